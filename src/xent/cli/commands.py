"""The command line, thin: parse, call, print. The work is in ``xent.linear_model`` and ``xent.verify``.

Started several times by torchrun, ``fit`` and ``predict`` share the rows; rank 0 writes and prints results.

Exit codes: 0 done, 1 the job could not be done or an identity does not hold, 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import csv
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table as Grid
from rich.text import Text

from xent._processes.group import DEFAULT_TIMEOUT
from xent._processes.start import join
from xent._util.text import class_text, json_text, printable, quoted
from xent.errors import BadInput, MissingExtra, RankFailed, RankLost, Terminated

if TYPE_CHECKING:
    from xent.cli.fit_job import Fitted
    from xent.cli.predict_job import Scored
    from xent.linear_model.descent import Progress as Now


class Commands(click.Group):
    """The one place where an error becomes a line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # by `xent fit … | head`: printing comes last, so the work is done
            with contextlib.suppress(OSError):  # Python's own flush at the end is not to fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "xent"
            complain(f"{error.format_message()} ({command} --help)")
            ctx.exit(2)
        except BadInput as error:
            complain(error)
            ctx.exit(2)
        except MissingExtra as error:
            complain(error)
            ctx.exit(1)
        except Terminated:
            complain("ended by SIGTERM, as torchrun ends the ranks that are left; nothing is half-written")
            raise
        except (RankLost, RankFailed) as error:
            complain(error)
            ctx.exit(1)
        except (OSError, MemoryError) as error:
            complain(f"the job could not be done: {error or type(error).__name__}")
            ctx.exit(1)
        except KeyboardInterrupt:
            complain("interrupted; no file is half-written")
            ctx.exit(130)


def complain(what: object) -> None:
    with contextlib.suppress(BrokenPipeError):
        click.echo("xent: " + printable(" ".join(str(what).split())), err=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="xent")
def cli() -> None:
    """Softmax classifiers from files: fit one, and predict with it. And the mathematics, verified."""


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Names as a row of CSV, so that one may hold a comma."""
    try:
        return tuple(name for row in csv.reader([value or ""], strict=True) for name in row)
    except csv.Error as error:
        raise click.BadParameter(f"{value!r} is no row of CSV: {error}") from error


class Finite(click.FloatRange):
    """A range without nan, which no comparison keeps out, and without infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


_timeout = click.option(
    "--timeout",
    type=Finite(0, 10**7, min_open=True),
    default=DEFAULT_TIMEOUT,
    show_default=True,
    envvar="XENT_TIMEOUT",
    metavar="SECONDS",
    help="Under torchrun: how long a rank waits for another that does not answer.",
)


@cli.command()
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.option("--demo", is_flag=True, help="Fit scikit-learn's handwritten digits instead of a file.")
@click.option("--label", metavar="COLUMN", help="The column to learn. NPZ: the array; NPY: the second file.")
@click.option("--features", callback=_names, metavar="A,B", help="Columns to learn from [all numeric ones].")
@click.option("--exclude", callback=_names, metavar="A,B", help="Numeric columns not to learn from.")
@click.option(
    "--validation",
    type=Finite(0, 1, max_open=True),
    default=0.2,
    show_default=True,
    help="Share of the rows held out, every class alike; 0 for none.",
)
@click.option(
    "--l2",
    type=Finite(0),
    default=1.0,
    show_default=True,
    help="Penalty l2/2·‖W‖²; 1/C of scikit-learn.",
)
@click.option(
    "--solver",
    type=click.Choice(["lbfgs", "newton-cg"]),
    default="lbfgs",
    show_default=True,
    help="newton-cg goes on to gradients of 1e-10, and costs more until then.",
)
@click.option("--max-iter", type=click.IntRange(1), default=1000, show_default=True, help="Most iterations.")
@click.option(
    "--tol",
    type=Finite(0),
    default=1e-4,
    show_default=True,
    help="Stop when no component of the mean loss's gradient exceeds it.",
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
    help="Under torchrun: K ranks share the classes, and read the same rows; --solver lbfgs only.",
)
@_timeout
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def fit(
    data: Path | None,
    demo: bool,
    label: str | None,
    features: tuple[str, ...],
    exclude: tuple[str, ...],
    out: Path,
    slices: int,
    timeout: float,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Fit a softmax classifier to DATA: .csv, .tsv, .parquet, .npz, or .npy with --label labels.npy.

    \b
    xent fit --demo
    xent fit flowers.csv --label species
    xent fit embeddings.npy --label labels.npy --l2 0.1
    torchrun --nproc-per-node 4 -m xent fit rows.parquet --label species
    """
    from xent._util.atomic_write import check_writable
    from xent.cli import fit_job as job
    from xent.data import sources

    if demo == (data is not None):
        raise click.UsageError("name a file or --demo, not both" if demo else "name a file to fit, or --demo")
    if demo and (label or features or exclude):
        raise click.UsageError("--demo knows its label and features: drop --label, --features and --exclude")
    if features and exclude:
        raise click.UsageError("--features and --exclude do not go together: the first already chooses")
    if not demo and label is None:
        raise click.UsageError("which column is to be learned? Name it with --label")
    asked = job.Settings(**settings)
    with join(timeout, slices) as ranks:
        quiet = quiet or not ranks.first
        with ranks.together():
            if ranks.first:
                check_writable(out)
            if data is not None:
                _keep_inputs(out / job.VALIDATION, data)
        if data is None:
            table = sources.digits(ranks)
        else:
            table = sources.read_labelled(data, str(label), features, exclude, ranks)
        with _bar(asked.tol, asked.max_iter, quiet) as advance:
            fitted = job.fit(table, asked, advance, ranks)
        if fitted.interrupted and ranks.first:
            complain(f"interrupted: saving the best model so far, of iteration {fitted.iterations}")
        paths = job.write(fitted, table, out, ranks)
        if demo:
            with ranks.together():
                if ranks.first:
                    held_out = out / "held-out.parquet"  # what `predict` may be judged by
                    held_out.unlink(missing_ok=True)
                    if len(rows := fitted.validation_rows):
                        paths.append(sources.write_parquet(sources.digits(), rows, held_out))
        drawn = not ranks.first or _draw(fitted, out, paths, quiet)
    if ranks.first:
        _report(fitted, asked.tol, table.source, paths, out, as_json, quiet)
    if fitted.interrupted:
        sys.exit(130)
    if not drawn:
        sys.exit(1)


def _draw(fitted: Fitted, out: Path, paths: list[Path], quiet: bool) -> bool:
    """Draw the figures and add their paths; whether nothing went wrong."""
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
    fitted: Fitted,
    tol: float,
    source: str,
    paths: list[Path],
    out: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    if not fitted.converged and not fitted.interrupted and not quiet:
        complain(
            f"not converged in {fitted.iterations} iterations: gradient {fitted.gradient_norm:.1e} is above "
            f"--tol {tol:g}: {fitted.advice}"
        )
    if as_json:
        files = [str(path) for path in paths]
        click.echo(json_text({"source": source, **fitted.summary(), "files": files}))
    elif not quiet:
        _print_fit(fitted, source, paths, out)


def _keep_inputs(output: Path, *inputs: Path) -> None:
    """Raise ``BadInput`` if the output would replace a file that the command reads."""
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise BadInput(f"{output}: is read by this command and would be overwritten; name another output")


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help=".parquet or .csv.")
@click.option(
    "--label", metavar="COLUMN", help="Where the labels are, if not under the name the model was fitted on."
)
@_timeout
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def predict(
    model: Path, data: Path, output: Path, label: str | None, timeout: float, as_json: bool, quiet: bool
) -> None:
    """Write the probability of every class, and the most probable one, for each row of DATA.

    Where DATA has labels, it also says how many are predicted; that none of them is known is an error.

    \b
    xent predict xent-model/model.safetensors flowers.csv -o predictions.parquet
    """
    from xent._util.atomic_write import check_file, check_writable, folder
    from xent.cli import predict_job as job
    from xent.data import model_file
    from xent.report import evaluation

    with join(timeout) as ranks:
        with ranks.together():
            evaluation.check_suffix(output)
            check_file(output)
            _keep_inputs(output, model, data, *([Path(label)] if label else []))
            if ranks.first:
                check_writable(output.parent)
            fitted = model_file.load(model)
        ranks.alike(f"model in {model}", fitted.fingerprint)
        table = job.read_for(fitted, model, data, label, ranks)
        scored = job.score(fitted, table, ranks)
        rows = int(ranks.sum(len(table.features)))
        with contextlib.ExitStack() as stack:
            with ranks.together():
                if ranks.first:
                    stack.enter_context(folder(output.parent))
            evaluation.write_predictions(fitted, table, output, ranks=ranks)
    if not ranks.first:
        return
    if as_json:
        found = None if scored is None else scored.evaluation.summary()
        about = {"source": table.source, "rows": rows, "evaluation": found, "file": str(output)}
        if scored is not None:
            about |= {"unlabelled": scored.unlabelled, "unknown_labels": scored.unknown}
        click.echo(json_text(about))
    elif not quiet:
        _print_predict(rows, len(fitted.classes), scored, label or table.label_name, output)


def _device(_: click.Context, __: click.Parameter, value: str) -> str:
    """A device that computes."""
    import torch

    try:
        if torch.device(value).type == "meta":
            raise click.BadParameter("meta tensors hold no numbers to check")
        torch.ones(1, device=value).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises any of these
        raise click.BadParameter(f"{value!r}: {str(error).splitlines()[0]}") from error
    return value


@cli.command()
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    callback=_device,
    help="Where to compute: cpu, cuda, cuda:1.",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
    help="A type to check, as often as you like [float64 and float32].",
)
@click.option(
    "--figures", type=click.Path(path_type=Path), metavar="DIR", help="Draw what the identities look like."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def verify(device: str, dtypes: tuple[str, ...], figures: Path | None, as_json: bool) -> None:
    """Check every identity of the mathematics on this machine: which hold, and how closely.

    \b
    xent verify
    xent verify --device cuda --dtype bfloat16
    xent verify --figures figures
    """
    from xent import verify as job
    from xent._util.atomic_write import check_writable
    from xent.verify.table import say

    if figures is not None:
        check_writable(figures)
    report = job.verify(tuple(dict.fromkeys(dtypes)) or job.DEFAULT_DTYPES, device)
    files = [] if figures is None else [str(path) for path in job.draw(figures)]
    if as_json:
        click.echo(json_text({**report.summary(), "files": files}))
    else:
        console = Console(highlight=False)
        console.width = console.width if console.is_terminal else 120  # a file is as wide as the table
        with console.capture() as said:
            say(console, report)
        click.echo(said.get(), nl=False)
        if files:
            click.echo("drawn: " + printable(", ".join(files)))
    if not report.holds:
        sys.exit(1)


@contextlib.contextmanager
def _bar(tol: float, max_iter: int, quiet: bool) -> Iterator[Callable[[Now], None] | None]:
    """A bar on stderr that fills as the gradient falls, on a log scale, from where it starts to ``tol``."""
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
    first = math.inf
    with bar:
        task = bar.add_task("first iteration", total=1.0)

        def advance(now: Now) -> None:
            nonlocal first
            first = now.gradient_norm if first == math.inf else first
            span = math.log(max(first, 1e-300) / max(tol, 1e-16))
            fallen = math.log(max(first, 1e-300) / max(now.gradient_norm, 1e-300)) / span if span > 0 else 1.0
            done = max(fallen, now.iteration / max_iter, bar.tasks[0].completed)
            bar.update(
                task,
                completed=min(done, 1.0),
                description=f"iteration {now.iteration}  objective {now.objective:.4f}  "
                f"gradient {now.gradient_norm:.1e} → {tol:.0e}",
            )

        yield advance


def _print_fit(fitted: Fitted, source: str, paths: list[Path], out: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    with console.capture() as said:  # printed by click: rich ends the process, with 1, on a closed pipe
        _say_fit(console, fitted, source, paths, out)
    click.echo(said.get(), nl=False)


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
    said = f"{source}: {len(fitted.model.classes)} classes, {len(fitted.model.feature_names)} features"
    console.print(Text(printable(said)))
    skipped = fitted.skipped
    if skipped:
        shown = ", ".join(skipped[:6]) + (f" and {len(skipped) - 6} more" if len(skipped) > 6 else "")
        console.print(Text(f"not numeric, so not used: {printable(shown)}"))
    console.print()
    console.print(grid)
    console.print()
    how = "converged" if fitted.converged else "interrupted" if fitted.interrupted else "not converged"
    console.print(
        f"{how} after {fitted.iterations} iterations in {fitted.seconds:.2f} s, "
        f"gradient {fitted.gradient_norm:.1e} (tol {fitted.model.settings['tol']:g})"
    )
    names = [printable(class_text(value)[:60]) for value in fitted.model.classes]
    confused = fitted.judged.most_confused(3)
    console.print(f"most confused on {parts[-1][0]} rows{':' if confused else ': none'}")
    for a, b, ab, ba, rows in confused:
        back = f", {names[b]} taken for {names[a]} {_times(ba)}" if ba else ""
        console.print(Text(f"  {names[a]} taken for {names[b]} {_times(ab)}{back} (of {rows} rows)"))
    console.print(Text(f"\nin {printable(str(out))}/: " + ", ".join(path.name for path in paths)))


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


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
