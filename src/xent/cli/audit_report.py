"""The result of an audit in a terminal: sentences first, then the tables behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from xent._util.text import counted, printable
from xent.auditing.records import RowMeasures
from xent.auditing.result import AuditResult
from xent.auditing.sentences import sentences, short
from xent.cli.grid import grid

SHOWN = 8
"""Rows of each table."""


def pieces(
    result: AuditResult, compared: dict[str, Any] | None, against: dict[str, Any] | None
) -> Iterator[Any]:
    """Yield the texts and tables of the screen."""
    yield Text(f"{printable(result.source)}: {counted(result.count, 'row')}, {result.classes:,} classes")
    yield ""
    for sentence in sentences(result):
        yield Text(sentence[0].upper() + sentence[1:] + ".")
    if against is not None:
        yield from _against(against)
    if compared is not None:
        yield from _compared(result, compared)
    yield ""
    yield _numbers(result)
    yield from _classes(result)
    yield from _pairs(result)
    yield from _rows("the labels that look most wrong", result.suspect_rows)
    yield from _rows("the largest losses", result.worst)


def _numbers(result: AuditResult) -> Any:
    found = result.measures
    made = grid("", "", "")
    made.show_header = False
    amount = "infinite" if found.miscalibration is None else f"{found.miscalibration:.4f} nats"
    made.add_row("miscalibration", amount, "of the confidence; 0 is best")
    made.add_row("discrimination", f"{found.discrimination:.4f} nats", f"of at most {found.uncertainty:.4f}")
    made.add_row("Brier score", f"{found.brier:.4f}", "")
    missing = "−infinite" if result.infinite_rows else "not defined"
    amount = missing if found.d2 is None else f"{found.d2:.4f}"
    made.add_row("D²", amount, "1 − loss / loss of knowing frequencies")
    for k, value in list(result.top_k.items())[1:4]:
        made.add_row(f"right among {k}", f"{100 * value:.2f} %", "")
    return made


def _classes(result: AuditResult) -> Iterator[Any]:
    rows = sorted(result.per_class, key=lambda row: -row.share)
    shown = [row for row in rows if row.rows][:SHOWN]
    if not shown:
        return
    yield ""
    yield Text("the classes that carry most")
    made = grid("class", "rows", "loss", "share", "recall", "precision", "miscalibration")
    for row in shown:
        made.add_row(
            Text(short(row.name)),
            f"{row.rows:,}",
            _number(row.loss, ".4f"),
            f"{100 * row.share:.1f} %",
            _percent(row.recall),
            _percent(row.precision),
            "" if row.calibration is None else f"{row.calibration.miscalibration:.4f}",
        )
    yield made


def _pairs(result: AuditResult) -> Iterator[Any]:
    if not result.pairs:
        return
    yield ""
    yield Text("the pairs that carry most: a class and its rival")
    made = grid("class", "rival", "nats", "share")
    for pair in result.pairs[:SHOWN]:
        made.add_row(
            Text(short(pair.name)), Text(short(pair.rival)), f"{pair.loss:.4f}", f"{100 * pair.share:.1f} %"
        )
    yield made


def _rows(title: str, rows: list[RowMeasures]) -> Iterator[Any]:
    if not rows:
        return
    yield ""
    yield Text(title)
    made = grid("row", "label", "p", "predicted", "p", "loss")
    for row in rows[:SHOWN]:
        name = f"{row.row:,}" if row.id is None else short(str(row.id))
        made.add_row(
            Text(name),
            Text(short(row.label)),
            f"{row.probability:.2g}",
            Text(short(row.prediction)),
            f"{row.confidence:.2g}",
            "infinite" if row.loss is None else f"{row.loss:.2f}",
        )
    yield made


def _against(found: dict[str, Any]) -> Iterator[Any]:
    yield ""
    if found["difference"] is None:
        yield Text(f"Against {printable(found['source'])}: no row has a finite loss in both.")
        return
    word = "higher" if found["difference"] > 0 else "lower" if found["difference"] < 0 else "apart"
    ends = (
        ""
        if found["low"] is None
        else f" (95 % of the difference: {found['low']:+.4g} to {found['high']:+.4g})"
    )
    yield Text(
        f"Against {printable(found['source'])} the loss is {abs(found['difference']):.4g} nats {word}{ends}; "
        f"it is higher in {counted(found['higher_rows'], 'row')} and lower in {found['lower_rows']:,}."
    )
    yield ""
    yield Text("the classes that moved most: their loss here less that there")
    made = grid("class", "nats")
    for row in found["per_class"][:SHOWN]:
        made.add_row(Text(short(row["name"])), f"{row['difference']:+.4f}")
    yield made


def _compared(result: AuditResult, found: dict[str, Any]) -> Iterator[Any]:
    yield ""
    own = result.to_dict()["measures"]
    made = grid(f"beside {short(found['source'])}", "here", "there", "difference")
    for name, difference in found["differences"].items():
        made.add_row(
            name.replace("_", " "), f"{own[name]:.6g}", f"{found['measures'][name]:.6g}", f"{difference:+.3g}"
        )
    yield made


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
