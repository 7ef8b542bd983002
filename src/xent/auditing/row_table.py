"""The measures of rows as an Arrow table, a row for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from xent.auditing.rows import Batch

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
    batch: Batch, names: Sequence[str], ids: Any = None, feature_norm: Tensor | None = None
) -> pa.Table:
    """Return the measures of rows; ``ids`` (n,) name them, else ``row`` counts from 1.

    ``feature_norm`` (n,) is ‖x‖: the gradient in the head's weight has the length ‖p − t‖·‖x‖.
    """
    import pyarrow as pa

    dictionary = pa.array(list(names), pa.string())

    def named(codes: Tensor) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(codes.numpy().astype(np.int32)), dictionary)

    columns: dict[str, Any] = {"row": pa.array(np.arange(batch.start + 1, batch.start + len(batch) + 1))}
    if ids is not None:
        columns["id"] = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids)
    columns["label"], columns["prediction"], columns["runner_up"] = (
        named(x) for x in (batch.label, batch.prediction, batch.runner_up)
    )
    columns |= {name: pa.array(getattr(batch, name).numpy()) for name in NUMBERS}
    if feature_norm is not None:
        columns["head_gradient_norm"] = pa.array((batch.gradient_norm * feature_norm).numpy())
    columns["weight"] = pa.array(batch.weight.numpy())
    return pa.table(columns)
