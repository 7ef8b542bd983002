"""``xent fit``: a softmax classifier from a file."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table as Grid
from rich.text import Text

from xent._processes.start import join
from xent._util.atomic_write import check_writable
from xent._util.text import class_text, json_text, printable
from xent.cli.options import AUTO_PATH, Finite, SolverName, Strength, StrengthPath, column_names, keep_inputs
from xent.cli.options import device as device_option
from xent.cli.options import timeout as timeout_option
from xent.cli.output import complain
from xent.errors import MissingExtra
from xent.linear_model.descent import STOPPING
from xent.linear_model.solvers import AUTO, all_solvers

if TYPE_CHECKING:
    from xent.cli.fit_job import Fitted
    from xent.linear_model.descent import Progress as Now


@click.command()
@click.argument("data", nargs=-1, type=click.Path(path_type=Path))
@click.option("--demo", is_flag=True, help="Fit scikit-learn's handwritten digits instead of a file.")
@click.option("--label", metavar="COLUMN", help="The column to learn. NPZ: the array; NPY: the second file.")
@click.option(
    "--features", callback=column_names, metavar="A,B", help="Columns to learn from [all numeric ones]."
)
@click.option("--exclude", callback=column_names, metavar="A,B", help="Numeric columns not to learn from.")
@click.option(
    "--validation",
    type=Finite(0, 1, max_open=True),
    default=0.2,
    show_default=True,
    help="Share of the rows held out, every class alike; 0 for none.",
)
@click.option(
    "--l2",
    type=Strength(0),
    default=1.0,
    show_default=True,
    help="Penalty l2/2·‖W‖²; 1/C of scikit-learn. auto: the best of --l2-path 1e-5:1e6:45.",
)
@click.option(
    "--l2-path",
    type=StrengthPath(),
    metavar="START:STOP:COUNT",
    help="Choose --l2 among these by the loss on the validation rows, then fit all rows at the best.",
)
@click.option(
    "--solver",
    type=SolverName(),
    default=AUTO,
    show_default=True,
    help="auto chooses by the shape and --tol. "
    + " ".join(solver.summary for solver in all_solvers() if solver.summary),
)
@click.option("--max-iter", type=click.IntRange(1), default=1000, show_default=True, help="Most iterations.")
@click.option(
    "--tol",
    type=Finite(0),
    default=1e-4,
    show_default=True,
    help="Stop when the objective is this close to its minimum, relative to itself; see --stopping.",
)
@click.option(
    "--stopping",
    type=click.Choice(STOPPING),
    default=STOPPING[0],
    show_default=True,
    help="What --tol bounds; gradient: the largest component of the mean loss's, as in scikit-learn.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the split.")
@click.option(
    "--standardize/--no-standardize", default=True, help="Bring features to mean 0 and deviation 1 [yes]."
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
    help="Under torchrun: K ranks share the classes, and read the same rows; "
    f"--solver {', '.join(solver.name for solver in all_solvers() if solver.class_parallel)} only.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the state of the fit in DIR: a process that is killed loses an iteration or 10 s.",
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in DIR.")
@device_option
@timeout_option
@click.option("--verbose", "-v", is_flag=True, help="Say which solver and threads were chosen, and why.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def fit(
    data: tuple[Path, ...],
    demo: bool,
    label: str | None,
    features: tuple[str, ...],
    exclude: tuple[str, ...],
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
    """Fit a softmax classifier to DATA: .csv, .tsv, .parquet, .npz, or .npy with --label labels.npy.

    Several files, or a folder of them, are one table. Of .npy and large .parquet files rows are read when
    they are used, so that the memory that a fit takes does not grow with them.

    \b
    xent fit --demo
    xent fit flowers.csv --label species
    xent fit embeddings.npy --label labels.npy --l2 0.1
    torchrun --nproc-per-node 4 -m xent fit rows.parquet --label species
    """
    from xent.cli import fit_job as job
    from xent.cli.checkpoints import Checkpoints
    from xent.cli.solve_job import Settings
    from xent.data import sources

    if demo == bool(data):
        raise click.UsageError("name a file or --demo, not both" if demo else "name a file to fit, or --demo")
    if demo and (label or features or exclude):
        raise click.UsageError("--demo knows its label and features: drop --label, --features and --exclude")
    if features and exclude:
        raise click.UsageError("--features and --exclude do not go together: the first already chooses")
    if not demo and label is None:
        raise click.UsageError("which column is to be learned? Name it with --label")
    if resume and checkpoint is None:
        raise click.UsageError("--resume goes on from a checkpoint: name its folder with --checkpoint")
    if settings["l2"] == "auto":
        settings["l2_path"] = settings["l2_path"] or AUTO_PATH
    if settings["l2_path"] is not None:
        settings["l2"] = 1.0  # until the best of the path is known
    chosen = Settings(**settings)
    with join(timeout, slices) as ranks:
        quiet = quiet or not ranks.is_main
        with ranks.raise_together():
            if ranks.is_main:
                check_writable(out)
                if checkpoint is not None:
                    check_writable(checkpoint)
            keep_inputs(out / job.VALIDATION, *data)
        if demo:
            table = sources.digits(ranks)
        else:
            table = sources.read_labelled(data, str(label), features, exclude, ranks)
        kept = None
        if checkpoint is not None:
            kept = Checkpoints(checkpoint, resume, lambda line: None if quiet else complain(line))
        with _bar(chosen.tol, chosen.stopping, chosen.max_iter, quiet) as advance:
            fitted = job.fit(table, chosen, advance, ranks, device, kept)
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
        _report(fitted, chosen.tol, table.source, paths, out, as_json, quiet)
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


def _report(
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


def _print_fit(fitted: Fitted, source: str, paths: list[Path], out: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    with console.capture() as printed:  # printed by click: rich ends the process, with 1, on a closed pipe
        _say_fit(console, fitted, source, paths, out)
    click.echo(printed.get(), nl=False)


def _say_fit(console: Console, fitted: Fitted, source: str, paths: list[Path], out: Path) -> None:
    parts = [("training", fitted.training)]
    if fitted.validation is not None:
        parts.append(("validation", fitted.validation))
    grid = Grid(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    grid.add_column("")
    for name, _ in parts:
        grid.add_column(name, justify="right")
    grid.add_row("rows", *(f"{part.rows:,}" for _, part in parts))
    grid.add_row("loss", *(f"{part.loss:.4f} nats" for _, part in parts))
    grid.add_row("  knowing only class frequencies", *(f"{part.baseline:.4f} nats" for _, part in parts))
    grid.add_row("accuracy", *(f"{100 * part.accuracy:.2f} %" for _, part in parts))
    about = f"{source}: {len(fitted.model.classes)} classes, {len(fitted.model.feature_names)} features"
    console.print(Text(printable(about)))
    if skipped := fitted.skipped:
        shown = ", ".join(skipped[:6]) + (f" and {len(skipped) - 6} more" if len(skipped) > 6 else "")
        console.print(Text(f"not numeric, so not used: {printable(shown)}"))
    console.print()
    console.print(grid)
    console.print()
    how = "converged" if fitted.converged else "interrupted" if fitted.interrupted else "not converged"
    console.print(
        f"{how} after {fitted.iterations} iterations in {fitted.seconds:.2f} s, "
        f"{_reached(fitted)} (tol {fitted.model.settings['tol']:g})"
    )
    if (path := fitted.strengths) is not None:
        edge = ", an end of the path: a wider one may hold a better" if path.at_an_end else ""
        console.print(
            f"l2 {path.l2[path.best]:.3g} is the best of {len(path.l2)} on the validation rows{edge}; "
            "the model in the file is fitted at it to all rows"
        )
    names = [printable(class_text(value)[:60]) for value in fitted.model.classes]
    confused = fitted.judged.most_confused(3)
    console.print(f"most confused on {parts[-1][0]} rows{':' if confused else ': none'}")
    for a, b, ab, ba, rows in confused:
        back = f", {names[b]} taken for {names[a]} {_times(ba)}" if ba else ""
        console.print(Text(f"  {names[a]} taken for {names[b]} {_times(ab)}{back} (of {rows} rows)"))
    console.print(Text(f"\nin {printable(str(out))}/: " + ", ".join(path.name for path in paths)))


def _reached(fitted: Fitted) -> str:
    """Return the number that ``--tol`` bounds, with its name."""
    if fitted.model.settings["stopping"] == "gradient":
        return f"gradient {fitted.gradient_norm:.1e}"
    return f"at most {fitted.gap.relative:.1e} above the minimum by its {fitted.gap.by}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
