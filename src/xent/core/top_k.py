"""The k largest probabilities of each row, streaming over class tiles: no row of logits is kept.

    p_(i) = exp(z_(i) − m) / (1 + r)

The k largest logits of the classes seen so far meet those of the next tile; the row statistics, which give
the probabilities, are the sweep's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xent.core.statistics import RunningUnion, Statistics, statistics_dtype, summarise
from xent.core.sweep import Problem, Workspace


def top_k(problem: Problem, k: int) -> tuple[Tensor, Tensor]:
    """Probabilities (N, k) float64, largest first, and their classes (N, k) int64; targets play no part."""
    scores, targets, o = problem.scores, problem.targets, problem.arithmetic
    plan = problem.plan(resident=False, temporaries=1)
    workspace = Workspace(problem, plan, slopes=False)
    dtype = statistics_dtype(scores.device)
    found = []
    with problem.products():
        for chunk in plan.row_chunks(targets.count):
            loaded = scores.load(targets.pick(chunk))
            union = RunningUnion()
            values = indices = None
            for classes in plan.class_tiles(targets.classes):
                z, _ = scores.tile(o, loaded, classes, workspace.room(chunk, classes))
                largest, at = z.topk(min(k, z.shape[1]), dim=1)
                at = at + classes.start
                if values is not None and indices is not None:
                    largest, at = torch.cat((values, largest), 1), torch.cat((indices, at), 1)
                    largest, order = largest.topk(min(k, largest.shape[1]), dim=1)
                    at = at.gather(1, order)
                values, indices = largest, at
                union.add(summarise(o, z, None, None)[1])
            assert values is not None
            found.append((_probabilities(union.whole(), values.to(dtype)), indices))
    if not found:
        empty = torch.empty(0, k, dtype=dtype, device=scores.device)
        return empty, empty.to(torch.int64)
    probabilities, classes_of = zip(*found, strict=True)
    return torch.cat(probabilities), torch.cat(classes_of)


def _probabilities(found: Statistics, z: Tensor) -> Tensor:
    return torch.exp(found.log_prob(z))
