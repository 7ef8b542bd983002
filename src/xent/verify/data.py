"""The rows that identities are checked on: random, extreme (they broke libraries), scikit-learn's digits.

Inputs are rounded to the checked type first. The exact values are then computed from the rounded inputs in
float64 on the CPU, by the pairwise differences of `xent._core.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from xent._core import reference
from xent.data.sources import digits
from xent.errors import MissingExtra


@dataclass(frozen=True, eq=False)
class Head:
    """Features and a linear classifier."""

    x: Tensor  # (N, D)
    w: Tensor  # (C, D)
    b: Tensor  # (C,)

    @cached_property
    def exact(self) -> Exact:
        x, w, b = (part.cpu().double() for part in (self.x, self.w, self.b))
        return Exact(x @ w.T + b)

    @cached_property
    def size(self) -> Tensor:
        """Σ |x_d·w_cd| + |b_c|, (N, C), which the rounding of the product is relative to."""
        x, w, b = (part.cpu().double().abs() for part in (self.x, self.w, self.b))
        return x @ w.T + b

    def loss_scale(self, t: Tensor) -> Tensor:
        """Return the scale of the rounding error of the loss, (N,)."""
        return self.exact.loss_scale(t) + (self.exact.gradient(t).abs() * self.size).sum(1)

    def gradient_scale(self, t: Tensor) -> Tensor:
        """Return the scale of the rounding error of the gradient, (N, C): that of the products times a·J."""
        p, a = self.exact.p, t.sum(1, keepdim=True).abs()
        return self.exact.gradient_scale(t) + a * p * (self.size + (p * self.size).sum(1, keepdim=True))


class Target(NamedTuple):
    """A target in the form that is passed to xent, and as rows t."""

    kind: str
    given: Tensor  # (N,) classes or (N, C) probabilities
    t: Tensor  # (N, C) float64, the same


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of logits, each with a class and a soft target."""

    name: str
    z: Tensor  # (N, C)
    y: Tensor  # (N,)
    q: Tensor  # (N, C) of any mass; 0 where a class is masked
    head: Head | None = None  # of the logits before they were rounded

    @cached_property
    def exact(self) -> Exact:
        return Exact(self.z.cpu().double())

    @cached_property
    def one_hot(self) -> Tensor:
        """The classes as one-hot rows, (N, C) float64."""
        return torch.nn.functional.one_hot(self.y.cpu(), self.z.shape[1]).double()

    @property
    def targets(self) -> Iterator[Target]:
        yield Target("class", self.y, self.one_hot)
        yield Target("probabilities", self.q, self.q.cpu().double())


@dataclass(frozen=True, eq=False)
class Exact:
    """Exact values for rows of logits, in float64."""

    z: Tensor  # (N, C)

    @cached_property
    def cost(self) -> Tensor:
        """The costs −log p, (N, C)."""
        return reference.surprise(self.z).masked_fill(self.z == -math.inf, math.inf)

    @cached_property
    def p(self) -> Tensor:
        return (-self.cost).exp()

    @cached_property
    def lse(self) -> Tensor:
        return self.z.logsumexp(1)

    @cached_property
    def jacobian(self) -> Tensor:
        """The Jacobians diag(p) − p pᵀ, (N, C, C)."""
        return torch.diag_embed(self.p) - self.p[:, :, None] * self.p[:, None, :]

    @cached_property
    def distance(self) -> Tensor:
        """The distances max z − z, (N, C); 0 for a masked class."""
        below = self.z.amax(1, keepdim=True) - self.z
        return below.masked_fill(below == math.inf, 0.0)

    def loss(self, t: Tensor) -> Tensor:
        return torch.where(t == 0, 0.0, t * self.cost).sum(1)

    def gradient(self, t: Tensor) -> Tensor:
        return t.sum(1, keepdim=True) * self.p - t

    def entropy(self) -> Tensor:
        return self.loss(self.p)

    def loss_scale(self, t: Tensor) -> Tensor:
        """Return Σ |t|·(−log p) plus the effect of rounding z − max z by one unit, (N,)."""
        return self.loss(t.abs()) + (self.gradient(t).abs() * self.distance).sum(1)

    def entropy_scale(self) -> Tensor:
        """Return H plus the effect of rounding z − max z by one unit, (N,); ∂H/∂z = −p∘(log p + H)."""
        H = self.entropy()
        slope = torch.where(self.p == 0, 0.0, self.p * (self.cost + H[:, None]))
        return H + (slope * self.distance).sum(1)

    def gradient_scale(self, t: Tensor) -> Tensor:
        """Return |a|·‖p‖ + ‖t‖, (N, 1)."""
        return t.sum(1, keepdim=True).abs() * self.p.norm(dim=1, keepdim=True) + t.norm(dim=1, keepdim=True)


def batches(dtype: torch.dtype, device: torch.device, table: DigitRows | None) -> tuple[Batch, ...]:
    """Return all batches, rounded to a type."""
    generator = torch.Generator().manual_seed(20)
    rows = [_random(generator), _extreme(torch.finfo(dtype), generator)]
    if table is not None:
        rows.append(_digits(table, generator))
    return tuple(_moved(batch, dtype, device) for batch in rows)


class DigitRows(NamedTuple):
    """The pixels and classes of scikit-learn's handwritten digits."""

    x: Tensor  # (N, D) float64
    y: Tensor  # (N,)


def read_digits() -> DigitRows | None:
    """Return scikit-learn's handwritten digits, or None without the extra."""
    try:
        table = digits()
    except MissingExtra:
        return None
    assert table.codes is not None
    return DigitRows(torch.from_numpy(table.features).double(), torch.from_numpy(table.codes))


def _random(generator: torch.Generator) -> Batch:
    rows, classes, features = 64, 7, 16
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    w = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    b = torch.randn(classes, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (rows,), generator=generator)
    q = torch.rand(rows, classes, generator=generator, dtype=torch.float64)
    q[::4] /= q[::4].sum(1, keepdim=True)  # every fourth row a probability, the others of any mass
    q[0] = 0.0
    return Batch("random", x @ w.T + b, y, q, Head(x, w, b))


def _extreme(info: torch.finfo, generator: torch.Generator) -> Batch:
    """Make rows of four classes that broke libraries."""
    gone, far, huge = -math.inf, min(1e8, info.max / 8), info.max / 8
    rows = [
        ((far, far, gone, gone), 0),  # log 2, however large
        ((0.0, -40.0, gone, gone), 0),  # loss 4.2e-18, not 0
        ((0.0, 200.0, gone, gone), 0),  # loss 200, not inf
        ((gone, 1.0, 2.0, gone), 1),  # masked classes
        ((gone, gone, gone, 5.0), 3),  # all masked but the target: loss 0
        ((0.0, 0.0, 0.0, 0.0), 2),
        ((far, far + 32 * far * info.eps, far, far), 0),  # a common offset
        ((-far, -far, -far, gone), 1),
        ((huge, 0.0, -huge, 1.0), 0),  # as far apart as the type allows, right and wrong
        ((huge, 0.0, -huge, 1.0), 2),
        ((60.0, 0.0, 59.0, -60.0), 0),
        ((1e-4, 0.0, -1e-4, 0.0), 3),
    ]
    z = torch.tensor([row for row, _ in rows], dtype=torch.float64)
    q = torch.rand(z.shape, generator=generator, dtype=torch.float64) * (z > gone)
    return Batch("extreme", z, torch.tensor([y for _, y in rows]), q)


def _digits(table: DigitRows, generator: torch.Generator) -> Batch:
    """Make the logits of a nearest-class-mean classifier on pixels x: z = (⟨x, μ_c⟩ − ‖μ_c‖²/2)/32."""
    x, y = table
    means = torch.stack([x[y == c].mean(0) for c in range(int(y.max()) + 1)])
    w, b = means / 32, -means.square().sum(1) / 64
    q = torch.nn.functional.one_hot(y).double()
    q = 0.9 * q + 0.1 * torch.rand(q.shape, generator=generator, dtype=torch.float64)
    return Batch("digits", x @ w.T + b, y, q, Head(x, w, b))


def _moved(batch: Batch, dtype: torch.dtype, device: torch.device) -> Batch:
    head = batch.head
    if head is not None:
        head = Head(*(part.to(device, dtype) for part in (head.x, head.w, head.b)))
    z, q = (part.to(device, dtype) for part in (batch.z, batch.q))
    return Batch(batch.name, z, batch.y.to(device), q, head)
