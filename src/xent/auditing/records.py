"""The parts of a result: plain numbers and names."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple


class Decomposed(NamedTuple):
    """A mean score of a binary event: ``score = miscalibration − discrimination + uncertainty``."""

    score: float
    miscalibration: float
    discrimination: float
    uncertainty: float


class ClassMeasures(NamedTuple):
    """The measures of the rows of one class."""

    name: str
    rows: int
    weight: float
    loss: float | None  # nats, the mean over rows of finite loss; None without any
    share: float  # of the whole loss
    recall: float | None
    precision: float | None
    threshold: float | None  # the mean probability of the class over its own rows
    calibration: Decomposed | None  # of the class against the rest, log loss; None where not measured


class PairMeasures(NamedTuple):
    """The loss that a class and a rival carry."""

    name: str
    rival: str
    loss: float  # nats of the mean loss
    share: float  # of the whole loss


class RowMeasures(NamedTuple):
    """One row of those that are listed."""

    row: int  # counted from 1
    id: Any  # the caller's name of the row; None without any
    label: str
    prediction: str
    probability: float  # of the label
    confidence: float  # the probability of the prediction
    loss: float | None  # nats; None where it is infinite
    saving: float | None  # nats less with the prediction as label; None where it is infinite


class Point(NamedTuple):
    """Rows of like confidence: mean confidence, share that is right, and their weight."""

    confidence: float
    accuracy: float
    weight: float


class Bar(NamedTuple):
    """A cell of a histogram."""

    low: float
    high: float
    wrong: float  # weight of the rows that are predicted wrong
    right: float


class Bounds(NamedTuple):
    """Means of the bounds by triplets over a sample of rows."""

    rows: int
    hinge: float
    smooth: float
    tight: float
    loss: float
    union: float
    hardest_low: float
    hardest_high: float


@dataclasses.dataclass(frozen=True)
class Measures:
    """The measures that are one number each; None is what is infinite or was not measured."""

    log_loss: float | None  # nats, the mean; None where a row's is infinite
    finite_log_loss: float | None  # over the rows whose loss is finite
    infinite_rows: int  # of a class whose probability is 0
    standard_error: float | None
    low: float | None  # 95 % interval of the mean
    high: float | None
    bootstrap_low: float | None  # the same by blocks of rows; None for fewer than 20 of these
    bootstrap_high: float | None
    label_entropy: float  # nats, the loss of knowing the labels' frequencies alone
    d2: float | None  # 1 − log_loss / label_entropy
    accuracy: float
    brier: float
    entropy: float  # nats, of the predictions
    confidence: float
    margin: float | None  # nats, the mean over the rows where it is finite
    gradient_norm: float
    curvature_trace: float
    miscalibration: float | None  # nats, of the confidence against being right; None where it is infinite
    discrimination: float
    uncertainty: float
    brier_miscalibration: float
    brier_discrimination: float
    brier_uncertainty: float
    expected_calibration_error: float
    temperature: float | None = None
    temperature_saving: float | None = None
    suspects: int | None = None
    suspects_low: float | None = None
    suspects_high: float | None = None


def finite(value: float) -> float | None:
    """Return a number, None for one that is infinite or nan."""
    return float(value) if math.isfinite(value) else None


def share_of(part: float, whole: float) -> float:
    """Return a share, 0 of nothing."""
    return part / whole if whole > 0 else 0.0
