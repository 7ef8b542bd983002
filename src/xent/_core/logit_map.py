"""The map from the inner logits u of some rows to the logits z that enter the softmax, in both directions.

    z = k·tanh(u/k) / T − log Q        dz/du = g·s        g = 1/T, s = 1 − tanh²(u/k)

with the softcap k, the temperature T (a number, or one for each row) and the chances Q of sampled classes.
The factor g is constant along a row, so whoever has a coefficient of the row multiplies that; s, the slope,
is a tile, and absent where there is no softcap.
"""

from __future__ import annotations

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

    @property
    def curved(self) -> bool:
        return self.softcap is not None

    @property
    def is_identity(self) -> bool:
        return self.softcap is None and self.log_q is None and self._number == 1.0

    @property
    def gain(self) -> float | Tensor:
        """g, a number or (N,)."""
        return 1.0 / self.temperature

    @property
    def _number(self) -> float | None:
        return None if isinstance(self.temperature, Tensor) else self.temperature

    def rows(self, rows: Rows) -> LogitMap:
        """Return the map of some rows."""
        if not isinstance(self.temperature, Tensor):
            return self
        return LogitMap(self.softcap, take(self.temperature, rows), self.log_q)

    def apply(
        self, ops: TileOps, u: Tensor, classes: slice, buffers: TileBuffers
    ) -> tuple[Tensor, Tensor | None]:
        """Return z (R, T) of these rows, which may overwrite u, and s where it is curved and wanted."""
        z, slope = u, None
        if self.softcap is not None:
            z = ops.tanh(ops.div(z, self.softcap))
            if buffers.wants_slope:
                slope = ops.one_minus_square(z, buffers.slope)
            z = ops.mul(z, self.softcap)
        if self._number != 1.0:
            z = ops.div(z, self._divisor(z.dtype))
        return z if self.log_q is None else ops.sub(z, cut(self.log_q, classes).to(z.dtype)), slope

    def at(self, u: Tensor) -> Tensor:
        """Return z (R, K) of some classes of each row, without the correction by log Q."""
        if self.softcap is not None:
            u = self.softcap * torch.tanh(u / self.softcap)
        return u if self._number == 1.0 else u / self._divisor(u.dtype)

    def bend(self, z: Tensor, slope: Tensor, classes: slice) -> Tensor:
        """Return d²z/du² ÷ g of a tile, −(2/k)·tanh(u/k)·s, from its z and its slope."""
        assert self.softcap is not None
        z = z if self.log_q is None else z + cut(self.log_q, classes).to(z.dtype)
        return z * self._divisor(z.dtype) * (-2.0 / self.softcap**2) * slope

    def _divisor(self, dtype: torch.dtype) -> float | Tensor:
        """Return T to divide a tile by: a number or (R, 1)."""
        t = self.temperature
        return t.to(dtype)[:, None] if isinstance(t, Tensor) else t


IDENTITY = LogitMap()
