"""``xent audit``: where the loss of a classifier comes from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xent._processes.group import Ranks
from xent._processes.start import join
from xent._util.atomic_write import check_file, check_writable, folder
from xent._util.text import json_text
from xent.cli.grouped import GroupedCommand
from xent.cli.options import column_names, keep_inputs
from xent.cli.options import timeout as timeout_option
from xent.cli.output import complain
from xent.cli.reading_options import NAMES, check_standard_input, reading_options
from xent.data.layout import STANDARD_INPUT, Layout, shown, spooled
from xent.errors import BadInput

if TYPE_CHECKING:
    from xent.auditing.files import Columns, Files

CROSSED = 3
"""The exit code where a threshold of ``--fail-on`` is crossed."""

GROUPS = {
    "Predictions": ["--kind", "--model", "--label", "--classes", "--prefix", "--positive", "--renormalize"],
    "Rows": ["--id", "--weight", "--soft-prefix", "--allow-zero"],
    "Results": ["--html", "--json", "--rows", "--worst", "--fail-on", "--quiet"],
    "Comparisons": ["--against", "--compare"],
    "Files": NAMES,
    "Machine": ["--sweeps", "--timeout", "--help"],
}


@click.command(cls=GroupedCommand, groups=GROUPS)
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--kind",
    type=click.Choice(["probs", "logits", "log-probs"]),
    help="What the columns hold. Needed with predictions, as xent does not guess it.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="A model that xent fit wrote. DATA then holds features, from which the model predicts.",
)
@click.option("--label", metavar="COLUMN", help="The column of the true classes. For .npy, a second file.")
@click.option(
    "--classes",
    callback=column_names,
    metavar="A,B",
    help="The columns of the predictions, each named after its class. For arrays, the classes in "
    "the order of the columns.",
)
@click.option(
    "--prefix",
    metavar="TEXT",
    help="The predictions are in the columns whose names start with TEXT: with p_, the column "
    "p_cat is of class cat.",
)
@click.option(
    "--positive",
    metavar="CLASS",
    help="The file has one column of predictions, which is for this one of two classes.",
)
@click.option(
    "--renormalize",
    is_flag=True,
    help="Divide each row of probabilities by its sum, which is off by up to 1e-3 in files of few digits.",
)
@click.option("--id", "id_", metavar="COLUMN", help="The column with the name of each row.")
@click.option("--weight", metavar="COLUMN", help="The column with the weight of each row.")
@click.option(
    "--soft-prefix",
    metavar="TEXT",
    help="Soft labels instead of --label: the share of each class, in the columns whose names "
    "start with TEXT, such as t_cat.",
)
@click.option(
    "--allow-zero",
    is_flag=True,
    help="Accept rows whose true class has probability 0: count them, and report the loss of the others.",
)
@click.option("--html", type=click.Path(path_type=Path), help="Write the result as one HTML page.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--rows", type=click.Path(path_type=Path), help="Write the measures of every row to this .parquet file."
)
@click.option(
    "--worst",
    type=click.IntRange(0, 100_000),
    default=100,
    show_default=True,
    metavar="K",
    help="Number of rows with the largest losses to list.",
)
@click.option(
    "--fail-on",
    multiple=True,
    metavar="TEXT",
    help="Exit with code 3 if this holds, for example 'log_loss>0.5'. May be repeated.",
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Another model's predictions for the same rows: a file of them, or with --model another model.",
)
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    help="The JSON of another audit: print how each measure differs.",
)
@click.option(
    "--sweeps",
    type=click.IntRange(1, 2),
    default=2,
    show_default=True,
    help="Number of passes over DATA. 1 leaves out the best temperature and the suspects of a wrong label.",
)
@timeout_option
@reading_options
def audit(
    data: tuple[Path, ...],
    kind: Any,
    model: Path | None,
    label: str | None,
    classes: tuple[str, ...],
    prefix: str | None,
    positive: str | None,
    renormalize: bool,
    id_: str | None,
    weight: str | None,
    soft_prefix: str | None,
    allow_zero: bool,
    html: Path | None,
    as_json: bool,
    rows: Path | None,
    worst: int,
    fail_on: tuple[str, ...],
    quiet: bool,
    against: Path | None,
    compare: Path | None,
    sweeps: int,
    timeout: float,
    layout: Layout,
    form: str,
) -> None:
    """Show where the loss of a classifier comes from: classes, pairs, calibration, rows, labels.

    DATA holds a column of predictions for each class and a column of labels, as xent predict --keep writes
    them. With --model, DATA holds features, from which the model predicts. Files larger than memory are read
    in pieces, twice.

    \b
    xent audit predictions.csv --kind probs --label species --html report.html
    xent audit --model xent-model/model.safetensors flowers.csv --label species
    """
    from xent.auditing.files import Columns
    from xent.auditing.page import write_page
    from xent.cli import audit_job as job

    _check_options(kind, model, label, classes, prefix, positive, renormalize, soft_prefix)
    wanted = job.thresholds(fail_on, sweeps)
    columns = Columns(
        label=label,
        kind=kind or "logits",
        classes=classes,
        prefix=prefix,
        soft_prefix=soft_prefix,
        id=id_,
        weight=weight,
        positive=positive,
        renormalize=renormalize,
        allow_zero=allow_zero,
        layout=layout,
    )
    with join(timeout) as ranks, spooled(data, form) as paths:
        with ranks.raise_together():
            check_standard_input(data, ranks.size)
            _check_outputs(ranks, html, rows, against, [*paths, *([model] if model else [])])
            before = None if compare is None else job.earlier(compare)
            files = _opened(paths, columns, model)
            job.check_measures(wanted, len(files.names))
            if STANDARD_INPUT in data:
                files.source = shown(files.source, paths[data.index(STANDARD_INPUT)])
            other = None
            if against is not None:
                other = (
                    _opened([against], columns, None) if model is None else _opened(paths, columns, against)
                )
        result = job.run(
            files,
            ranks,
            sweeps=sweeps,
            worst=worst,
            rows=rows,
            quiet=quiet or (as_json and not ranks.is_main),
        )
        paired = None if other is None or against is None else job.against(files, other, against)
    if not ranks.is_main:
        return
    beside = None if before is None else job.compared(result, before)
    if html is not None:
        with folder(html.parent):
            write_page(result, html, beside, paired)
    if as_json:
        about = result.to_dict()
        about |= {"against": paired} if paired is not None else {}
        about |= {"compare": beside} if beside is not None else {}
        click.echo(json_text(about, indent=1, default=str))
    elif not quiet:
        from xent.cli.audit_report import pieces
        from xent.cli.grid import show

        show(pieces(result, beside, paired))
        for what, path in (("the page", html), ("each row's measures", rows)):
            if path is not None:
                click.echo(f"\n{what}: {path}")
    if crossed := job.crossed(result, wanted):
        complain("a threshold is crossed: " + "; ".join(crossed))
        click.get_current_context().exit(CROSSED)


def _check_options(
    kind: str | None,
    model: Path | None,
    label: str | None,
    classes: tuple[str, ...],
    prefix: str | None,
    positive: str | None,
    renormalize: bool,
    soft_prefix: str | None,
) -> None:
    """Raise a usage error for options that do not go together."""
    if model is None and kind is None:
        raise click.UsageError(
            "say what the columns hold with --kind probs, logits or log-probs; or name a --model"
        )
    if model is None and label is None and soft_prefix is None:
        raise click.UsageError("name the column of the true classes with --label")
    if label is not None and soft_prefix is not None:
        raise click.UsageError("--label and --soft-prefix both say the classes of the rows; give one")
    if classes and prefix is not None:
        raise click.UsageError("--classes and --prefix both name the columns of the classes; give one")
    if renormalize and kind != "probs":
        raise click.UsageError("--renormalize is of --kind probs")
    if model is not None:
        given = {
            "--kind": kind,
            "--classes": classes or None,
            "--prefix": prefix,
            "--positive": positive,
            "--soft-prefix": soft_prefix,
        }
        odd = [option for option, value in given.items() if value is not None]
        if odd:
            raise click.UsageError(f"{odd[0]} is of files of predictions; with --model the model predicts")


def _check_outputs(
    ranks: Ranks, html: Path | None, rows: Path | None, against: Path | None, inputs: list[Path]
) -> None:
    """Raise ``BadInput`` for outputs that cannot be written, before anything is read."""
    for option, path in (("--rows", rows), ("--against", against)):
        if path is not None and ranks.size > 1:
            raise BadInput(f"{option} is done by one process; run it without torchrun")
    if rows is not None and rows.suffix != ".parquet":
        raise BadInput(f"{rows}: --rows writes Parquet; call the file .parquet")
    if html is not None and html.suffix not in (".html", ".htm"):
        raise BadInput(f"{html}: --html writes a page; call the file .html")
    for output in (html, rows):
        if output is not None:
            check_file(output)
            keep_inputs(output, *inputs)
            if ranks.is_main:
                check_writable(output.parent)


def _opened(paths: list[Path], columns: Columns, model: Path | None) -> Files:
    """Return the files of predictions, or of features for a model."""
    from xent.auditing.files import Files
    from xent.auditing.model_files import ModelFiles
    from xent.data import model_file

    if model is None:
        return Files(paths, columns)
    return ModelFiles(paths, columns, model_file.load(model), model)
