"""The divergence of two heads inside torch's differentiation; wiring only, no formula.

    rows  ── backward ──▶  gradient  ── backward, jvp ──▶  Hessian product
      └──── jvp ──▶ tangent

As in `autograd`, each is a Function of the same tensors (features, weight and bias of the student, then of
the teacher) and each one's derivative is the next; `reduced` forms the gradient of one plain backward in the
forward sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from xent._autograd.transforms import batched, is_one, plain, split, spread, transformed
from xent._core.logits import GradientAccumulator, LinearHead
from xent._core.ops import tile_ops_for
from xent._core.statistics import Statistics, statistics_dtype
from xent._core.targets import no_targets
from xent._core.tiles import two_heads, two_heads_second_order
from xent._core.tiles.two_heads import Found, Pair

LEAVES = 6  # features, weight and bias of both heads
SAVED = 5  # m and r of both heads, and KL
THIRD = (
    "linear_kl_divergence has two derivatives; this asks for a third: "
    "xent.kl_divergence of both heads' logits has any number of them"
)

Leaves: TypeAlias = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class _Recipe:
    """A pair without its tensors, which autograd is to see: the leaves, then the rows that take part."""

    student: Callable[..., LinearHead]
    teacher: Callable[..., LinearHead]
    classes: int
    total: int
    budget: int
    wants: tuple[bool, ...] = ()  # of what the function at hand may answer
    known: tuple[Tensor, ...] | None = None  # the answer, where it has been computed already

    def asking(self, wants: Sequence[bool], known: tuple[Tensor, ...] | None = None) -> _Recipe:
        return replace(self, wants=tuple(wants), known=known)

    @classmethod
    def of(cls, pair: Pair) -> tuple[_Recipe, Leaves]:
        student, teacher, t = pair.student, pair.teacher, pair.targets
        recipe = cls(student.make, teacher.make, t.classes, t.total, pair.budget)
        return recipe, (*student.tensors, *teacher.tensors, t.rows)

    def bind(self, tensors: Leaves, *others: Tensor | None) -> Pair:
        """Return the pair made of the tensors; `others` are further ones that `vmap` may have batched."""
        student, teacher = self.student(*tensors[:3]), self.teacher(*tensors[3:LEAVES])
        targets = no_targets(self.total, self.classes, student.device, None)
        targets = replace(targets, rows=tensors[LEAVES])
        return Pair(student, teacher, targets, self.budget, tile_ops_for(*tensors, *others))


def rows(pair: Pair) -> Tensor:
    """Return KL of each of the M rows, (M,) float64, differentiable twice in every tensor of both heads."""
    recipe, tensors = _Recipe.of(pair)
    kl: Tensor = _Rows.apply(recipe, *tensors)[0]
    return kl


def reduced(pair: Pair, weight: Tensor | None, scale: float | Tensor) -> Tensor:
    """Return Σ weight·KL·scale, a float64 scalar, its gradient formed in the forward sweep."""
    recipe, tensors = _Recipe.of(pair)
    total: Tensor = _Reduced.apply(pair, recipe, weight, scale, *tensors)
    return total


def total(kl: Tensor, weight: Tensor | None, scale: float | Tensor) -> Tensor:
    """Return Σ weight·KL·scale: 0 where the weights leave nothing to count."""
    value = (kl if weight is None else kl * weight).sum() * scale
    return value.masked_fill(scale == 0, 0.0) if isinstance(scale, Tensor) else value


class _Rows(torch.autograd.Function):
    """Leaves → KL, and what the derivatives start from."""

    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: _Recipe, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        pair = recipe.bind(tensors)
        with plain(pair.student.device):
            found = two_heads.values(pair)
        return found.kl, *(t.clone() for t in saved_of(found))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.recipe, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:], *tensors)
        ctx.save_for_forward(*output[1:], *tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> Leaves:
        saved, tensors = split(ctx.saved_tensors, SAVED)
        wants = ctx.needs_input_grad[1 : 1 + LEAVES]
        if upstream is None or not any(wants):
            return (None,) * (1 + len(tensors))
        gradients = _Gradient.apply(ctx.recipe.asking(wants), upstream, *saved, *tensors)
        return None, *spread(gradients, wants, len(tensors))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Leaves:
        saved, tensors = split(ctx.saved_tensors, SAVED)
        along = tangents[1 : 1 + LEAVES]
        return _Tangent.apply(ctx.recipe, *saved, *along, *tensors), *(None,) * SAVED


class _Gradient(torch.autograd.Function):
    """∂⟨KL, upstream⟩ in the leaves that are wanted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: _Recipe, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        if recipe.known is not None:
            return recipe.known
        (gamma,), saved, tensors = split(inputs, 1, SAVED)
        pair = recipe.bind(tensors, gamma, *saved)
        with plain(pair.student.device):
            _, accumulators = two_heads.gradient(pair, found_of(saved), gamma, both(recipe.wants))
            return wanted(recipe.wants, accumulators, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        recipe, *tensors = inputs
        ctx.recipe = recipe.asking(recipe.wants)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Leaves:
        (gamma,), saved, tensors = split(ctx.saved_tensors, 1, SAVED)
        along = spread(upstream, ctx.recipe.wants, LEAVES)
        (needs_gamma,), _, needs = split(ctx.needs_input_grad[1:], 1, SAVED)
        wants = (needs_gamma, *needs[:LEAVES])
        if not any(wants) or all(t is None for t in along):
            return (None,) * (2 + SAVED + len(tensors))
        out = _Product.apply(ctx.recipe.asking(wants), gamma, *saved, *along, *tensors)
        of_gamma, *found = spread(out, wants, 1 + len(tensors))
        return None, of_gamma, *(None,) * SAVED, *found

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        (gamma,), saved, tensors = split(ctx.saved_tensors, 1, SAVED)
        (change,), _, rest = split(tangents[1:], 1, SAVED)
        along, found = rest[:LEAVES], None
        if any(t is not None for t in along):
            wants = (False, *ctx.recipe.wants)
            found = _Product.apply(ctx.recipe.asking(wants), gamma, *saved, *along, *tensors)
        if change is None:
            return found or tuple(torch.zeros_like(t) for t in chosen(ctx.recipe.wants, tensors))
        linear = _Gradient.apply(ctx.recipe, change, *saved, *tensors)
        return linear if found is None else tuple(a + b for a, b in zip(found, linear, strict=True))


class _Tangent(torch.autograd.Function):
    """The derivative of KL along tangents of the leaves."""

    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: _Recipe, *inputs: Tensor | None) -> Tensor:
        saved, along, tensors = split(inputs, SAVED, LEAVES)
        pair = recipe.bind(tensors, *saved, *along)
        with plain(pair.student.device):
            return two_heads_second_order.tangent(pair, found_of(saved), both(along))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.recipe, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Leaves:
        saved, along, tensors = split(ctx.saved_tensors, SAVED, LEAVES)
        _, wants_along, wants, _ = split(ctx.needs_input_grad[1:], SAVED, LEAVES, LEAVES)
        d_along: Leaves = (None,) * LEAVES
        if any(wants_along):
            out = _Gradient.apply(ctx.recipe.asking(wants_along), upstream, *saved, *tensors)
            d_along = spread(out, wants_along, LEAVES)
        d_leaves: Leaves = (None,) * len(tensors)
        if any(wants):
            recipe = ctx.recipe.asking((False, *wants))
            out = _Product.apply(recipe, upstream, *saved, *along, *tensors)
            d_leaves = spread(out, wants, len(tensors))
        return None, *(None,) * SAVED, *d_along, *d_leaves

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise NotImplementedError(
            "forward mode over forward mode is not supported: put reverse mode inside, "
            "or take xent.kl_divergence of both heads' logits"
        )


class _Product(torch.autograd.Function):
    """The derivative of ⟨gradient, tangents⟩ in the upstream and in the leaves that are wanted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: _Recipe, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        (gamma,), saved, along, tensors = split(inputs, 1, SAVED, LEAVES)
        pair, found = recipe.bind(tensors, gamma, *saved, *along), found_of(saved)
        wants_gamma, *wants = recipe.wants
        with plain(pair.student.device):
            if not any(wants):
                return (two_heads_second_order.tangent(pair, found, both(along)),)
            kl, accumulators = two_heads_second_order.product(pair, found, gamma, both(along), both(wants))
            return *((kl,) if wants_gamma else ()), *wanted(wants, accumulators, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # under vmap torch reaches `backward`, to be told there is none, only where something was saved
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Leaves:
        raise NotImplementedError(THIRD)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        raise NotImplementedError(THIRD)


class _Reduced(torch.autograd.Function):
    """The scalar loss; its gradient is formed at once, or again from the statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        pair: Pair,
        recipe: _Recipe,
        weight: Tensor | None,
        scale: float | Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        gamma = _gamma(pair, weight, scale)
        wants = both(ctx.needs_input_grad[4 : 4 + LEAVES])
        with plain(pair.student.device):
            found, ctx.gradient_in_forward = two_heads.fused(pair, lambda chunk: gamma[chunk], wants)
        ctx.recipe, ctx.found, ctx.gamma = recipe, found, gamma
        ctx.save_for_backward(*tensors)
        return total(found.kl, weight, scale)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Leaves:
        # asked for even where unused: it is what notices a freed graph, and tensors that have changed
        tensors = ctx.saved_tensors
        wants = ctx.needs_input_grad[4 : 4 + LEAVES]
        gradient_in_forward, ctx.gradient_in_forward = ctx.gradient_in_forward, None
        known = None
        if gradient_in_forward is not None and not (batched(upstream) or transformed(upstream)):
            with torch.no_grad():
                factor = None if is_one(upstream) else upstream
                formed = tuple(g for accumulator in gradient_in_forward for g in accumulator.finish(factor))
            if not torch.is_grad_enabled():
                return *(None,) * 4, *formed, None
            known = chosen(wants, formed)
        # under create_graph what has been formed is the answer, and this its derivative's way
        recipe = ctx.recipe.asking(wants, known)
        gradients = _Gradient.apply(recipe, ctx.gamma * upstream, *saved_of(ctx.found), *tensors)
        return *(None,) * 4, *spread(gradients, wants, len(tensors))


def _gamma(pair: Pair, weight: Tensor | None, scale: float | Tensor) -> Tensor:
    """Return ∂(Σ weight·KL·scale)/∂KL, (M,)."""
    device = pair.student.device
    one = torch.ones(pair.targets.count, dtype=statistics_dtype(device), device=device)
    return (one if weight is None else weight) * scale


def saved_of(found: Found) -> tuple[Tensor, ...]:
    return found.student.m, found.student.r, found.teacher.m, found.teacher.r, found.kl


def found_of(saved: Sequence[Tensor]) -> Found:
    """Statistics for derivatives, which never ask for d and a."""
    student_m, student_r, teacher_m, teacher_r, kl = saved
    zero = torch.zeros_like(student_m)
    student = Statistics(m=student_m, r=student_r, d=zero, a=zero)
    return Found(student, Statistics(m=teacher_m, r=teacher_r, d=zero, a=zero), kl)


def both(of_leaves: Sequence[Any]) -> tuple[Any, Any]:
    """Split values of all leaves into the student's and the teacher's."""
    return tuple(of_leaves[:3]), tuple(of_leaves[3:LEAVES])


def chosen(wants: Sequence[bool], tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(t for want, t in zip(wants, tensors, strict=False) if want and t is not None)


def wanted(
    wants: Sequence[bool],
    accumulators: tuple[GradientAccumulator, GradientAccumulator],
    tensors: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Gradients of the leaves that are wanted, in order."""
    every = zip((g for accumulator in accumulators for g in accumulator.finish(None)), tensors, strict=False)
    filled = [torch.zeros_like(t) if g is None and t is not None else g for g, t in every]
    return chosen(wants, filled)
