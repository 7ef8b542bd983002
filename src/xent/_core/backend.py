"""The seam between what is to be computed and what computes it: the interface of a backend, and the tiles.

    row_statistics(problem) → Statistics                              (M,) numbers a row
    gradient(problem, statistics, coefficients, wants) → Gradients    of probabilities and the logits' tensors

A backend implements these two. `fused`, loss and gradient in one pass, has a default made of the two;
tangents and Hessian products are the tiles' unless a backend has its own. `supports` returns None or the
reason why a problem is not served; `backends` chooses for every call, and the tiles serve everything. Nothing
above knows which backend ran.

What forces a GPU to wait for the host lies behind this seam or in the checks of a call's arguments, and is
listed in docs/design.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from xent._core.coefficients import Coefficients
from xent._core.logits import Tangents
from xent._core.plan import DEFAULT_BUDGET, GPU_DEFAULT
from xent._core.problem import Problem
from xent._core.statistics import Statistics
from xent._core.tiles import second_order, sweep
from xent._core.tiles.second_order import RowTangent

Wants: TypeAlias = tuple[bool, ...]  # of probabilities, then of each of the logits' tensors


class Gradients(Protocol):
    """Gradients whose common factor is not known yet."""

    def finish(self, scale: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradient of each leaf, in its type, times `scale`: a number, or one for each of N rows.

        The factor comes before the rounding to a half type. Memory may be reused: it is called once.
        """
        ...


class FinishedGradients(NamedTuple):
    """Gradients that exist already, in the type of the computation."""

    tensors: tuple[Tensor | None, ...]
    leaves: tuple[Tensor | None, ...]

    def finish(self, scale: Tensor | None) -> tuple[Tensor | None, ...]:
        if scale is not None and scale.dim():
            scale = scale[:, None]
        return tuple(
            None if g is None or leaf is None else (g if scale is None else g.mul_(scale)).to(leaf.dtype)
            for g, leaf in zip(self.tensors, self.leaves, strict=True)
        )


class Backend(ABC):
    """An implementation of row statistics and gradients; the interface for further ones.

    A subclass sets ``name`` and ``serves`` (one line for people) and implements :meth:`row_statistics` and
    :meth:`gradient`. The other methods have defaults. :func:`xent.register_backend` makes an instance known;
    each call then takes the first backend whose :meth:`supports` and :meth:`missing` return None. The
    interface may change until version 1.0.

    Example:
        >>> import torch, xent
        >>> from xent._core.tiles import sweep
        >>> class Counting(xent.Backend):
        ...     name, serves, calls = "counting", "every problem", 0
        ...     def row_statistics(self, problem):
        ...         self.calls += 1
        ...         return sweep.statistics(problem)
        ...     def gradient(self, problem, found, coefficients, wants):
        ...         return sweep.gradient(problem, found, coefficients, wants)
        >>> counting = Counting()
        >>> xent.register_backend(counting)
        >>> loss = xent.cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
        >>> xent.unregister_backend("counting")
        >>> counting.calls
        1
    """

    name: str
    serves: str  # one line for people
    memory = f"{DEFAULT_BUDGET >> 20} MiB on a CPU; on a CUDA device {GPU_DEFAULT}"

    def missing(self) -> str | None:
        """Return what this machine lacks for the backend to serve any problem.

        Returns:
            A line for people, or None where nothing is missing.
        """
        return None

    def supports(self, problem: Problem) -> str | None:
        """Return why this backend does not serve a problem.

        Args:
            problem: logits or a linear head, targets and options.

        Returns:
            The reason, a line for people, or None where the backend serves the problem.
        """
        return None

    @abstractmethod
    def row_statistics(self, problem: Problem) -> Statistics:
        """Return the statistics of the M rows that count, such as the maximum and the sum of exponentials.

        Args:
            problem: logits or a linear head, targets and options.

        Returns:
            The statistics, tensors (M,).
        """

    @abstractmethod
    def gradient(
        self, problem: Problem, found: Statistics, coefficients: Coefficients, wants: Wants
    ) -> Gradients:
        """Return the gradients of the tensors that require one.

        Args:
            problem: logits or a linear head, targets and options.
            found: the statistics of its rows.
            coefficients: the factors of each row in the gradient.
            wants: which gradients are needed: of target probabilities, then of each tensor of the logits.

        Returns:
            The gradients, None for each one that is not needed.
        """

    def fused(
        self, problem: Problem, coefficients: Callable[[Statistics, slice], Coefficients], wants: Wants
    ) -> tuple[Statistics, Gradients]:
        """Return the statistics of the rows and the gradients, from one pass if the backend has one.

        The default calls :meth:`row_statistics` and then :meth:`gradient`.

        Args:
            problem: logits or a linear head, targets and options.
            coefficients: a function that returns the coefficients of a chunk of rows from their statistics.
            wants: as in :meth:`gradient`.

        Returns:
            A pair of statistics and gradients.
        """
        found = self.row_statistics(problem)
        upstream = coefficients(found, slice(0, problem.targets.count))
        return found, self.gradient(problem, found, upstream, wants)

    def tangent(
        self, problem: Problem, found: Statistics, tangents: Tangents, dq: Tensor | None
    ) -> RowTangent:
        """Return the derivatives of the rows' outputs along tangents of the tensors (forward mode).

        Args:
            problem: logits or a linear head, targets and options.
            found: the statistics of its rows.
            tangents: a tangent for each tensor of the logits, or None.
            dq: a tangent of the target probabilities, or None.

        Returns:
            The derivatives, tensors (M,).
        """
        return second_order.tangent(problem, found, tangents, dq)

    def product(
        self,
        problem: Problem,
        found: Statistics,
        coefficients: Coefficients,
        tangents: Tangents,
        dq: Tensor | None,
        wants: Wants,
    ) -> tuple[RowTangent, Gradients]:
        """Return the derivatives along tangents, and the derivative of ⟨gradient, tangents⟩ in the tensors.

        The second part is the product of the Hessian with the tangents.

        Args:
            problem: logits or a linear head, targets and options.
            found: the statistics of its rows.
            coefficients: the factors of each row in the gradient.
            tangents: a tangent for each tensor of the logits, or None.
            dq: a tangent of the target probabilities, or None.
            wants: as in :meth:`gradient`.

        Returns:
            A pair of the derivatives of the rows and the products.
        """
        return second_order.product(problem, found, coefficients, tangents, dq, wants)


class Tiles(Backend):
    """Tiles of rows × classes within a memory budget, of torch's operations: every problem, any device."""

    name = "tiles"
    serves = "every problem, on any device"

    def row_statistics(self, problem: Problem) -> Statistics:
        return sweep.statistics(problem)

    def gradient(
        self, problem: Problem, found: Statistics, coefficients: Coefficients, wants: Wants
    ) -> Gradients:
        return sweep.gradient(problem, found, coefficients, wants)

    def fused(
        self, problem: Problem, coefficients: Callable[[Statistics, slice], Coefficients], wants: Wants
    ) -> tuple[Statistics, Gradients]:
        return sweep.fused(problem, coefficients, wants)
