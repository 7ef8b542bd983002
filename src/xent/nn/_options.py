"""Options as attributes of a module: validated when it is made, shown where they differ from defaults."""

from __future__ import annotations

from typing import Any

from torch import nn

from xent._core.validators import valid


def keep(module: nn.Module, **options: Any) -> None:
    """Make the options attributes of the module, each seen to be of its kind."""
    for name, value in options.items():
        setattr(module, name, valid(name, value))


def changed(module: nn.Module, **defaults: object) -> str:
    """Return the options that differ from their defaults, for `repr`."""
    return ", ".join(f"{n}={getattr(module, n)!r}" for n, v in defaults.items() if getattr(module, n) != v)
