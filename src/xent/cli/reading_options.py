"""The options that say how a file is to be read, which `xent fit` and `xent predict` share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from xent.data._registry import format_of, known_suffixes
from xent.data.layout import STANDARD_INPUT, Layout
from xent.errors import BadInput

OPTIONS = (
    click.option(
        "--delimiter",
        metavar="MARK",
        help="The mark between columns of text. [default: a comma; a tab in .tsv]",
    ),
    click.option(
        "--decimal",
        metavar="MARK",
        default=".",
        show_default=True,
        help="The decimal mark in columns of text.",
    ),
    click.option(
        "--encoding", metavar="NAME", default="utf-8", show_default=True, help="The encoding of text."
    ),
    click.option(
        "--no-header",
        is_flag=True,
        help="The first line is a row of data. The columns are called f0, f1, ...",
    ),
    click.option(
        "--array", metavar="NAME", help="The name of the array of features in NPZ and safetensors files."
    ),
    click.option(
        "--format",
        "form",
        metavar="SUFFIX",
        help="The format of standard input: csv, tsv, csv.gz, parquet, npz, npy or safetensors. "
        "[default: csv]",
    ),
)

NAMES = ["--delimiter", "--decimal", "--encoding", "--no-header", "--array", "--format"]


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, which is called with ``layout`` and ``form``, a suffix."""

    @functools.wraps(command)
    def called(
        *arguments: Any,
        delimiter: str | None,
        decimal: str,
        encoding: str,
        no_header: bool,
        array: str | None,
        form: str | None,
        **others: Any,
    ) -> Any:
        mark = "\t" if delimiter in ("\\t", "tab") else delimiter
        layout = Layout(mark, decimal, encoding, not no_header, array)
        suffix = "." + (form or "csv").lstrip(".").lower()
        files = [*others["data"], *([others["test"]] if others.get("test") else [])]
        if form is not None and STANDARD_INPUT not in files:
            raise click.UsageError("--format is of standard input, -; a file's format is that of its name")
        if format_of(Path("standard input" + suffix)) is None:
            known = ", ".join(known.lstrip(".") for known in known_suffixes())
            raise click.UsageError(f"--format {form}: no such format; there are {known}")
        return command(*arguments, layout=layout, form=suffix, **others)

    for option in reversed(OPTIONS):
        called = option(called)
    return called


def check_standard_input(paths: Sequence[Path], ranks: int) -> None:
    """Raise ``BadInput`` for standard input where several processes share the rows."""
    if STANDARD_INPUT in paths and ranks > 1:
        raise BadInput("standard input is one process's; write it to a file to share it with torchrun")
