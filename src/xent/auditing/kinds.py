"""The kinds of a matrix of predictions, and probabilities with their logarithms of each.

    probs       0 ≤ p ≤ 1, |Σ p − 1| ≤ tolerance        log_p = log p
    log-probs   log p ≤ tolerance, |Σ e^(log p) − 1| ≤ tolerance        p = e^(log p)
    logits      no nan, no +inf, one number above −inf        p = softmax z

The tolerance is that of the metrics: it goes by the type that the numbers are stored in. A single column is
of the second of two classes: its probability, the logarithm of that, or the logit against the first class.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from xent.auditing.rows import from_logits
from xent.metrics._arrays import Rows
from xent.metrics._probabilities import Probabilities

Kind = Literal["probs", "log-probs", "logits"]


class Judged(NamedTuple):
    """Probabilities of some rows, or what is wrong with these."""

    p: Tensor  # (n, C)
    log_p: Tensor  # (n, C)
    bad: Tensor | None  # (n,) rows that are none; None means all are right
    likely: Tensor | None = None  # (n,) the most probable class, where it came along


class Fault(NamedTuple):
    """The fault of a row."""

    row: int
    column: int | None  # None where it is the row as a whole
    value: float
    what: str  # such as "where a probability, 0 to 1, is needed"


def judged(x: Tensor, kind: Kind, renormalize: bool = False) -> Judged:
    """Return the probabilities of rows (n, C), or (n, 1) of the second of two classes.

    ``renormalize`` divides probabilities that have few digits by their sum.

    >>> judged(torch.tensor([[0.25]]), "probs").p.tolist()
    [[0.75, 0.25]]
    """
    stored, x = x, x if x.dtype in (torch.float32, torch.float64) else x.to(_wide(x.dtype))
    if x.shape[1] == 1:
        return _single(x, kind)
    if kind == "logits":
        most = x.amax(1)
        impossible = ~most.isfinite()  # nan and +inf are largest, −inf if all are masked
        if impossible.any():
            return Judged(x, x, impossible)
        p, log_p, likely = from_logits(x)
        return Judged(p, log_p, None, likely)
    rule = Probabilities(Rows(stored), False, renormalize)
    p = x if kind == "probs" else x.exp()
    # what a logarithm is above 0 by, within the tolerance, is rounding
    highest = 1.0 if kind == "probs" else 1 + rule.tolerance
    log_p = x.clamp(max=0) if kind == "log-probs" and bool((x > 0).any()) else x
    low, high = (end.item() for end in p.aminmax())
    # a sum in the type of p is off by far less than a tenth of the tolerance
    plain = low >= 0 and high <= highest and bool(((p.sum(1) - 1).abs() <= 0.9 * rule.tolerance).all())
    if not plain:
        bad = ~((p >= 0) & (p <= highest)).all(1) | rule.bad_sums(p)
        if bad.any():
            return Judged(p, p, bad)
    if renormalize:
        p = p / p.sum(1, dtype=torch.float64)[:, None].to(p.dtype)
        return Judged(p, p.log(), None)
    return Judged(p, p.log() if kind == "probs" else log_p, None)


def _single(x: Tensor, kind: Kind) -> Judged:
    """Return the probabilities of two classes from a column (n, 1) of the second."""
    x = x[:, 0]
    if kind == "logits":
        bad = ~x.isfinite()
        pair = torch.stack([torch.zeros_like(x), x]).t()
        p, log_p = (pair, pair) if bad.any() else from_logits(pair)[:2]
    elif kind == "probs":
        bad = ~((x >= 0) & (x <= 1))
        p, log_p = torch.stack([1 - x, x]).t(), torch.stack([torch.log1p(-x), x.log()]).t()
    else:
        bad = ~(x <= 0)
        other = torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))
        p, log_p = torch.stack([-torch.expm1(x), x.exp()]).t(), torch.stack([other, x]).t()
    return Judged(p, log_p, bad if bad.any() else None)


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
