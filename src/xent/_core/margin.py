"""Loss and logsumexp of a row after the target's logit is shifted by δ, from row statistics alone.

    z_y → z_y + δ multiplies the odds against the target, e^ℓ − 1 = Σ_{j≠y} exp(z_j − z_y), by e^−δ:

    −log p_y → log1p(e^−δ·expm1(−log p_y))        lse → lse + log((1 − p_y) + p_y·e^δ)

A margin, and the exemption of a target's own class from the correction of sampled classes, are such moves:
numbers of a row made from numbers of a row. No tile knows of them, and they are differentiated by autograd.

    cosine margin    M(c) = c − m                                         (CosFace)
    angular margin   M(c) = cos(θ + m), θ = arccos c                      (ArcFace)
                     M(c) = c − m·sin m where θ + m > π, so that M keeps falling as θ grows

with c the target's score after the softcap and before the temperature T, so δ = (M(c) − c)/T, and 1/T is
what these papers call the scale s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xent._core.ops import cut
from xent._core.validators import valid

OUTSIDE = 0.05  # how far rounding, of half types too, may carry a cosine out of −1..1


@dataclass(frozen=True)
class Margin:
    """A reduction of the target's own score during training, so that its class has to win by more.

    The margin applies to scores that are cosines: products of features and class vectors of length 1. With θ
    the angle between them and ``temperature = 1/s``, the target's logit becomes
    ``s·(cos(θ + angle) − cosine)``; the logits of all other classes stay ``s·cos θ``. Where ``θ + angle``
    exceeds π, the score is ``cos θ − angle·sin(angle) − cosine``, so that it keeps falling as θ grows.
    Sources: Wang et al., "CosFace", 2018; Deng et al., "ArcFace", 2019.

    Args:
        cosine: the number subtracted from the target's score (CosFace uses 0.35). The scores need not be
            cosines.
        angle: the angle in radians, from 0 to π/2, added to the target's angle (ArcFace uses 0.5). The scores
            must be cosines.

    Raises:
        ValueError: a number outside its interval.
        TypeError: an argument that is not a number.

    Example:
        >>> import torch, xent
        >>> x, w = (torch.nn.functional.normalize(t, dim=1) for t in (torch.randn(8, 4), torch.randn(10, 4)))
        >>> target = torch.randint(10, (8,))
        >>> loss = xent.linear_cross_entropy(x, w, target, margin=xent.Margin(angle=0.5), temperature=1 / 64)
    """

    cosine: float = 0.0  # subtracted from the target's score
    angle: float = 0.0  # radians, added to the target's angle

    def __post_init__(self) -> None:
        for name in ("cosine", "angle"):
            object.__setattr__(self, name, valid(name, getattr(self, name)))

    def move(self, c: Tensor, eps: float) -> Tensor:
        """Return the change of the target's score, M(c) − c.

        Args:
            c: the target's score of each row, (M,).
            eps: the absolute error of the scores; it bounds the derivative near c = ±1.

        Returns:
            (M,).
        """
        if self.angle == 0.0:
            return torch.full_like(c, -self.cosine)
        # nearer to ±1 than c is known, 1/sin θ would only magnify its rounding
        sine = ((1 - c) * (1 + c)).clamp_min(eps).sqrt()
        turned = -2 * math.sin(self.angle / 2) ** 2 * c - math.sin(self.angle) * sine
        beyond = c < -math.cos(self.angle)
        return torch.where(beyond, -self.angle * math.sin(self.angle), turned) - self.cosine


class TargetShift(NamedTuple):
    """The moves of M rows' own scores, and how much of each row's loss is the own class's."""

    margin: Margin | None
    temperature: float | Tensor  # or (M,)
    eps: float  # of the scores
    log_q: Tensor | None  # (M,) what was subtracted from the own logit as from every sampled one
    mass: Tensor | None  # (M,) t_y; None means 1
    rest: Tensor | None  # (M,) a − t_y; None means 0
    check: bool = False  # whether scores that are no cosines are an error; else they cost nan
    way_out: str = ""  # of that error

    def __call__(self, loss: Tensor, logsumexp: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor]:
        """Return ℓ and lse, (M,) each, after the target's logit is shifted."""
        delta = self.delta(logsumexp + log_prob)
        cost = -log_prob
        moved = _with_odds(cost, delta)
        onward = torch.log(torch.exp(log_prob + delta) - torch.expm1(log_prob))
        own = moved if self.mass is None else self.mass * moved
        if self.rest is not None:  # of the other classes, whose scores stay and whose lse moves
            others = loss - (cost if self.mass is None else self.mass * cost)
            own = own + others + self.rest * onward
        return own, logsumexp + onward

    def rows(self, rows: slice) -> TargetShift:
        some = (None if t is None else cut(t, rows) for t in (self.log_q, self.mass, self.rest))
        log_q, mass, rest = some
        t = self.temperature
        temperature = cut(t, rows) if isinstance(t, Tensor) else t
        return self._replace(log_q=log_q, mass=mass, rest=rest, temperature=temperature)

    def delta(self, own: Tensor) -> Tensor:
        """Return the shift δ of the targets' logits (M,)."""
        back = torch.zeros_like(own) if self.log_q is None else self.log_q
        if self.margin is None:
            return back
        c = (own + back) * self.temperature
        if self.margin.angle != 0.0:
            good = c.abs() <= 1 + OUTSIDE
            if self.check and not good.all():
                row = int(good.logical_not().nonzero()[0])
                raise ValueError(
                    f"an angular margin needs cosines: a target's score is {c[row].item():.6g}, outside "
                    f"−1..1; {self.way_out}"
                )
            c = torch.where(good, c, math.nan)
        return self.margin.move(c, self.eps) / self.temperature + back


def _with_odds(cost: Tensor, delta: Tensor) -> Tensor:
    """Return log1p(e^−δ·expm1(ℓ)) of ℓ ≥ 0, (M,), with all digits of a tiny ℓ and no overflow."""
    small = (cost < 1) | ((delta > 0) & (cost < 500))
    near = torch.log1p(torch.exp(-delta) * torch.expm1(torch.where(small, cost, 0.0)))
    large = torch.where(small, 1.0, cost)
    far = (large - delta) + torch.log1p(torch.exp(-large) * torch.expm1(delta))
    return torch.where(small, near, far)
