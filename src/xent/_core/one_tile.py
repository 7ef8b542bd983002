"""A small problem as one tile of all its rows and classes, for which nothing is planned and no memory shared.

A few thousand logits cost less than to choose tiles does. The formulas are the tiles' own, on new tensors, so
every option is served; what is larger, on another device or shared by processes is left to the tiles.
"""

from __future__ import annotations

from collections.abc import Callable

from xent._core.backend import Backend, FinishedGradients, Gradients, Wants
from xent._core.coefficients import Coefficients
from xent._core.logit_map import TileBuffers
from xent._core.logits import Loaded
from xent._core.problem import Problem
from xent._core.statistics import Statistics
from xent._core.tiles.formulas import Tile, differentiate
from xent._core.tiles.sweep import chunk_statistics

LARGEST = 1 << 17  # logits: beyond, the tiles are no slower


class OneTile(Backend):
    """One tile of all rows and classes."""

    name = "one_tile"
    serves = f"at most {LARGEST:,} logits on a CPU, of targets that are class indices"

    def supports(self, problem: Problem) -> str | None:
        rows, classes = problem.logits.shape
        if not 0 < rows * classes <= LARGEST:
            return f"{rows} × {classes} logits are not between 1 and {LARGEST}"
        if rows * classes * problem.logits.dtype.itemsize > problem.budget:
            return (
                f"the memory budget of {problem.budget} bytes holds no tile of all {rows} × {classes} logits"
            )
        if problem.logits.device.type != "cpu":
            return f"the tensors are on {problem.logits.device.type}"
        if problem.ranks is not None:
            return "other processes hold some of the classes"
        if problem.batched:
            return "vmap has batched a tensor"
        if problem.targets.probabilities is not None:
            return "a target of probabilities may take a gradient of its own"
        return None

    def row_statistics(self, problem: Problem) -> Statistics:
        return _visit(problem, slopes=False)[1]

    def gradient(
        self, problem: Problem, found: Statistics, coefficients: Coefficients, wants: Wants
    ) -> Gradients:
        loaded, found, tiles = _visit(problem, slopes=problem.logits.map.curved)
        return _pull_back(problem, loaded, tiles, found, coefficients, wants)

    def fused(
        self, problem: Problem, coefficients: Callable[[Statistics, slice], Coefficients], wants: Wants
    ) -> tuple[Statistics, Gradients]:
        loaded, found, tiles = _visit(problem, slopes=problem.logits.map.curved)
        upstream = coefficients(found, slice(0, problem.selection.count))
        return found, _pull_back(problem, loaded, tiles, found, upstream, wants)


def _visit(problem: Problem, *, slopes: bool) -> tuple[Loaded, Statistics, list[Tile]]:
    chunk, classes = slice(0, problem.selection.count), slice(0, problem.targets.n_classes)
    loaded = problem.logits.load(problem.selection.pick(chunk))
    buffers = TileBuffers(None, None, slopes)
    found, tiles = chunk_statistics(problem, chunk, loaded, (classes,), lambda _: buffers, keep=True)
    return loaded, found, tiles


def _pull_back(
    problem: Problem,
    loaded: Loaded,
    tiles: list[Tile],
    found: Statistics,
    coefficients: Coefficients,
    wants: Wants,
) -> Gradients:
    (tile,) = tiles
    g = differentiate(problem, slice(0, problem.selection.count), tile, found, coefficients)
    found_gradients = problem.logits.pull_back(loaded, g, wants[1:])
    if problem.selection.index is not None:
        found_gradients = tuple(
            problem.selection.scatter(t) if t is not None and of_rows else t
            for t, of_rows in zip(found_gradients, problem.logits.of_rows, strict=True)
        )
    return FinishedGradients((None, *found_gradients), problem.leaves)
