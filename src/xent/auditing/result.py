"""The result of an audit: plain numbers as attributes, as JSON and as a page.

The JSON object is what ``docs/audit.md`` describes; `VERSION` is that of its schema.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xent._util.atomic_write import atomic_write, check_file
from xent._util.text import json_text

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1


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
    loss: float | None  # nats, the mean; None without rows
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
    miscalibration: float  # nats, of the confidence against being right
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


@dataclasses.dataclass(frozen=True)
class AuditResult:
    """Where the loss of a classifier comes from; every measure is an attribute, ``result.log_loss``.

    ``rows`` is an Arrow table of every row's measures, made by one more sweep over the caller's arrays; None
    where these came as a stream.
    """

    source: str
    count: int  # rows
    weight: float  # of all rows
    classes: int
    sweeps: int  # 1 without what a second sweep measures
    measures: Measures
    top_k: dict[int, float]  # accuracy by k
    per_class: list[ClassMeasures]
    pairs: list[PairMeasures]  # the heaviest first
    pairs_remainder: float  # nats of the mean loss in other pairs
    reliability: list[Point]
    margins: list[Bar]
    losses: list[tuple[float, float, float, float]]  # ends of a cell, its weight, its share of the loss
    bounds: Bounds | None
    worst: list[RowMeasures]
    suspect_rows: list[RowMeasures]
    left_out: list[str]  # what was not measured, and why
    _rows: Callable[[], pa.Table] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __getattr__(self, name: str) -> Any:
        measures = self.__dict__.get("measures")
        if measures is not None and name in Measures.__dataclass_fields__:
            return getattr(measures, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *Measures.__dataclass_fields__})

    @functools.cached_property
    def rows(self) -> pa.Table | None:
        """Every row's measures as an Arrow table; None of a stream."""
        return None if self._rows is None else self._rows()

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values, of the documented schema."""
        return {
            "schema": "xent.audit",
            "version": VERSION,
            "source": self.source,
            "rows": self.count,
            "weight": self.weight,
            "classes": self.classes,
            "sweeps": self.sweeps,
            "measures": dataclasses.asdict(self.measures),
            "top_k": {str(k): value for k, value in self.top_k.items()},
            "per_class": [
                {
                    **each._asdict(),
                    "calibration": None if each.calibration is None else each.calibration._asdict(),
                }
                for each in self.per_class
            ],
            "pairs": [each._asdict() for each in self.pairs],
            "pairs_remainder": self.pairs_remainder,
            "reliability": [each._asdict() for each in self.reliability],
            "margins": [each._asdict() for each in self.margins],
            "losses": [
                dict(zip(("low", "high", "weight", "share"), each, strict=True)) for each in self.losses
            ],
            "bounds": None if self.bounds is None else self.bounds._asdict(),
            "worst": [each._asdict() for each in self.worst],
            "suspects": [each._asdict() for each in self.suspect_rows],
            "left_out": self.left_out,
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the result as JSON, and write it to a file where one is named.

        Raises ``OSError`` where the file cannot be written, ``BadInput`` for a path that is a folder.
        """
        text = json_text(self.to_dict(), indent=1, default=str) + "\n"
        if path is not None:
            check_file(Path(path))
            with atomic_write(Path(path)) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page of HTML.

        Raises ``MissingExtra`` without Jinja and Matplotlib, ``OSError`` where the file cannot be written.
        """
        from xent.auditing.page import write_page

        write_page(self, Path(path))

    def __str__(self) -> str:
        from xent.auditing.sentences import sentences

        return "\n".join(sentences(self))

    def _repr_html_(self) -> str:
        from xent.auditing.page import summary_html

        return summary_html(self)


def finite(value: float) -> float | None:
    """Return a number, None for one that is infinite or nan."""
    return float(value) if math.isfinite(value) else None


def share_of(part: float, whole: float) -> float:
    """Return a share, 0 of nothing."""
    return part / whole if whole > 0 else 0.0


