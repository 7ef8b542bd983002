"""The report as a table: a line for each identity, a column for each type. Needs the extra ``cli``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from xent._util.text import printable
from xent.verify.report import Report

TOPICS = {
    1: "the loss and its options",
    2: "numerics",
    3: "likelihood, entropy, divergence",
    4: "first derivatives",
    5: "second derivatives",
    6: "triplets",
    7: "temperature and the log-free surrogate",
}
"""The topic of each section of identities."""


def say(console: Console, report: Report) -> None:
    """Print the table, the identities that do not hold and where, and the data."""
    console.print("largest error of each identity, in units in the last place of what rounding allows\n")
    console.print(_table(report))
    console.print()
    for done in report.failures:
        at = printable(" ".join(done.worst.where.split()))
        text = f"✗ {done.identity.name} in {done.dtype}: {_units(done.worst.units)} at {at}"
        console.print(Text(text, "bold red"))
    broken = {done.identity.name for done in report.failures}
    of = len(report.identities)
    said = f"{len(broken)} of {of} do not hold" if broken else f"all {of} hold"
    console.print(f"{said} in {' and '.join(report.dtypes)} on {report.device}; {report.seconds:.1f} s")
    console.print("; ".join(report.data))
    if report.missing:
        console.print(f"not checked on {report.missing}", markup=False)


def _table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("identity", no_wrap=True)
    table.add_column("formula")
    table.add_column("allowed", justify="right")
    for dtype in report.dtypes:
        table.add_column(dtype, justify="right", no_wrap=True)
    topic = 0
    for identity in report.identities:
        if identity.section != topic:
            topic = identity.section
            table.add_row(Text(TOPICS[topic], "bold"))
        cells = [
            Text(f"{_units(done.worst.units)} {'✓' if done.holds else '✗'}", "" if done.holds else "bold red")
            for done in report.of(identity)
        ]
        allowed = f"{identity.allowed:g}"
        table.add_row(Text(f"  {identity.name}"), Text(identity.formula), allowed, *cells)
    return table


def _units(units: float) -> str:
    return f"{units:.2f}" if units < 1000 else f"{units:.1e}"
