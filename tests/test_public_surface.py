"""The public names and their signatures are a contract: additions are recorded here, nothing goes."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch

import xent
from xent import curvature, metrics, nn, sinkhorn, triplets

MODULES = (xent, nn, metrics, triplets, sinkhorn, curvature)
RECORDED = Path(__file__).with_name("public_surface.txt")


def names_of(module) -> list[str]:
    """The names of a module's `__all__`; of `xent.nn`, which has none, its modules."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, thing in vars(module).items()
        if inspect.isclass(thing) and issubclass(thing, torch.nn.Module)
    )


def surface() -> list[str]:
    lines = []
    for module in MODULES:
        for name in names_of(module):
            thing = getattr(module, name)
            said = f"{module.__name__}.{name}"
            if callable(thing):
                said += str(inspect.signature(thing))
            lines.append(said)
            if inspect.isclass(thing):
                for method, function in sorted(inspect.getmembers(thing, inspect.isfunction)):
                    if method[0] != "_" and function.__module__.startswith("xent"):
                        lines.append(f"{said.partition('(')[0]}.{method}{inspect.signature(function)}")
    return lines


def test_the_public_surface_is_what_is_recorded():
    """After a deliberate addition: python tests/test_public_surface.py."""
    assert surface() == RECORDED.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    RECORDED.write_text("\n".join(surface()) + "\n", encoding="utf-8")
