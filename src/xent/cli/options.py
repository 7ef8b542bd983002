"""Types, checks and options that commands share."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, Literal

import click

from xent._processes.group import DEFAULT_TIMEOUT
from xent.errors import BadInput
from xent.linear_model.solvers import solver_names


class Finite(click.FloatRange):
    """A range of numbers without nan, which no comparison keeps out, and without infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; raise a usage error for one outside the range."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Strength(Finite):
    """A strength of the penalty, or "auto"."""

    name = "strength"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number or "auto"; raise a usage error for anything else."""
        return value if value == "auto" else super().convert(value, param, ctx)

    def get_metavar(self, *about: Any, **also: Any) -> str | None:
        """Return how the help shows it."""
        return "FLOAT|auto"


class StrengthPath(click.ParamType):  # type: ignore[type-arg]
    """Strengths evenly spaced in the logarithm, START:STOP:COUNT."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return start, stop and count; raise a usage error for anything else."""
        if isinstance(value, tuple):
            return value
        try:
            start, stop, count = value.split(":")
            path = float(start), float(stop), int(count)
        except ValueError:
            self.fail(f"{value!r} is no START:STOP:COUNT, such as 1e-5:1e6:45.", param, ctx)
        if not (math.isfinite(path[0]) and math.isfinite(path[1]) and min(path[:2]) > 0):
            self.fail(f"the strengths of {value!r} must be positive and finite.", param, ctx)
        if not 2 <= path[2] <= 10_000:
            self.fail(f"{path[2]} strengths are no path; give from 2 to 10000.", param, ctx)
        return path


AUTO_PATH = (1e-5, 1e6, 45)
"""The path of ``--l2 auto``: that of the published evaluations of embeddings, which fit 45 strengths."""


class SolverName(click.ParamType):  # type: ignore[type-arg]
    """The name of one of the solvers that are registered when it is looked at, or "auto"."""

    name = "solver"

    def _choice(self) -> click.Choice[str]:
        return click.Choice(solver_names())

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name; raise a usage error, which lists the solvers, for another."""
        return self._choice().convert(value, param, ctx)

    def get_metavar(self, *about: Any, **also: Any) -> str | None:
        """Return the names, as the help shows them."""
        return self._choice().get_metavar(*about, **also)


def column_names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Return names given as a row of CSV, so that one may hold a comma."""
    try:
        return tuple(name for row in csv.reader([value or ""], strict=True) for name in row)
    except csv.Error as error:
        raise click.BadParameter(f"{value!r} is no row of CSV: {error}") from error


def categorical_columns(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[str, ...] | Literal["auto"]:
    """Return names given as a row of CSV, or "auto"."""
    return "auto" if value == "auto" else column_names(context, parameter, value)


def keep_inputs(output: Path, *inputs: Path) -> None:
    """Raise ``BadInput`` if the output would replace a file that the command reads."""
    for path in inputs:
        if path.is_dir():
            keep_inputs(output, *(file for file in path.iterdir() if file.is_file()))
        if output.exists() and path.exists() and output.samefile(path):
            raise BadInput(f"{output}: is read by this command and would be overwritten; name another output")


def _device(_: click.Context, __: click.Parameter, value: str) -> str:
    """Return the name of a device that computes; raise a usage error for another."""
    import torch

    try:
        if torch.device(value).type == "meta":
            raise click.BadParameter("meta tensors hold no numbers to compute with")
        torch.ones(1, device=value).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises any of these
        raise click.BadParameter(f"{value!r}: {str(error).splitlines()[0]}") from error
    return value


device = click.option(
    "--device",
    default="cpu",
    show_default=True,
    callback=_device,
    help="Where to compute: cpu, cuda, cuda:1.",
)

timeout = click.option(
    "--timeout",
    type=Finite(0, 10**7, min_open=True),
    default=DEFAULT_TIMEOUT,
    show_default=True,
    envvar="XENT_TIMEOUT",
    metavar="SECONDS",
    help="Under torchrun: how long a process waits for another that does not answer.",
)
