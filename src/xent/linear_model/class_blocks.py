"""The diagonal blocks of the Hessian of a fit, one a class, from a sample of its rows.

    H_cc = Σ_n m_n p_nc (1 − p_nc) x̃_n x̃_nᵀ / N

A class sees the rows in doubt about it. The largest terms of each sum are formed as they are; the rest
of its weight stands on the second moment A of all rows, as if its rows were any.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from xent.data.batches import BLOCK, slices
from xent.linear_model.workers import Workers

TERMS = 2
"""Terms of a block that are formed as they are, in multiples of D."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Rows that stand for all, evenly spaced: standardised features and a column of ones, and masses.

    Without an intercept the column is of zeros.
    """

    x: Tensor  # (n, D + 1)
    mass: Tensor  # (n,), of mean 1 over all rows of all ranks

    def second_moment(self) -> Tensor:
        """Return A = Σ m x̃ x̃ᵀ / n, (D + 1, D + 1)."""
        return ((self.x * self.mass[:, None]).t() @ self.x).div_(max(1, len(self.x)))


def class_blocks(
    sample: Sample,
    second_moment: Tensor,  # (D + 1, D + 1)
    theta: Tensor,  # (K, D + 1)
    binary: bool,
    workers: Workers,
) -> Tensor:
    """Return H_cc without the penalty, (K, D + 1, D + 1)."""
    blocks = theta.new_empty(len(theta), *second_moment.shape)
    if not len(sample.x):
        return blocks.zero_()
    curvature = theta.new_empty(len(theta), len(sample.x))  # (K, n) m·p(1 − p)
    terms = min(TERMS * theta.shape[1], len(sample.x))

    def of_rows(rows: slice) -> None:
        p = theta @ sample.x[rows].t()
        p = p.sigmoid_() if binary else torch.softmax(p, 0, out=p)
        torch.mul(p, 1 - p, out=curvature[:, rows]).mul_(sample.mass[rows])

    def of_classes(classes: slice) -> None:
        x = theta.new_empty(terms, theta.shape[1])
        for weight, block in zip(curvature[classes], blocks[classes], strict=True):
            largest, rows = weight.topk(terms, sorted=False)
            torch.index_select(sample.x, 0, rows, out=x).mul_(largest.sqrt_()[:, None])
            rest = (weight.sum() - largest.square_().sum()).clamp(min=0)
            torch.mul(second_moment, rest, out=block).addmm_(x.t(), x).div_(len(sample.x))

    for work, parts in (
        (of_rows, slices(sample.x.shape, BLOCK)),
        (of_classes, workers.shares(len(theta), 0)),
    ):
        for _ in workers.map(work, parts):
            pass
    return blocks
