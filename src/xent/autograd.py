"""Where the sweep meets torch's differentiation; wiring only, no formula.

Two functions of the same tensors. `reduced` gives the scalar loss and forms its gradient in the forward
sweep: the first backward scales that gradient in place and lets it go, a second one recomputes. `rows`
gives each row's ℓ and lse, from which anything can be made by ordinary operations, and recomputes the
tiles in backward from the saved statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from xent.core import sweep
from xent.core.reduction import Reduction
from xent.core.scores import Scores, Transform
from xent.core.statistics import Statistics
from xent.core.targets import Targets


@dataclass(frozen=True)
class _Recipe:
    """A problem without the tensors that autograd watches: those go through `save_for_backward`."""

    kind: type[Any]
    transform: Transform
    targets: Targets
    budget: int

    @classmethod
    def of(cls, scores: Scores, targets: Targets, budget: int) -> tuple[_Recipe, tuple[Tensor | None, ...]]:
        recipe = cls(type(scores), scores.transform, replace(targets, probabilities=None), budget)
        return recipe, (targets.probabilities, *scores.tensors)

    def bind(self, tensors: tuple[Tensor | None, ...]) -> tuple[Scores, Targets]:
        probabilities, *rest = tensors
        return self.kind(*rest, transform=self.transform), replace(self.targets, probabilities=probabilities)


def needs_gradient(scores: Scores, targets: Targets) -> bool:
    tensors = (targets.probabilities, *scores.tensors)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def rows(scores: Scores, targets: Targets, budget: int) -> tuple[Tensor, Tensor]:
    """(ℓ, lse), each (M,) float64, differentiable once in every tensor of scores and in probabilities."""
    if not needs_gradient(scores, targets):
        with _plain(scores):
            found = sweep.statistics(scores, targets, budget)
        return found.loss, found.logsumexp
    recipe, tensors = _Recipe.of(scores, targets, budget)
    return _Rows.apply(recipe, *tensors)


def reduced(
    scores: Scores,
    targets: Targets,
    reduction: Reduction,
    row_weight: Tensor | None,
    scale: Tensor,
    budget: int,
) -> Tensor:
    """Σ s·(ℓ + λ lse²)·scale, a float64 scalar, its gradient formed in the forward sweep."""
    recipe, tensors = _Recipe.of(scores, targets, budget)
    return _Reduced.apply(recipe, reduction, row_weight, scale, *tensors)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        scores, targets = recipe.bind(tensors)
        with _plain(scores):
            found = sweep.statistics(scores, targets, recipe.budget)
        ctx.recipe, ctx.found = recipe, found
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return found.loss, found.logsumexp

    @staticmethod
    def backward(ctx: Any, loss: Tensor | None, logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
        if loss is None:
            if logsumexp is None:
                return (None,) * len(ctx.needs_input_grad)
            loss = torch.zeros_like(logsumexp)
        asked = sweep.Coefficients(loss, logsumexp)
        wants = ctx.needs_input_grad[1:]
        return _once((None, *_recompute(ctx.recipe, ctx.saved_tensors, ctx.found, asked, wants)))


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recipe: _Recipe,
        reduction: Reduction,
        row_weight: Tensor | None,
        scale: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        scores, targets = recipe.bind(tensors)

        def coefficients(found: Statistics, chunk: slice) -> sweep.Coefficients:
            return reduction.coefficients(found, targets, row_weight, scale, chunk)

        with _plain(scores):
            found, ctx.early = sweep.fused(
                scores, targets, coefficients, ctx.needs_input_grad[5:], recipe.budget
            )
        ctx.recipe, ctx.found = recipe, found
        ctx.asked = coefficients(found, slice(None))
        ctx.save_for_backward(*tensors)
        return (reduction.values(found.loss, found.logsumexp, row_weight) * scale).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # asked for even where unused: it is what notices a freed graph
        early, ctx.early = ctx.early, None
        nothing = (None,) * 4
        if early is not None:
            with torch.no_grad():
                gradients = early.finish(upstream)
            return _once((*nothing, None, *gradients))
        asked = sweep.Coefficients(
            ctx.asked.loss * upstream,
            None if ctx.asked.logsumexp is None else ctx.asked.logsumexp * upstream,
        )
        return _once((*nothing, *_recompute(ctx.recipe, tensors, ctx.found, asked, ctx.needs_input_grad[4:])))


def _recompute(
    recipe: _Recipe,
    tensors: tuple[Tensor | None, ...],
    found: Statistics,
    asked: sweep.Coefficients,
    wants: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of (probabilities, *scores.tensors) from the saved statistics."""
    scores, targets = recipe.bind(tensors)
    with _plain(scores):
        sink, dq = sweep.gradient(
            scores, targets, found, asked, wants[1:], recipe.budget, wants_target=wants[0]
        )
        return dq, *sink.finish(None)


def _once(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients that refuse to be differentiated: under `create_graph` a constant would be a silent zero."""
    if not torch.is_grad_enabled():
        return gradients
    refuse = torch._C._functions.DelayedError(
        b"xent's losses cannot be differentiated twice yet: use torch.nn.functional for this for now",
        len(gradients),
    )
    watched: list[Any] = [g if g is None else g.detach().requires_grad_() for g in gradients]
    return tuple(refuse(*watched))


class _plain:
    """The sweep's own arithmetic: no graph, and no autocast of products whose types are already chosen."""

    def __init__(self, scores: Scores) -> None:
        self.no_grad = torch.no_grad()
        kind = scores.device.type
        self.autocast = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else None

    def __enter__(self) -> None:
        self.no_grad.__enter__()
        if self.autocast is not None:
            self.autocast.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.autocast is not None:
            self.autocast.__exit__(*error)
        self.no_grad.__exit__(*error)


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise where the answer would be wrong or zero: torch.func, forward mode and torch.compile."""
    way_out = "use torch.nn.functional for this for now"
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"xent's losses do not compile yet: mark the call torch.compiler.disable, or {way_out}"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(f"xent's losses do not support torch.func transforms yet: {way_out}")
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(f"xent's losses do not support forward-mode differentiation yet: {way_out}")
