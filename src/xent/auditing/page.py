"""The result of an audit as one page of HTML that loads nothing from elsewhere, and as a table in a notebook.

Every name of a class is text: the template escapes it, and a control character is shown as its escape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xent._util import html
from xent._util.atomic_write import atomic_write, check_file
from xent._util.text import counted, printable
from xent.auditing.records import RowMeasures
from xent.auditing.sentences import headline, sentences, short
from xent.errors import needs

if TYPE_CHECKING:
    from xent.auditing.result import AuditResult

MOST_CLASSES, MOST_PAIRS, MOST_ROWS = 500, 100, 200
"""Rows of the tables of a page."""


class Cell(NamedTuple):
    """A cell of a table: what is read, and what it is sorted by."""

    text: str
    value: str


class Table(NamedTuple):
    """A table of the page."""

    title: str
    note: str
    columns: Sequence[str]
    text: Sequence[int]  # columns that are flush left
    rows: list[list[Cell]]


def write_page(
    result: AuditResult,
    path: Path,
    compared: Mapping[str, Any] | None = None,
    against: Mapping[str, Any] | None = None,
) -> None:
    """Write the page, whole or not at all, with comparisons as ``xent audit --json`` has them."""
    text = page(result, [*_against(against), *_compared(result, compared)])
    check_file(path)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(result: AuditResult, first: Sequence[Table] = ()) -> str:
    """Return the page, other tables before its own; raise ``MissingExtra`` without Jinja or Matplotlib."""
    with needs("report"):
        import jinja2

        from xent.auditing.charts import charts

        drawn = list(charts(result))
    template = resources.files("xent.auditing").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        result=_Printable(result),
        said=sentences(result),
        cards=_cards(result),
        charts=drawn,
        tables=[*first, *_tables(result)],
        version=metadata.version("xent"),
    )


class _Printable:
    """The parts of a result that the template names itself."""

    def __init__(self, result: AuditResult) -> None:
        self.source, self.count, self.classes = printable(result.source), result.count, result.classes


def _cards(result: AuditResult) -> list[tuple[str, str]]:
    found = result.measures
    cards = [
        ("loss, nats", _text(found.log_loss, ".4g", "∞")),
        ("loss of knowing frequencies alone", f"{found.label_entropy:.4g}"),
        ("accuracy", f"{100 * found.accuracy:.2f} %"),
        ("miscalibration, nats", _text(found.miscalibration, ".3g", "∞")),
        ("Brier score", f"{found.brier:.4g}"),
    ]
    if found.temperature is not None and found.temperature_saving is not None:
        cards.append((f"saved by temperature {found.temperature:.3g}", f"{found.temperature_saving:.3g}"))
    if found.suspects is not None:
        cards.append(("labels look wrong", f"{found.suspects:,}"))
    return cards


def _tables(result: AuditResult) -> list[Table]:
    found = []
    classes = sorted(result.per_class, key=lambda row: -row.share)
    shown = [row for row in classes if row.rows][:MOST_CLASSES]
    if shown:
        rows = [
            [
                _name(row.name),
                _cell(row.rows, ","),
                _cell(row.loss, ".4f"),
                _cell(100 * row.share, ".1f"),
                _cell(_times(row.recall), ".1f"),
                _cell(_times(row.precision), ".1f"),
                _cell(None if row.calibration is None else row.calibration.miscalibration, ".4f"),
            ]
            for row in shown
        ]
        columns = ("class", "rows", "loss", "share of loss, %", "recall, %", "precision, %", "miscalibration")
        note = "Miscalibration is of the class against the rest, in nats." + _of(
            len(shown), result.classes, "classes"
        )
        found.append(Table("Classes", note, columns, (0,), rows))
    if result.pairs:
        pairs = result.pairs[:MOST_PAIRS]
        rows = [
            [_name(p.name), _name(p.rival), _cell(p.loss, ".4g"), _cell(100 * p.share, ".1f")] for p in pairs
        ]
        note = "What a class and a rival carry of the mean loss; all pairs add up to it." + _of(
            len(pairs), result.classes * (result.classes - 1), "pairs"
        )
        found.append(Table("Pairs", note, ("class", "rival", "nats", "share of loss, %"), (0, 1), rows))
    for title, note, listed in (
        (
            "Labels that look wrong",
            "The rows whose loss another label would lower most, as many as there may be. Look before you "
            "change one: where classes overlap, a row that looks wrong may only be hard.",
            result.suspect_rows,
        ),
        ("Largest losses", "The rows that cost most.", result.worst),
    ):
        if listed:
            part = listed[:MOST_ROWS]
            columns = ("row", "label", "its p", "predicted", "its p", "loss", "nats less with it")
            found.append(
                Table(
                    title,
                    note + _of(len(part), len(listed), "rows"),
                    columns,
                    (0, 1, 3),
                    list(map(_row, part)),
                )
            )
    return found


def _row(row: RowMeasures) -> list[Cell]:
    name = Cell(f"{row.row:,}", str(row.row)) if row.id is None else _name(str(row.id))
    return [
        name,
        _name(row.label),
        _cell(row.probability, ".3g"),
        _name(row.prediction),
        _cell(row.confidence, ".3g"),
        _cell(row.loss if row.loss is not None else math.inf, ".3f"),
        _cell(row.saving if row.saving is not None else math.inf, ".3f"),
    ]


def _against(found: Mapping[str, Any] | None) -> list[Table]:
    """Return the comparison with another model on the same rows as a table."""
    if found is None or found["difference"] is None:
        return []
    ends = "" if found["low"] is None else f" (95 %: {found['low']:+.4g} to {found['high']:+.4g})"
    note = (
        f"The loss here less that there is {found['difference']:+.4g} nats{ends}: it is higher in "
        f"{counted(found['higher_rows'], 'row')} and lower in {counted(found['lower_rows'], 'row')}."
    )
    shown = found["per_class"][:MOST_CLASSES]
    rows = [[_name(row["name"]), _cell(row["difference"], "+.4f")] for row in shown]
    note += _of(len(shown), len(found["per_class"]), "classes")
    return [Table(f"Against {printable(found['source'])}", note, ("class", "nats"), (0,), rows)]


def _compared(result: AuditResult, found: Mapping[str, Any] | None) -> list[Table]:
    """Return the comparison with an earlier audit as a table."""
    if found is None:
        return []
    own = result.to_dict()["measures"]
    rows = [
        [
            _name(name.replace("_", " ")),
            _cell(own[name], ".6g"),
            _cell(found["measures"][name], ".6g"),
            _cell(difference, "+.3g"),
        ]
        for name, difference in found["differences"].items()
    ]
    columns = ("measure", "here", "there", "difference")
    return [Table(f"Beside {short(found['source'])}", "Here less there.", columns, (0,), rows)]


def summary_html(result: AuditResult) -> str:
    """Return the result as a small table for a notebook."""
    return html.table(headline(result), (), _cards(result))


def _of(shown: int, there: int, what: str) -> str:
    return f" The first {shown:,} of {there:,} {what}." if shown < there else ""


def _name(name: str) -> Cell:
    text = short(name, 120)
    return Cell(text, text)


def _cell(value: float | None, form: str) -> Cell:
    if value is None:
        return Cell("", "")
    if math.isinf(value):
        return Cell("∞", "Infinity")
    return Cell(format(value, form), repr(float(value)))


def _text(value: float | None, form: str, otherwise: str) -> str:
    return otherwise if value is None else format(value, form)


def _times(value: float | None) -> float | None:
    return None if value is None else 100 * value
