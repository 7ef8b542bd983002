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
    """A description of a backend."""

    name: str  # the name under which it is registered
    serves: str  # the problems that it computes, in words
    missing: str | None  # what this machine lacks for it to serve any problem; None if nothing
    memory: str  # its working memory where no memory_budget is given, in words


_backends: list[Backend] = [OneTile(), Triton(), Tiles(), Reference()]


def register_backend(backend: Backend) -> None:
    """Register a backend, which each call then tries before all others.

    A backend of the same name is replaced. The interface, :class:`Backend`, may change until version 1.0.

    Args:
        backend: an instance of a subclass of :class:`Backend`, with a ``name`` and a ``serves``.

    Raises:
        TypeError: an object that is not a :class:`Backend`, or has no string ``name`` or ``serves``.
        ValueError: the name "tiles", which belongs to the backend that serves every problem.

    Example:
        >>> import xent
        >>> from xent._core.backend import Tiles
        >>> class Mine(Tiles):
        ...     name, serves = "mine", "every problem"
        >>> xent.register_backend(Mine())
        >>> xent.backends()[0].name
        'mine'
        >>> xent.unregister_backend("mine")
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
    """Remove a registered backend.

    Args:
        name: the name of the backend.

    Raises:
        ValueError: there is no backend of this name, or it is "tiles", which serves every problem.

    Example:
        >>> import xent
        >>> xent.unregister_backend("tiles")
        Traceback (most recent call last):
            ...
        ValueError: name must be one of ['one_tile', 'triton', 'tiles', 'reference'], and not 'tiles'; got ...
    """
    names = [backend.name for backend in _backends]
    if name not in names or name == Tiles.name:
        raise ValueError(f"name must be one of {names}, and not {Tiles.name!r}; got {name!r}")
    _backends[:] = [backend for backend in _backends if backend.name != name]


def backends() -> tuple[BackendInfo, ...]:
    """Return the backends in the order in which each call tries them.

    A backend computes row statistics and gradients. The first one that serves a problem computes it. The
    backend "tiles" serves every problem; "reference", behind it, is there for tests.

    Returns:
        A named tuple for each backend: its ``name``, the problems it ``serves``, what is ``missing`` on this
        machine (None if nothing), and its working ``memory`` where no ``memory_budget`` is given.

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
