"""``xent predict``: the probabilities of a model for the rows of a file."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xent._processes.group import Ranks
from xent._processes.start import join
from xent._util.atomic_write import check_file, check_writable, folder
from xent._util.text import json_text, printable, quoted
from xent.cli.grouped import GroupedCommand
from xent.cli.options import column_names, keep_inputs
from xent.cli.options import timeout as timeout_option
from xent.cli.reading_options import NAMES, check_standard_input, reading_options
from xent.data.layout import Layout, spooled
from xent.errors import BadInput

if TYPE_CHECKING:
    from xent.cli.predict_job import Scored
    from xent.data.model_file import Model
    from xent.report.prediction_file import PredictionFile

STANDARD_OUTPUT = Path("-")

GROUPS = {
    "Common options": ["--output", "--label", "--keep", "--top", "--skip-bad"],
    "Files": NAMES,
    "Machine": ["--timeout"],
    "Output": ["--lines", "--json", "--quiet", "--help"],
}


@dataclasses.dataclass(frozen=True)
class Done:
    """The end of a prediction, as it is reported."""

    source: str
    rows: int
    scored: Scored | None
    label: str | None
    unknown_categories: dict[str, int]
    skipped: int = 0
    first_skipped: Sequence[int] = ()


@click.command(cls=GroupedCommand, groups=GROUPS)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help=".parquet, .csv or .jsonl; - is standard output, as CSV.",
)
@click.option("--label", metavar="COLUMN", help="The column of labels, if its name is not that in the model.")
@click.option(
    "--keep", callback=column_names, metavar="A,B", help="Columns of DATA to copy before the predictions."
)
@click.option(
    "--top",
    type=click.IntRange(1),
    metavar="K",
    help="Write the K most probable classes of each row instead of a column for each class.",
)
@click.option(
    "--skip-bad",
    is_flag=True,
    help="Leave out rows that cannot be predicted, and print how many. The others are written "
    "with their row numbers.",
)
@click.option("--lines", is_flag=True, help="With -o -: write one JSON object a line instead of CSV.")
@timeout_option
@reading_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def predict(
    model: Path,
    data: tuple[Path, ...],
    output: Path,
    label: str | None,
    keep: tuple[str, ...],
    top: int | None,
    skip_bad: bool,
    lines: bool,
    timeout: float,
    layout: Layout,
    form: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the probability of every class, and the most probable class, for each row of DATA.

    If DATA has labels, the command also prints the share of right predictions and the loss. It is an error
    if the model knows none of the labels. Several files, a pattern or a folder are read as one table; - is
    standard input. Rows are written as they are read, so that memory does not grow with the file. A command
    that fails leaves no file; on standard output, the rows before a bad one have been written.

    \b
    xent predict xent-model/model.safetensors flowers.csv -o predictions.parquet
    xent predict m.safetensors rows.parquet -o - --keep id --top 3 --skip-bad
    """
    from xent.cli import predict_job as job
    from xent.data import model_file
    from xent.report.prediction_file import PredictionFile, check_suffix

    printed = output == STANDARD_OUTPUT
    if lines and not printed:
        raise click.UsageError("--lines is of standard output, -o -; files are called .jsonl")
    if printed and as_json:
        raise click.UsageError("--json prints to standard output, where -o - writes the predictions")
    with join(timeout) as ranks, spooled(data, form) as files:
        with ranks.raise_together():
            check_suffix(output)
            check_standard_input(data, ranks.size)
            _check_together(ranks, printed, keep, top, skip_bad)
            if not printed:
                check_file(output)
                keep_inputs(output, model, *files, *([Path(label)] if label else []))
                if ranks.is_main:
                    check_writable(output.parent)
            fitted = model_file.load(model)
            job.check_output(fitted, model, keep, top, skip_bad)
        ranks.check_equal(f"model in {model}", fitted.fingerprint)
        wanted = model_file.wanted_for(fitted, model, label, layout, skip_bad)
        if ranks.size > 1:
            done = _shared(fitted, model, files, label, layout, output, ranks)
        else:

            def opened(before: Sequence[Any]) -> PredictionFile:
                return PredictionFile(fitted, output, before, top, ".jsonl" if lines else ".csv")

            source = str(data[0]) if len(data) == 1 else f"{data[0]} and {len(data) - 1} more"
            with contextlib.nullcontext() if printed else folder(output.parent):
                found = job.predict_streaming(fitted, files, wanted, keep, opened, source)
            done = Done(
                source,
                found.rows,
                found.scored,
                label or found.label_name,
                dict(found.unknown_categories),
                found.skipped,
                found.first_skipped,
            )
    if ranks.is_main:
        _report(done, len(fitted.classes), output, as_json, quiet, printed)


def _check_together(
    ranks: Ranks, printed: bool, keep: Sequence[str], top: int | None, skip_bad: bool
) -> None:
    """Raise ``BadInput`` for what one process alone does."""
    alone = {"-o -": printed, "--keep": bool(keep), "--top": top is not None, "--skip-bad": skip_bad}
    for option, given in alone.items():
        if given and ranks.size > 1:
            raise BadInput(f"{option} is done by one process; run it without torchrun")


def _shared(
    fitted: Model,
    model: Path,
    files: Sequence[Path],
    label: str | None,
    layout: Layout,
    output: Path,
    ranks: Ranks,
) -> Done:
    """Write the predictions of several processes, each for its share of the rows."""
    from xent.cli import predict_job as job
    from xent.report import predictions

    table = job.read_for(fitted, model, files, label, ranks, layout)
    scored = job.score(fitted, table, ranks)
    unknown: dict[str, int] = dict(sum((Counter(own) for own in ranks.gather(table.unknown)), Counter()))
    rows = int(ranks.sum(table.rows.shape[0]))
    with contextlib.ExitStack() as stack:
        with ranks.raise_together():
            if ranks.is_main:
                stack.enter_context(folder(output.parent))
        predictions.write_predictions(fitted, table, output, ranks=ranks)
    return Done(table.source, rows, scored, label or table.label_name, unknown)


def _report(done: Done, classes: int, output: Path, as_json: bool, quiet: bool, printed: bool) -> None:
    """Print what was predicted; to stderr where the predictions are on standard output."""
    scored = done.scored
    if as_json:
        about: dict[str, Any] = {
            "source": done.source,
            "rows": done.rows,
            "evaluation": None if scored is None else scored.evaluation.summary(),
            "file": str(output),
            "unknown_categories": done.unknown_categories,
            "skipped_rows": done.skipped,
        }
        if scored is not None:
            about |= {"unlabelled": scored.unlabelled, "unknown_labels": scored.unknown}
        click.echo(json_text(about))
        return
    if quiet:
        return
    where = "standard output" if printed else printable(str(output))
    click.echo(f"{done.rows:,} rows, {classes} classes: {where}", err=printed)
    for line in _sentences(done):
        click.echo(printable(line), err=printed)


def _sentences(done: Done) -> Sequence[str]:
    said = []
    if done.skipped:
        first = ", ".join(f"{row:,}" for row in done.first_skipped)
        more = ", ..." if done.skipped > len(done.first_skipped) else ""
        said.append(f"left out: {done.skipped:,} rows that cannot be predicted: {first}{more}")
    if done.unknown_categories:
        shown = ", ".join(f"{name} in {count:,} rows" for name, count in done.unknown_categories.items())
        said.append(f"unknown categories: {shown}")
    if (scored := done.scored) is not None:
        judged = scored.evaluation
        said.append(
            f"against {done.label!r}: accuracy {100 * judged.accuracy:.2f} %, loss {judged.loss:.4f} nats"
        )
        left_out = [f"{scored.unlabelled:,} without a label"] if scored.unlabelled else []
        left_out += [f"{n:,} labelled {quoted(text)}" for text, n in list(scored.unknown.items())[:3]]
        if left_out:
            more = " ..." if len(scored.unknown) > 3 else ""
            said.append(f"left out of that: rows {', '.join(left_out)}{more}")
    return said
