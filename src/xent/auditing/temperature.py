"""The best temperature and its saving, from a sample of rows and one sweep over all.

    f(β) = mean of lse(β u) − β⟨t, u⟩,    u = log p,    β = 1/T
    f′ = ⟨p_β, u⟩ − ⟨t, u⟩        f″ = Var_{p_β} u        f‴ = third central moment of u under p_β

The sample's own best β₀ is near that of all rows. The sweep takes f and three derivatives at β₀; the minimum
of the expansion there differs from the true one by the fourth power of the small distance.
Source: Guo et al., "On calibration of modern neural networks", 2017.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from xent._calibration import fit_temperature
from xent.auditing.rows import Rows
from xent.auditing.sample import Sample
from xent.auditing.tiles import Tile
from xent.errors import NoBestTemperature


class BestTemperature(NamedTuple):
    """The temperature of the least mean loss, and what it saves."""

    temperature: float
    saving: float  # nats, of the mean over the rows whose loss is finite


def of_sample(sample: Sample) -> float:
    """Return the best β of a sample; 0 or infinity where the loss keeps falling to that end."""
    if not len(sample.key):
        return 1.0
    log_p, label, weight, mass = sample.result()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # where every temperature is as good
            return 1 / fit_temperature(log_p, label if mass is None else mass, sample_weight=weight)
    except NoBestTemperature as error:
        return math.inf if error.limit == 0 else 0.0


class Tempered:
    """The loss at an inverse temperature, with three derivatives, summed over rows."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.sums = torch.zeros(5, dtype=torch.float64)  # f(β), f′, f″, f‴, f(1)
        self.weight = 0.0

    def sums_of(self, tile: Tile, known: Rows) -> Tensor | None:
        """Return f, f′, f″, f‴ at β, f(1) and the weight, summed over the rows of a tile (6,).

        Rows of infinite loss are left out; None where there is no β.
        """
        if not 0 < self.beta < math.inf:
            return None
        s = torch.where(known.loss.isfinite(), known.weight, 0.0)
        place = known.prediction[:, None]
        u = tile.scores()
        if tile.kind != "logits":
            u -= u.gather(1, place)
        w = torch.mul(u, self.beta, out=tile.memory.take(1, u)).exp_()
        # e^(βu) is 0 where u is −inf, whose powers are to count as 0
        if u.amin() == -math.inf:
            u = torch.where(w > 0, u, 0.0)
        beside = w.scatter_(1, place, 0.0).sum(1).double()
        total = 1 + beside
        moments = []
        for _ in range(3):
            w.mul_(u)
            moments.append(w.sum(1).double() / total)
        first, second, third = moments
        variance = second - first.square()
        skew = third - 3 * first * second + 2 * first.pow(3)
        target = -(known.loss + known.top_log)  # ⟨t, log p⟩ − log p of the prediction, whose u is 0
        loss = beside.log1p() - self.beta * target
        rows = torch.stack([loss, first - target, variance, skew, known.loss])
        counts = s > 0
        return torch.cat([rows[:, counts] @ s[counts], s.sum()[None]])

    def add(self, sums: Tensor | None) -> None:
        """Add the sums of some rows."""
        if sums is not None:
            self.sums += sums[:-1]
            self.weight += float(sums[-1])

    def merge(self, other: Tempered) -> None:
        """Add the rows of another."""
        self.sums += other.sums
        self.weight += other.weight

    def result(self) -> BestTemperature | None:
        """Return the best temperature; None where the loss falls towards 0 or infinity without end."""
        if not 0 < self.beta < math.inf or not self.weight:
            return None
        loss, first, second, third, now = (self.sums / self.weight).tolist()
        if second <= 0:
            return BestTemperature(1.0, 0.0)
        step = 0.0
        for _ in range(20):  # the minimum of the cubic, by Newton's method
            curved = second + third * step
            if curved <= second / 4:
                step = -first / second
                break
            step -= (first + second * step + third * step * step / 2) / curved
        beta = self.beta + step
        best = loss + first * step + second * step**2 / 2 + third * step**3 / 6
        return BestTemperature(1 / beta, max(0.0, now - best)) if beta > 0 else None
