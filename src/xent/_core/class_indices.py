"""Class indices as they come from a caller: their types, and checks that each is a class.

0 ≤ y < C, or y = ignore_index        (a target outside the classes is never scored as another)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NO_CLASS = -(2**62)
"""An index, of several in a row, that is no class: its logit is −inf, and it is never ignored by a user."""


class Checked(NamedTuple):
    """The facts known of class indices."""

    classes: bool  # each is a class, or to be ignored
    none_ignored: bool


UNCHECKED = Checked(classes=False, none_ignored=False)


def holds_integers(tensor: Tensor) -> bool:
    """Return whether a tensor is of an integer type; booleans are none, and would be classes 0 and 1."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def widened(indices: Tensor) -> Tensor:
    """Return class indices as int64: a narrow type cannot hold what they are compared with.

    uint64 beyond int64 becomes the largest int64, which is no class and no ignore index.
    """
    wide = indices.to(torch.int64)
    if indices.dtype == torch.uint64:
        return wide.masked_fill(wide < 0, torch.iinfo(torch.int64).max)
    return wide


def check_top_k(
    indices: Tensor, classes: int, check: bool | None, name: str = "TopKTarget.indices"
) -> Checked:
    """Raise an error that names the first index (N, ..., k) that is no class, or twice in a row.

    `NO_CLASS` may be there any number of times.

    As `check_index` does, on a CPU or with ``check=True``; elsewhere an asynchronous assertion fails.
    """
    if check is False or indices.numel() == 0:
        return UNCHECKED
    good = ((indices >= 0) & (indices < classes)) | (indices == NO_CLASS)
    ordered = indices.sort(-1).values
    different = (ordered[..., 1:] != ordered[..., :-1]) | (ordered[..., 1:] == NO_CLASS)
    if check is None and indices.device.type != "cpu":
        torch._assert_async(
            good.all() & different.all(),
            f"{name} must be different classes of 0..{classes - 1}; check_targets=True names one",
        )
        return UNCHECKED
    if not good.all():
        at = tuple(good.logical_not().nonzero()[0].tolist())
        raise IndexError(f"{name}{list(at)} is {int(indices[at])}, outside 0..{classes - 1}")
    if not different.all():
        *row, column = different.logical_not().nonzero()[0].tolist()
        raise ValueError(
            f"{name}{row} names class {int(ordered[(*row, column)])} twice; "
            "add the probabilities of a class up first"
        )
    return Checked(classes=bool((indices >= 0).all()), none_ignored=True)


def check_index(
    target: Tensor, classes: int, ignore_index: int, check: bool | None, name: str = "target"
) -> Checked:
    """Raise an error unless each target, int64, is a class or the ignore index.

    A target outside the classes is never scored as something else.

    On a CPU, and with ``check=True``, IndexError names the first one; elsewhere an asynchronous assertion
    fails; with ``check=False`` it is not looked for, and costs nan.
    """
    if check is False:
        return UNCHECKED
    if target.device.type == "cpu" and target.numel():
        least, most = target.aminmax()
        low, high = least.item(), most.item()
        if low >= 0 and high < classes and not low <= ignore_index <= high:
            return Checked(classes=True, none_ignored=True)
    good = (target == ignore_index) | ((target >= 0) & (target < classes))
    if check is None and target.device.type != "cpu":
        torch._assert_async(good.all(), f"{name}: outside 0..{classes - 1}; check_targets=True says where")
        return UNCHECKED
    if not good.all():
        at = tuple(good.logical_not().nonzero()[0].tolist())
        where = "" if not at else f" at row {at[0]}" if len(at) == 1 else f" at position {at}"
        raise IndexError(
            f"{name} {int(target[at])}{where} is outside 0..{classes - 1}; "
            f"mark {'rows' if name == 'target' else 'what is'} to skip with ignore_index (now {ignore_index})"
        )
    return Checked(classes=True, none_ignored=False)
