"""The size of a tile: a budget in bytes becomes rows × classes.

A head's backward needs every probability of a row at once. Where the budget holds all classes of enough
rows, a chunk's probabilities stay in the workspace between forward and gradient (*resident*) and the
head costs three matrix products. Where it does not, the logits are computed twice (four products), with
classes outermost, so that a slice of the classifier and of its gradient is visited once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

MIB = 1 << 20
DEFAULT_BUDGET = 64 * MIB
FEWEST_ROWS = 64  # of a tile on a CPU


@dataclass(frozen=True)
class Grain:
    """The tiles that a kind of device is fastest with."""

    class_tile: int  # classes of a tile at most
    elements: int  # of a tile: beyond, more rows make the product no faster
    most_rows: int
    fewest_rows: int  # below, a product is bound by memory: narrow the tile first
    multiple: int  # of rows, for which products are made


# long enough for the product, short enough to stay near the cache
CPU = Grain(class_tile=4096, elements=1 << 22, most_rows=1 << 22, fewest_rows=FEWEST_ROWS, multiple=1)
# one product of all classes, whose rows fill every multiprocessor
GPU = Grain(class_tile=1 << 20, elements=1 << 32, most_rows=4096, fewest_rows=1024, multiple=128)

GPU_DEFAULT = "the larger of 512 MiB and 2,048 rows × C × 6 bytes, at most a quarter of the free memory"


def grain_of(device: torch.device) -> Grain:
    """Return the tiles that a device is fastest with."""
    return GPU if device.type == "cuda" else CPU


def default_budget(device: torch.device, classes: int) -> int:
    """Return the bytes of working memory of a call that names none; `GPU_DEFAULT` on CUDA devices.

    A float32 tile of 2,048 rows and its gradient in a half type take 6 bytes a logit. In a trace, where the
    free memory is not that of the run, and in a capture, where it may not be read, it does not bound.
    """
    if device.type != "cuda":
        return DEFAULT_BUDGET
    wanted = max(512 * MIB, 2048 * classes * 6)
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return wanted
    free = torch.cuda.mem_get_info(device)[0]
    # what torch holds and has not lent out is free too
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(DEFAULT_BUDGET, min(wanted, free // 4))


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
    def within(
        budget: int,
        rows: int,
        classes: int,
        footprint: Footprint,
        *,
        resident: bool,
        grain: Grain = CPU,
    ) -> Plan:
        """Return the largest useful tile of `rows` × `classes` whose footprint is at most `budget` bytes."""
        f = footprint
        buffers = budget - f.fixed
        rows = max(rows, 1)
        tile = min(max(classes, 1), grain.class_tile)
        if resident:
            held = (buffers - tile * f.per_class) // (classes * f.kept + tile * f.scratch + f.per_row)
            if held >= min(rows, f.resident_rows):
                return Plan(_rows(rows, held, tile, grain), _even(classes, tile), resident=True)
        while True:
            fits = (buffers - tile * f.per_class) // (tile * (f.kept + f.scratch) + f.per_row)
            if fits >= min(rows, grain.fewest_rows) or tile == 1:
                break
            tile = (tile + 1) // 2
        if fits < 1:
            raise ValueError(
                f"a memory budget of {budget} bytes holds not even one row × one class here; "
                f"at least {f.kept + f.scratch + f.per_row + f.per_class + f.fixed} bytes are needed"
            )
        return Plan(_rows(rows, fits, tile, grain), _even(classes, tile), resident=False)

    @staticmethod
    def of_all_rows(budget: int, rows: int, classes: int, footprint: Footprint) -> Plan:
        """Return one chunk of all rows, for sweeps that cannot accumulate, of as many classes as fit."""
        fits = budget // max(1, rows * (footprint.kept + footprint.scratch) + footprint.per_class)
        return Plan(max(rows, 1), _even(classes, max(1, min(fits, CPU.class_tile))), resident=False)

    def row_chunks(self, stop: int, start: int = 0) -> Iterator[slice]:
        return _slices(start, stop, self.row_chunk)

    def class_tiles(self, classes: int) -> Iterator[slice]:
        return _slices(0, classes, self.class_tile)


def _rows(total: int, fits: int, tile: int, grain: Grain) -> int:
    """Return the rows of a chunk, of which as many fit beside a tile's classes."""
    most = max(1, min(fits, grain.elements // tile, grain.most_rows))
    rows = _even(total, most)
    whole = -(-rows // grain.multiple) * grain.multiple
    if whole > most:
        whole = most // grain.multiple * grain.multiple or rows
    return min(whole, max(total, 1))


def _even(total: int, largest: int) -> int:
    """Return the size that splits `total` into the fewest parts of at most `largest`, nearly equal."""
    total = max(1, total)
    largest = max(1, min(largest, total))
    parts = -(-total // largest)
    return -(-total // parts)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for at in range(start, stop, size):
        yield slice(at, min(at + size, stop))
