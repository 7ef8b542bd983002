"""A C × C operator for every row of a batch, given by its product with columns.

    A: (..., C, C)        A @ v: (..., C) -> (..., C)        A @ V: (..., C, K) -> (..., C, K)

v with as many dimensions as the logits is one vector a row; with one dimension more it is a matrix a row.
Nothing is broadcast: for logits (N, C) a tensor (N, C) is one vector a row, and (C, K) is an error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from xent._arguments.validation import require_tensors
from xent._core.logits import compute_dtype
from xent._core.validators import FLOATING


class RowOperator(ABC):
    """Base of the operators of a batch of rows; half types are computed in float32 and rounded once."""

    def __init__(self, rows: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = rows  # (..., C)
        self._dtype = dtype
        self._device = device

    @abstractmethod
    def _matmul(self, v: Tensor) -> Tensor:
        """Multiply columns (..., C, K), in the type of the computation."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the matrices, (..., C, C)."""
        return torch.Size((*self._rows, self._rows[-1]))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the logits and of every result."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """The device of the logits and of every result."""
        return self._device

    def __matmul__(self, v: Tensor) -> Tensor:
        """Multiply one vector a row, (..., C), or one matrix a row, (..., C, K)."""
        return self._apply(self._matmul, v, "v")

    def to_dense(self) -> Tensor:
        """Return the matrices, (..., C, C)."""
        classes = self._rows[-1]
        eye = torch.eye(classes, dtype=compute_dtype(self._dtype), device=self._device)
        return self._round(self._matmul(eye.expand(self.shape)))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self._dtype}, device='{self._device}')"
        )

    def _apply(self, f: Callable[[Tensor], Tensor], v: Tensor, name: str) -> Tensor:
        """Apply f, a map of columns (..., C, K), to vectors (..., C) or matrices (..., C, K)."""
        check_floating(name, v)
        rows = tuple(self._rows)
        is_vector = v.ndim == len(rows)
        columns = v[..., None] if is_vector else v
        if columns.shape[:-1] != self._rows:
            raise ValueError(
                f"{name} has shape {tuple(v.shape)}: for logits of shape {rows} it must be {rows}, one "
                f"vector for each row, or ({', '.join(map(str, (*rows, 'K')))}), a matrix for each; expand "
                "what is to serve several rows"
            )
        product = f(columns.to(compute_dtype(self._dtype)))
        return self._round(product[..., 0] if is_vector else product)

    def _round(self, value: Tensor) -> Tensor:
        return value.to(self._dtype)


def check_floating(name: str, value: object) -> None:
    require_tensors(spread=False, **{name: value})
    assert isinstance(value, Tensor)
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name} must be of a floating type of 16, 32 or 64 bits, got {value.dtype}: convert it with "
            f"{name}.to(torch.float32)"
        )
