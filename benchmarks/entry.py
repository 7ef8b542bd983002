"""Count the Python calls that one plain `linear_cross_entropy` makes before autograd takes over.

    python benchmarks/entry.py [--list]

(2048, 64) × 5000, float32, gradients on, one process, second call. Functions of Python are counted, torch's
included, before the first `autograd.Function.apply`. The limit that the project sets itself is 60. Every step
from one module of xent back to another that had been left before is printed too; the packages `_arguments`
and `_autograd`, which many modules call, count neither as left nor as entered.
"""

from __future__ import annotations

import argparse
import sys
from types import FrameType

import torch

import xent

LIMIT = 60
SHARED = ("xent/_arguments/", "xent/_autograd/")


def calls_before_apply(rows: int = 2048, features: int = 64, classes: int = 5000) -> list[tuple[str, str]]:
    """Return the file and the name of each function called, in order."""
    x = torch.randn(rows, features, requires_grad=True)
    w = torch.randn(classes, features, requires_grad=True)
    y = torch.randint(classes, (rows,))
    xent.linear_cross_entropy(x, w, y).backward()
    calls: list[tuple[str, str]] = []
    reached = False

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal reached
        if reached or event != "call":
            return
        code = frame.f_code
        if code.co_name == "apply" and code.co_filename.endswith("torch/autograd/function.py"):
            reached = True
            return
        calls.append((code.co_filename, code.co_name))

    sys.setprofile(note)
    try:
        xent.linear_cross_entropy(x, w, y)
    finally:
        sys.setprofile(None)
    assert reached, "no autograd Function was applied"
    return calls


def short(file: str) -> str:
    """Return a file's path from its package on."""
    parts = file.replace("\\", "/").split("/")
    start = max((i for i, part in enumerate(parts) if part in ("xent", "torch")), default=len(parts) - 1)
    return "/".join(parts[start:])


def steps_back(calls: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Return (module left, module entered again, function) of each step to a module of xent left before."""
    found, entered, current = [], set(), ""
    for file, name in calls:
        module = short(file)
        if not module.startswith("xent/") or module.startswith(SHARED) or module == current:
            continue
        if module in entered:
            found.append((current, module, name))
        entered.add(module)
        current = module
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--list", action="store_true", help="each call with its file")
    arguments = parser.parse_args()
    calls = calls_before_apply()
    if arguments.list:
        for file, name in calls:
            print(f"{short(file):48} {name}")
    back = steps_back(calls)
    for left, module, name in back:
        print(f"back to {module:40} {name}, from {left}")
    print(f"{len(calls)} Python calls before the first Function.apply (limit {LIMIT})")
    print(f"{len(back)} steps back to a module that had been left")


if __name__ == "__main__":
    main()
