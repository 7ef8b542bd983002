"""The k largest probabilities of each row, streaming over class tiles: no row of logits is kept.

    p_(i) = exp(z_(i) − m) / (1 + r)

The k largest logits of the classes seen so far meet those of the next tile; the row statistics, which give
the probabilities, are the sweep's own. Within a tile the k largest lie in the k blocks of classes whose
maxima are largest: one pass takes the maxima, and what is searched is a few hundred logits instead of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xent._core.problem import Problem
from xent._core.statistics import PairwiseMerge, Statistics, statistics_dtype, summarise
from xent._core.tiles.sweep import Workspace

BLOCK = 64  # classes: of a tile of 4096, as many blocks as one holds classes


class Largest:
    """The k largest logits of the classes seen so far, largest first, and these classes."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.values: Tensor | None = None  # (R, at most k)
        self.classes: Tensor | None = None  # (R, the same) int64

    def add(self, z: Tensor, first: int) -> None:
        """Take in the next tile of logits, (R, T), and its first class."""
        values, at = _candidates(z, self.k)
        at = at + first
        if self.values is not None and self.classes is not None:
            values, at = torch.cat((self.values, values), 1), torch.cat((self.classes, at), 1)
        self.values, order = values.topk(min(self.k, values.shape[1]), dim=1)
        self.classes = at.gather(1, order)


def _candidates(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return logits among which the k largest of z (R, T) are, and their columns; (R, K) each."""
    rows, width = z.shape
    blocks = width // BLOCK
    if 8 * k >= blocks:  # the candidates would be no few
        largest = z.topk(min(k, width), dim=1)
        return largest.values, largest.indices
    maxima = z[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).amax(2)
    best = maxima.topk(k, dim=1, sorted=False).indices
    inside = (best[:, :, None] * BLOCK + torch.arange(BLOCK, device=z.device)).flatten(1)
    rest = torch.arange(blocks * BLOCK, width, device=z.device).expand(rows, -1)
    columns = torch.cat((inside, rest), 1)
    return z.gather(1, columns), columns


def top_k(problem: Problem, k: int) -> tuple[Tensor, Tensor]:
    """Return probabilities (N, k) float64, largest first, and their classes (N, k) int64, of any targets."""
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    plan = problem.plan(resident=False, temporaries=1)
    workspace = Workspace(problem, plan, slopes=False)
    dtype = statistics_dtype(logits.device)
    found = []
    with problem.products():
        for chunk in plan.row_chunks(targets.count):
            loaded = logits.load(targets.pick(chunk))
            union: PairwiseMerge[Statistics] = PairwiseMerge()
            largest = Largest(k)
            for classes in plan.class_tiles(targets.n_classes):
                z, _ = logits.tile(ops, loaded, classes, workspace.buffers(chunk, classes))
                largest.add(z, classes.start)
                union.add(summarise(ops, z, None, None)[1])
            assert largest.values is not None
            assert largest.classes is not None
            found.append((_probabilities(union.whole(), largest.values.to(dtype)), largest.classes))
    if not found:
        empty = torch.empty(0, k, dtype=dtype, device=logits.device)
        return empty, empty.to(torch.int64)
    probabilities, classes_of = zip(*found, strict=True)
    return torch.cat(probabilities), torch.cat(classes_of)


def _probabilities(found: Statistics, z: Tensor) -> Tensor:
    return torch.exp(found.log_prob(z))
