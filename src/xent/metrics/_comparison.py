"""True labels and predictions, compared in one sweep, a part of the rows at a time.

    rows n of a part → ℓ_n = rule(p_n, y_n), s_n, y_n        each metric reduces these in its own way

Labels, probabilities and weights are checked here, in the same way for every metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from xent._core.statistics import statistics_dtype
from xent.metrics._arrays import Rows, as_tensor, read_numbers
from xent.metrics._labels import Labels, format_labels, read_labels
from xent.metrics._probabilities import Probabilities, read_probabilities

Rule = Callable[[Tensor, Tensor], Tensor]
"""p (R, C), or (R,) of the second of two labels; y (R,) int64 → losses (R,), float64 and new."""


class Part(NamedTuple):
    """The losses and weights of some rows of a comparison."""

    rows: slice
    y: Tensor  # (R,) int64
    loss: Tensor  # (R,) float64: s·ℓ where there are weights
    weight: Tensor | None  # (R,) float64; None means 1


@dataclass(frozen=True)
class Comparison:
    """N true labels and N predictions over C labels."""

    labels: Labels
    predicted: Probabilities
    weight: Rows | None  # (N,)

    def sweep(self, rule: Rule, copied: bool = False) -> Iterator[Part]:
        """Yield the weighted losses of all rows in order; `copied` says that the rule copies its p."""
        device = self.predicted.rows.device
        for part in self.predicted.rows.parts(copied or self.predicted.renormalize):
            y = as_tensor(self.labels.codes(part)).to(device)
            loss = rule(self.predicted[part], y)
            weight = None
            if self.weight is not None:
                weight = self.weight[part].to(device, statistics_dtype(device))
                # a row of weight 0 is left out: 0·inf must not make nan of the others
                loss = loss.mul_(weight).masked_fill_(weight == 0, 0.0)
            yield Part(part, y, loss, weight)


def compare(
    y_true: Any,
    y_pred: Any,
    *,
    sample_weight: Any = None,
    labels: Any = None,
    renormalize: Any = False,
    split: Callable[[Labels], Labels] | None = None,
) -> Comparison:
    """Read and check the arguments of a metric; ``split`` maps the labels to two values beforehand."""
    predicted = read_probabilities(y_pred, renormalize)
    true = read_labels(y_true, labels)
    if true.count != predicted.count:
        raise ValueError(f"y_true has {true.count} rows and y_pred has {predicted.count}; they must agree")
    if split is not None and predicted.single:
        true = split(true)
    columns = len(true.values)
    if columns < 2:
        if labels is None:
            raise ValueError(
                f"y_true holds only one label, {format_labels(true.values)}; "
                "name those of all columns as labels="
            )
        raise ValueError(f"labels must name at least two labels, got {format_labels(true.values)}")
    if columns != predicted.classes:
        one = "one column, that of the second of two labels"
        named = format_labels(true.values)
        actual = f"y_pred has {one if predicted.single else f'{predicted.classes} columns'}"
        if labels is None:
            raise ValueError(
                f"{actual}, but y_true holds {columns} labels, {named}; name those of the columns as labels="
            )
        raise ValueError(f"{actual}, but labels has {columns} entries, {named}")
    return Comparison(true, predicted, read_weight(sample_weight, true.count))


def read_weight(sample_weight: Any, count: int) -> Rows | None:
    """Read weights (N,): finite, not negative and not all zero; None means 1 for every row."""
    if sample_weight is None:
        return None
    weight = read_numbers(sample_weight, "sample_weight")
    if weight.shape != (count,):
        raise ValueError(f"sample_weight must have shape ({count},), one for each row; got {weight.shape}")
    most = 0.0
    for part in weight.parts():
        s = weight[part]
        low, high = (bound.item() for bound in s.aminmax())
        if not (low >= 0 and high < math.inf):
            row = int((~((s >= 0) & (s < math.inf))).nonzero()[0])
            raise ValueError(
                f"sample_weight is {s[row].item():.6g} at row {part.start + row}; "
                f"weights are finite and not negative"
            )
        most = max(most, high)
    if most == 0:
        raise ValueError(
            "sample_weight is 0 at every row; an average needs a row that counts, of a weight above zero"
        )
    return weight


def sum_of(parts: Iterator[Tensor] | list[Tensor]) -> float:
    """Return the sum over all parts: pairwise within a part, exactly rounded over the parts."""
    sums = [part.sum().item() for part in parts]
    try:
        return math.fsum(sums)
    except OverflowError:
        return math.inf
