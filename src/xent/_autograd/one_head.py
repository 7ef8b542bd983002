"""Row outputs and losses of given logits, or of one head, inside torch's differentiation.

`rows` gives the outputs of each row, twice differentiable; `loss` one loss, whose gradient is formed in the
forward sweep where that is right and pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xent._autograd import chain, custom_ops
from xent._autograd.chain import Loss, needs_gradient
from xent._autograd.forms import OneHead, Tensors, saved_of
from xent._autograd.transforms import split, transformed
from xent._core.backend import Gradients
from xent._core.backends import backend_for
from xent._core.coefficients import Coefficients
from xent._core.logits import LinearHead
from xent._core.problem import Problem, RowTerms
from xent._core.record import record
from xent._core.reduction import Reduction, RowValues, Scale
from xent._core.statistics import Statistics


class RowOutputs(NamedTuple):
    """The outputs of M rows, (M,): float64, differentiable, None where not requested; argmax int64."""

    loss: Tensor
    logsumexp: Tensor
    entropy: Tensor | None = None
    log_rest: Tensor | None = None  # of the classes that are not own
    log_prob: Tensor | None = None  # (M, K) of the own classes
    argmax: Tensor | None = None
    # where processes share the classes, what targets are made of; no gradient
    mass: Tensor | None = None  # t_y of the target's class
    of_target: Tensor | None = None  # a


def rows(problem: Problem) -> RowOutputs:
    """Return the outputs of the M rows, or in a graph of all N; twice differentiable, in a graph once."""
    requested = problem.requested
    form, tensors = problem.flatten()
    of_target = None
    if problem.in_graph:
        outputs, further = custom_ops.rows(OneHead(form), tensors, problem.check)
    else:
        outputs, saved, further = chain.rows(OneHead(form), tensors)
        of_target = saved[2]
    loss, logsumexp, entropy, log_rest, log_prob = outputs
    assert loss is not None
    assert logsumexp is not None
    argmax = further[0] if requested.argmax else None
    mass = further[-1] if requested.mass else None
    of_target = of_target if requested.mass else None
    return RowOutputs(loss, logsumexp, entropy, log_rest, log_prob, argmax, mass, of_target)


@record
class _Step:
    """The step from a problem's rows to its loss, which holds none of the problem's large tensors."""

    terms: RowTerms
    reduction: Reduction
    scale: Scale
    dtype: torch.dtype  # of the loss

    @property
    def is_linear(self) -> bool:
        return self.reduction.is_linear(self.terms)

    def fused(self, problem: Problem, wants: tuple[bool, ...]) -> tuple[Tensor, Statistics, Gradients]:
        found, gradients = backend_for(problem).fused(problem, self._coefficients, wants)
        # without a z-loss, a shift and a bucket nothing reads the logsumexp
        bare = found.own is None and self.reduction.z_loss == 0.0
        rows = RowValues(found.loss, found.m, None, None) if bare else RowValues.of(found)
        return self._reduced(rows), found, gradients

    def saved(self, found: Statistics) -> Tensors:
        return saved_of(found)

    def loss(self, outputs: Tensors) -> Tensor:
        loss, logsumexp, _, log_rest, log_prob = outputs
        assert loss is not None
        assert logsumexp is not None
        return self._reduced(RowValues(loss, logsumexp, log_prob, log_rest))

    def _reduced(self, rows: RowValues) -> Tensor:
        values = self.reduction.values(self.terms, rows)
        if self.reduction.kind == "none":
            return self.terms.selection.scatter(values).to(self.dtype)
        return self.reduction.total(values, self.scale).to(self.dtype)

    def upstream(self, found: Statistics, upstream: Tensor) -> Tensors:
        own = self._coefficients(found, slice(0, self.terms.selection.count))
        if upstream.dim():
            upstream = self.terms.selection.gather(upstream)
        return tuple(own.scaled(upstream))

    def _coefficients(self, found: Statistics, chunk: slice) -> Coefficients:
        return self.reduction.coefficients(self.terms.rows(chunk), found, self.scale)


def loss(
    problems: Sequence[Problem], reduction: Reduction, dtype: torch.dtype, *, plain: bool = False
) -> Tensor:
    """Return the loss (), in the type given, of problems that share a divisor; or (N,) of one, not reduced.

    ``plain``: no transform is at work, which has been found out already.
    """
    # one problem only: the gradients of several, kept until backward, would be several times the memory
    if len(problems) == 1:
        problem = problems[0].for_loss()
        terms = problem.terms
        form, tensors = problem.flatten()
        leaves, others = split(tensors, form.n_leaves)
        if _forms_early(problem, tensors, reduction, plain=plain):
            step = _Step(
                terms, reduction, reduction.scale(problems, read=problem.logits.device.type == "cpu"), dtype
            )
            value: Tensor = Loss.apply(problem, step, OneHead(form), (*others, problem.row_weight), *leaves)
            return value
    if reduction.kind == "none":
        (problem,) = problems
        values, _ = _values(problem, reduction)
        return problem.selection.scatter(values).to(dtype)
    found = [_values(problem, reduction) for problem in problems]
    scale = reduction.scale([problem for _, problem in found])
    first, *others = (reduction.total(values, scale) for values, _ in found)
    return sum(others, start=first).to(dtype)


def _forms_early(problem: Problem, tensors: Tensors, reduction: Reduction, *, plain: bool) -> bool:
    """Return whether to form the gradient in the forward sweep: only where that is right and pays."""
    logits, s, q = problem.logits, problem.row_weight, problem.targets.probabilities
    if problem.in_graph or problem.ranks is not None or not logits.gradient_in_forward:
        return False  # of ranks, statistics come when the last tile has been seen
    if reduction.kind == "none" and isinstance(logits, LinearHead):
        return False  # the weight's gradient sums over rows, whose upstream is not known yet
    if (s is not None and s.requires_grad) or (q is not None and q.requires_grad):
        return False
    return needs_gradient(tensors) and (plain or not transformed(*tensors, s))


def _values(problem: Problem, reduction: Reduction) -> tuple[Tensor, Problem]:
    """Return what each of the M rows adds to the loss, before the divisor; and the problem that gives it."""
    problem = problem.for_loss()
    found = rows(problem)
    # select before weighing: 0·nan is not 0
    masked = problem.selection.masked
    loss, logsumexp = masked(found.loss), masked(found.logsumexp)
    log_prob = None if found.log_prob is None else masked(found.log_prob)
    log_rest = None if found.log_rest is None else masked(found.log_rest)
    if found.mass is not None:  # of all processes' classes
        targets, shift = problem.targets, problem.shift
        if problem.weight_elsewhere:
            targets = targets.weighed(found.mass)
        if shift is not None and found.of_target is not None:
            rest = found.of_target - found.mass if targets.dense else None
            shift = shift._replace(mass=found.mass, rest=rest)
        problem = replace(problem, targets=targets, shift=shift)
    return reduction.values(problem.terms, RowValues(loss, logsumexp, log_prob, log_rest)), problem


def scattered(problem: Problem) -> RowOutputs:
    """Return the outputs of all N rows: zero, and −1 for argmax, in those that are left out."""
    found = rows(problem)
    values: list[Any] = [
        None if value is None else problem.selection.scatter(value, -1 if name == "argmax" else 0)
        for name, value in found._asdict().items()
    ]
    return RowOutputs(*values)
