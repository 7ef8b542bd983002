"""A result, formed from the sums of one sweep or of two."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from xent import triplets
from xent.auditing.calibration import ClassReliability, Decomposition, Reliability
from xent.auditing.largest import Largest
from xent.auditing.pairs import DENSE, HEAVIEST, Pair
from xent.auditing.records import (
    Bar,
    Bounds,
    ClassMeasures,
    Decomposed,
    Measures,
    PairMeasures,
    Point,
    RowMeasures,
    finite,
    share_of,
)
from xent.auditing.result import AuditResult
from xent.auditing.sample import Sample
from xent.auditing.sweeps import FirstSweep, SecondSweep
from xent.auditing.totals import LOSSES, MARGINS, TOP, Totals

if TYPE_CHECKING:
    import pyarrow as pa

POINTS = 20
"""Points of a reliability curve, of equal weight."""


def formed(
    first: FirstSweep,
    second: SecondSweep | None,
    names: Sequence[str],
    source: str = "",
    rows: Callable[[], pa.Table] | None = None,
) -> AuditResult:
    """Return the result of one sweep, or of both; ``names`` (C,) are the classes as text."""
    totals, loss = first.totals, first.mean_loss
    weight = totals.total
    carried = float(totals.per_class("loss").sum())
    pairs = _pairs(first, second)
    in_pairs = share_of(math.fsum(pair.loss for pair in pairs), loss.weight)
    per_class = first.per_class if second is None else second.per_class or first.per_class
    suspects = None if second is None else second.suspects
    return AuditResult(
        source=source,
        count=loss.rows,
        weight=weight,
        classes=len(names),
        sweeps=1 if second is None else 2,
        measures=_measures(first, second),
        top_k={
            k: share_of(float(value), weight)
            for k, value in zip(TOP, totals.ranks, strict=True)
            if k == 1 or k < len(names)
        },
        per_class=_classes(totals, per_class, names, carried),
        pairs=[
            PairMeasures(names[p.label], names[p.rival], p.loss / loss.weight, share_of(p.loss, carried))
            for p in pairs
        ],
        pairs_remainder=max(0.0, (loss.finite if loss.weight else 0.0) - in_pairs),
        reliability=_curve(first.reliability),
        margins=_bars(totals),
        losses=_losses(totals, carried),
        bounds=_bounds(first.sample),
        worst=_rows(first.worst, names),
        suspect_rows=[] if suspects is None else _rows(suspects.listed(), names),
        left_out=_left_out(second, len(names)),
        _rows=rows,
    )


def _measures(first: FirstSweep, second: SecondSweep | None) -> Measures:
    loss, totals = first.mean_loss, first.totals
    normal, blocks = loss.normal(), loss.bootstrap()
    entropy = totals.label_entropy
    top, brier = first.reliability.decomposition()
    margin, margin_weight = totals.margin
    error = loss.standard_error()
    found = Measures(
        log_loss=finite(loss.mean),
        finite_log_loss=finite(loss.finite),
        infinite_rows=loss.infinite,
        standard_error=error,
        low=None if normal is None else normal.low,
        high=None if normal is None else normal.high,
        bootstrap_low=None if blocks is None else blocks.low,
        bootstrap_high=None if blocks is None else blocks.high,
        label_entropy=entropy,
        d2=finite(1 - loss.mean / entropy) if entropy > 0 else None,
        accuracy=totals.mean("hit"),
        brier=totals.mean("brier"),
        entropy=totals.mean("entropy"),
        confidence=totals.mean("confidence"),
        margin=float(margin / margin_weight) if margin_weight else None,
        gradient_norm=totals.mean("gradient_norm"),
        curvature_trace=totals.mean("curvature_trace"),
        miscalibration=finite(top.miscalibration),
        discrimination=top.discrimination,
        uncertainty=top.uncertainty,
        brier_miscalibration=brier.miscalibration,
        brier_discrimination=brier.discrimination,
        brier_uncertainty=brier.uncertainty,
        expected_calibration_error=first.reliability.error(),
    )
    if second is None:
        return found
    best, interval = second.tempered.result(), second.suspects.interval()
    return dataclasses.replace(
        found,
        temperature=None if best is None else best.temperature,
        temperature_saving=None if best is None else best.saving,
        suspects=second.suspects.count,
        suspects_low=interval.low,
        suspects_high=interval.high,
    )


def _pairs(first: FirstSweep, second: SecondSweep | None) -> list[Pair]:
    found = first.pairs if second is None or second.pairs is None else second.pairs
    return found.heaviest(HEAVIEST)


def _classes(
    totals: Totals, per_class: ClassReliability, names: Sequence[str], carried: float
) -> list[ClassMeasures]:
    weight, counted, loss, hits, predicted = (
        totals.per_class(name) for name in ("weight", "finite", "loss", "hits", "predicted")
    )
    thresholds = totals.thresholds
    place = {int(c): i for i, c in enumerate(per_class.classes)}
    found = []
    for c, name in enumerate(names):
        decomposed = None
        if c in place and weight[c] > 0:
            decomposed = _finite(per_class.decomposition(place[c])[0])
        found.append(
            ClassMeasures(
                name=name,
                rows=int(totals.rows[c]),
                weight=float(weight[c]),
                loss=float(loss[c] / counted[c]) if counted[c] > 0 else None,
                share=share_of(float(loss[c]), carried),
                recall=float(hits[c] / weight[c]) if weight[c] > 0 else None,
                precision=float(hits[c] / predicted[c]) if predicted[c] > 0 else None,
                threshold=finite(thresholds[c]),
                calibration=decomposed,
            )
        )
    return found


def _finite(of: Decomposition) -> Decomposed | None:
    values = dataclasses.astuple(of)
    return Decomposed(*values) if all(map(math.isfinite, values)) else None


def _curve(reliability: Reliability) -> list[Point]:
    """Return points of equal weight, in the order of the confidence."""
    order = np.cumsum(reliability.weight)
    if not order[-1]:
        return []
    at = np.minimum((POINTS * (order - reliability.weight / 2) / order[-1]).astype(int), POINTS - 1)
    weight, confidence, hits = (
        np.bincount(at, values, POINTS)
        for values in (reliability.weight, reliability.confidence, reliability.hits)
    )
    return [
        Point(float(c / w), float(h / w), float(w))
        for w, c, h in zip(weight, confidence, hits, strict=True)
        if w
    ]


def _bars(totals: Totals) -> list[Bar]:
    ends = MARGINS.edges.tolist()
    return [
        Bar(low, high, float(wrong), float(right))
        for low, high, wrong, right in zip(ends[:-1], ends[1:], *totals.margins, strict=True)
    ]


def _losses(totals: Totals, carried: float) -> list[tuple[float, float, float, float]]:
    ends = (2.0**LOSSES.edges).tolist()
    return [
        (low, high, float(weight), share_of(float(loss), carried))
        for low, high, weight, loss in zip(ends[:-1], ends[1:], *totals.losses, strict=True)
        if weight
    ]


def _bounds(sample: Sample) -> Bounds | None:
    log_p, label, weight, mass = sample.result()
    if not len(label) or mass is not None:  # a triplet has one class
        return None
    found = triplets.bounds(log_p, label, reduction="none")
    means = [float((each.double() * weight).sum() / weight.sum()) for each in found]
    return Bounds(len(label), *means) if all(map(math.isfinite, means)) else None


def _rows(largest: Largest, names: Sequence[str]) -> list[RowMeasures]:
    columns = (
        largest.column(name).tolist()
        for name in ("row", "label", "prediction", "own", "confidence", "loss", "saving")
    )
    ids = [None] * largest.values.shape[1] if largest.ids is None else largest.ids.tolist()
    found = []
    for row, label, prediction, own, confidence, loss, saving, name in zip(*columns, ids, strict=True):
        found.append(
            RowMeasures(
                row + 1, name, names[label], names[prediction], own, confidence, finite(loss), finite(saving)
            )
        )
    return found


def _left_out(second: SecondSweep | None, classes: int) -> list[str]:
    if second is not None:
        return []
    what = ["the best temperature and the suspects take a second sweep"]
    if classes > DENSE:
        what.append(
            f"of more than {DENSE:,} classes the calibration of each takes a second sweep, and the loss of a "
            "pair counts only the two strongest rivals of a row"
        )
    return what
