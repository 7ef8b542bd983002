"""Features from the columns of a table: numbers with their gaps filled, and an indicator for each category.

    x = ( numbers, gaps filled by the training rows' medians |
          1 where a number or a category was missing |
          1 where the category is this one )

A category that the encoding has not seen is zero in all its indicators, and is counted.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xent._processes.group import ALONE, Ranks
from xent._util.text import quoted
from xent.data.batches import Batch, DenseBatch, slices
from xent.data.rows import BATCH, RowSource, blocks, shifted
from xent.data.table import Table
from xent.errors import BadInput

KEPT = 384 << 20
"""Bytes of features up to which they are formed once, and kept."""

MEDIANS = 1 << 25
"""Numbers of which medians are formed at a time."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """The way from a table's columns to features, as the training rows fix it.

    Args:
        numbers: the columns of numbers, D₀ of them.
        categories: the columns of categories, with their values.
        fill: medians of the numbers, (D₀,); None where a gap is an error.
        gaps: the columns, of numbers or of categories, that have an indicator of what is missing.
    """

    numbers: tuple[str, ...]
    categories: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    fill: np.ndarray | None = None
    gaps: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the features, D of them."""
        indicators = [f"{name}={value}" for name, values in self.categories.items() for value in values]
        return (*self.numbers, *(f"{name} is missing" for name in self.gaps), *indicators)

    @property
    def plain(self) -> bool:
        """True where the features are the numbers as they are."""
        return not self.categories and self.fill is None

    def about(self) -> dict[str, Any]:
        """Return it as plain JSON values; ``of`` reads them."""
        return {
            "numbers": list(self.numbers),
            "categories": {name: list(values) for name, values in self.categories.items()},
            "fill": None if self.fill is None else [float(value) for value in self.fill],
            "gaps": list(self.gaps),
        }

    @classmethod
    def of(cls, about: dict[str, Any]) -> Encoding:
        """Return the encoding of plain JSON values; raise ``TypeError`` or ``ValueError`` for others."""
        numbers, gaps = (tuple(_texts(about[name])) for name in ("numbers", "gaps"))
        categories = {name: tuple(_texts(values)) for name, values in about["categories"].items()}
        fill = None if about["fill"] is None else np.array(about["fill"], dtype=np.float64)
        if fill is not None and (fill.shape != (len(numbers),) or not np.isfinite(fill).all()):
            raise ValueError("the medians are not one for each number")
        if not set(gaps) <= {*numbers, *categories}:
            raise ValueError("an indicator is of no column")
        return cls(numbers, categories, fill, gaps)

    @classmethod
    def learnt(cls, table: Table, rows: np.ndarray, impute: bool, ranks: Ranks = ALONE) -> Encoding:
        """Return the encoding that some rows of a table fix, those of all ranks."""
        numbers = table.feature_names
        categories = {column.name: column.values for column in table.categories}
        if not impute:
            return cls(numbers, categories)
        medians, gaps = _medians(table, rows, ranks)
        missing = [bool(ranks.sum(float((c.codes[rows] == -1).sum()))) for c in table.categories]
        named = [name for name, gap in zip(numbers, gaps, strict=True) if gap]
        named += [name for name, gap in zip(categories, missing, strict=True) if gap]
        return cls(numbers, categories, medians, tuple(named))

    @property
    def adds(self) -> bool:
        """True where there are features beside the numbers."""
        return self.names != self.numbers

    def encoded(self, table: Table, strict: bool = True) -> Table:
        """Return a table, with this encoding's columns, of the features; one that has them is itself.

        Raises ``BadInput`` for a category that is missing where that is an error, unless not ``strict``.
        """
        if self.plain or (self.adds and table.feature_names == self.names and not table.categories):
            return table
        by_name = {column.name: column for column in table.categories}
        codes = [by_name[name].recoded(values) for name, values in self.categories.items()]
        if self.fill is None and strict:
            for name, own in zip(self.categories, codes, strict=True):
                if (own == -1).any():
                    row = table.start + int(np.flatnonzero(own == -1)[0])
                    raise BadInput(
                        f"{table.source}: row {row + 1}, column {quoted(name)} is missing; correct or drop "
                        "the row, or fit with --missing drop or impute"
                    )
        unknown = {name: int((own == -2).sum()) for name, own in zip(self.categories, codes, strict=True)}
        rows = EncodedRows(table.rows, np.stack(codes, 1) if codes else np.empty((len(table), 0)), self)
        features: np.ndarray | RowSource = rows
        if rows.shape[0] * rows.shape[1] * rows.dtype.itemsize <= KEPT:
            features = np.empty(rows.shape, rows.dtype)
            for here, x in blocks(rows):
                features[here] = x.numpy()
        return dataclasses.replace(
            table,
            features=features,
            feature_names=self.names,
            categories=(),
            unknown={name: count for name, count in unknown.items() if count},
        )


def check_apart(source: str, names: Sequence[str]) -> None:
    """Raise ``BadInput`` for two features of one name: an entry of lists or a category, and a column."""
    if len({*names}) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise BadInput(
            f"{source}: two features would be called {quoted(twice)}; rename a column, or leave one out with "
            "--exclude"
        )


class EncodedRows:
    """The features of an encoding, formed anew for each batch.

    Args:
        numbers: (N, D₀), nan where one is missing.
        codes: (N, k), positions among the values of each category, negative for none of them.
    """

    in_memory = False

    def __init__(self, numbers: RowSource, codes: np.ndarray, encoding: Encoding) -> None:
        self._numbers, self._encoding, self.dtype = numbers, encoding, numbers.dtype
        self._codes = torch.from_numpy(codes.astype(np.int64))
        self.width = len(encoding.names)
        self.shape = (numbers.shape[0], self.width)
        place = {name: j for j, name in enumerate((*encoding.numbers, *encoding.categories))}
        self._gaps = torch.tensor([place[name] for name in encoding.gaps], dtype=torch.int64)
        widths = [len(values) for values in encoding.categories.values()]
        before = len(encoding.numbers) + len(encoding.gaps)
        self._first = before + torch.tensor([0, *np.cumsum(widths)[:-1]][: len(widths)], dtype=torch.int64)

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield the features of some rows at a time."""
        for here, batch in self._numbers.batches():
            for part in slices((len(batch), self.shape[1]), BATCH):
                rows = shifted(part, here.start)
                yield rows, DenseBatch(self._formed(batch[part], self._codes[rows]))

    def _formed(self, x: Tensor, codes: Tensor) -> Tensor:
        made = x.new_zeros((len(x), self.shape[1]), dtype=getattr(torch, self.dtype.name))
        count = x.shape[1]
        made[:, :count] = x
        missing = torch.cat([x.isnan(), codes == -1], 1)
        if self._encoding.fill is not None:
            fill = torch.from_numpy(self._encoding.fill).to(made)
            made[:, :count] = torch.where(missing[:, :count], fill, made[:, :count])
        made[:, count : count + len(self._gaps)] = missing[:, self._gaps].to(made.dtype)
        known = codes >= 0
        row, column = known.nonzero(as_tuple=True)
        made[row, self._first[column] + codes[known]] = 1
        return made


def _medians(table: Table, rows: np.ndarray, ranks: Ranks) -> tuple[np.ndarray, np.ndarray]:
    """Return the medians of all ranks' numbers, (D₀,), 0 of a column without any, and which have gaps."""
    count = len(table.feature_names)
    medians, gaps = np.zeros(count), np.zeros(count, dtype=bool)
    total = int(ranks.sum(float(len(rows))))
    chosen = np.zeros(len(table), dtype=bool)
    chosen[rows] = True
    width = max(1, MEDIANS // max(1, total))
    for start in range(0, count, width):
        columns = slice(start, min(start + width, count))
        parts = [np.empty((0, columns.stop - start))]
        for here, x in blocks(table.rows):
            parts.append(x[:, columns].double().numpy()[chosen[here]])
        values = ranks.concatenate(np.concatenate(parts))
        missing = np.isnan(values)
        gaps[columns] = missing.any(axis=0)
        there = ~missing.all(axis=0)
        medians[start:][: values.shape[1]][there] = np.nanmedian(values[:, there], axis=0)
    return medians, gaps


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("names are a list of texts")
    return values
