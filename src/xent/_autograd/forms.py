"""The forms of problems, as differentiation sees them: what a chain of Functions can compute from tensors.

    of one head, or given logits    outputs ℓ, lse, H, log P̄, log p_y    leaves q, x, W, b
                                    saved m, r, a, e, lse of the own classes and of the others
    of two heads                    a divergence                  saved m, r, moments    leaves x, W, b twice

A form is everything of a problem that is no tensor. The differentiable tensors, the leaves, come first. Which
backend computes with one head is chosen for every problem.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from xent._core import problem as core
from xent._core.backend import Gradients
from xent._core.backends import backend_for
from xent._core.coefficients import Coefficients
from xent._core.record import record
from xent._core.statistics import Statistics
from xent._core.tiles import two_heads, two_heads_second_order
from xent._core.tiles.divergences import Divergence, divergence
from xent._core.tiles.pair import Found, PairForm

T = TypeVar("T")
Tensors: TypeAlias = tuple[Tensor | None, ...]

THIRD = "xent's losses have two derivatives; this asks for a third: use torch.nn.functional for it"
THIRD_OF_TWO = (
    "a divergence of two heads (linear_kl_divergence) has two derivatives; this asks for a third: "
    "xent.kl_divergence and js_divergence of both heads' logits have any number of them"
)


class Form(Protocol):
    """Everything of a problem that is no tensor, and what the chain needs to compute with it."""

    @property
    def n_leaves(self) -> int: ...

    @property
    def saves(self) -> tuple[bool, ...]:
        """A flag for each number of a row that derivatives start from: whether there is one."""
        ...

    @property
    def n_saved(self) -> int:
        """The number of these flags."""
        ...

    @property
    def outputs(self) -> tuple[bool, ...]:
        """A flag for each differentiable output: whether there is one."""
        ...

    @property
    def further(self) -> int:
        """The number of outputs without a derivative."""
        ...

    @property
    def third(self) -> str:
        """The message where a third derivative is taken."""
        ...

    @property
    def form(self) -> Any: ...

    def device(self, tensors: Tensors) -> torch.device: ...

    def evaluate(self, tensors: Tensors, known: Any = None) -> tuple[Tensors, Tensors, Tensors]:
        """Return outputs, what the derivatives start from, and further outputs; None where there is none."""
        ...

    def gradient(
        self, tensors: Tensors, saved: Tensors, upstream: Tensors, wants: tuple[bool, ...]
    ) -> Gradients:
        """Return ∂⟨outputs, upstream⟩/∂leaves, of those that are wanted."""
        ...

    def tangent(self, tensors: Tensors, saved: Tensors, along: Tensors) -> Tensors:
        """Return the derivative of the outputs along tangents of the leaves."""
        ...

    def product(
        self,
        tensors: Tensors,
        saved: Tensors,
        upstream: Tensors,
        along: Tensors,
        wants: tuple[bool, ...],
    ) -> tuple[Tensors, Gradients]:
        """Return `tangent`, and the derivative of ⟨gradient, along⟩ in the leaves that are wanted."""
        ...


@record
class OneHead:
    """The form of a problem of one head, or of given logits, as the chain uses it."""

    form: core.Form

    third = THIRD

    @property
    def n_saved(self) -> int:
        return len(self.saves)

    @property
    def n_leaves(self) -> int:
        return self.form.n_leaves

    @property
    def outputs(self) -> tuple[bool, ...]:
        wanted = self.form.requested
        return True, True, wanted.entropy, wanted.log_rest, wanted.log_prob

    @property
    def saves(self) -> tuple[bool, ...]:
        wanted = self.form.requested
        return True, True, True, wanted.entropy, wanted.log_rest, wanted.log_rest

    @property
    def further(self) -> int:
        return self.form.requested.argmax + self.form.requested.mass

    def device(self, tensors: Tensors) -> torch.device:
        x = tensors[1]
        assert x is not None
        return x.device

    def evaluate(self, tensors: Tensors, known: Statistics | None = None) -> tuple[Tensors, Tensors, Tensors]:
        if known is None:
            problem = self.form.bind(tensors)
            known = backend_for(problem).row_statistics(problem)
        saved = tuple(None if t is None else t.clone() for t in saved_of(known))
        return outputs_of(known), saved, (known.k, known.mass)

    def gradient(
        self, tensors: Tensors, saved: Tensors, upstream: Tensors, wants: tuple[bool, ...]
    ) -> Gradients:
        problem = self.form.bind(tensors, *upstream, *saved)
        return backend_for(problem).gradient(problem, found_of(saved), _coefficients(upstream), wants)

    def tangent(self, tensors: Tensors, saved: Tensors, along: Tensors) -> Tensors:
        problem = self.form.bind(tensors, *saved, *along)
        dq, *tangents = along
        return backend_for(problem).tangent(problem, found_of(saved), tuple(tangents), dq).outputs

    def product(
        self, tensors: Tensors, saved: Tensors, upstream: Tensors, along: Tensors, wants: tuple[bool, ...]
    ) -> tuple[Tensors, Gradients]:
        problem = self.form.bind(tensors, *upstream, *saved, *along)
        dq, *tangents = along
        part, gradients = backend_for(problem).product(
            problem, found_of(saved), _coefficients(upstream), tuple(tangents), dq, wants
        )
        return part.outputs, gradients


def outputs_of(found: Statistics) -> Tensors:
    """Return ℓ, lse, H, log P̄ (M,) and log p of the own classes (M, K), None where they are not known."""
    entropy = None if found.e is None else found.entropy
    log_prob = None if found.own is None else found.own_log_prob
    log_rest = None if found.lse_others is None else found.log_rest
    return found.loss, found.logsumexp, entropy, log_rest, log_prob


def saved_of(found: Statistics) -> Tensors:
    """Return what derivatives start from, (M,)."""
    return found.m, found.r, found.a, found.e, found.lse_own, found.lse_others


def found_of(saved: Tensors) -> Statistics:
    """Return the statistics for derivatives, which never need d."""
    m, r, a, e, lse_own, lse_others = saved
    assert m is not None
    assert r is not None
    assert a is not None
    zero = torch.zeros_like(m)
    return Statistics(m=m, r=r, d=zero, a=a, e=e, lse_own=lse_own, lse_others=lse_others)


def _coefficients(upstream: Tensors) -> Coefficients:
    loss, *others = upstream
    assert loss is not None
    return Coefficients(loss, *others)


@record
class TwoHeads:
    """The form of a pair of heads, as the chain uses it."""

    form: PairForm

    outputs = (True,)
    further = 0
    third = THIRD_OF_TWO

    @property
    def n_leaves(self) -> int:
        return self.form.n_leaves

    @property
    def saves(self) -> tuple[bool, ...]:
        return (True,) * self.n_saved

    @property
    def n_saved(self) -> int:
        return 4 + self.divergence.n_moments

    @property
    def divergence(self) -> Divergence:
        return divergence(self.form.beta)

    def device(self, tensors: Tensors) -> torch.device:
        x = tensors[0]
        assert x is not None
        return x.device

    def evaluate(self, tensors: Tensors, known: Found | None = None) -> tuple[Tensors, Tensors, Tensors]:
        found = two_heads.values(self.form.bind(tensors)) if known is None else known
        return (self.divergence.value(found.moments),), tuple(t.clone() for t in pair_saved(found)), ()

    def gradient(
        self, tensors: Tensors, saved: Tensors, upstream: Tensors, wants: tuple[bool, ...]
    ) -> Gradients:
        pair = self.form.bind(tensors, *upstream, *saved)
        (gamma,) = upstream
        assert gamma is not None
        return two_heads.gradient(pair, pair_found(saved), gamma, self.both(wants))[1]

    def tangent(self, tensors: Tensors, saved: Tensors, along: Tensors) -> Tensors:
        pair = self.form.bind(tensors, *saved, *along)
        return (two_heads_second_order.tangent(pair, pair_found(saved), self.both(along)),)

    def product(
        self, tensors: Tensors, saved: Tensors, upstream: Tensors, along: Tensors, wants: tuple[bool, ...]
    ) -> tuple[Tensors, Gradients]:
        pair = self.form.bind(tensors, *upstream, *saved, *along)
        (gamma,) = upstream
        assert gamma is not None
        kl, gradients = two_heads_second_order.product(
            pair, pair_found(saved), gamma, self.both(along), self.both(wants)
        )
        return (kl,), gradients

    def both(self, of_leaves: tuple[T, ...]) -> tuple[tuple[T, ...], tuple[T, ...]]:
        """Split a value for each leaf into those of the student and of the teacher."""
        return of_leaves[: self.form.student_leaves], of_leaves[self.form.student_leaves :]


def pair_saved(found: Found) -> tuple[Tensor, ...]:
    return found.student.m, found.student.r, found.teacher.m, found.teacher.r, *found.moments


def pair_found(saved: Tensors) -> Found:
    """Return the statistics for derivatives, which never need d and a."""
    student_m, student_r, teacher_m, teacher_r, *moments = saved
    assert student_m is not None
    assert student_r is not None
    assert teacher_m is not None
    assert teacher_r is not None
    zero = torch.zeros_like(student_m)
    student = Statistics(m=student_m, r=student_r, d=zero, a=zero)
    known = tuple(moment for moment in moments if moment is not None)
    return Found(student, Statistics(m=teacher_m, r=teacher_r, d=zero, a=zero), known)
