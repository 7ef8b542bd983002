"""The computation of a tile of rows × classes, for a sweep that decides which tiles there are.

    summarise: logits → statistics, and what the gradient needs of the tile
    differentiate: that and the row's statistics → G = ∂L/∂u
    revisit: logits once more and the row's statistics → G

`TORCH` computes by torch's operations, in place on the workspace or functionally under vmap. Another body may
keep something else of a tile in its place, such as the logits themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from xent._core.coefficients import Coefficients
from xent._core.logit_map import TileBuffers
from xent._core.logits import Loaded
from xent._core.problem import Problem
from xent._core.statistics import Statistics, finite_base, statistics_dtype, summarise
from xent._core.tiles.formulas import Tile, differentiate, row_tile, takes_whole_rows, target_columns
from xent._core.tiles.workspace import Workspace

Slopes: TypeAlias = tuple[Tensor, Tensor | None]
"""G (R, T), and G in the type in which products take it, where the body has made that too."""


class TileBody(Protocol):
    """The computation of a tile."""

    def whole_rows(
        self, problem: Problem, chunk: slice, loaded: Loaded, buffers: TileBuffers
    ) -> tuple[Statistics, Tile] | None:
        """Return a chunk's statistics from one tile of all classes, where there is a shorter way to them."""
        ...

    def summarise(
        self,
        problem: Problem,
        chunk: slice,
        loaded: Loaded,
        classes: slice,
        buffers: TileBuffers,
        absent: float | Tensor,
    ) -> tuple[Statistics, Tile]:
        """Return the statistics of a tile without the own classes, and the tile with the own ones' logits.

        ``absent`` is the logit of an own class that no tile holds.
        """
        ...

    def differentiate(
        self,
        problem: Problem,
        chunk: slice,
        loaded: Loaded,
        tile: Tile,
        found: Statistics,
        asked: Coefficients,
    ) -> Slopes:
        """Return G of a tile that was kept."""
        ...

    def revisit(
        self,
        problem: Problem,
        buffers: TileBuffers,
        chunk: slice,
        loaded: Loaded,
        classes: slice,
        found: Statistics,
        asked: Coefficients,
        of_probabilities: Callable[[Tensor], None] | None,
    ) -> Slopes:
        """Return G of a tile whose logits are computed once more; hand on ∂L/∂q (R, T) where it is wanted."""
        ...


class TorchBody:
    """The computation by torch's operations; a tile keeps exp(z − base)."""

    def whole_rows(
        self, problem: Problem, chunk: slice, loaded: Loaded, buffers: TileBuffers
    ) -> tuple[Statistics, Tile] | None:
        return row_tile(problem, chunk, loaded, buffers) if takes_whole_rows(problem) else None

    def summarise(
        self,
        problem: Problem,
        chunk: slice,
        loaded: Loaded,
        classes: slice,
        buffers: TileBuffers,
        absent: float | Tensor,
    ) -> tuple[Statistics, Tile]:
        targets, ops = problem.targets, problem.ops
        z, slope = problem.logits.tile(ops, loaded, classes, buffers)
        own, own_z = target_columns(targets, chunk, classes), None
        if own is not None:
            own_z = own.take(z, absent).to(statistics_dtype(z.device))
            z = own.put(ops, z, -torch.inf)
        t = targets.tile(chunk, classes, z.dtype)
        z, part = summarise(ops, z, t, own, problem.requested, problem.first + classes.start)
        return part, Tile(classes, z, slope, loaded.map.gain, part.m, own, own_z)

    def differentiate(
        self,
        problem: Problem,
        chunk: slice,
        loaded: Loaded,
        tile: Tile,
        found: Statistics,
        asked: Coefficients,
    ) -> Slopes:
        return differentiate(problem, chunk, tile, found, asked), None

    def revisit(
        self,
        problem: Problem,
        buffers: TileBuffers,
        chunk: slice,
        loaded: Loaded,
        classes: slice,
        found: Statistics,
        asked: Coefficients,
        of_probabilities: Callable[[Tensor], None] | None,
    ) -> Slopes:
        tile, shifted = shifted_tile(problem, buffers, chunk, loaded, classes, found)
        if of_probabilities is not None:
            # −log p, before exp overwrites the shifted logits
            surprise = found.log_partition.to(shifted.dtype)[:, None] - shifted
            factor = problem.targets.probability_factor(classes, shifted.dtype)
            of_probabilities(surprise * factor * asked.loss.to(surprise.dtype)[:, None])
        tile = tile._replace(z=problem.ops.exp(shifted))
        return differentiate(problem, chunk, tile, found, asked), None


TORCH = TorchBody()


def revisit(
    problem: Problem, workspace: Workspace, chunk: slice, loaded: Loaded, classes: slice, found: Statistics
) -> tuple[Tile, Tensor]:
    """Return a tile of rows whose statistics are known, and z − m, to which `exp` is still to be applied."""
    return shifted_tile(problem, workspace.buffers(chunk, classes), chunk, loaded, classes, found)


def own_base(found: Statistics, dtype: torch.dtype) -> Tensor:
    """Return what is subtracted from the logits of rows whose statistics are known, (R,)."""
    if found.lse_others is None:
        return found.m
    # far below m where the own classes have all the probability
    return finite_base(found.lse_others.to(dtype)).to(found.m.dtype)


def shifted_tile(
    problem: Problem, buffers: TileBuffers, chunk: slice, loaded: Loaded, classes: slice, found: Statistics
) -> tuple[Tile, Tensor]:
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    z, slope = logits.tile(ops, loaded, classes, buffers, borrow=True)
    own = target_columns(targets, chunk, classes)
    own_z = None if own is None else own.take(z, 0.0).to(found.m.dtype)
    base = own_base(found, z.dtype)
    shifted = ops.difference(z, finite_base(base.to(z.dtype))[:, None], buffers.z)
    return Tile(classes, shifted, slope, loaded.map.gain, base, own, own_z), shifted
