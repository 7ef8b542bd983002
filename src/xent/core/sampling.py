"""Labels drawn from each row's softmax, y ∼ p, tile by tile.

    y = the first class with Σ_{c ≤ y} p_c > u        u uniform in [0, 1)

by the inverse of the running sum, which the tiles carry on from one to the next: the statistics of the rows
are known, so one sweep serves any number of draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xent.core.statistics import Statistics
from xent.core.sweep import Problem, Workspace, revisit


def sample(problem: Problem, found: Statistics, draws: int, generator: torch.Generator) -> Tensor:
    """Classes of the M rows, (M, draws) int64, independent ones."""
    scores, targets = problem.scores, problem.targets
    plan = problem.plan(resident=False, temporaries=2)
    workspace = Workspace(problem, plan, slopes=False)
    parts = []
    with problem.products():
        for chunk in plan.row_chunks(targets.count):
            loaded, rows = scores.load(targets.pick(chunk)), found.rows(chunk)
            count = chunk.stop - chunk.start
            u = torch.rand(count, draws, generator=generator, dtype=scores.dtype, device=scores.device)
            drawn = torch.full((count, draws), -1, dtype=torch.int64, device=scores.device)
            last = torch.zeros(count, dtype=torch.int64, device=scores.device)
            before = torch.zeros(count, 1, dtype=scores.dtype, device=scores.device)
            for classes in plan.class_tiles(targets.classes):
                _, shifted = revisit(problem, workspace, chunk, loaded, classes, rows)
                p = shifted.exp_().mul_((1 / (1 + rows.r)).to(shifted.dtype)[:, None])
                width = p.shape[1]
                possible = (p > 0).any(1)
                highest = width - 1 - (p > 0).flip(1).to(torch.uint8).argmax(1)
                last = torch.where(possible, classes.start + highest, last)
                sums = p.cumsum(1).add_(before)
                at = torch.searchsorted(sums, u, right=True)
                drawn = torch.where((drawn < 0) & (at < width), classes.start + at, drawn)
                before = sums[:, -1:]
            # u above the sum of all, which rounding may leave below 1
            parts.append(torch.where(drawn < 0, last[:, None], drawn))
    return torch.cat(parts) if parts else torch.empty(0, draws, dtype=torch.int64, device=scores.device)
