"""One pass over rows whose targets are classes known to be in range: the loss and its gradient in (W, b).

    L = Σ_n s_n ℓ_n      ℓ = log(1 + Σ_{j≠y} p_j / p_y)      ∂L/∂W = Gᵀ X,  ∂L/∂b = Gᵀ 1
    G = s·(p − e_y)      p_y − 1 = −Σ_{j≠y} p_j              p = softmax(x Wᵀ + b)

This is `linear_cross_entropy` of plain index targets, without what a fit has no use for: its targets are
checked once, and it has one reduction. Rows are gathered, converted from a half type and centred a tile at
a time: x is a row of the features less a center. A tile stays in the cache from its first product to its
last. Of few classes it is laid out classes × rows, where torch's softmax is twenty times as fast as over
short rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xent.data.batches import Batch, DenseBatch, Tile
from xent.losses._cross_entropy import cross_entropy

TILE = 1 << 19
"""Numbers of a tile, of its features and its probabilities: 2 MiB of float32, which a core's caches hold."""

DEVICE_TILE = 1 << 26
"""Numbers of a tile on a GPU, which has no such caches and wants long operations: 256 MiB of float32."""

FEWEST, MOST = 64, 1 << 13
"""Rows of a tile; as many as fit on a GPU."""

FEW = 16
"""Classes below which a tile is laid out classes × rows."""

LEAST = 1e-12
"""Lowest p_y of the formula. Below it a loss, 27 nats or more, is measured from the largest logit."""


class RowPass:
    """Tiles of rows × classes at one (W, b); of one thread, for its buffers are one.

    Targets are classes (n,), or masses (n, C), of which the losses and G are `cross_entropy`'s.

    Args:
        W: (C, D), in the type in which features are computed with.
        b: (C,), or None.
        center: (D,) in the same type, taken from each row; None is 0.
        width: numbers that a row stores; None is D.
    """

    def __init__(
        self, W: Tensor, b: Tensor | None, center: Tensor | None = None, width: int | None = None
    ) -> None:
        self.W, self.b, self.center = W, b, center
        n_classes, n_features = W.shape
        self.axis = 0 if n_classes < FEW else 1  # of the classes in a tile
        on_host = W.device.type == "cpu"
        fit = (TILE if on_host else DEVICE_TILE) // (n_classes + (width or n_features))
        self.rows = max(FEWEST, min(MOST, fit) if on_host else fit)
        self._buffer: Tensor | None = None

    def loss(self, x: Batch | Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        """Return L, a scalar of float64, for x (n, D), y (n,) int64, weight (n,)."""
        row_losses = self._softmax if y.ndim == 1 else self._soft
        total = torch.zeros((), dtype=torch.float64, device=y.device)
        for here, part, classes in self._tiles(x, y):
            loss, _ = row_losses(self._logits(part), classes)
            total += _weighted(loss, weight, here)
        return total

    def loss_and_gradient(
        self, x: Batch | Tensor, y: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return L, a scalar of float64, ∂L/∂W (C, D) and ∂L/∂b (C,)."""
        row_losses = self._softmax if y.ndim == 1 else self._soft
        total = torch.zeros((), dtype=torch.float64, device=y.device)
        to_W, to_b = torch.zeros_like(self.W), self.W.new_zeros(len(self.W))
        for here, part, classes in self._tiles(x, y):
            loss, g = row_losses(self._logits(part), classes)
            total += _weighted(loss, weight, here)
            if weight is not None:
                g *= weight[here].unsqueeze(self.axis)
            part.add_product(g, self.axis, to_W)
            to_b += g.sum(1 - self.axis)
        return total, to_W, to_b

    def _tiles(self, x: Batch | Tensor, y: Tensor) -> Iterator[tuple[slice, Tile, Tensor]]:
        """Yield which rows, their features (R, D), their targets, classes along their axis."""
        batch = DenseBatch(x) if isinstance(x, Tensor) else x
        for here, part in batch.tiles(self.rows, self.W.dtype, self.center):
            yield here, part, y[here].unsqueeze(self.axis) if y.ndim == 1 else y[here]

    def _logits(self, x: Tile) -> Tensor:
        """Return x Wᵀ + b, (R, C) or (C, R), in memory that the next tile overwrites."""
        rows, n_classes = len(x), len(self.W)
        if self._buffer is None:
            self._buffer = self.W.new_empty(rows * n_classes)  # the first tile is the longest
        z = x.times(self.W, self.axis, self._buffer[: rows * n_classes])
        if self.b is None:
            return z
        return z.add_(self.b if self.axis == 1 else self.b[:, None])

    def _softmax(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each row, (R,), and p − e_y in the memory of z."""
        axis = self.axis
        own_z, top = z.gather(axis, y).squeeze(axis), z.amax(axis)
        p = torch.softmax(z, axis, out=z)
        p_y = p.gather(axis, y).squeeze(axis)
        near = p_y >= LEAST
        p_top = None if z.device.type == "cpu" and near.all() else p.amax(axis)
        p.scatter_(axis, y, 0.0)
        others = p.sum(axis)
        p.scatter_(axis, y, -others.unsqueeze(axis))
        loss = torch.log1p(others / p_y)
        if p_top is not None:
            loss = torch.where(near, loss, (top - own_z) - p_top.log())
        return loss, p

    def _soft(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each row, (R,), for masses t (R, C), and its gradient in z, laid out as z."""
        leaf = (z.t() if self.axis == 0 else z).detach().contiguous().requires_grad_()
        with torch.enable_grad():
            loss = cross_entropy(leaf, t, reduction="none")
        (g,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
        return loss.detach(), g.t().contiguous() if self.axis == 0 else g


def _weighted(loss: Tensor, weight: Tensor | None, rows: slice) -> Tensor:
    return (
        loss.sum(dtype=torch.float64) if weight is None else torch.vdot(weight[rows].double(), loss.double())
    )
