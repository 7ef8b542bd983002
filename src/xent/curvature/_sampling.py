"""Labels drawn from each row's softmax, y ∼ p, tile by tile.

    y = the first class with Σ_{c ≤ y} p_c > u        u uniform in [0, 1)

by inversion of the running sum, which continues from one tile to the next: the statistics of the rows are
known, so one sweep serves any number of draws. u is a hash of a seed, the row's key and the draw's number,
not a stream of numbers, which would depend on the order of rows and threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xent._core.problem import Problem
from xent._core.statistics import CACHED, Statistics
from xent._core.tiles.sweep import Workspace, revisit

GOLDEN = 0x9E3779B97F4A7C15  # of splitmix64 (Steele, Lea and Flood, 2014), as are the factors in `_mixed`
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sample(problem: Problem, found: Statistics, u: Tensor) -> Tensor:
    """Draw a class of each of the M rows for each entry of u (M, draws), int64."""
    logits, targets = problem.logits, problem.targets
    plan = problem.plan(resident=False, temporaries=2)
    workspace = Workspace(problem, plan, slopes=False)
    parts = []
    with problem.products():
        for chunk in plan.row_chunks(targets.count):
            loaded, rows = logits.load(targets.pick(chunk)), found.rows(chunk)
            some = u[chunk].to(logits.dtype)
            count = chunk.stop - chunk.start
            drawn = torch.full_like(some, -1, dtype=torch.int64)
            last = torch.zeros(count, dtype=torch.int64, device=logits.device)
            before = torch.zeros(count, 1, dtype=logits.dtype, device=logits.device)
            for classes in plan.class_tiles(targets.n_classes):
                _, shifted = revisit(problem, workspace, chunk, loaded, classes, rows)
                p = shifted.exp_().mul_((1 / (1 + rows.r)).to(shifted.dtype)[:, None])
                width = p.shape[1]
                possible = (p > 0).any(1)
                highest = width - 1 - (p > 0).flip(1).to(torch.uint8).argmax(1)
                last = torch.where(possible, classes.start + highest, last)
                sums = p.cumsum(1).add_(before)
                at = torch.searchsorted(sums, some, right=True)
                drawn = torch.where((drawn < 0) & (at < width), classes.start + at, drawn)
                before = sums[:, -1:]
            # u above the sum of all probabilities, which rounding may leave below 1
            parts.append(torch.where(drawn < 0, last[:, None], drawn))
    return torch.cat(parts) if parts else torch.empty_like(u, dtype=torch.int64)


def uniforms(keys: Tensor, draws: int, seed: int) -> Tensor:
    """Return a number in [0, 1) for each key (M,) int64 and draw, (M, draws) float64, a function of both."""
    numbers = torch.arange(1, draws + 1, device=keys.device)
    mixed = _mixed(_mixed(keys + _signed(seed))[:, None] + numbers * _signed(GOLDEN))
    return _shifted(mixed, 11).to(torch.float64) * 2.0**-53


def content_keys(x: Tensor) -> Tensor:
    """Hash rows (M, D) to (M,) int64: equal for rows equal in every bit, else different almost surely."""
    bits = x.contiguous().view(BITS[x.element_size()])
    columns = torch.arange(1, x.shape[1] + 1, device=x.device)
    factors = _mixed(columns * _signed(GOLDEN)) | 1
    at_once = max(1, CACHED // max(1, x.shape[1]))
    return torch.cat([(some.to(torch.int64) * factors).sum(1) for some in bits.split(at_once)])


def _mixed(z: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64, modulo 2⁶⁴."""
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """Shift the bits to the right, filling with zeros."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """Return the int64 with the same bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
