"""The kinds of a matrix of predictions, and whether its numbers are what a kind says.

    probs       0 ≤ p ≤ 1, |Σ p − 1| ≤ tolerance        log_p = log p
    log-probs   log p ≤ tolerance, |Σ e^(log p) − 1| ≤ tolerance        p = e^(log p)
    logits      no nan, no +inf, one number above −inf        p = softmax z

The tolerance is that of the metrics: it goes by the type that the numbers are stored in. A single column is
of the second of two classes: its probability, the logarithm of that, or the logit against the first class.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from xent.auditing.tiles import Kind
from xent.auditing.top_two import TopTwo, top_two
from xent.metrics._arrays import Rows
from xent.metrics._probabilities import Probabilities

FEW = 64
"""Classes up to which sums over them are faster with the rows of a class side by side in memory."""


class Judged(NamedTuple):
    """Numbers of some rows in a type to compute in, or the rows that are wrong."""

    x: Tensor  # (n, C), C at least 2
    kind: Kind
    bad: Tensor | None = None  # (n,) rows that are not what the kind says; None means all are
    top: TopTwo | None = None  # of logits


class Fault(NamedTuple):
    """The fault of a row."""

    row: int
    column: int | None  # None where it is the row as a whole
    value: float
    what: str  # such as "where a probability, 0 to 1, is needed"


def judged(x: Tensor, kind: Kind, renormalize: bool = False) -> Judged:
    """Return the numbers of rows (n, C), or of the two classes where (n, 1) is of the second.

    ``renormalize`` divides probabilities that have few digits by their sum.

    >>> judged(torch.tensor([[0.25]]), "probs").x.exp().tolist()
    [[0.75, 0.25]]
    """
    stored, x = x, x if x.dtype in (torch.float32, torch.float64) else x.to(_wide(x.dtype))
    if x.shape[1] == 1:
        return _single(x, kind, stored)
    if x.shape[1] <= FEW and x.stride(0) != 1:
        x = x.t().contiguous().t()
    if kind == "logits":
        top = top_two(x)
        impossible = ~top.top.isfinite()  # nan and +inf are largest, −inf if all are masked
        return Judged(x, kind, impossible if impossible.any() else None, top)
    rule = Probabilities(Rows(stored), False, renormalize)
    p = x if kind == "probs" else x.exp()
    # what a logarithm is above 0 by, within the tolerance, is rounding
    highest = 1.0 if kind == "probs" else 1 + rule.tolerance
    low, high = (end.item() for end in p.aminmax())
    # a sum in the type of p is off by far less than a tenth of the tolerance
    plain = low >= 0 and high <= highest and bool(((p.sum(1) - 1).abs() <= 0.9 * rule.tolerance).all())
    if not plain:
        bad = ~((p >= 0) & (p <= highest)).all(1) | rule.bad_sums(p)
        if bad.any():
            return Judged(x, kind, bad)
    if renormalize:
        return Judged(p / p.sum(1, dtype=torch.float64)[:, None].to(p.dtype), "probs")
    return Judged(x.clamp(max=0) if kind == "log-probs" and not (plain and high <= 1) else x, kind)


def _single(x: Tensor, kind: Kind, stored: Tensor) -> Judged:
    """Return numbers of two classes from a column (n, 1) of the second: logits, else log-probabilities."""
    x = x[:, 0]
    if kind == "logits":
        bad, first, second = ~x.isfinite(), torch.zeros_like(x), x
    elif kind == "probs":
        bad, first, second = ~((x >= 0) & (x <= 1)), torch.log1p(-x), x.log()
    else:
        bad, second = ~(x <= Probabilities(Rows(stored), False, False).tolerance), x.clamp(max=0)
        x = second
        first = torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))
    pair = torch.stack([first, second]).t()
    return Judged(pair, "logits" if kind == "logits" else "log-probs", bad if bad.any() else None)


NEEDED = {
    "probs": "where a probability, 0 to 1, is needed",
    "log-probs": "where the logarithm of a probability, 0 or less, is needed",
    "logits": "where a logit, a number or -inf, is needed",
}


def fault(x: Tensor, kind: Kind, row: int) -> Fault:
    """Return what is wrong with a row of a matrix (n, C) that was judged to be bad."""
    values = x[row].double()
    if kind == "probs":
        odd = ~((values >= 0) & (values <= 1))
    elif kind == "log-probs":
        odd = ~(values <= 1e-3)
    else:
        odd = values.isnan() | values.isposinf()
    if odd.any():
        column = int(odd.nonzero()[0])
        return Fault(row, column, values[column].item(), NEEDED[kind])
    if kind == "logits":
        return Fault(row, None, -math.inf, "in every column, so that no class is possible")
    total = (values if kind == "probs" else values.exp()).sum().item()
    return Fault(row, None, total, "where the probabilities of a row sum to 1")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type to compute in, of numbers of a half type or whole ones."""
    return torch.float32 if dtype.is_floating_point else torch.float64
