"""Progress on stderr: rows, rows a second, and the time left where the number of rows is known."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from xent.data._registry import format_of
from xent.data.layout import is_compressed, matching
from xent.data.parts import files_of
from xent.errors import BadInput

SAMPLE = 1 << 20
"""Bytes of a file of text from which its number of lines is estimated."""


class Progress:
    """A line on a terminal, written again and again; elsewhere a line every 30 seconds.

    Args:
        what: the name of the work, such as "sweep 1 of 2".
        total: rows in all, 0 where it is not known.
        shown: False writes nothing.
    """

    def __init__(self, what: str, total: int, shown: bool = True) -> None:
        self.what, self.total, self.shown = what, total, shown
        self.live = sys.stderr.isatty()
        self.started = self.last = time.monotonic()
        self.rows, self.written = 0, False

    def add(self, rows: int) -> None:
        """Add rows that are done."""
        self.rows += rows
        now = time.monotonic()
        if self.shown and now - self.last > (0.2 if self.live else 30):
            self.last, self.written = now, True
            print(
                ("\r\x1b[K" if self.live else "xent: ") + self.line(now),
                end="" if self.live else "\n",
                file=sys.stderr,
                flush=True,
            )

    def line(self, now: float) -> str:
        """Return what is written."""
        seconds = max(now - self.started, 1e-9)
        rate = self.rows / seconds
        text = f"{self.what}: {self.rows:,} rows, {rate:,.0f} a second"
        if self.total > self.rows and rate:
            text += f", about {(self.total - self.rows) / rate:,.0f} s left"
        return text

    def end(self) -> None:
        """Take the line off the terminal."""
        if self.written and self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def rows_about(paths: Sequence[Path]) -> int:
    """Return about how many rows some files have; 0 where that cannot be told without reading them."""
    total = 0
    try:
        files = files_of([each for path in paths for each in matching(path)])
        for file in files:
            found = format_of(file)
            if found is not None and found.count is not None:
                total += found.count(file)
            elif found is not None and found.name == "CSV" and not is_compressed(file):
                with open(file, "rb") as text:
                    sample = text.read(SAMPLE)
                total += round(sample.count(b"\n") * file.stat().st_size / max(1, len(sample)))
            else:
                return 0
    except (BadInput, OSError, ValueError):  # the job itself says what is wrong
        return 0
    return total
