"""The inputs of an estimator: features, labels and weights of any library, as checked NumPy arrays.

Tensors are detached and brought to the CPU; half types become float32. Every fault is an error that names the
argument, the row and the value.
"""

from __future__ import annotations

from numbers import Number, Real
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d
from torch import Tensor

from xent.metrics._arrays import as_array
from xent.metrics._comparison import read_weight
from xent.metrics._labels import missing

BLOCK = 1 << 16
"""Rows that are checked at a time."""


def read_features(X: Any) -> Any:
    """Return features as what scikit-learn validates: tensors as arrays, the rest as it is."""
    if isinstance(X, Tensor) and X.layout == torch.strided and X.dtype == torch.float16:
        return X.numpy(force=True)
    if isinstance(X, Tensor) or (isinstance(X, list | tuple) and any(isinstance(x, Tensor) for x in X)):
        return as_array(X, "X")
    return X


def stays_tensor(X: Any) -> bool:
    """Return whether NumPy cannot read it in place: a floating tensor (N, D) on a device, or of bfloat16."""
    if not isinstance(X, Tensor) or X.layout != torch.strided or X.ndim != 2 or 0 in X.shape:
        return False
    return X.is_floating_point() and (X.device.type != "cpu" or X.dtype == torch.bfloat16)


def check_finite(X: Tensor) -> None:  # (N, D)
    """Raise ``ValueError`` for the first entry that is nan or infinite."""
    for start in range(0, len(X), BLOCK):
        bad = ~X[start : start + BLOCK].isfinite()
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            value = X[start + row, column].item()
            raise ValueError(f"X is {value} at row {start + row}, column {column}; features are finite")


def check_finite_sparse(X: Any) -> None:  # (N, D) in CSR
    """Raise ``ValueError`` for the first stored entry that is nan or infinite."""
    if bool(np.isfinite(X.data).all()):
        return
    at = int(np.flatnonzero(~np.isfinite(X.data))[0])
    row = int(np.searchsorted(X.indptr, at, side="right")) - 1
    raise ValueError(f"X is {X.data[at]} at row {row}, column {X.indices[at]}; features are finite")


def read_labels(y: Any, rows: int) -> np.ndarray:
    """Return labels (N,), or soft labels (N, C ≥ 2) as masses that are finite and not negative."""
    if issparse(y):
        raise TypeError("sparse labels are not supported; pass y.toarray()")
    y = as_array(y, "y")
    if y.ndim not in (1, 2):
        raise ValueError(f"y must be labels (N,) or soft labels (N, C), got shape {y.shape}")
    if len(y) != rows:
        raise ValueError(f"y has {len(y)} rows and X has {rows}; they must agree")
    soft = y.ndim == 2 and y.shape[1] > 1
    absent = np.argwhere(_absent(y))
    if len(absent):
        row = int(absent[0, 0])
        where = f"row {row}, class {absent[0, 1]}" if soft else f"row {row}"
        value = y[tuple(absent[0])]
        raise ValueError(
            f"y is {value} at {where}, which is no {'mass' if soft else 'label'}; drop the row or give it one"
        )
    if y.dtype == object:
        y = _unboxed(y)
    if soft:
        return _masses(y)
    y = column_or_1d(y, warn=True)
    if y.dtype == object:
        _check_one_type(y)
    try:
        check_classification_targets(y)
    except ValueError as error:
        raise ValueError(f"y holds no labels: {error}") from None
    return y


def read_sample_weight(given: Any, rows: int, dtype: np.dtype) -> np.ndarray | None:
    """Return a weight for each row (N,), finite, not negative and not all 0; None means 1."""
    if given is None:
        return None
    if isinstance(given, Number):  # as scikit-learn has it
        given = np.full(rows, given)
    read = read_weight(given, rows)
    assert read is not None
    return cast_to(as_array(read.source, "sample_weight"), dtype, "sample_weight")


def cast_to(array: np.ndarray, dtype: np.dtype, name: str, axis: str = "row") -> np.ndarray:
    """Return finite numbers in another type; ValueError where one leaves its range."""
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, dtype=dtype)
    finite = np.isfinite(cast)
    if not finite.all():
        at = tuple(np.argwhere(~finite)[0])
        raise ValueError(
            f"{name} is {array[at]:.6g} at {axis} {at[0]}, beyond {dtype}; make the numbers smaller or pass "
            f"float64 features"
        )
    return cast


def _absent(y: np.ndarray) -> np.ndarray:
    """Return a mask of the entries that are missing or not finite."""
    if y.dtype.kind in "fc":
        return ~np.isfinite(y)
    if y.dtype.kind in "mM":
        return np.isnat(y)
    if y.dtype != object:
        return np.zeros(y.shape, dtype=bool)
    each = [missing(v) or (isinstance(v, float) and not np.isfinite(v)) for v in y.ravel()]
    return np.array(each, dtype=bool).reshape(y.shape)


def _unboxed(y: np.ndarray) -> np.ndarray:
    """Return objects as the numbers that they are, if they are."""
    values = y.ravel().tolist()
    numbers = all(isinstance(value, Real | np.bool_) for value in values)
    return np.array(values).reshape(y.shape) if numbers else y


def _check_one_type(y: np.ndarray) -> None:  # (N,)
    text = [isinstance(value, str) for value in y]
    if any(text) and not all(text):
        odd = text.index(not text[0])
        raise ValueError(
            f"y is {y[0]!r} at row 0 and {y[odd]!r} at row {odd}, labels of two types; make all of them text"
        )


def _masses(y: np.ndarray) -> np.ndarray:  # (N, C) -> (N, C)
    """Return soft labels; ValueError for what is more likely labels beside something else."""
    columns = y.shape[1]
    if y.dtype.kind not in "fiub":
        raise ValueError(
            f"soft labels (N, C) must be numbers; these are {y.dtype}, in {columns} columns; pass one column "
            f"of labels"
        )
    if y.dtype.kind != "f":
        sums = y.sum(axis=1, dtype=np.float64)
        off = np.flatnonzero(sums != 1)
        if len(off):
            raise ValueError(
                f"y has {columns} columns of whole numbers and row {off[0]} sums to {sums[off[0]]:g}, not 1: "
                f"pass one column of labels, or y.astype(float) if these are masses"
            )
    if (y < 0).any():
        row, column = np.argwhere(y < 0)[0]
        raise ValueError(
            f"soft label {y[row, column]} at row {row}, class {column} is negative; a mass is not"
        )
    return y
