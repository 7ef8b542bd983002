"""The job of ``xent audit``: one sweep or two over some files, the measures of all ranks merged."""

from __future__ import annotations

import contextlib
import functools
import json
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from xent._processes.group import Ranks
from xent._util.atomic_write import atomic_write
from xent._util.text import quoted
from xent.auditing.files import Faults, Files
from xent.auditing.form import formed
from xent.auditing.paired import paired
from xent.auditing.result import VERSION, AuditResult
from xent.auditing.row_table import row_table
from xent.auditing.rows import MeasuredRows
from xent.auditing.sweeps import FirstSweep, SecondSweep
from xent.auditing.threads import Threads, threads
from xent.cli.progress import Progress, rows_about
from xent.errors import BadInput

Sweep = TypeVar("Sweep", FirstSweep, SecondSweep)

OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


def run(
    files: Files, ranks: Ranks, *, sweeps: int, worst: int, rows: Path | None = None, quiet: bool = False
) -> AuditResult:
    """Return the audit of some files; write each row's measures where a file is named."""
    ranks.check_equal(f"view of {files.source}", (files.kind, files.names))
    total = 0 if quiet else rows_about(files.paths) // ranks.share.count
    with contextlib.ExitStack() as stack, threads(sys.maxsize) as each:
        write = None if rows is None else stack.enter_context(_row_file(rows, files.names))
        first = FirstSweep(len(files.names), worst)
        with ranks.raise_together():
            _sweep(
                first,
                files,
                ranks,
                Progress(f"sweep 1 of {sweeps}", total, not quiet and ranks.is_main),
                write,
                each,
            )
        first = _merged(first, ranks)
        if not first.mean_loss.rows:
            raise BadInput(f"{files.source}: there are no rows")
        if not first.totals.total > 0:
            raise BadInput(f"{files.source}: every row has weight 0 in {quoted(files.columns.weight)}")
    second = None
    if sweeps == 2:
        second = SecondSweep(first)
        with ranks.raise_together(), threads(sys.maxsize) as each:
            total = first.mean_loss.rows // ranks.share.count
            progress = Progress("sweep 2 of 2", total, not quiet and ranks.is_main)
            _sweep(second, files, ranks, progress, None, each)
        second = _merged(second, ranks)
    return formed(first, second, files.names, files.source)


def _sweep(
    sweep: FirstSweep | SecondSweep,
    files: Files,
    ranks: Ranks,
    progress: Progress,
    write: Any,
    each: Threads,
) -> None:
    """Add this rank's share of the rows to the measures."""
    try:
        for batch in files.batches(Faults(), ranks.share, each):
            ranks.check_interrupt()
            rows = sweep.update(batch, each)
            if write is not None and isinstance(rows, MeasuredRows):
                write(row_table(rows, files.names, batch.ids, batch.length))
            progress.add(len(rows))
    finally:
        progress.end()


def _merged(own: Sweep, ranks: Ranks) -> Sweep:
    """Return the measures of all ranks, on every rank."""
    parts = ranks.gather(own)

    def both(one: Sweep, other: Sweep) -> Sweep:
        one.merge(other)
        return one

    return functools.reduce(both, parts)


@contextlib.contextmanager
def _row_file(path: Path, names: Sequence[str]) -> Iterator[Callable[[Any], None]]:
    """Open a Parquet file of rows, whole when the block ends."""
    from pyarrow import parquet

    writer: Any = None
    with atomic_write(path) as temporary:

        def write(table: Any) -> None:
            nonlocal writer
            if writer is None:
                writer = parquet.ParquetWriter(temporary, table.schema)
            writer.write_table(table.cast(writer.schema))

        try:
            yield write
        finally:
            if writer is not None:
                writer.close()


def check_measures(wanted: Sequence[tuple[str, str, float]], classes: int) -> None:
    """Raise ``BadInput`` for the accuracy among as many classes as there are, or more."""
    for name, _, _ in wanted:
        top = re.fullmatch(r"top_(\d+)_accuracy", name)
        if top and int(top[1]) >= classes:
            raise BadInput(f"--fail-on {name}: there are {classes} classes, among which every label is")


def thresholds(texts: Sequence[str], sweeps: int) -> list[tuple[str, str, float]]:
    """Return measure, operator and number of each ``--fail-on``; raise ``BadInput`` for another text."""
    from xent.auditing.records import Measures
    from xent.auditing.totals import TOP

    names = [*Measures.__dataclass_fields__, *(f"top_{k}_accuracy" for k in TOP[1:])]
    found = []
    for text in texts:
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*", text)
        try:
            number = float(match[3]) if match else None
        except ValueError:
            number = None
        if match is None or number is None:
            raise BadInput(f"--fail-on {quoted(text)} is no measure, sign and number, such as 'log_loss>0.5'")
        if match[1] not in names:
            raise BadInput(f"--fail-on: there is no measure {quoted(match[1])}; there are {', '.join(names)}")
        if sweeps < 2 and match[1].startswith(("temperature", "suspects")):
            raise BadInput(f"--fail-on {match[1]} takes a second sweep, which --sweeps 1 leaves out")
        found.append((match[1], match[2], number))
    return found


def crossed(result: AuditResult, wanted: Sequence[tuple[str, str, float]]) -> list[str]:
    """Return what the thresholds say that are crossed; a loss that is infinite is above any number."""
    said = []
    for name, sign, bound in wanted:
        top = re.fullmatch(r"top_(\d+)_accuracy", name)
        value = result.top_k.get(int(top[1])) if top else getattr(result.measures, name)
        if (
            value is None
            and result.infinite_rows
            and name in ("log_loss", "low", "high", "d2", "miscalibration")
        ):
            value = float("-inf") if name == "d2" else float("inf")
        if value is None:
            raise BadInput(f"--fail-on {name}: these rows have no such measure, so it cannot be compared")
        if OPERATORS[sign](value, bound):
            said.append(f"{name} is {value:.6g}, {sign} {bound:g}")
    return said


def earlier(path: Path) -> dict[str, Any]:
    """Return another audit's JSON; raise ``BadInput`` for another file."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["schema"] != "xent.audit" or not isinstance(about["measures"], dict):
            raise KeyError
        version = int(about["version"])
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file (--compare)") from None
    except OSError as error:
        raise BadInput(f"{path}: {os.strerror(error.errno or 0)} (--compare)") from None
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        raise BadInput(f"{path}: is not what `xent audit --json` writes (--compare)") from None
    if version > VERSION:
        raise BadInput(f"{path}: is of version {version}, this xent reads up to {VERSION}; upgrade xent")
    return dict(about)


def compared(result: AuditResult, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return another audit's measures, and this one's less those."""
    own = result.to_dict()["measures"]
    theirs = {name: float(value) for name, value in about["measures"].items() if _is_number(value)}
    return {
        "source": str(about.get("source")),
        "measures": {name: theirs.get(name) for name in own},
        "differences": {
            name: own[name] - theirs[name] for name in own if name in theirs and _is_number(own[name])
        },
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def against(first: Files, second: Files, name: Path) -> dict[str, Any]:
    """Return the comparison of two models on the same rows; ``name`` is what ``--against`` names."""
    return paired(first, second).to_dict(str(name), first.names)
