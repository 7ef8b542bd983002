"""The map from the inner logits u of some rows to the logits z that enter the softmax, in both directions.

    z = k·tanh(κu/k) / T − log Q        dz/du = g·s        g = κ/T, s = 1 − tanh²(κu/k)

with the scale κ, the softcap k, the temperature T (a number, or one for each row) and the chances Q of the
sampled classes. Without a softcap z = u / (T/κ) − log Q, one division.
The factor g is constant along a row, so whoever has a coefficient of the row multiplies that; s, the slope,
is a tile, and absent where there is no softcap.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from xent._core.ops import TileOps, cut, take
from xent._core.record import record

Rows: TypeAlias = slice | Tensor  # consecutive rows, or (R,) int64


class TileBuffers(NamedTuple):
    """The memory for a tile of logits, and for its slopes where they are wanted."""

    z: Tensor | None  # (R, T)
    slope: Tensor | None  # (R, T)
    wants_slope: bool


NO_BUFFERS = TileBuffers(None, None, wants_slope=False)


@record
class LogitMap:
    """u → z of N rows over C classes."""

    softcap: float | None = None
    temperature: float | Tensor = 1.0  # a number, or (N,) float64; no gradient
    log_q: Tensor | None = None  # (C,) subtracted from z; no gradient
    scale: float = 1.0  # κ

    @property
    def curved(self) -> bool:
        return self.softcap is not None

    @property
    def is_identity(self) -> bool:
        return self.softcap is None and self.log_q is None and self._number == self.scale == 1.0

    @property
    def gain(self) -> float | Tensor:
        """g, a number or (N,)."""
        return self.scale / self.temperature

    @property
    def _number(self) -> float | None:
        return None if isinstance(self.temperature, Tensor) else self.temperature

    def rows(self, rows: Rows) -> LogitMap:
        """Return the map of some rows."""
        if not isinstance(self.temperature, Tensor):
            return self
        return replace(self, temperature=take(self.temperature, rows))

    def apply(
        self, ops: TileOps, u: Tensor, classes: slice, buffers: TileBuffers
    ) -> tuple[Tensor, Tensor | None]:
        """Return z (R, T) of these rows, which may overwrite u, and s where it is curved and wanted."""
        z, slope = u, None
        if self.softcap is not None:
            z = ops.tanh(ops.div(z, self.softcap / self.scale))
            if buffers.wants_slope:
                slope = ops.one_minus_square(z, buffers.slope)
            z = ops.mul(z, self.softcap)
        if self._divides:
            z = ops.div(z, self._divisor(z.dtype))
        return z if self.log_q is None else ops.sub(z, cut(self.log_q, classes).to(z.dtype)), slope

    def at(self, u: Tensor) -> Tensor:
        """Return z (R, K) of some classes of each row, without the correction by log Q."""
        if self.softcap is not None:
            u = self.softcap * torch.tanh(u / (self.softcap / self.scale))
        return u / self._divisor(u.dtype) if self._divides else u

    def bend(self, z: Tensor, slope: Tensor, classes: slice) -> Tensor:
        """Return d²z/du² ÷ g of a tile, −(2κ/k)·tanh(κu/k)·s, from its z and its slope."""
        assert self.softcap is not None
        z = z if self.log_q is None else z + cut(self.log_q, classes).to(z.dtype)
        return z * self._divisor(z.dtype) * (-2.0 * self.scale / self.softcap**2) * slope

    @property
    def divisor(self) -> float | Tensor | None:
        """T, or without a softcap T/κ: a number, (N,), or None where it is 1."""
        return self._divisor(torch.float32) if self._divides else None

    @property
    def _divides(self) -> bool:
        return self._number != (1.0 if self.curved else self.scale)

    def _divisor(self, dtype: torch.dtype) -> float | Tensor:
        """Return T, or without a softcap T/κ, to divide a tile by: a number or (R, 1)."""
        t = self.temperature
        if not self.curved and self.scale != 1.0:
            t = t / self.scale
        return t.to(dtype)[:, None] if isinstance(t, Tensor) else t


IDENTITY = LogitMap()
