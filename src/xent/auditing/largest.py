"""The rows with the largest values of some key, however the rows come.

The K largest of two sets of rows are the K largest of those of each. Equal keys go by the row's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xent.auditing.rows import Rows

COLUMNS = ("row", "label", "prediction", "loss", "own", "confidence", "saving", "key")


class Largest:
    """The rows of the largest keys, and what is known of each."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.values = np.empty((len(COLUMNS), 0))  # a row number up to 2**53 is exact
        self.ids: np.ndarray | None = None  # (k,) object

    def update(self, rows: Rows, key: np.ndarray, ids: Sequence[Any] | None = None) -> None:
        """Add the rows that count and whose key (n,) is above 0; ``ids`` (n,) are their names."""
        wanted = (key > 0) & (rows.weight.numpy() > 0)
        if self.most == 0 or not wanted.any():
            return
        if self.values.shape[1] == self.most:
            wanted &= key > self.values[-1, -1]
        chosen = np.flatnonzero(wanted)
        chosen = chosen[np.argsort(-key[chosen], kind="stable")[: self.most]]
        columns = [rows.start + chosen]
        columns += [getattr(rows, name).numpy()[chosen] for name in COLUMNS[1:-1]]
        names = None if ids is None else np.array([ids[row] for row in chosen.tolist()], dtype=object)
        self._join(np.stack([*columns, key[chosen]]).astype(np.float64), names)

    def merge(self, other: Largest) -> None:
        """Add the rows of another."""
        self._join(other.values, other.ids)

    def _join(self, values: np.ndarray, ids: np.ndarray | None) -> None:
        names = [
            np.full(of.shape[1], None, dtype=object) if each is None else each
            for each, of in ((self.ids, self.values), (ids, values))
        ]
        values = np.concatenate([self.values, values], axis=1)
        order = np.lexsort((values[0], -values[-1]))[: self.most]
        if self.ids is not None or ids is not None:
            self.ids = np.concatenate(names)[order]
        self.values = values[:, order]

    def column(self, name: str) -> np.ndarray:
        """Return a column (k,) by its name in ``COLUMNS``, the largest keys first."""
        found = self.values[COLUMNS.index(name)]
        return found.astype(np.int64) if name in ("row", "label", "prediction") else found

    def first(self, count: int) -> Largest:
        """Return the first of the rows."""
        part = Largest(count)
        part.values = self.values[:, :count]
        part.ids = None if self.ids is None else self.ids[:count]
        return part
