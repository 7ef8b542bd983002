"""The group of the processes that were started together, one or several."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from xent._processes.group import ALONE, DEFAULT_TIMEOUT, Ranks
from xent.errors import BadInput


def started() -> tuple[int, int] | None:
    """Return this process's rank and how many there are; None unless torchrun or the like started several."""
    given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    if None in given.values():
        return None
    try:
        rank, size, _ = (int(given[name] or "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    except ValueError:
        raise BadInput(
            f"RANK, WORLD_SIZE and MASTER_PORT are to be whole numbers, as torchrun sets them; got "
            f"{given['RANK']!r}, {given['WORLD_SIZE']!r} and {given['MASTER_PORT']!r}"
        ) from None
    if not 0 <= rank < size:
        raise BadInput(f"RANK={rank} is not below WORLD_SIZE={size}; start the ranks with torchrun")
    return None if size == 1 else (rank, size)


@contextlib.contextmanager
def join(timeout: float = DEFAULT_TIMEOUT, slices: int = 1) -> Iterator[Ranks]:
    """Connect the ranks that were started together, for the block; one process where there is one."""
    given = started()
    size = 1 if given is None else given[1]
    if size % slices:
        raise BadInput(
            f"--class-parallel {slices} does not divide the {size} {'ranks' if size > 1 else 'process'}"
            + ("" if size > 1 else f"; start them with: torchrun --nproc-per-node {slices} -m xent fit …")
        )
    if given is None:
        yield ALONE
        return
    from xent._processes.torchrun import joined

    with joined(*given, timeout, slices) as ranks:
        yield ranks
