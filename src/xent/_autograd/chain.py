"""The sweeps inside torch's differentiation; wiring only, no formula.

    rows  ── backward ──▶  gradient  ── backward, jvp ──▶  Hessian product
      └──── jvp ──▶ tangent

Each is a Function of the same tensors, and each one's derivative is the next. `rows` gives each row's ℓ and
lse (and, asked for, H and log p_y), from which anything can be made by ordinary operations. `reduced` is a
shortcut for one plain backward of a scalar loss: it forms the gradient in the forward sweep, scales it in
place and lets it go. A second backward recomputes, and one that is to be differentiated itself goes through
`rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xent._autograd.transforms import batched, gradients_of, is_one, plain, split, spread, transformed
from xent._core.coefficients import Coefficients
from xent._core.collectives import ClassGroup
from xent._core.logits import GradientAccumulator, Logits
from xent._core.margin import TargetShift
from xent._core.ops import tile_ops_for
from xent._core.reduction import Reduction, Scale
from xent._core.statistics import RequestedOutputs, Statistics
from xent._core.targets import ClassSlice, Targets
from xent._core.tiles import second_order, sweep
from xent._core.tiles.sweep import Problem

THIRD = "xent's losses have two derivatives; this asks for a third: use torch.nn.functional for it"


class RowOutputs(NamedTuple):
    """The outputs of M rows, each (M,): float64, differentiable, None where not requested; argmax int64."""

    loss: Tensor
    logsumexp: Tensor
    entropy: Tensor | None = None
    log_prob: Tensor | None = None
    argmax: Tensor | None = None
    # where processes share the classes, what targets are made of; no gradient
    mass: Tensor | None = None  # t_y of the own class
    of_target: Tensor | None = None  # a


UPSTREAM = 4  # of ℓ, lse, H and log p_y, None where there is none
SAVED = 4  # m, r, a and e, None where there is none


@dataclass(frozen=True)
class _Recipe:
    """A problem without its tensors, which autograd is to see: leaves (q, *scores) first, then the rest."""

    make: Callable[..., Logits]
    classes: int
    total: int
    smoothing: float
    index_checked: bool
    budget: int
    requested: RequestedOutputs
    ranks: ClassGroup | None
    held: ClassSlice | None
    leaves: int
    wants: tuple[
        bool, ...
    ] = ()  # of what the function at hand may answer; here, as torch.func unpacks tuples

    known: tuple[Tensor, ...] | None = None  # the answer, where it has been computed already

    def asking(self, wants: tuple[bool, ...], known: tuple[Tensor, ...] | None = None) -> _Recipe:
        return replace(self, wants=tuple(wants), known=known)

    @classmethod
    def of(cls, problem: Problem) -> tuple[_Recipe, tuple[Tensor | None, ...]]:
        logits, t = problem.logits, problem.targets
        leaves = (t.probabilities, *logits.tensors)
        rest = (t.rows, t.own, t.index_mass, t.other_mass, t.class_weight, t.spread)
        recipe = cls(
            logits.make,
            t.classes,
            t.total,
            t.smoothing,
            t.index_checked,
            problem.budget,
            problem.requested,
            problem.ranks,
            t.held,
            len(leaves),
        )
        return recipe, leaves + rest

    def bind(self, tensors: tuple[Tensor | None, ...], *others: Tensor | None) -> Problem:
        """Return the problem made of the tensors; `others` are further ones that `vmap` may have batched."""
        probabilities, *logits = tensors[: self.leaves]
        rows, own, index_mass, other_mass, class_weight, spread = tensors[self.leaves :]
        targets = Targets(
            classes=self.classes,
            total=self.total,
            rows=rows,
            row_weight=None,
            mean_weight=None,
            own=own,
            index_mass=index_mass,
            other_mass=other_mass,
            index_checked=self.index_checked,
            probabilities=probabilities,
            class_weight=class_weight,
            smoothing=self.smoothing,
            spread=spread,
            held=self.held,
        )
        ops = tile_ops_for(*tensors, *others)
        return Problem(self.make(*logits), targets, self.budget, ops, self.requested, self.ranks)


def rows(problem: Problem) -> RowOutputs:
    """Return the outputs of each row, differentiable twice in the logits' tensors and in probabilities."""
    recipe, tensors = _Recipe.of(problem)
    if needs_gradient(problem) or transformed(*tensors):
        found = _Rows.apply(recipe, None, *tensors)
    else:
        with plain(problem.logits.device):
            found = _outputs(sweep.statistics(problem))
    return _unpacked(found, problem.requested)


def _outputs(found: Statistics) -> tuple[Tensor, ...]:
    """Return ℓ, lse, H, log p_y, then m, r, a, e for the derivatives, then k, t_y; only what is requested."""
    entropy = None if found.e is None else found.entropy
    log_prob = None if found.own is None else found.target_log_prob
    saved = (t if t is None else t.clone() for t in (found.m, found.r, found.a, found.e))
    every = (found.loss, found.logsumexp, entropy, log_prob, *saved, found.k, found.mass)
    return tuple(t for t in every if t is not None)


def _unpacked(outputs: tuple[Tensor, ...], requested: RequestedOutputs) -> RowOutputs:
    _, _, entropy, log_prob, saved = _arranged(outputs, requested)
    rest = outputs[len(outputs) - requested.argmax - requested.mass :]
    argmax, mass = spread(rest, (requested.argmax, requested.mass), 2)
    of_target = saved[2] if requested.mass else None
    return RowOutputs(outputs[0], outputs[1], entropy, log_prob, argmax, mass, of_target)


def _arranged(outputs: tuple[Any, ...], requested: RequestedOutputs) -> tuple[Any, ...]:
    """Split a tuple laid out as `_outputs` into ℓ, lse, H or None, log p_y or None, and the saved four."""
    wants = (True, True, requested.entropy, requested.log_prob, True, True, True, requested.entropy)
    *upstream, m, r, a, e = spread(outputs, wants, len(wants))
    return *upstream, (m, r, a, e)


def reduced(
    problem: Problem,
    reduction: Reduction,
    row_weight: Tensor | None,
    scale: Scale,
    move: TargetShift | None = None,
) -> Tensor:
    """Return Σ s·(ℓ + λ lse²)·scale, a float64 scalar; its gradient is formed in the forward sweep."""
    recipe, tensors = _Recipe.of(problem)
    # in an object of its own, as torch.func unpacks tuples
    how = _Reduction(reduction, row_weight, scale, move)
    return _Reduced.apply(problem, recipe, how, row_weight, *tensors)


@dataclass(frozen=True, eq=False)
class _Reduction:
    """The step from the rows' outputs to the loss."""

    reduction: Reduction
    row_weight: Tensor | None
    scale: Scale
    move: TargetShift | None

    def total(self, loss: Tensor, logsumexp: Tensor, log_prob: Tensor | None) -> Tensor:
        values = self.reduction.values(loss, logsumexp, log_prob, self.row_weight, self.move)
        return self.reduction.total(values, self.scale)

    def coefficients(self, found: Statistics, chunk: slice) -> Coefficients:
        return self.reduction.coefficients(found, self.row_weight, self.scale, chunk, self.move)

    @property
    def straight(self) -> bool:
        """The case that its derivatives in the rows' outputs are constant."""
        return self.reduction.z_loss == 0.0 and self.move is None


def needs_gradient(problem: Problem) -> bool:
    tensors = (problem.targets.probabilities, *problem.logits.tensors)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Rows(torch.autograd.Function):
    """(q, *scores) → what the rows say, and the statistics that the derivatives start from."""

    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: _Recipe, known: Statistics | None, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        if known is not None:
            return _outputs(known)
        problem = recipe.bind(tensors)
        with plain(problem.logits.device):
            return _outputs(sweep.statistics(problem))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.recipe, _, *tensors = inputs
        requested = ctx.recipe.requested
        ctx.mark_non_differentiable(*output[2 + requested.entropy + requested.log_prob :])
        ctx.set_materialize_grads(False)
        saved = _arranged(output, requested)[-1]
        ctx.save_for_backward(*saved, *tensors)
        ctx.save_for_forward(*saved, *tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, tensors = split(ctx.saved_tensors, SAVED)
        *asked, _ = _arranged(upstream, ctx.recipe.requested)
        wants = ctx.needs_input_grad[2 : 2 + ctx.recipe.leaves]
        if all(t is None for t in asked) or not any(wants):
            return (None,) * (2 + len(tensors))
        if asked[0] is None:
            asked[0] = torch.zeros_like(saved[0])
        gradients = _Gradient.apply(ctx.recipe.asking(wants), *asked, *saved, *tensors)
        return None, None, *spread(gradients, wants, len(tensors))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, tensors = split(ctx.saved_tensors, SAVED)
        along, requested = tangents[2 : 2 + ctx.recipe.leaves], ctx.recipe.requested
        found = _Tangent.apply(ctx.recipe, *saved, *along, *tensors)
        return *found, *(None,) * (3 + requested.entropy + requested.argmax + requested.mass)


class _Gradient(torch.autograd.Function):
    """∂⟨rows, upstream⟩ in the leaves that are wanted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: _Recipe, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        if recipe.known is not None:
            return recipe.known
        asked, saved, tensors = split(inputs, UPSTREAM, SAVED)
        problem, wants = recipe.bind(tensors, *asked, *saved), recipe.wants
        with plain(problem.logits.device):
            accumulator, dq = sweep.gradient(
                problem, _found(saved), _coefficients(asked), wants[1:], wants_target=wants[0]
            )
            return _wanted(wants, problem, dq, accumulator)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        recipe, *tensors = inputs
        ctx.recipe = recipe.asking(recipe.wants)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        asked, saved, tensors = split(ctx.saved_tensors, UPSTREAM, SAVED)
        along = spread(upstream, ctx.recipe.wants, ctx.recipe.leaves)
        needs = ctx.needs_input_grad[1:]
        leaves = needs[UPSTREAM + SAVED :][: ctx.recipe.leaves]
        wants = (*needs[:UPSTREAM], *leaves)
        if not any(wants) or all(t is None for t in along):
            return (None,) * (1 + UPSTREAM + SAVED + len(tensors))
        out = _Product.apply(ctx.recipe.asking(wants), *asked, *saved, *along, *tensors)
        found = spread(out, wants, len(wants))
        rest = (None,) * (len(tensors) - ctx.recipe.leaves)
        return None, *found[:UPSTREAM], *(None,) * SAVED, *found[UPSTREAM:], *rest

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        asked, saved, tensors = split(ctx.saved_tensors, UPSTREAM, SAVED)
        changes, _, rest = split(tangents[1:], UPSTREAM, SAVED)
        along = rest[: ctx.recipe.leaves]
        total: list[Tensor | None] = [None] * sum(ctx.recipe.wants)
        if any(t is not None for t in along):
            wants = (*(False,) * UPSTREAM, *ctx.recipe.wants)
            total = list(_Product.apply(ctx.recipe.asking(wants), *asked, *saved, *along, *tensors))
        if any(t is not None for t in changes):
            first = torch.zeros_like(saved[0]) if changes[0] is None else changes[0]
            linear = _Gradient.apply(ctx.recipe, first, *changes[1:], *saved, *tensors)
            total = [g if t is None else t + g for t, g in zip(total, linear, strict=True)]
        return tuple(total)


class _Tangent(torch.autograd.Function):
    """The derivative of what the rows say along tangents of the leaves."""

    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: _Recipe, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        saved, (dq, *along), tensors = split(inputs, SAVED, recipe.leaves)
        problem = recipe.bind(tensors, *saved, dq, *along)
        with plain(problem.logits.device):
            out = second_order.tangent(problem, _found(saved), tuple(along), dq)
        return tuple(t for t in out.outputs if t is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.recipe, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        n, requested = ctx.recipe.leaves, ctx.recipe.requested
        saved, along, tensors = split(ctx.saved_tensors, SAVED, n)
        wants = (True, True, requested.entropy, requested.log_prob)
        asked = list(spread(upstream, wants, UPSTREAM))
        if asked[0] is None:
            asked[0] = torch.zeros_like(saved[0])
        _, wants_along, wants, _ = split(ctx.needs_input_grad[1:], SAVED, n, n)
        d_along: tuple[Tensor | None, ...] = (None,) * n
        if any(wants_along):
            out = _Gradient.apply(ctx.recipe.asking(wants_along), *asked, *saved, *tensors)
            d_along = spread(out, wants_along, n)
        d_leaves: tuple[Tensor | None, ...] = (None,) * len(tensors)
        if any(wants):
            both = (*(False,) * UPSTREAM, *wants)
            out = _Product.apply(ctx.recipe.asking(both), *asked, *saved, *along, *tensors)
            d_leaves = spread(out, wants, len(tensors))
        return None, *(None,) * SAVED, *d_along, *d_leaves

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        raise NotImplementedError("forward mode over forward mode is not supported: put reverse mode inside")


class _Product(torch.autograd.Function):
    """The derivative of ⟨gradient, tangents⟩ in the upstream and in the leaves that are wanted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: _Recipe, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        asked, saved, (dq, *along), tensors = split(inputs, UPSTREAM, SAVED, recipe.leaves)
        problem = recipe.bind(tensors, *asked, *saved, dq, *along)
        of_rows, wants = recipe.wants[:UPSTREAM], recipe.wants[UPSTREAM:]
        gradients: tuple[Tensor, ...] = ()
        with plain(problem.logits.device):
            if not any(wants):
                part = second_order.tangent(problem, _found(saved), tuple(along), dq)
            else:
                part, accumulator, q_part = second_order.product(
                    problem,
                    _found(saved),
                    _coefficients(asked),
                    tuple(along),
                    dq,
                    wants[1:],
                    wants_target=wants[0],
                )
                gradients = _wanted(wants, problem, q_part, accumulator)
        scalars = tuple(v for want, v in zip(of_rows, part.outputs, strict=True) if want and v is not None)
        return scalars + gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # under vmap torch reaches `backward`, to be told there is none, only where something was saved
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(THIRD)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        raise NotImplementedError(THIRD)


class _Reduced(torch.autograd.Function):
    """The scalar loss; its gradient is formed at once, or again from the statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        recipe: _Recipe,
        how: _Reduction,
        row_weight: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        with plain(problem.logits.device):
            found, ctx.gradient_in_forward = sweep.fused(
                problem, how.coefficients, ctx.needs_input_grad[5 : 4 + recipe.leaves]
            )
        ctx.recipe, ctx.how, ctx.found = recipe, how, found
        ctx.save_for_backward(row_weight, *tensors)
        loss = found.loss
        logsumexp = loss if how.straight else found.logsumexp
        return how.total(loss, logsumexp, None if found.own is None else found.target_log_prob)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # asked for even where unused: it is what notices a freed graph, and tensors that have changed
        _, *tensors = ctx.saved_tensors
        n = ctx.recipe.leaves
        wants = ctx.needs_input_grad[4 : 4 + n]
        rest = (None,) * (len(tensors) - n)
        gradient_in_forward, ctx.gradient_in_forward = ctx.gradient_in_forward, None
        if gradient_in_forward is not None and not (batched(upstream) or transformed(upstream)):
            with torch.no_grad():
                formed: tuple[Tensor | None, ...] = gradient_in_forward.finish(
                    None if is_one(upstream) else upstream
                )
            if not torch.is_grad_enabled():
                return *(None,) * 5, *formed, *rest
        else:
            formed = ()
        found = ctx.found
        if torch.is_grad_enabled() and not ctx.how.straight:  # whose derivatives go through the rows

            def again(*tensors: Tensor | None) -> Tensor:
                outputs = _Rows.apply(ctx.recipe, ctx.found, *tensors)
                found = _unpacked(outputs, ctx.recipe.requested)
                return ctx.how.total(found.loss, found.logsumexp, found.log_prob)

            return *(None,) * 4, *gradients_of(again, tensors, wants, upstream), *rest
        every = slice(0, found.m.shape[0])
        asked = ctx.how.coefficients(found, every).scaled(upstream)
        # under create_graph what has been formed is the answer, and this its derivative's way
        recipe = ctx.recipe.asking(wants, tuple(g for g in formed if g is not None) if formed else None)
        gradients = _Gradient.apply(recipe, *asked, found.m, found.r, found.a, found.e, *tensors)
        return *(None,) * 4, *spread(gradients, wants, n), *rest


def _coefficients(asked: tuple[Tensor | None, ...]) -> Coefficients:
    loss, *others = asked
    assert loss is not None
    return Coefficients(loss, *others)


def _found(saved: tuple[Tensor | None, ...]) -> Statistics:
    """Statistics for derivatives, which never ask for d."""
    m, r, a, e = saved
    assert m is not None
    assert r is not None
    assert a is not None
    return Statistics(m=m, r=r, d=torch.zeros_like(m), a=a, e=e)


def _wanted(
    wants: tuple[bool, ...], problem: Problem, dq: Any, accumulator: GradientAccumulator
) -> tuple[Tensor, ...]:
    """Gradients of the leaves that are wanted, in order; zero where nothing reached one."""
    q = problem.targets.probabilities
    of_q = None if dq is None or q is None else dq.finish(None, q.dtype)
    found = (of_q, *accumulator.finish(None))
    leaves = (q, *problem.logits.tensors)
    answers = []
    for want, g, leaf in zip(wants, found, leaves, strict=True):
        if want:
            assert leaf is not None
            answers.append(torch.zeros_like(leaf) if g is None else g)
    return tuple(answers)
