"""Columns that look like an identifier of the row and not like a feature.

a different whole number in every row, or numbers that rise or fall from each row to the next
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from xent._processes.group import ALONE, Ranks
from xent.data.rows import blocks
from xent.data.table import Table

FEWEST = 20
"""Rows from which on a coincidence is unlikely."""

MOST_COLUMNS = 1000
"""Columns up to which they are looked at: wide tables are embeddings, whose columns are none."""


LARGEST = 2.0**53
"""The number beyond which every float64 is whole."""


def look_like_identifiers(table: Table, ranks: Ranks = ALONE) -> list[str]:
    """Return the named columns of numbers that look like identifiers, of the rows of all ranks."""
    names = table.feature_names
    if table.width is not None or not 0 < len(names) <= MOST_COLUMNS or ranks.sum(len(table)) < FEWEST:
        return []
    last = np.full((0, len(names)), np.nan)
    whole, up, down = (np.ones(len(names), dtype=bool) for _ in range(3))
    values: list[np.ndarray] = []
    for _, x in blocks(table.rows):
        part = x.double().numpy()
        whole &= ((np.floor(part) == part) & (np.abs(part) < LARGEST)).all(axis=0)
        change = np.diff(np.concatenate([last, part]), axis=0)
        up &= (change > 0).all(axis=0)
        down &= (change < 0).all(axis=0)
        last = part[-1:] if len(part) else last
    ends = np.concatenate([*_first(table), last]) if len(table) else np.empty((0, len(names)))
    whole, up, down = (_everywhere(each, ranks) for each in (whole, up, down))
    rows = [end for end in ranks.gather(ends) if len(end)]
    for before, after in itertools.pairwise(rows):
        up &= after[0] > before[-1]
        down &= after[0] < before[-1]
    candidates = np.flatnonzero(whole & ~(up | down))
    for j in candidates:
        values = [x[:, j].double().numpy() for _, x in blocks(table.rows)]
        column = np.concatenate([*ranks.gather(np.concatenate([*values, np.empty(0)]))])
        whole[j] = len(np.unique(column)) == len(column)
    return [name for name, found in zip(names, (up | down) | whole, strict=True) if found]


def _first(table: Table) -> Iterable[np.ndarray]:
    for _, x in blocks(table.rows):
        return [x[:1].double().numpy()]
    return []


def _everywhere(flags: np.ndarray, ranks: Ranks) -> np.ndarray:
    return ranks.maximum(~flags) == 0
