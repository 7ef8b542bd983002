"""The sweeps inside torch's differentiation; wiring only, no formula.

    rows  ── backward ──▶  gradient  ── backward, jvp ──▶  Hessian product
      └──── jvp ──▶ tangent

Each is a Function of the same tensors, and each one's derivative is the next. `rows` gives outputs of each
row, from which anything can be made by ordinary operations. `Loss` is a shortcut for one plain backward: it
forms the gradient in the forward sweep, scales it in place and lets it go. A second backward recomputes, and
one that is to be differentiated itself goes through the Functions above.

What the Functions compute is a `Form`'s: of one head or given logits (`one_head`), or of a student and a
teacher (`two_heads`). The differentiable tensors of a problem, its leaves, are the first of its tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from xent._autograd.forms import Form, Tensors
from xent._autograd.transforms import batched, gradients_of, plain, split, spread, transformed
from xent._core.backend import Gradients


@dataclass(frozen=True)
class _Recipe:
    """A form and its results that are wanted, in an object of its own: torch.func unpacks tuples."""

    form: Form
    wants: tuple[bool, ...] = ()
    known: Any = None  # the answer, where it has been computed already

    def wanting(self, wants: tuple[bool, ...], known: Tensors | None = None) -> _Recipe:
        return replace(self, wants=tuple(wants), known=known)


def rows(form: Form, tensors: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """Return outputs of each row, saved numbers and further outputs; twice differentiable in the leaves."""
    if needs_gradient(tensors[: form.n_leaves]) or transformed(*tensors):
        found = _Rows.apply(_Recipe(form), *tensors)
    else:
        with plain(form.device(tensors)):
            found = _present(form.evaluate(tensors))
    return _arranged(form, found)


def needs_gradient(tensors: Tensors) -> bool:
    """Return whether a derivative of any of the tensors may be taken by a backward pass."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _present(groups: tuple[Tensors, ...]) -> tuple[Tensor, ...]:
    return tuple(t for group in groups for t in group if t is not None)


def _arranged(form: Form, found: tuple[Any, ...]) -> tuple[Tensors, Tensors, Tensors]:
    """Split outputs, saved numbers and further outputs."""
    n = sum(form.outputs)
    outputs = spread(found[:n], form.outputs, len(form.outputs))
    saved, further = found[n : len(found) - form.further], found[len(found) - form.further :]
    return outputs, spread(saved, form.saves, form.n_saved), further


class _Rows(torch.autograd.Function):
    """Leaves → the outputs of each row, and the numbers that the derivatives start from."""

    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: _Recipe, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with plain(recipe.form.device(tensors)):
            return _present(recipe.form.evaluate(tensors, recipe.known))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        recipe, *tensors = inputs
        ctx.recipe = _Recipe(recipe.form)
        ctx.mark_non_differentiable(*output[sum(recipe.form.outputs) :])
        ctx.set_materialize_grads(False)
        _, saved, _ = _arranged(recipe.form, output)
        ctx.save_for_backward(*saved, *tensors)
        ctx.save_for_forward(*saved, *tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Tensors:
        form = ctx.recipe.form
        saved, tensors = split(ctx.saved_tensors, form.n_saved)
        asked, _, _ = _arranged(form, upstream)
        wants = ctx.needs_input_grad[1 : 1 + form.n_leaves]
        if all(t is None for t in asked) or not any(wants):
            return (None,) * (1 + len(tensors))
        asked = _with_first(asked, saved)
        gradients = _Gradient.apply(ctx.recipe.wanting(wants), *asked, *saved, *tensors)
        return None, *spread(gradients, wants, len(tensors))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensors:
        form = ctx.recipe.form
        saved, tensors = split(ctx.saved_tensors, form.n_saved)
        found = _Tangent.apply(ctx.recipe, *saved, *tangents[1 : 1 + form.n_leaves], *tensors)
        return *found, *(None,) * (sum(t is not None for t in saved) + form.further)


class _Gradient(torch.autograd.Function):
    """∂⟨rows, upstream⟩ in the leaves that are wanted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: _Recipe, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        if recipe.known is not None:
            known: tuple[Tensor, ...] = recipe.known
            return known
        form = recipe.form
        upstream, saved, tensors = split(inputs, len(form.outputs), form.n_saved)
        with plain(form.device(tensors)):
            found = form.gradient(tensors, saved, upstream, recipe.wants).finish(None)
        return _wanted(recipe.wants, found, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        recipe, *tensors = inputs
        ctx.recipe = recipe.wanting(recipe.wants)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Tensors:
        form, wants = ctx.recipe.form, ctx.recipe.wants
        n_up, n_saved, n = len(form.outputs), form.n_saved, form.n_leaves
        asked, saved, tensors = split(ctx.saved_tensors, n_up, n_saved)
        along = spread(upstream, wants, n)
        of_asked, _, of_tensors = split(ctx.needs_input_grad[1:], n_up, n_saved)
        both = (*of_asked, *of_tensors[:n])
        if not any(both) or all(t is None for t in along):
            return (None,) * (1 + n_up + n_saved + len(tensors))
        out = _Product.apply(ctx.recipe.wanting(both), *asked, *saved, *along, *tensors)
        found = spread(out, both, len(both))
        return None, *found[:n_up], *(None,) * n_saved, *found[n_up:], *(None,) * (len(tensors) - n)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensors:
        form, wants = ctx.recipe.form, ctx.recipe.wants
        sizes = len(form.outputs), form.n_saved
        asked, saved, tensors = split(ctx.saved_tensors, *sizes)
        changes, _, rest = split(tangents[1:], *sizes)
        along = rest[: form.n_leaves]
        total: list[Tensor | None] = [None] * sum(wants)
        if any(t is not None for t in along):
            recipe = ctx.recipe.wanting((*(False,) * len(asked), *wants))
            total = list(_Product.apply(recipe, *asked, *saved, *along, *tensors))
        if any(t is not None for t in changes):
            linear = _Gradient.apply(ctx.recipe, *_with_first(changes, saved), *saved, *tensors)
            total = [g if t is None else t + g for t, g in zip(total, linear, strict=True)]
        if wants and total and total[0] is None:
            chosen = (t for want, t in zip(wants, tensors, strict=False) if want and t is not None)
            return tuple(torch.zeros_like(t) for t in chosen)
        return tuple(total)


class _Tangent(torch.autograd.Function):
    """The derivative of the rows' outputs along tangents of the leaves."""

    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: _Recipe, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        form = recipe.form
        saved, along, tensors = split(inputs, form.n_saved, form.n_leaves)
        with plain(form.device(tensors)):
            return _present((form.tangent(tensors, saved, along),))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.recipe, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Tensors:
        form = ctx.recipe.form
        n, n_up = form.n_leaves, len(form.outputs)
        saved, along, tensors = split(ctx.saved_tensors, form.n_saved, n)
        asked = _with_first(spread(upstream, form.outputs, n_up), saved)
        _, wants_along, wants, _ = split(ctx.needs_input_grad[1:], form.n_saved, n, n)
        d_along: Tensors = (None,) * n
        if any(wants_along):
            out = _Gradient.apply(ctx.recipe.wanting(wants_along), *asked, *saved, *tensors)
            d_along = spread(out, wants_along, n)
        d_leaves: Tensors = (None,) * len(tensors)
        if any(wants):
            recipe = ctx.recipe.wanting((*(False,) * n_up, *wants))
            out = _Product.apply(recipe, *asked, *saved, *along, *tensors)
            d_leaves = spread(out, wants, len(tensors))
        return None, *(None,) * form.n_saved, *d_along, *d_leaves

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensors:
        raise NotImplementedError("forward mode over forward mode is not supported: put reverse mode inside")


class _Product(torch.autograd.Function):
    """The derivative of ⟨gradient, tangents⟩ in the upstream and in the leaves that are wanted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: _Recipe, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        form = recipe.form
        n_up = len(form.outputs)
        upstream, saved, along, tensors = split(inputs, n_up, form.n_saved, form.n_leaves)
        of_rows, wants = recipe.wants[:n_up], recipe.wants[n_up:]
        gradients: tuple[Tensor, ...] = ()
        with plain(form.device(tensors)):
            if any(wants):
                tangents, formed = form.product(tensors, saved, upstream, along, wants)
                gradients = _wanted(wants, formed.finish(None), tensors)
            else:
                tangents = form.tangent(tensors, saved, along)
        numbers = (v for want, v in zip(of_rows, tangents, strict=True) if want and v is not None)
        return *numbers, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # under vmap torch reaches `backward`, which says that there is none, only where something was saved
        ctx.form = inputs[0].form
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Tensors:
        raise NotImplementedError(ctx.form.third)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensors:
        raise NotImplementedError(ctx.form.third)


class Step(Protocol):
    """The step from the rows' outputs to a loss: a number, or one for each of N rows."""

    @property
    def is_linear(self) -> bool:
        """The case that its derivatives in the rows' outputs are constant."""
        ...

    def fused(self, problem: Any, wants: tuple[bool, ...]) -> tuple[Tensor, Any, Gradients]:
        """Return a problem's loss, its statistics, and the gradient for an upstream of 1."""
        ...

    def saved(self, found: Any) -> Tensors:
        """Return the numbers of the statistics that the derivatives start from."""
        ...

    def loss(self, outputs: Tensors) -> Tensor:
        """Return the loss by ordinary operations."""
        ...

    def upstream(self, found: Any, upstream: Tensor) -> Tensors:
        """Return ∂⟨loss, upstream⟩/∂outputs."""
        ...


class Loss(torch.autograd.Function):
    """The loss of a problem; its gradient is formed at once, or again from the statistics."""

    @staticmethod
    def forward(
        ctx: Any, problem: Any, step: Step, form: Form, others: Tensors, *leaves: Tensor | None
    ) -> Tensor:
        # `others`, a problem's further tensors and the rows' weights, take no gradient: torch need not look
        with plain(form.device(leaves)):
            loss, ctx.found, ctx.gradients = step.fused(problem, ctx.needs_input_grad[4:])
        ctx.step, ctx.form = step, form
        ctx.save_for_backward(*leaves, *others)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensors:
        # read even where unused: it is what notices a freed graph, and tensors that have changed
        *tensors, _ = ctx.saved_tensors
        step, form, gradients = ctx.step, ctx.form, ctx.gradients
        ctx.gradients = None
        wants = ctx.needs_input_grad[4:]
        formed: Tensors = ()
        differentiated = torch.is_grad_enabled()
        if gradients is not None and not (batched(upstream) or transformed(upstream)):
            if not differentiated:
                return *(None,) * 4, *gradients.finish(_factor(upstream))
            with torch.no_grad():
                formed = gradients.finish(_factor(upstream))
        if differentiated and not step.is_linear:  # whose derivatives go through the rows
            recipe = _Recipe(form, known=ctx.found)

            def again(*tensors: Tensor | None) -> Tensor:
                return step.loss(_arranged(form, _Rows.apply(recipe, *tensors))[0])

            return *(None,) * 4, *gradients_of(again, tensors, wants, upstream)
        # under create_graph what has been formed is the answer, and this its derivative's way
        known = tuple(g for g in formed if g is not None) if formed else None
        of_rows = step.upstream(ctx.found, upstream)
        out = _Gradient.apply(_Recipe(form, tuple(wants), known), *of_rows, *step.saved(ctx.found), *tensors)
        return *(None,) * 4, *spread(out, wants, form.n_leaves)


def _factor(upstream: Tensor) -> Tensor | None:
    """Return the scale of a gradient: None where it is known to be 1, one number where all are the same."""
    if upstream.dim() and upstream.numel() and not any(upstream.stride()):
        upstream = upstream[(0,) * upstream.dim()]
    if upstream.dim() == 0 and upstream.device.type == "cpu" and upstream.item() == 1.0:
        return None
    return upstream


def _with_first(upstream: Tensors, saved: Tensors) -> Tensors:
    """Return the upstream with zeros for the first output, where it has none: a loss is always there."""
    first, *others = upstream
    if first is not None:
        return upstream
    assert saved[0] is not None
    return torch.zeros_like(saved[0]), *others


def _wanted(wants: tuple[bool, ...], found: Tensors, tensors: Tensors) -> tuple[Tensor, ...]:
    """Return the gradients of the leaves that are wanted, in order; zero where nothing reached one."""
    answers = []
    for want, g, leaf in zip(wants, found, tensors, strict=False):
        if want:
            assert leaf is not None
            answers.append(torch.zeros_like(leaf) if g is None else g)
    return tuple(answers)
