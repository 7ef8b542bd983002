"""The size of a tile: a budget in bytes becomes rows × classes.

A head's backward needs every probability of a row at once. Where the budget holds all classes of enough
rows, a chunk's probabilities stay in the workspace between forward and gradient (*resident*) and the
head costs three matrix products. Where it does not, the logits are computed twice (four products), with
classes outermost, so that a slice of the classifier and of its gradient is visited once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MIB = 1 << 20
DEFAULT_BUDGET = 64 * MIB
CLASS_TILE = 4096  # a tile's columns: long enough for the product, short enough to stay near the cache
TILE_ELEMENTS = 1 << 22  # a tile's elements: beyond this, more rows make the product no faster
FEWEST_ROWS = 64  # below this a product is bound by memory: narrow the tile first


@dataclass(frozen=True)
class Footprint:
    """The memory of one sweep beside its inputs and outputs, in bytes."""

    kept: int  # per element of a tile, from forward to gradient: probabilities (and slopes)
    scratch: int  # per element of a tile while it is worked on
    per_row: (
        int  # per row of a chunk: converted or gathered features (statistics are O(N), outside the budget)
    )
    per_class: int  # per class of a tile: a converted slice of the classifier
    resident_rows: int  # fewest rows of a chunk for which residence pays
    fixed: int = 0  # whatever the tile


@dataclass(frozen=True)
class Plan:
    row_chunk: int
    class_tile: int
    resident: bool

    @staticmethod
    def within(budget: int, rows: int, classes: int, footprint: Footprint, *, resident: bool) -> Plan:
        """Return the largest useful tile of `rows` × `classes` whose footprint is at most `budget` bytes."""
        f = footprint
        buffers = budget - f.fixed
        rows = max(rows, 1)
        tile = min(max(classes, 1), CLASS_TILE)
        if resident:
            held = (buffers - tile * f.per_class) // (classes * f.kept + tile * f.scratch + f.per_row)
            if held >= min(rows, f.resident_rows):
                return Plan(
                    _even(rows, min(held, TILE_ELEMENTS // tile)), _even(classes, tile), resident=True
                )
        while True:
            fits = (buffers - tile * f.per_class) // (tile * (f.kept + f.scratch) + f.per_row)
            if fits >= min(rows, FEWEST_ROWS) or tile == 1:
                break
            tile = (tile + 1) // 2
        if fits < 1:
            raise ValueError(
                f"a memory budget of {budget} bytes holds not even one row × one class here; "
                f"at least {f.kept + f.scratch + f.per_row + f.per_class + f.fixed} bytes are needed"
            )
        return Plan(_even(rows, min(fits, TILE_ELEMENTS // tile)), _even(classes, tile), resident=False)

    @staticmethod
    def of_all_rows(budget: int, rows: int, classes: int, footprint: Footprint) -> Plan:
        """Return one chunk of all rows, for sweeps that cannot accumulate, of as many classes as fit."""
        fits = budget // max(1, rows * (footprint.kept + footprint.scratch) + footprint.per_class)
        return Plan(max(rows, 1), _even(classes, max(1, min(fits, CLASS_TILE))), resident=False)

    def row_chunks(self, stop: int, start: int = 0) -> Iterator[slice]:
        return _slices(start, stop, self.row_chunk)

    def class_tiles(self, classes: int) -> Iterator[slice]:
        return _slices(0, classes, self.class_tile)


def _even(total: int, largest: int) -> int:
    """Return the size that splits `total` into the fewest parts of at most `largest`, nearly equal."""
    total = max(1, total)
    largest = max(1, min(largest, total))
    parts = -(-total // largest)
    return -(-total // parts)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for at in range(start, stop, size):
        yield slice(at, min(at + size, stop))
