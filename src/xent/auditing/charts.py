"""The figures of an audit's page, each as SVG that takes its colours from the page's style.

Letters are text, not outlines, so that a reader can search them and a screen reader can say them.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xent.auditing.sentences import short
from xent.report.figures import BLUE, FAINT, INK, RULE, VERMILION, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from xent.auditing.result import AuditResult

MOST = 12
"""Bars of a figure."""

COLOURS = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    RULE: "var(--rule)",
    "#BBBBBB": "var(--rule)",
    BLUE: "var(--blue)",
    VERMILION: "var(--red)",
    "#FFFFFF": "var(--paper)",
}
"""The colours of a figure, and what they are on the page."""


class Chart(NamedTuple):
    """A figure with the sentence that says what to see in it."""

    title: str
    sentence: str
    svg: str


def charts(result: AuditResult) -> Iterator[Chart]:
    """Yield the figures for which the result has rows."""
    makers: list[Callable[[AuditResult], tuple[str, str, Callable[[Axes], None], float] | None]] = [
        _worst_rows,
        _classes,
        _pairs,
        _reliability,
        _margins,
        _bounds,
    ]
    for number, make in enumerate(makers):
        found = make(result)
        if found is not None:
            title, sentence, draw, height = found
            yield Chart(title, sentence, _svg(draw, height, f"c{number}-", f"{title}. {sentence}"))


def _svg(draw: Callable[[Axes], None], height: float, prefix: str, alt: str) -> str:
    """Return a figure as an SVG element whose names do not meet those of another."""
    import matplotlib
    from matplotlib.figure import Figure

    written = io.StringIO()
    rc: Any = {"svg.fonttype": "none", "svg.hashsalt": prefix, "font.family": "sans-serif"}
    with style(), matplotlib.rc_context(rc), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that the font lacks
        figure = Figure(figsize=(5.4, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    text = re.sub(r'href="#', f'href="#{prefix}', text)
    for colour, name in COLOURS.items():
        text = re.sub(re.escape(colour), name, text, flags=re.IGNORECASE)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    opening = f'<svg role="img" aria-label="{html.escape(alt, quote=True)}"'
    text = re.sub(r"<svg", lambda _: opening, text, count=1)
    # the width is the page's, the height follows
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))


def _bars(axes: Axes, names: list[str], values: list[float], colour: str) -> None:
    """Draw shares as bars with their names at the left, the largest on top."""
    place = np.arange(len(names))[::-1]
    axes.barh(place, values, color=colour, height=0.72)
    axes.set_yticks(place, names, color=INK)
    axes.set_xlim(0, max(values) * 1.12)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("share of the loss, %")
    for y, value in zip(place, values, strict=True):
        axes.annotate(f"{value:.1f}", (value, y), (4, 0), textcoords="offset points", va="center", fontsize=9)


def _worst_rows(result: AuditResult) -> Any:
    cells = [cell for cell in reversed(result.losses) if cell[2] > 0]
    total = sum(cell[2] for cell in cells)
    if not cells or not sum(cell[3] for cell in cells):
        return None
    rows = np.concatenate([[0.0], np.cumsum([cell[2] for cell in cells]) / total])
    share = np.concatenate([[0.0], np.cumsum([cell[3] for cell in cells])])
    at = float(np.interp(0.05, rows, share))

    def draw(axes: Axes) -> None:
        axes.fill_between(100 * rows, 100 * share, color=BLUE, alpha=0.15, linewidth=0)
        axes.plot(100 * rows, 100 * share, color=BLUE)
        axes.plot([5], [100 * at], "o", color=VERMILION)
        axes.annotate(
            f"5 % of the rows: {100 * at:.0f} %", (5, 100 * at), (9, -4), textcoords="offset points"
        )
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 102)
        axes.set_xlabel("rows of the largest losses, %")
        axes.set_ylabel("share of the loss, %")

    sentence = (
        f"The 5 % of the rows with the largest losses carry {100 * at:.0f} % of the loss: the steeper the "
        "curve, the fewer rows there are to look at."
    )
    return "How few rows carry the loss", sentence, draw, 3.2


def _classes(result: AuditResult) -> Any:
    found = sorted((row for row in result.per_class if row.share > 0), key=lambda row: -row.share)[:MOST]
    if not found:
        return None
    names, values = [short(row.name, 24) for row in found], [100 * row.share for row in found]
    total = sum(row.weight for row in result.per_class)
    rows = 100 * found[0].weight / total
    sentence = f"{names[0]} carries {values[0]:.0f} % of the loss and has {rows:.0f} % of the rows."
    return "Which classes carry it", sentence, lambda axes: _bars(axes, names, values, BLUE), _height(names)


def _pairs(result: AuditResult) -> Any:
    found = [pair for pair in result.pairs if pair.share > 0][:MOST]
    if not found:
        return None
    names = [f"{short(pair.name, 18)} | {short(pair.rival, 18)}" for pair in found]
    values = [100 * pair.share for pair in found]
    first = found[0]
    sentence = (
        f"Rows of {short(first.name)} to which {short(first.rival)} is a rival carry {values[0]:.0f} % "
        "of the loss; a "
        "bar is a class, then its rival, and all pairs add up to the whole."
    )
    return (
        "Which pairs carry it",
        sentence,
        lambda axes: _bars(axes, names, values, VERMILION),
        _height(names),
    )


def _reliability(result: AuditResult) -> Any:
    points = result.reliability
    if not points:
        return None
    confidence, accuracy = (100 * np.array([p[i] for p in points]) for i in (0, 1))
    gap = result.measures.confidence - result.measures.accuracy
    said = (
        "surer than it is right"
        if gap > 0.005
        else "right more often than it is sure"
        if gap < -0.005
        else "as sure as it is right"
    )
    sentence = (
        f"The model is {said} on average: confidence {100 * result.measures.confidence:.1f} %, accuracy "
        f"{100 * result.measures.accuracy:.1f} %. Points below the diagonal are too sure; each point "
        "stands for the same number of rows."
    )

    def draw(axes: Axes) -> None:
        low = max(0.0, min(confidence.min(), accuracy.min()) - 5)
        axes.plot([low, 100], [low, 100], color=FAINT, linewidth=1, linestyle="--")
        axes.plot(confidence, accuracy, "o-", color=BLUE, markersize=4)
        axes.set_xlim(low, 101)
        axes.set_ylim(low, 101)
        axes.set_xlabel("confidence, %")
        axes.set_ylabel("right, %")

    return "How far it can be believed", sentence, draw, 3.6


def _margins(result: AuditResult) -> Any:
    there = [i for i, bar in enumerate(result.margins) if bar.wrong + bar.right > 0]
    if not there:
        return None
    bars = result.margins[there[0] : there[-1] + 1]
    total = sum(bar.wrong + bar.right for bar in bars)
    near = sum(bar.wrong + bar.right for bar in bars if bar.low >= -1 and bar.high <= 1)
    sentence = (
        f"{100 * near / total:.0f} % of the rows lie within one nat of the border between right and "
        "wrong; those "
        "far to the left are surely wrong, or wrongly labelled."
    )

    def draw(axes: Axes) -> None:
        low = [bar.low for bar in bars]
        width = bars[0].high - bars[0].low
        for values, colour in (([b.wrong for b in bars], VERMILION), ([b.right for b in bars], BLUE)):
            axes.bar(low, values, width=width * 0.9, align="edge", color=colour)
        axes.set_xlabel("log p of the class less that of its strongest rival, nats")
        axes.set_ylabel("rows")
        axes.axvline(0, color=FAINT, linewidth=1)
        axes.margins(y=0.15)
        axes.annotate(
            "wrong",
            (0, 1),
            (-8, -12),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right",
            color=VERMILION,
        )
        axes.annotate(
            "right",
            (0, 1),
            (8, -12),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=BLUE,
        )

    return "How near rows are to the border", sentence, draw, 3.2


def _bounds(result: AuditResult) -> Any:
    found = result.bounds
    if found is None:
        return None
    names = {
        "hinge": "triplet loss, margin log C",
        "smooth": "smooth triplet loss, log C",
        "tight": "smooth triplet loss, log (C − 1)",
        "hardest_low": "strongest rival alone",
        "loss": "cross-entropy",
        "hardest_high": "as if all rivals were the strongest",
        "union": "sum of all triplets",
    }
    values = [getattr(found, name) for name in names]
    sentence = (
        "A triplet is a row, its class and one rival; losses of triplets bound the cross-entropy from both "
        f"sides. On {found.rows:,} rows the cross-entropy is {found.loss:.3g} nats, and the strongest rival "
        f"of each row alone gives {found.hardest_low:.3g}."
    )

    def draw(axes: Axes) -> None:
        place = np.arange(len(names))[::-1]
        colours = [VERMILION if name == "loss" else BLUE for name in names]
        axes.hlines(place, 0, values, color=colours, linewidth=1.5)
        axes.scatter(values, place, color=colours, s=28, zorder=3)
        axes.set_yticks(place, list(names.values()), color=INK)
        axes.set_xlim(0, max(values) * 1.15 or 1)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("nats")

    return "Between which bounds it lies", sentence, draw, 2.8


def _height(names: list[str]) -> float:
    return 0.9 + 0.27 * len(names)
