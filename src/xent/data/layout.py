"""A file's layout: what its name does not say about how it is written, and files that are compressed.

rows.csv.gz      the suffix before .gz or .zst is that of the format
-                standard input, spooled to a file once, of the format that is said, else CSV
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import glob
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xent.errors import BadInput

MAGIC = {
    b"\x1f\x8b": "compressed by gzip: its name ends in .gz, as .csv.gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: its name ends in .zst, as .csv.zst",
    b"BZh": "compressed by bzip2: its name ends in .bz2, as .csv.bz2",
    b"PAR1": "a Parquet file: its name ends in .parquet",
    b"\x93NUMPY": "an array of NumPy: its name ends in .npy",
    b"PK\x03\x04": "an archive, .npz if it is of NumPy; a spreadsheet is read when it is saved as CSV",
}
"""The first bytes of files that are no text, and what the file is."""

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Suffixes of compressed files, which are read as they are decompressed, and Arrow's names of the ways."""

STANDARD_INPUT = Path("-")


OF_TEXT = ("--delimiter", "--decimal", "--encoding", "--no-header")
"""The options of a layout that count for files of text; ``--array`` is of archives."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of a file of text, and of an archive of arrays.

    Args:
        delimiter: between the columns of text; None is a tab for ``.tsv`` and a comma for others.
        decimal: the decimal mark of numbers.
        encoding: of text, by its Python name.
        header: whether the first line holds the names of the columns; without it they are f0, f1, ...
        array: the array of features in an archive of several.
    """

    delimiter: str | None = None
    decimal: str = "."
    encoding: str = "utf-8"
    header: bool = True
    array: str | None = None

    def __post_init__(self) -> None:
        for name, mark in (("--delimiter", self.delimiter), ("--decimal", self.decimal)):
            if mark is not None and (len(mark) != 1 or not mark.isascii() or mark in '"\r\n'):
                raise BadInput(f"{name} is one character, such as ';' or a tab; got {mark!r}")
        if self.decimal == self.delimiter or self.decimal.isalnum() or self.decimal in "+-":
            raise BadInput(f"--decimal {self.decimal!r} cannot be told from the rest of a number or a line")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise BadInput(
                f"--encoding {self.encoding!r} is not known; names are such as utf-8, latin-1 and cp1252"
            ) from None

    @property
    def given(self) -> list[str]:
        """The options that say something else than the defaults do."""
        said = {
            "--delimiter": self.delimiter is not None,
            "--decimal": self.decimal != ".",
            "--encoding": codecs.lookup(self.encoding).name != "utf-8",
            "--no-header": not self.header,
            "--array": self.array is not None,
        }
        return [option for option, there in said.items() if there]

    def delimiter_of(self, path: Path) -> str:
        """Return what lies between the columns of a file."""
        return self.delimiter or ("\t" if suffix_of(path) == ".tsv" else ",")


PLAIN = Layout()
"""Text in UTF-8 with a header, commas and points."""


def suffix_of(path: Path) -> str:
    """Return the suffix of a file's format, in lower case, before that of its compression.

    >>> [suffix_of(Path(name)) for name in ("a.CSV", "a.csv.gz", "a.tar.zst", "b.gz", "c")]
    ['.csv', '.csv', '.tar', '', '']
    """
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def check_text(path: Path, start: bytes) -> None:
    """Raise ``BadInput`` for a file that is to be text and whose first bytes say that it is none."""
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            raise BadInput(f"{path}: is {what} (of standard input, --format says so)")


def is_compressed(path: Path) -> bool:
    """Return whether a file's name says that it is compressed."""
    return path.suffix.lower() in COMPRESSED


def opened(path: Path) -> Any:
    """Open a file for reading bytes, as an Arrow stream that decompresses where the name says so."""
    import pyarrow as pa

    return pa.input_stream(str(path), compression=COMPRESSED.get(path.suffix.lower()))


@contextlib.contextmanager
def spooled(paths: Sequence[Path], suffix: str) -> Iterator[list[Path]]:
    """Yield the paths, of ``-`` a file with what standard input holds, which is there inside the block."""
    if STANDARD_INPUT not in paths:
        yield list(paths)
        return
    if list(paths).count(STANDARD_INPUT) > 1:
        raise BadInput("standard input can be read once; name - once")
    with tempfile.TemporaryDirectory(prefix="xent-") as folder:
        file = Path(folder) / f"standard input{suffix}"
        with open(file, "wb") as target:
            shutil.copyfileobj(sys.stdin.buffer, target, 1 << 20)
        try:
            yield [file if path == STANDARD_INPUT else path for path in paths]
        except BadInput as error:
            raise BadInput(shown(str(error), file)) from error


def shown(text: str, file: Path) -> str:
    """Return a text in which a spooled file goes by the name that its reader knows."""
    return text.replace(str(file), "standard input")


def matching(path: Path) -> list[Path]:
    """Return the files that a pattern with ``*``, ``?`` or ``[`` matches; a path that is there is itself."""
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    found = sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not found:
        raise BadInput(f"{path}: no file matches the pattern")
    return found
