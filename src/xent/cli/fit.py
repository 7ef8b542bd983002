"""``xent fit``: a softmax classifier from a file."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from xent._processes.start import join
from xent._util.atomic_write import check_writable
from xent._util.text import quoted
from xent.cli.fit_report import report
from xent.cli.grouped import GroupedCommand
from xent.cli.options import (
    AUTO_PATH,
    Finite,
    SolverName,
    Strength,
    StrengthPath,
    categorical_columns,
    column_names,
    keep_inputs,
)
from xent.cli.options import device as device_option
from xent.cli.options import timeout as timeout_option
from xent.cli.output import complain
from xent.cli.reading_options import NAMES, check_standard_input, reading_options
from xent.data.categories import MOST
from xent.data.layout import STANDARD_INPUT, Layout, shown, spooled
from xent.data.table import Wanted, as_option
from xent.errors import MissingExtra
from xent.linear_model.descent import STOPPING
from xent.linear_model.solvers import AUTO, all_solvers

if TYPE_CHECKING:
    from xent.cli.fit_job import Fitted
    from xent.linear_model.descent import Progress as Now


GROUPS = {
    "Common options": [
        "--label",
        "--features",
        "--exclude",
        "--categorical",
        "--missing",
        "--validation",
        "--test",
        "--l2",
        "--calibrate",
        "--out",
    ],
    "Rows and columns": [
        "--demo",
        "--max-categories",
        "--weight",
        "--class-weight",
        "--soft-labels",
        "--test-label",
        "--test-array",
        "--seed",
        "--standardize",
    ],
    "Files": NAMES,
    "Solver": ["--l2-path", "--solver", "--max-iter", "--tol", "--stopping", "--checkpoint", "--resume"],
    "Machine": ["--device", "--class-parallel", "--timeout"],
    "Output": ["--verbose", "--json", "--quiet", "--help"],
}


@click.command(cls=GroupedCommand, groups=GROUPS)
@click.argument("data", nargs=-1, type=click.Path(path_type=Path))
@click.option("--demo", is_flag=True, help="Fit scikit-learn's handwritten digits instead of a file.")
@click.option(
    "--label",
    metavar="COLUMN",
    help="The column with the class of each row. NPZ: the array. NPY: the second file.",
)
@click.option(
    "--features",
    callback=column_names,
    metavar="A,B",
    help="Columns to learn from. [default: all columns of numbers]",
)
@click.option("--exclude", callback=column_names, metavar="A,B", help="Columns not to learn from.")
@click.option(
    "--categorical",
    callback=categorical_columns,
    metavar="auto|A,B",
    help="Columns of categories to learn from, by an indicator for each value. auto: all columns "
    "of text and booleans.",
)
@click.option(
    "--max-categories",
    type=click.IntRange(1, 100_000),
    default=MOST,
    show_default=True,
    help="Largest number of values in a column of --categorical.",
)
@click.option(
    "--missing",
    type=click.Choice(["error", "drop", "impute"]),
    default="error",
    show_default=True,
    help="What to do with rows that lack a value: stop, drop the rows, or impute the median and "
    "add an indicator.",
)
@click.option(
    "--weight", metavar="COLUMN", help="The column with the weight of each row. NPY: a second file."
)
@click.option(
    "--class-weight",
    type=click.Choice(["balanced"]),
    help="balanced: all classes have the same weight in the fit, however many rows they have.",
)
@click.option(
    "--soft-labels",
    "soft",
    callback=column_names,
    metavar="A,B",
    help="Soft labels instead of --label: columns with the share of each class in the row. "
    "Arrays: one of rows × classes.",
)
@click.option(
    "--test",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A file of rows on which the fitted model is judged; they take no part in the fit.",
)
@click.option(
    "--test-label",
    metavar="COLUMN",
    help="The column of labels in the --test file, if it is not that of --label.",
)
@click.option(
    "--test-array",
    metavar="NAME",
    help="The array of features in the --test file, if it is not that of --array.",
)
@click.option(
    "--calibrate", is_flag=True, help="Fit the temperature of the probabilities to the validation rows."
)
@click.option(
    "--validation",
    type=Finite(0, 1, max_open=True),
    default=0.2,
    show_default=True,
    help="Share of the rows of each class that is held out for validation. 0 holds out none.",
)
@click.option(
    "--l2",
    type=Strength(0),
    default=1.0,
    show_default=True,
    help="Strength of the penalty l2/2·‖W‖², which is 1/C in scikit-learn. auto: the best of "
    "--l2-path 1e-5:1e6:45.",
)
@click.option(
    "--l2-path",
    type=StrengthPath(),
    metavar="START:STOP:COUNT",
    help="Try COUNT strengths from START to STOP, choose the one of the smallest validation loss, "
    "and fit all rows with it.",
)
@click.option(
    "--solver",
    type=SolverName(),
    default=AUTO,
    show_default=True,
    help="auto chooses by the shape and --tol. "
    + " ".join(solver.summary for solver in all_solvers() if solver.summary),
)
@click.option(
    "--max-iter",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Largest number of iterations.",
)
@click.option(
    "--tol",
    type=Finite(0),
    default=1e-4,
    show_default=True,
    help="Stop when the objective is this close to its minimum, relative to the objective; see --stopping.",
)
@click.option(
    "--stopping",
    type=click.Choice(STOPPING),
    default=STOPPING[0],
    show_default=True,
    help="What --tol bounds. objective: its distance from the minimum. gradient: the largest "
    "component of the gradient of the mean loss, as in scikit-learn.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Seed of the split into training and validation rows.",
)
@click.option(
    "--standardize/--no-standardize",
    default=True,
    help="Scale features to mean 0 and standard deviation 1. [default: yes]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("xent-model"),
    show_default=True,
    help="Directory for the model, the validation predictions and the figures.",
)
@click.option(
    "--class-parallel",
    "slices",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="K",
    help="Under torchrun: K processes share the classes and read the same rows; "
    f"--solver {', '.join(solver.name for solver in all_solvers() if solver.class_parallel)} only.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the state of the fit in DIR. A process that is killed loses one iteration, or 10 s of work.",
)
@click.option(
    "--resume", is_flag=True, help="Continue from the last checkpoint in the directory of --checkpoint."
)
@device_option
@timeout_option
@reading_options
@click.option(
    "--verbose", "-v", is_flag=True, help="Print which solver and how many threads were chosen, and why."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def fit(
    data: tuple[Path, ...],
    demo: bool,
    label: str | None,
    features: tuple[str, ...],
    exclude: tuple[str, ...],
    categorical: tuple[str, ...] | Literal["auto"],
    max_categories: int,
    weight: str | None,
    soft: tuple[str, ...],
    test: Path | None,
    test_label: str | None,
    test_array: str | None,
    layout: Layout,
    form: str,
    out: Path,
    slices: int,
    device: str,
    timeout: float,
    checkpoint: Path | None,
    resume: bool,
    verbose: bool,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Fit a softmax classifier to DATA: .csv, .tsv, .parquet, .npz, .safetensors, or .npy with
    --label labels.npy.

    Several files, a pattern or a folder are read as one table; - is standard input. Text may be compressed,
    .csv.gz or .csv.zst. Rows of .npy, .safetensors and large .parquet files are read when they are used, so
    that memory does not grow with the file.

    \b
    xent fit --demo
    xent fit flowers.csv --label species --categorical auto --missing impute
    xent fit embeddings.npy --label labels.npy --l2 0.1
    torchrun --nproc-per-node 4 -m xent fit rows.parquet --label species
    """
    from xent.cli import fit_job as job
    from xent.cli.checkpoints import Checkpoints
    from xent.cli.solve_job import Settings
    from xent.data import sources
    from xent.data.identifiers import look_like_identifiers
    from xent.data.read import read_table

    if demo == bool(data):
        raise click.UsageError("name a file or --demo, not both" if demo else "name a file to fit, or --demo")
    if demo and (label or features or exclude or categorical or weight or soft or test):
        raise click.UsageError(
            "--demo knows its label and features: drop --label and all others that name columns"
        )
    if features and exclude:
        raise click.UsageError("--features and --exclude do not go together: the first already chooses")
    if not demo and label is None and not soft:
        raise click.UsageError("which column is to be learned? Name it with --label")
    if label is not None and soft:
        raise click.UsageError("--label and --soft-labels do not go together: name one of them")
    for option, value in (("--test-label", test_label), ("--test-array", test_array)):
        if value is not None and test is None:
            raise click.UsageError(f"{option} is of --test, which is not there")
    if test is not None and soft:
        raise click.UsageError("--test needs the classes of its rows; --soft-labels names none")
    if resume and checkpoint is None:
        raise click.UsageError("--resume goes on from a checkpoint: name its folder with --checkpoint")
    if settings["l2"] == "auto":
        settings["l2_path"] = settings["l2_path"] or AUTO_PATH
    if settings["l2_path"] is not None:
        settings["l2"] = 1.0  # until the best of the path is known
    chosen = Settings(**settings)
    wanted = Wanted(
        label=label,
        features=features or None,
        exclude=exclude,
        layout=layout,
        categorical=categorical,
        most=max_categories,
        missing=chosen.missing,
        weight=weight,
        soft=soft,
    )
    inputs = [*data, *([] if test is None else [test])]
    with join(timeout, slices) as ranks, spooled(inputs, form) as files:
        quiet = quiet or not ranks.is_main
        with ranks.raise_together():
            if ranks.is_main:
                check_writable(out)
                if checkpoint is not None:
                    check_writable(checkpoint)
            check_standard_input(inputs, ranks.size)
            keep_inputs(out / job.VALIDATION, *files)
        if test is not None:
            test = files.pop()
        if demo:
            table = sources.digits(ranks)
        else:
            table = read_table(files, wanted, ranks)
            for given, file in zip(data, files, strict=True):
                if given == STANDARD_INPUT:
                    table = dataclasses.replace(table, source=shown(table.source, file))
        for name in () if features else look_like_identifiers(table, ranks):
            if not quiet:
                complain(f"column {quoted(name)} looks like an id: --exclude {as_option(name)} leaves it out")
        judged_by = None
        if test is not None:
            wanted_there = dataclasses.replace(
                wanted, layout=dataclasses.replace(layout, array=test_array or layout.array)
            )
            judged_by = job.read_test(test, test_label or str(label), table, wanted_there, ranks)
        kept = None
        if checkpoint is not None:
            kept = Checkpoints(checkpoint, resume, lambda line: None if quiet else complain(line))
        with _bar(chosen.tol, chosen.stopping, chosen.max_iter, quiet) as advance:
            fitted = job.fit(table, chosen, advance, ranks, device, kept)
        if judged_by is not None:
            fitted = job.with_test(fitted, judged_by, ranks)
        if fitted.interrupted and ranks.is_main:
            complain(f"interrupted: saving the best model so far, of iteration {fitted.iterations}")
        paths = job.write(fitted, table, out, ranks)
        if demo:
            with ranks.raise_together():
                if ranks.is_main:
                    held_out = out / "held-out.parquet"  # what `predict` may be judged by
                    held_out.unlink(missing_ok=True)
                    if len(rows := fitted.validation_rows) and fitted.strengths is None:  # else none is new
                        paths.append(sources.write_parquet(sources.digits(), rows, held_out))
        drawn = not ranks.is_main or _draw(fitted, out, paths, quiet)
    if ranks.is_main:
        if verbose and not quiet:
            click.echo(f"solver {fitted.how.name}: {fitted.how.why}\n{fitted.how.threads}", err=True)
        report(fitted, chosen.tol, table.source, paths, out, as_json, quiet)
    if fitted.interrupted:
        sys.exit(130)
    if not drawn:
        sys.exit(1)


def _draw(fitted: Fitted, out: Path, paths: list[Path], quiet: bool) -> bool:
    """Draw the figures and add their paths; return False where the drawing failed."""
    from xent.cli import fit_job as job

    try:
        paths += job.draw(fitted, out)
    except MissingExtra as error:
        if not quiet:
            complain(f"no figures: {error}")
    except KeyboardInterrupt:
        complain(f"interrupted while drawing figures; the model is saved in {out}/")
        sys.exit(130)
    except Exception as error:  # whatever a drawing library raises, the model is saved and to be reported
        complain(f"no figures, but the model is saved: {type(error).__name__}: {error}")
        return False
    return True


@contextlib.contextmanager
def _bar(tol: float, stopping: str, max_iter: int, quiet: bool) -> Iterator[Callable[[Now], None] | None]:
    """Show a bar on stderr that fills as what is left falls, on a log scale, from its start to ``tol``."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    what = "gradient" if stopping == "gradient" else "above the minimum"
    first = math.inf  # of what falls to tol
    with bar:
        task = bar.add_task("first iteration", total=1.0)

        def advance(now: Now) -> None:
            nonlocal first
            first = now.remaining if first == math.inf else first
            span = math.log(max(first, 1e-300) / max(tol, 1e-16))
            fallen = math.log(max(first, 1e-300) / max(now.remaining, 1e-300)) / span if span > 0 else 1.0
            done = max(fallen, now.iteration / max_iter, bar.tasks[0].completed)
            bar.update(
                task,
                completed=min(done, 1.0),
                description=f"iteration {now.iteration}  objective {now.objective:.4f}  "
                f"{what} {now.remaining:.1e} → {tol:.0e}",
            )

        yield advance
