"""The measures of rows as an Arrow table, a row for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from xent.auditing.rows import MeasuredRows

if TYPE_CHECKING:
    import pyarrow as pa

NUMBERS = (
    "loss",
    "confidence",
    "entropy",
    "margin",
    "gradient_norm",
    "curvature_trace",
)
"""Columns that are one float64 each."""


def row_table(
    rows: MeasuredRows, names: Sequence[str], ids: Any = None, feature_norm: Tensor | None = None
) -> pa.Table:
    """Return the measures of rows; ``ids`` (n,) name them, else ``row`` counts from 1.

    ``feature_norm`` (n,) is ‖x‖: the gradient in the head's weight has the length ‖p − t‖·‖x‖.
    """
    import pyarrow as pa

    dictionary = pa.array(list(names), pa.string())

    def named(codes: Tensor) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(codes.numpy().astype(np.int32)), dictionary)

    columns: dict[str, Any] = {"row": pa.array(np.arange(rows.start + 1, rows.start + len(rows) + 1))}
    if ids is not None:
        columns["id"] = pa.array(ids)
    columns["label"], columns["prediction"], columns["runner_up"] = (
        named(x) for x in (rows.label, rows.prediction, rows.runner_up)
    )
    columns |= {name: pa.array(getattr(rows, name).numpy()) for name in NUMBERS}
    if feature_norm is not None:
        columns["head_gradient_norm"] = pa.array((rows.gradient_norm * feature_norm).numpy())
    columns["weight"] = pa.array(rows.weight.numpy())
    return pa.table(columns)
