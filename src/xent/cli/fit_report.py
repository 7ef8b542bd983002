"""The end of a fit as `xent fit` prints it: a table and sentences, or one JSON object."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xent._util.text import class_text, json_text, printable
from xent.cli.grid import grid
from xent.cli.output import complain

if TYPE_CHECKING:
    from xent.cli.calibration import Calibration
    from xent.cli.fit_job import Fitted
    from xent.report.evaluation import Evaluation

MOST, SHOWN = 10, 6
"""Classes, and names of columns, that are printed of many."""


def report(
    fitted: Fitted, tol: float, source: str, paths: list[Path], out: Path, as_json: bool, quiet: bool
) -> None:
    """Print how the fit ended, as a table or as JSON."""
    if not fitted.converged and not fitted.interrupted and not quiet:
        complain(
            f"not converged in {fitted.iterations} iterations: {_reached(fitted)} is above --tol {tol:g}: "
            f"{fitted.advice}"
        )
    if as_json:
        files = [str(path) for path in paths]
        click.echo(json_text({"source": source, **fitted.summary(), "files": files}))
    elif not quiet:
        _print_fit(fitted, source, paths, out)


def _print_fit(fitted: Fitted, source: str, paths: list[Path], out: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    with console.capture() as printed:  # printed by click: rich ends the process, with 1, on a closed pipe
        _say_fit(console, fitted, source, paths, out)
    click.echo(printed.get(), nl=False)


def _say_fit(console: Console, fitted: Fitted, source: str, paths: list[Path], out: Path) -> None:
    parts = [("training", fitted.training)]
    if fitted.validation is not None:
        parts.append(("validation", fitted.validation))
    judged = parts[-1]
    if fitted.test is not None:
        parts.append(("test", fitted.test))
    about = f"{source}: {len(fitted.model.classes)} classes, {len(fitted.model.feature_names)} features"
    console.print(Text(printable(about)))
    for line in _of_columns(fitted):
        console.print(Text(printable(line)))
    console.print()
    console.print(_figures(parts))
    console.print()
    if len(fitted.model.classes) > 2 or fitted.judged.accuracy < 1:
        for piece in _of_classes(fitted, *judged):
            console.print(piece)
    how = "converged" if fitted.converged else "interrupted" if fitted.interrupted else "not converged"
    console.print(
        f"{how} after {fitted.iterations} iterations in {fitted.seconds:.2f} s, "
        f"{_reached(fitted)} (tol {fitted.model.settings['tol']:g})"
    )
    if (path := fitted.strengths) is not None:
        edge = ", an end of the path: a wider one may hold a better" if path.at_an_end else ""
        console.print(
            f"l2 {path.l2[path.best]:.3g} is the best of {len(path.l2)} on the validation rows{edge}; "
            "the model in the file is fitted at it to all rows, and the figures above are of the one before: "
            "only rows of --test can judge it"
        )
    if fitted.calibration is not None:
        console.print(Text(_of_temperature(fitted.calibration)))
    if fitted.test_unknown:
        console.print(
            Text(printable(f"left out of test: labels that are no class, {_shown(fitted.test_unknown)}"))
        )
    names = [printable(class_text(value)[:60]) for value in fitted.model.classes]
    confused = fitted.judged.most_confused(3)
    console.print(f"most confused on {judged[0]} rows{':' if confused else ': none'}")
    for a, b, ab, ba, rows in confused:
        back = f", {names[b]} taken for {names[a]} {_times(ba)}" if ba else ""
        console.print(Text(f"  {names[a]} taken for {names[b]} {_times(ab)}{back} (of {rows} rows)"))
    console.print(Text(f"\nin {printable(str(out))}/: " + ", ".join(path.name for path in paths)))


def _figures(parts: Sequence[tuple[str, Evaluation]]) -> Table:
    """Return the figures of the training, validation and test rows, side by side."""
    made = grid("", *(name for name, _ in parts))
    made.add_row("rows", *(f"{part.rows:,}" for _, part in parts))
    made.add_row("loss", *(f"{part.loss:.4f} nats" for _, part in parts))
    knowing = ("" if part.baseline is None else f"{part.baseline:.4f} nats" for _, part in parts)
    made.add_row("  knowing only class frequencies", *knowing)
    made.add_row("accuracy", *(f"{100 * part.accuracy:.2f} %" for _, part in parts))
    made.add_row("macro F1", *(f"{100 * part.macro_f1:.2f} %" for _, part in parts))
    return made


def _of_columns(fitted: Fitted) -> Iterator[str]:
    """Yield which columns are used, which are not and why, and how many rows are left out."""
    encoding = fitted.model.encoding
    numbers = fitted.model.feature_names if encoding is None else encoding.numbers
    used = _by_column(numbers, fitted.model.lists)
    if encoding is not None:
        used += [f"{name} ({len(values)} categories)" for name, values in encoding.categories.items()]
    if fitted.model.width is None:
        more = f" and {len(used) - SHOWN} more" if len(used) > SHOWN else ""
        yield f"used: {', '.join(used[:SHOWN])}{more}"
    if unused := fitted.unused:
        yield f"not used: {_shown(unused)}"
    if fitted.dropped:
        yield f"dropped: {fitted.dropped:,} rows that lack a value"
    if encoding is not None and encoding.gaps:
        yield f"imputed, with an indicator: {', '.join(encoding.gaps[:SHOWN])}"


def _by_column(names: Sequence[str], lists: Container[str]) -> list[str]:
    """Return the columns that features lie in, of lists with how many numbers of each."""
    bases = [name.rpartition("[")[0] for name in names]
    bases = [base if base in lists else "" for base in bases]
    found = []
    for base, group in itertools.groupby(zip(names, bases, strict=True), key=lambda pair: pair[1] or pair[0]):
        count = len(list(group))
        found.append(base if count == 1 else f"{base} ({count} numbers)")
    return found


def _of_classes(fitted: Fitted, name: str, judged: Evaluation) -> Iterator[Any]:
    """Yield the figures of each class, of many the ones of least F1."""
    rows = judged.classes(fitted.model.classes)
    shown = rows
    if len(rows) > MOST:
        shown = sorted(rows, key=lambda row: row["f1"])[:MOST]
        yield f"the {MOST} classes of {len(rows)} with the lowest F1, on {name} rows"
    made = grid("class" if len(rows) <= MOST else "", "rows", "loss", "precision", "recall", "F1")
    for row in shown:
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        shares = (f"{100 * row[key]:.1f} %" for key in ("precision", "recall", "f1"))
        made.add_row(Text(printable(row["class"][:60])), f"{row['rows']:,}", loss, *shares)
    yield made
    yield ""


def _of_temperature(found: Calibration) -> str:
    if found.why_not:
        return f"no temperature was fitted: {found.why_not}"
    before, after = found.before, found.after
    return (
        f"temperature {found.temperature:.4g} by the validation rows: their loss {before.loss:.4f} → "
        f"{after.loss:.4f} nats, calibration error {100 * before.calibration_error:.2f} → "
        f"{100 * after.calibration_error:.2f} %"
    )


def _shown(about: Mapping[str, object], most: int = SHOWN) -> str:
    """Return names with what is said of them, cut where they are many."""
    named = ((name.strip() or "the column without a name", what) for name, what in about.items())
    items = [f"{name} ({what})" for name, what in itertools.islice(named, most)]
    return ", ".join(items) + (f" and {len(about) - most} more" if len(about) > most else "")


def _reached(fitted: Fitted) -> str:
    """Return the number that ``--tol`` bounds, with its name."""
    if fitted.model.settings["stopping"] == "gradient":
        return f"gradient {fitted.gradient_norm:.1e}"
    return f"objective at most {fitted.gap.relative:.1e} (relative) above its minimum by the {fitted.gap.by}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
