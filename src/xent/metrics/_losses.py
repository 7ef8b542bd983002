"""Losses of predicted probabilities, in nats.

    ℓ_n = −log p_n[y_n]                         log_loss = Σ s ℓ / Σ s
    b_n = Σ_c (p_nc − [c = y_n])²               brier_score = Σ s b / Σ s, halved for two labels
    H   = −Σ_c f_c log f_c                      f_c = Σ_{y_n = c} s_n / Σ s: the best constant's loss
    D²  = 1 − log_loss / H

ℓ is the loss of :doc:`/explanation/formula` for a class index, where p is the softmax of logits. The
arithmetic is float64, whatever type the probabilities are stored in, and nothing is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xent._core.statistics import statistics_dtype
from xent._core.validators import AutoName, valid
from xent.metrics._arrays import Rows, as_array
from xent.metrics._comparison import Comparison, Rule, compare, read_weight, sum_of
from xent.metrics._labels import Labels, format_labels, read_labels


class ClassLoss(NamedTuple):
    """The log loss of each label.

    The mean of ``loss`` weighted by ``weight``, over the labels that occur, is :func:`log_loss`.

    Example:
        >>> from xent.metrics import log_loss_per_class
        >>> each = log_loss_per_class(["b", "a"], [[0.5, 0.5], [1.0, 0.0]])
        >>> dict(zip(each.labels.tolist(), each.weight.tolist()))
        {'a': 1.0, 'b': 1.0}
    """

    labels: np.ndarray  # (C,), in the order of the columns
    loss: np.ndarray  # (C,) float64, the mean over the rows of a label, nats; nan for a label without rows
    weight: np.ndarray  # (C,) float64, Σ s over the rows of a label; their number without weights


def log_loss(
    y_true: Any,
    y_pred: Any,
    *,
    normalize: bool = True,
    sample_weight: Any = None,
    labels: Any = None,
    renormalize: bool = False,
) -> float:
    """Return the mean log loss of predicted probabilities, in nats.

    The loss of a row is ``ℓ = −log p_y``, with p_y the probability given to the true label; the mean is
    ``Σ s·ℓ / Σ s``. The function has the arguments of scikit-learn's ``log_loss``, with three differences.
    Nothing is clipped, so a true label of probability 0 gives inf. The columns follow ``labels`` in the order
    given. Rows that do not sum to 1 are errors.

    Args:
        y_true: (N,) or (N, 1) labels (whole numbers, bools, strings), or (N, C) one-hot.
        y_pred: (N, C) probabilities: NumPy, torch (any device), a data frame or lists; or (N,) or (N, 1), the
            probabilities of the second of two labels. A row must sum to 1 within the largest of √eps of its
            type, 1e-6 and C·5e-7 (six decimal places).
        normalize: whether to return the mean; False returns the sum.
        sample_weight: s, (N,), finite, not negative, not all 0. A row of weight 0 is left out of the sum; its
            probabilities are still checked.
        labels: (C,), the labels of the columns of ``y_pred``; by default the labels in ``y_true``, sorted.
        renormalize: whether each row of ``y_pred`` is divided by its sum, which may then be off 1 by up to
            1e-3.

    Returns:
        The mean or the sum, a float in nats; inf where a row of positive weight gives its label the
        probability 0.

    Raises:
        ValueError: a probability outside 0..1, a row that does not sum to 1, a label that has no column, a
            bad weight; the message names row and value. Also shapes that do not fit, and a single label
            without ``labels``.
        TypeError: probabilities or weights that are not real numbers.

    Example:
        >>> from xent.metrics import log_loss
        >>> y_pred = [[0.1, 0.9], [0.9, 0.1], [0.8, 0.2], [0.35, 0.65]]
        >>> round(log_loss(["spam", "ham", "ham", "spam"], y_pred), 11)
        0.21616187468
    """
    normalize = valid("normalize", normalize)
    compared = compare(y_true, y_pred, sample_weight=sample_weight, labels=labels, renormalize=renormalize)
    return _average(compared, _log_rule, normalize)


def log_loss_per_sample(
    y_true: Any, y_pred: Any, *, labels: Any = None, renormalize: bool = False
) -> np.ndarray:
    """Return the log loss of each row, ``−log p_y``, in nats.

    Args:
        y_true, y_pred, labels, renormalize: as in :func:`log_loss`.

    Returns:
        (N,) float64, in nats.

    Raises:
        ValueError, TypeError: as :func:`log_loss`.

    Example:
        >>> from xent.metrics import log_loss_per_sample
        >>> log_loss_per_sample([1, 0], [[0.3, 0.7], [0.8, 0.2]]).round(6).tolist()
        [0.356675, 0.223144]
    """
    compared = compare(y_true, y_pred, labels=labels, renormalize=renormalize)
    losses = np.empty(compared.labels.count)
    for part in compared.sweep(_log_rule):
        losses[part.rows] = part.loss.cpu().numpy()
    return losses


def log_loss_per_class(
    y_true: Any, y_pred: Any, *, sample_weight: Any = None, labels: Any = None, renormalize: bool = False
) -> ClassLoss:
    """Return the mean log loss of the rows of each label, in nats.

    The unweighted mean over the labels is the balanced log loss. The mean weighted by ``weight`` is
    :func:`log_loss`.

    Args:
        y_true, y_pred, sample_weight, labels, renormalize: as in :func:`log_loss`.

    Returns:
        A :class:`ClassLoss`, ``(labels, loss, weight)``, each (C,), in the order of the columns.

    Raises:
        ValueError, TypeError: as :func:`log_loss`.

    Example:
        >>> from xent.metrics import log_loss_per_class
        >>> each = log_loss_per_class(["b", "a", "a"], [[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
        >>> each.labels.tolist(), each.loss.round(6).tolist(), each.weight.tolist()
        (['a', 'b'], [0.346574, 0.693147], [2.0, 1.0])
    """
    compared = compare(y_true, y_pred, sample_weight=sample_weight, labels=labels, renormalize=renormalize)
    losses, weight = _by_class(compared)
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan
        return ClassLoss(compared.labels.values, losses / weight, weight)


def brier_score(
    y_true: Any,
    y_pred: Any,
    *,
    sample_weight: Any = None,
    pos_label: Any = None,
    labels: Any = None,
    scale_by_half: bool | AutoName = "auto",
    renormalize: bool = False,
) -> float:
    """Return the mean squared distance of the probabilities from the one-hot labels.

    The score of a row is ``b = Σ_c (p_c − [c = y])²``; the mean is ``Σ s·b / Σ s``, halved for two labels.
    The function has the arguments of scikit-learn's ``brier_score_loss``. Source: Brier, "Verification of
    forecasts expressed in terms of probability", 1950.

    Args:
        y_true, y_pred, sample_weight, labels, renormalize: as in :func:`log_loss`. With ``y_pred`` (N,) the
            labels may be any two numbers, of which the larger is the positive one; one of the two may be
            missing. Strings need ``pos_label`` or ``labels``.
        pos_label: with ``y_pred`` (N,), the label whose probabilities it holds.
        scale_by_half: True halves the score, which is then in 0..1; False leaves it in 0..2; ``"auto"``
            halves it for two labels.

    Returns:
        The mean, a float without a unit.

    Raises:
        ValueError, TypeError: as :func:`log_loss`; also a ``pos_label`` that is not a label, or beside
            ``y_pred`` (N, C).

    Example:
        >>> from xent.metrics import brier_score
        >>> round(brier_score([0, 1, 1, 0], [0.1, 0.9, 0.8, 0.3]), 6)
        0.0375
    """
    scale_by_half = valid("scale_by_half", scale_by_half)
    pos_label = _one_label(pos_label)

    def split(true: Labels) -> Labels:
        return true.split(_positive(true.values.tolist(), pos_label, labels))

    compared = compare(
        y_true, y_pred, sample_weight=sample_weight, labels=labels, renormalize=renormalize, split=split
    )
    if pos_label is not None and not compared.predicted.single:
        raise ValueError(
            f"pos_label is for y_pred of shape (N,); here y_pred has {compared.predicted.classes} columns: "
            f"say what they stand for with labels="
        )
    score = _average(compared, _brier_rule, copied=True)
    halved = compared.predicted.classes == 2 if scale_by_half == "auto" else scale_by_half
    return score / 2 if halved else score


def d2_log_loss(
    y_true: Any, y_pred: Any, *, sample_weight: Any = None, labels: Any = None, renormalize: bool = False
) -> float:
    """Return D², the share of the labels' entropy that the predictions explain:
    ``1 − log_loss / label_entropy``.

    1 is perfect. 0 is as good as the labels' frequencies as a prediction for every row. There is no lower
    bound. The function is scikit-learn's ``d2_log_loss_score``. Source: McFadden, "Conditional logit analysis
    of qualitative choice behavior", 1974.

    Args:
        y_true, y_pred, sample_weight, labels, renormalize: as in :func:`log_loss`.

    Returns:
        A float without a unit: nan where all rows of positive weight have one label (the entropy is 0), −inf
        where the log loss is infinite.

    Raises:
        ValueError, TypeError: as :func:`log_loss`.

    Example:
        >>> from xent.metrics import d2_log_loss
        >>> round(d2_log_loss([0, 1, 1, 1], [0.2, 0.9, 0.9, 0.8]), 4)
        0.7079
    """
    compared = compare(y_true, y_pred, sample_weight=sample_weight, labels=labels, renormalize=renormalize)
    losses, weight = _by_class(compared)
    entropy = _entropy(weight)
    if entropy == 0:
        return math.nan
    return 1 - math.fsum(losses) / math.fsum(weight) / entropy


def label_entropy(y: Any, *, sample_weight: Any = None) -> float:
    """Return the entropy of the labels' frequencies, in nats: the log loss of the best constant prediction.

    The entropy is ``H = −Σ_c f_c·log f_c``, with ``f_c = Σ_{y_n = c} s_n / Σ s`` the share of label c in the
    weight.

    Args:
        y: as ``y_true`` in :func:`log_loss`. A single label is allowed and has the entropy 0.
        sample_weight: s, (N,), finite, not negative, not all 0.

    Returns:
        A float in nats.

    Raises:
        ValueError, TypeError: as :func:`log_loss`.

    Example:
        >>> from xent.metrics import label_entropy
        >>> round(label_entropy(["white"] * 6 + ["black"] * 4), 6)
        0.673012
    """
    labels = read_labels(y, name="y")
    weight = read_weight(sample_weight, labels.count)
    mass = np.zeros(len(labels.values))
    for part in labels.parts():
        s = None if weight is None else weight[part].to("cpu", torch.float64).numpy()
        mass += np.bincount(labels.codes(part), s, minlength=len(mass))
    return _entropy(mass)


# --- rules: p (R, C) or (R,), y (R,) → losses (R,) -------------------------------------------------------


def _log_rule(p: Tensor, y: Tensor) -> Tensor:
    """Return ℓ = −log p_y; for the first of two labels −log1p(−p), which is accurate for a small p."""
    wide = statistics_dtype(p.device)
    if p.dim() == 1:
        p = p.to(wide)
        logs = torch.where(y == 1, p.log(), torch.log1p(-p))
    else:
        logs = p.gather(1, y[:, None]).squeeze(1).to(wide).log_()
    return torch.rsub(logs, 0.0)  # not −logs, so that p_y = 1 gives 0 and not −0


def _brier_rule(p: Tensor, y: Tensor) -> Tensor:
    """Return b = Σ_c (p_c − [c = y])², as written: Σp² − 2p_y + 1 would cancel where p_y is near 1."""
    wide = statistics_dtype(p.device)
    if p.dim() == 1:
        return (p.to(wide) - y).square_().mul_(2)
    errors = p.to(wide, copy=True)
    errors.scatter_add_(1, y[:, None], torch.full_like(y, -1, dtype=wide)[:, None])
    return errors.square_().sum(1)


# --- reductions ------------------------------------------------------------------------------------------


def _average(compared: Comparison, rule: Rule, normalize: bool = True, copied: bool = False) -> float:
    """Return Σ s·ℓ / Σ s, or Σ s·ℓ."""
    loss = sum_of(part.loss for part in compared.sweep(rule, copied))
    return loss / _sum_of_weights(compared.weight, compared.labels.count) if normalize else loss


def _sum_of_weights(weight: Rows | None, count: int) -> float:
    if weight is None:
        return count
    return sum_of(weight[part].to(statistics_dtype(weight.device)) for part in weight.parts())


def _by_class(compared: Comparison) -> tuple[np.ndarray, np.ndarray]:
    """Return Σ s·ℓ (C,) and Σ s (C,) over the rows of each label."""
    classes = len(compared.labels.values)
    losses, weight = np.zeros(classes), np.zeros(classes)
    for part in compared.sweep(_log_rule):
        losses += torch.bincount(part.y, part.loss, minlength=classes).cpu().numpy()
        weight += torch.bincount(part.y, part.weight, minlength=classes).cpu().numpy()
    return losses, weight


def _entropy(mass: np.ndarray) -> float:  # (C,), not negative
    """Return −Σ f log f; log of the largest f as log1p(−Σ of the others), accurate where these are small."""
    mass = np.sort(mass[mass > 0])
    rest = math.fsum(mass[:-1])
    total = rest + mass[-1]
    f = mass[:-1] / total
    return float(-math.fsum(f * np.log(f)) - (mass[-1] / total) * math.log1p(-rest / total))


def _one_label(given: Any) -> Any:
    """Return a label as a plain Python object; raise a TypeError for anything that cannot be a label."""
    label = as_array(given, "pos_label").item() if isinstance(given, Tensor) and given.numel() == 1 else given
    label = label.item() if isinstance(label, np.ndarray | np.generic) and label.ndim == 0 else label
    if isinstance(label, Tensor) or not isinstance(label, Hashable):
        raise TypeError(f"pos_label must be one label, got {type(given).__name__}")
    return label


def _positive(values: list[Any], pos_label: Any, labels: Any) -> list[bool]:
    """Return for each label whether a single column of probabilities gives its probability."""
    if len(values) > 2:
        raise ValueError(
            f"y_pred has one column, that of the second of two labels, but there are {len(values)} labels, "
            f"{format_labels(np.asarray(values))}; give y_pred a column for each"
        )
    if pos_label is not None:
        if pos_label not in values and len(values) == 2:
            raise ValueError(f"pos_label {pos_label!r} is none of the labels {values!r}")
        return [value == pos_label for value in values]
    if labels is not None:
        return [c == 1 for c in range(len(values))]
    if any(isinstance(value, str) for value in values):
        raise ValueError(
            f"y_pred has one column, and the labels are {values!r}: say which it is about with pos_label= "
            f"or labels=[negative, positive]"
        )
    # a lone 0 or −1 is the negative label, in data without a positive row
    greatest = max(values)
    return [value == greatest and not (len(values) == 1 and greatest in (0, -1)) for value in values]
