"""Held-out logits and labels of any library, as the tensors that a temperature is fitted on.

    arrays, lists, tensors → logits (N, C) or (N, C, d1, ...), class indices or probabilities
    s (N,) with N labels → logits (0, s)            y with classes → the c with classes_c = y

Logits (C,) with one label, or with probabilities (C,), are one row, as in the losses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xent._arguments.validation import check_floating, check_tensors
from xent._core.target import Target, TopKTarget
from xent._core.validators import valid
from xent.metrics._arrays import as_array, as_tensor, read_numbers
from xent.metrics._labels import format_labels, read_labels

IGNORED = -100


class HeldOut(NamedTuple):
    """The rows that a temperature is fitted on."""

    logits: Tensor  # (C,), (N, C) or (N, C, d1, ...)
    target: Target  # class indices, probabilities or a TopKTarget
    ignore_index: int | None  # what it is among class indices
    sample_weight: Tensor | None


def read_held_out(
    logits: Any, target: Any, classes: Any, ignore_index: int | None, sample_weight: Any
) -> HeldOut:
    """Read logits, target and weights; raise a one-line error that names what does not fit.

    ``classes`` (C,) names the columns, and the target holds such names; None: it holds their positions.
    """
    z = _numbers(logits, "logits")
    check_floating(logits=z)
    if z.ndim == 0:
        raise ValueError("logits need a class dimension: (C,), (N, C) or (N, C, d1, ...); got a scalar")
    weight = None if sample_weight is None else _numbers(sample_weight, "sample_weight", like=z)
    if isinstance(target, TopKTarget) or target is None:
        if classes is not None:
            raise ValueError("classes are for labels, and target is none: leave classes out")
        return HeldOut(z, target, ignore_index, weight)
    y = target if isinstance(target, Tensor) else _array(target, "target")
    soft = (y.is_floating_point() if isinstance(y, Tensor) else y.dtype.kind == "f") and classes is None
    if z.ndim == 1 and y.ndim == 1 and not soft:
        if len(y) != len(z):
            raise ValueError(
                f"logits of shape ({len(z)},) are one a row, of two classes, and target has {len(y)} labels; "
                f"give a label for each, or logits (N, C)"
            )
        z = torch.stack([torch.zeros_like(z), z], dim=1)
        if isinstance(y, Tensor) and y.dtype is torch.bool:
            y = y.long()
        elif not isinstance(y, Tensor) and y.dtype.kind == "b":
            y = y.astype(np.int64)
    if classes is not None:
        codes, ignore_index = _positions(y, classes, ignore_index, z), IGNORED
        return HeldOut(z, codes, ignore_index, weight)
    return HeldOut(z, y if isinstance(y, Tensor) else _targets(y).to(z.device), ignore_index, weight)


def _numbers(given: Any, name: str, like: Tensor | None = None) -> Tensor:
    """Return a tensor as it is, anything else as a floating tensor on the CPU or the device of `like`."""
    if isinstance(given, Tensor):
        check_tensors(spread=False, **{name: given})
        return given
    read = read_numbers(_array(given, name), name).source
    assert isinstance(read, np.ndarray)
    floating = read if read.dtype.kind == "f" else read.astype(np.float64)
    return _native(floating).to("cpu" if like is None else like.device)


def _array(given: Any, name: str) -> np.ndarray:
    """Return anything but a tensor as an array; raise a TypeError for what holds no values."""
    if (
        given is None
        or isinstance(given, dict | set)
        or (isinstance(given, str | bytes) and name != "target")
    ):
        raise TypeError(f"{name} must be a tensor, an array or a list, got {type(given).__name__}")
    if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given):
        raise TypeError(f"{name} is an array with masked entries, which have no value: leave those rows out")
    array = as_array(given, name)
    # of JAX and ml_dtypes, whose kind is none of NumPy's
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _native(array: np.ndarray) -> Tensor:
    """Return numbers as a tensor; of types and strides that torch lacks, a copy."""
    dtype = array.dtype.newbyteorder("=")
    if dtype.kind == "f" and dtype.itemsize not in (2, 4, 8):
        dtype = np.dtype(np.float64)
    return as_tensor(np.asarray(array, dtype=dtype))


def _targets(y: np.ndarray) -> Tensor:
    """Return class indices or probabilities; raise a TypeError for labels that need ``classes``."""
    if y.dtype == object:  # a column of a data frame, perhaps of whole numbers
        listed = y.ravel().tolist()
        if all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in listed):
            y = np.array(listed, dtype=np.int64).reshape(y.shape)
    if y.dtype.kind not in "biuf":
        kind = "text" if y.dtype.kind in "US" else f"values of {y.dtype}"
        raise TypeError(f"target holds {kind}, not class indices: pass classes=, the labels of the columns")
    return _native(y)


def _positions(target: Any, classes: Any, ignore_index: int | None, z: Tensor) -> Tensor:
    """Return the column of each label, int64 of the target's shape, −100 for an ignored one."""
    axis = 0 if z.ndim == 1 else 1
    shape = tuple(z.shape)
    rows_shape = shape[:axis] + shape[axis + 1 :]
    names = _class_names(classes, shape[axis] if shape else 0)
    y = as_array(target, "target")
    if y.shape != rows_shape:
        if y.shape == shape:
            raise ValueError(f"a target of shape {shape} has a column for each class: leave classes out")
        raise ValueError(
            f"target must have shape {rows_shape}, a label for each row of the logits; got {y.shape}"
        )
    flat = y.reshape(-1)
    ignore_index = valid("ignore_index", ignore_index)
    ignored = IGNORED if ignore_index is None else ignore_index
    if not len(flat):
        return torch.zeros(y.shape, dtype=torch.int64, device=z.device)
    left_out = _equal(flat, ignored)
    if ignored == IGNORED and _equal(names, IGNORED).any():
        raise ValueError(
            f"classes names {IGNORED}, which is ignore_index: rows of that class would be left out; pass "
            f"another ignore_index, a number that is no label"
        )
    # a copy: of labels that are positions it may be the caller's array
    codes = read_labels(flat, names, name="target").encoder(slice(0, len(flat))).copy()
    codes[left_out] = IGNORED
    unknown = np.flatnonzero((codes < 0) & ~left_out)
    if len(unknown):
        row = int(unknown[0])
        value = flat[row : row + 1].tolist()[0]
        raise ValueError(
            f"target is {value!r} at row {row}, which is not among classes {format_labels(names)}; leave the "
            f"row out, or write classes as the labels are written"
        )
    return torch.from_numpy(codes.reshape(y.shape)).to(z.device)


def _class_names(classes: Any, columns: int) -> np.ndarray:  # (C,)
    """Return the labels of the columns, distinct ones and as many."""
    names = as_array(classes, "classes") if isinstance(classes, Tensor) else _array(classes, "classes")
    if names.ndim != 1 or len(names) != columns:
        got = f"{len(names)} labels" if names.ndim == 1 else f"shape {names.shape}"
        raise ValueError(f"classes must name the {columns} columns of the logits, in their order; got {got}")
    listed = read_labels(names, name="classes") if columns else None
    if listed is not None and len(listed.values) < columns:
        seen = names.tolist()
        twice = next(value for at, value in enumerate(seen) if value in seen[:at])
        raise ValueError(f"classes names {twice!r} twice; give each column a label of its own")
    return names


def _equal(labels: np.ndarray, number: int) -> np.ndarray:
    """Return a mask of the labels that are the number."""
    if labels.dtype.kind in "iuf":
        return labels == number
    if labels.dtype != object:
        return np.zeros(len(labels), dtype=bool)
    return np.array([isinstance(v, int | float | np.number) and v == number for v in labels.tolist()])
