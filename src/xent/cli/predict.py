"""``xent predict``: the probabilities of a model for the rows of a file."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xent._processes.start import join
from xent._util.atomic_write import check_file, check_writable, folder
from xent._util.text import json_text, printable, quoted
from xent.cli.options import keep_inputs
from xent.cli.options import timeout as timeout_option
from xent.cli.reading_options import check_standard_input, reading_options
from xent.data.layout import Layout, spooled

if TYPE_CHECKING:
    from xent.cli.predict_job import Scored


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help=".parquet or .csv.")
@click.option(
    "--label", metavar="COLUMN", help="Where the labels are, if not under the name the model was fitted on."
)
@timeout_option
@reading_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def predict(
    model: Path,
    data: tuple[Path, ...],
    output: Path,
    label: str | None,
    timeout: float,
    layout: Layout,
    form: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the probability of every class, and the most probable one, for each row of DATA.

    Where DATA has labels, it also says how many are predicted; that none of them is known is an error.
    Several files, or a folder of them, are one table.

    \b
    xent predict xent-model/model.safetensors flowers.csv -o predictions.parquet
    """
    from xent.cli import predict_job as job
    from xent.data import model_file
    from xent.report import predictions

    with join(timeout) as ranks, spooled(data, form) as files:
        with ranks.raise_together():
            predictions.check_suffix(output)
            check_file(output)
            check_standard_input(data, ranks.size)
            keep_inputs(output, model, *files, *([Path(label)] if label else []))
            if ranks.is_main:
                check_writable(output.parent)
            fitted = model_file.load(model)
        ranks.check_equal(f"model in {model}", fitted.fingerprint)
        table = job.read_for(fitted, model, files, label, ranks, layout)
        scored = job.score(fitted, table, ranks)
        unknown: dict[str, int] = dict(sum((Counter(own) for own in ranks.gather(table.unknown)), Counter()))
        rows = int(ranks.sum(table.rows.shape[0]))
        with contextlib.ExitStack() as stack:
            with ranks.raise_together():
                if ranks.is_main:
                    stack.enter_context(folder(output.parent))
            predictions.write_predictions(fitted, table, output, ranks=ranks)
    if not ranks.is_main:
        return
    if as_json:
        found = None if scored is None else scored.evaluation.summary()
        about = {"source": table.source, "rows": rows, "evaluation": found, "file": str(output)}
        about["unknown_categories"] = unknown
        if scored is not None:
            about |= {"unlabelled": scored.unlabelled, "unknown_labels": scored.unknown}
        click.echo(json_text(about))
    elif not quiet:
        _print_predict(rows, len(fitted.classes), scored, label or table.label_name, output)
        if unknown:
            shown = ", ".join(f"{name} in {count:,} rows" for name, count in unknown.items())
            click.echo(printable(f"unknown categories: {shown}"))


def _print_predict(rows: int, classes: int, scored: Scored | None, label: str | None, output: Path) -> None:
    click.echo(f"{rows:,} rows, {classes} classes: {printable(str(output))}")
    if scored is None:
        return
    done = scored.evaluation
    click.echo(f"against {label!r}: accuracy {100 * done.accuracy:.2f} %, loss {done.loss:.4f} nats")
    left_out = [f"{scored.unlabelled:,} without a label"] if scored.unlabelled else []
    left_out += [f"{n:,} labelled {quoted(text)}" for text, n in list(scored.unknown.items())[:3]]
    if left_out:
        click.echo(f"left out of that: rows {', '.join(left_out)}{' ...' if len(scored.unknown) > 3 else ''}")
