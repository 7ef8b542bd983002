"""The registry of backends, and the choice of one for a problem: the first that serves it.

one_tile → triton → tiles → reference        (a backend that is registered later is tried before them)
"""

from __future__ import annotations

from typing import NamedTuple

from xent._core.backend import Backend, Tiles
from xent._core.one_tile import OneTile
from xent._core.problem import Problem
from xent._core.reference_backend import Reference
from xent._core.triton.backend import Triton


class BackendInfo(NamedTuple):
    """A backend that may compute a loss."""

    name: str
    serves: str  # the problems that it takes
    missing: str | None  # what this machine lacks for it to serve any; None: nothing
    memory: str  # what it works within where no memory_budget is given


_backends: list[Backend] = [OneTile(), Triton(), Tiles(), Reference()]


def register_backend(backend: Backend) -> None:
    """Have a backend tried before those that are registered; one of the same name is replaced.

    The interface, :class:`Backend`, may change until version 1.0.

    Raises:
        TypeError: what is no :class:`Backend`, or has no ``name`` and ``serves``.
        ValueError: the name is that of the tiles, which serve what no other does.
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"backend must be a Backend, got {type(backend).__name__}")
    for attribute in ("name", "serves"):
        if not isinstance(getattr(backend, attribute, None), str):
            raise TypeError(f"{type(backend).__name__} needs a string {attribute}")
    if backend.name == Tiles.name:
        raise ValueError(f"the name {Tiles.name!r} is taken by the backend that serves what no other does")
    _backends[:] = [backend, *(other for other in _backends if other.name != backend.name)]


def unregister_backend(name: str) -> None:
    """Take a registered backend out again.

    Example:
        >>> import xent
        >>> xent.unregister_backend("tiles")
        Traceback (most recent call last):
            ...
        ValueError: name must be one of ['one_tile', 'triton', 'tiles', 'reference'], and not 'tiles'; got ...

    Raises:
        ValueError: there is none of this name, or it is the tiles, which serve what no other does.
    """
    names = [backend.name for backend in _backends]
    if name not in names or name == Tiles.name:
        raise ValueError(f"name must be one of {names}, and not {Tiles.name!r}; got {name!r}")
    _backends[:] = [backend for backend in _backends if backend.name != name]


def backends() -> tuple[BackendInfo, ...]:
    """Return the backends in the order in which each call tries them, with what each serves, or why not.

    The first one that serves a problem computes it. The tiles serve every problem, so what stands behind them
    is there for tests.

    Example:
        >>> import xent
        >>> [backend.name for backend in xent.backends()]
        ['one_tile', 'triton', 'tiles', 'reference']
    """
    return tuple(
        BackendInfo(backend.name, backend.serves, backend.missing(), backend.memory) for backend in _backends
    )


def registered() -> tuple[Backend, ...]:
    """Return the backends in the order in which they are tried."""
    return tuple(_backends)


def backend_for(problem: Problem) -> Backend:
    """Return the first backend that serves the problem."""
    for backend in _backends:
        if backend.supports(problem) is None and backend.missing() is None:
            return backend
    raise AssertionError("the tiles serve every problem")
