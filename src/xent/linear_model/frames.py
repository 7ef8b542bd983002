"""The columns of a frame as the features of a model file: categories encoded, gaps filled as in its fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_array

from xent._processes.group import Share
from xent.data.model_file import Model
from xent.data.parquet import table_from_arrow
from xent.data.rows import blocks
from xent.data.table import Table, Wanted


def is_frame(X: Any) -> bool:
    """Return whether an argument is a frame of named columns: of pandas, polars or Arrow."""
    return hasattr(X, "__arrow_c_stream__") and not issparse(X)


def features_of(frame: Any, model: Model, path: Path) -> Table:
    """Return a model's features (N, D) for a frame with the columns it was fitted on, or the features.

    Warns of categories that the model does not know, whose indicators are all 0.
    """
    encoding, names = model.encoding, model.feature_names
    columns = [*names, *(() if encoding is None else (*encoding.numbers, *encoding.categories))]
    arrow = _as_arrow(frame, {*columns, *(name.rpartition("[")[0] for name in columns)})
    if encoding is not None and encoding.adds and {*names} <= {*arrow.column_names}:
        encoding = None  # its columns are the features already
    wanted = Wanted(
        features=names if encoding is None else encoding.numbers,
        model=path,
        lists=model.lists,
        categorical=[] if encoding is None else list(encoding.categories),
        known={} if encoding is None else encoding.categories,
        missing="error" if encoding is None or encoding.fill is None else "impute",
    )
    table = table_from_arrow(Path("X"), wanted, arrow, Share())
    table = table if encoding is None else encoding.encoded(table)
    if table.unknown:
        counts = ", ".join(f"{name!r} in {count:,} rows" for name, count in table.unknown.items())
        warnings.warn(f"X holds categories that {path} does not know: {counts}", stacklevel=3)
    return table


def _as_arrow(frame: Any, columns: set[str]) -> Any:
    """Return those columns of a frame as an Arrow table; what else there is may be of any kind."""
    import pyarrow as pa

    if isinstance(frame, pa.Table):
        return frame
    named = getattr(frame, "columns", ())  # of a record batch they are arrays, and a stream has none
    there = [name for name in named if isinstance(name, str) and name in columns]
    # Arrow names the columns that are there where one is missing, and finds one that is there twice
    return pa.table(frame[there] if there and len(there) == len({*there}) else frame)


class FrameEncoder(TransformerMixin, BaseEstimator):
    """A step of a pipeline from the columns of a frame to a model's features; an array is features already.

    Its categories and medians are those of the model, also after ``fit``.

    Parameters
    ----------
    model : what was read from a file.
    path : the file, for messages.
    """

    def __init__(self, model: Model, path: Path) -> None:
        self.model = model
        self.path = path

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, X: Any, y: Any = None) -> FrameEncoder:
        """Return the encoder as it is."""
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Return features (N, D), float64."""
        if not is_frame(X):
            return np.asarray(check_array(X, dtype=np.float64, input_name="X"))
        table = features_of(X, self.model, self.path)
        made = np.empty((len(table), len(self.model.feature_names)))
        for here, x in blocks(table.rows):
            made[here] = x.numpy()
        return made

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names of the features, (D,)."""
        return np.array(self.model.feature_names, dtype=object)
