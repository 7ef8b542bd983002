"""Limits on the sizes that a file may claim, checked before anything of that size is allocated.

A header of forty bytes can promise 10^15 rows, and one long label among many makes every entry of an array
as wide as itself. So sizes are read first, and held against these limits, the file and the machine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from xent._util.text import quoted
from xent.errors import BadInput

MOST_COLUMNS = 100_000
MOST_CELL = 1 << 20
"""Bytes of a cell of text."""
MOST_NAME = 64 << 10
"""Bytes of a label or of a column's name, in UTF-8."""
MOST_TEXT = 1 << 30
"""Bytes of all different labels together, each as long as the longest, as NumPy holds them."""


def check_columns(where: object, count: int) -> None:
    """Raise ``BadInput`` for more columns than are read."""
    if count > MOST_COLUMNS:
        raise BadInput(
            f"{where}: has {count:,} columns, more than the {MOST_COLUMNS:,} that are read; "
            "drop some, or project the features first"
        )


def check_names(where: object, names: Iterable[str]) -> None:
    """Raise ``BadInput`` for a column whose name is too long or cannot be written."""
    for name in names:
        fault = text_fault(name)
        if fault is not None:
            raise BadInput(f"{where}: the column name {quoted(name)} {fault}; rename it")


def text_fault(text: str) -> str | None:
    """Say what keeps a text from being a name or a label, if anything does."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "is not valid text"
    if size > MOST_NAME:
        return f"takes {size:,} bytes, more than {MOST_NAME:,}"
    if "\0" in text:
        return "holds a NUL character"
    return None


def check_memory(where: object, claimed: int, what: str) -> None:
    """Raise ``BadInput`` for a claim of more bytes than the machine has."""
    there = memory()
    if claimed > there:
        raise BadInput(
            f"{where}: claims {what}, {claimed / 2**30:,.1f} GiB, of which this machine holds "
            f"{there / 2**30:,.1f}; if it is not damaged, take fewer rows or columns"
        )


def memory() -> int:
    """Return how many bytes of memory this process can have: the machine's, or its container's."""
    total = 1 << 62
    with contextlib.suppress(AttributeError, ValueError, OSError):  # a system that does not say
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
            total = min(total, int(Path(limit).read_text()))
    return total
