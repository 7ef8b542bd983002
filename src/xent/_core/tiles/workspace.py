"""The memory of a sweep: one buffer, cut into contiguous tiles, so that nothing is allocated on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from xent._core.logit_map import TileBuffers
from xent._core.plan import Plan
from xent._core.problem import Problem


class Workspace:
    """The one buffer of a sweep, cut into contiguous tiles: products write into it, nothing is allocated."""

    def __init__(
        self, problem: Problem, plan: Plan, *, slopes: bool, buffers: int = 1, slope_at: int = 1
    ) -> None:
        self.slopes = slopes
        self.slope_at = slope_at
        classes, logits = problem.targets.n_classes, problem.logits
        self.width = classes if plan.resident else min(plan.class_tile, classes)
        self.rows = plan.row_chunk
        self.resident = plan.resident
        self.buffered = problem.ops.buffered
        self.size = self.rows * self.width * (buffers + slopes)
        self.dtype, self.device = logits.dtype, logits.device
        self.buffer: Tensor | None = None  # made when the first tile needs it

    def tile(self, chunk: slice, classes: slice, number: int = 0) -> Tensor | None:
        """Return the memory of one tile; `number` tells apart those that are held at once."""
        if not self.buffered:
            return None
        if self.buffer is None:
            self.buffer = torch.empty(self.size, dtype=self.dtype, device=self.device)
        rows, width = chunk.stop - chunk.start, classes.stop - classes.start
        start = number * self.rows * self.width + (classes.start * self.rows if self.resident else 0)
        return self.buffer[start : start + rows * width].view(rows, width)

    def buffers(self, chunk: slice, classes: slice, place: Tensor | None = None) -> TileBuffers:
        """Return the memory of a tile and its slopes; `place` is memory of all classes that may serve."""
        slope = self.tile(chunk, classes, self.slope_at) if self.slopes else None
        return TileBuffers(self.tile(chunk, classes) if place is None else place, slope, self.slopes)
