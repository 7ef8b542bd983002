"""The rows' outputs as custom operators, for `torch.compile`, `torch.export`, and tensors without data.

The tile loop must not be unrolled into a graph, so there the sweeps are operators that a graph holds as they
are: ``xent::rows`` and its derivative ``xent::rows_gradient``, of a head, of given logits or of two heads.
They take a problem as its tensors and as numbers and names, which `_encoded` and `_decoded` turn into a form
and back. They have one derivative and no rule for torch.func, so eager code never goes through them.
``xent::top_k`` has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xent._autograd.forms import Form, OneHead, Tensors, TwoHeads
from xent._autograd.transforms import refuse_derivatives, refuse_tangents, spread
from xent._core import problem as core
from xent._core.class_indices import check_index, check_top_k
from xent._core.problem import Problem
from xent._core.selection import Selection
from xent._core.statistics import RequestedOutputs, statistics_dtype
from xent._core.tiles import top_k as streaming
from xent._core.tiles.pair import PairForm

NO_SOFTCAP = 0.0


class _Encoded(NamedTuple):
    """A form in the types that an operator's arguments can have."""

    leaves: list[int]  # of the one head or of the logits, or of both heads
    numbers: list[float]  # softcap, logit scale (of each head), temperature, smoothing or β
    budget: int
    product_dtype: torch.dtype | None
    teacher_product_dtype: torch.dtype | None
    requested: list[bool]  # entropy, log_rest, log_prob, argmax


def _encoded(form: Form) -> _Encoded:
    if isinstance(form, TwoHeads):
        pair = form.form
        softcaps = (NO_SOFTCAP if softcap is None else softcap for softcap in pair.softcaps)
        numbers = [*softcaps, *pair.scales, pair.temperature, pair.beta]
        dtypes = pair.product_dtype, pair.teacher_product_dtype
        leaves = [pair.student_leaves, pair.teacher_leaves]
        return _Encoded(leaves, numbers, pair.budget, *dtypes, [False] * 4)
    one = form.form
    softcap = NO_SOFTCAP if one.softcap is None else one.softcap
    numbers = [softcap, one.scale, one.temperature, one.smoothing]
    wanted = one.requested
    return _Encoded(
        [one.n_leaves],
        numbers,
        one.budget,
        one.product_dtype,
        None,
        [wanted.entropy, wanted.log_rest, wanted.log_prob, wanted.argmax],
    )


def _decoded(
    leaves: Sequence[int],
    numbers: Sequence[float],
    budget: int,
    product_dtype: torch.dtype | None,
    teacher_product_dtype: torch.dtype | None,
    requested: Sequence[bool],
) -> Form:
    if len(leaves) == 2:
        *softcaps, scale, teacher_scale, temperature, beta = numbers
        student, teacher = (None if softcap == NO_SOFTCAP else softcap for softcap in softcaps)
        dtypes, scales = (product_dtype, teacher_product_dtype), (scale, teacher_scale)
        return TwoHeads(PairForm(*dtypes, temperature, scales, (student, teacher), budget, beta, *leaves))
    softcap, scale, temperature, smoothing = numbers
    entropy, log_rest, log_prob, argmax = requested
    return OneHead(
        core.Form(
            product_dtype,
            leaves[0],
            None if softcap == NO_SOFTCAP else softcap,
            temperature,
            scale,
            smoothing,
            False,
            None,
            budget,
            RequestedOutputs(entropy, argmax, log_prob, log_rest),
            None,
        )
    )


def arguments(form: Form, tensors: Tensors) -> tuple[Any, ...]:
    """Return a problem as the operators take it: the tensors that there are, which those are, the form."""
    present = [t is not None for t in tensors]
    return [t for t in tensors if t is not None], present, *_encoded(form)


def rows(form: Form, tensors: Tensors, check: bool | None) -> tuple[Tensors, Tensors]:
    """Return each row's outputs, zero in rows the mask takes out, and argmax; differentiable once."""
    refuse_derivatives()
    given, present, *encoded = arguments(form, tensors)
    outputs, _, argmax = torch.ops.xent.rows(given, present, check is not False, *encoded)
    return _unpacked(outputs, form), (argmax,)


def _packed(outputs: Tensors, like: Tensor) -> Tensor:
    """Return the outputs of rows, (N,) or the last of them (N, K), as one tensor (columns, N)."""
    every = [torch.zeros_like(like) if t is None else t for t in outputs]
    return torch.cat([t.t() if t.dim() > 1 else t[None] for t in every])


def _unpacked(packed: Tensor, form: Form) -> Tensors:
    """Return the outputs of rows again, None where there is none."""
    flags, last = form.outputs, len(form.outputs) - 1
    parts = [packed[i] if i < last or not last else packed[i:].t() for i in range(len(flags))]
    return tuple(part if there else None for part, there in zip(parts, flags, strict=True))


def _columns(form: Form, tensors: Tensors) -> int:
    """Return how many columns the packed outputs have."""
    of_classes = isinstance(form, OneHead) and form.form.requested.log_prob
    return len(form.outputs) - 1 + (form.form.n_own(tensors) if of_classes else 1)


def _resolved(form: Form, tensors: Tensors) -> tuple[Selection, Tensors]:
    """Return the tensors of the rows that count, by index where data may decide, and which those are."""
    problem = form.form.bind(tensors)
    if tensors[1].device.type not in Selection.masked_on:  # type: ignore[union-attr]
        problem = problem.resolved()
    elif problem.selection.mask is not None:
        problem = problem.harmless(problem.selection.mask)
    return problem.selection, problem.flatten()[1]


@torch.library.custom_op("xent::rows", mutates_args=())
def _rows(
    given: Sequence[Tensor],
    present: Sequence[bool],  # which of the form's tensors are given
    check: bool,
    leaves: Sequence[int],
    numbers: Sequence[float],
    budget: int,
    product_dtype: torch.dtype | None,
    teacher_product_dtype: torch.dtype | None,
    requested: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    form = _decoded(leaves, numbers, budget, product_dtype, teacher_product_dtype, requested)
    tensors = spread(tuple(given), tuple(present), len(present))
    refuse_tangents(*tensors[: form.n_leaves])
    if check and isinstance(form, OneHead):
        _check(form.form.bind(tensors))
    selection, chosen = _resolved(form, tensors)
    outputs, saved, further = form.evaluate(chosen)
    zero = outputs[0]
    assert zero is not None
    out = _packed(
        tuple(None if t is None else selection.scatter(t) for t in outputs), selection.scatter(zero)
    )
    kept = torch.stack([selection.scatter(torch.zeros_like(zero) if t is None else t) for t in saved])
    k = further[0] if further and further[0] is not None else torch.zeros_like(zero, dtype=torch.int64)
    return out, kept, selection.scatter(k, -1)


def _check(problem: Problem) -> None:
    """Raise unless the class indices of the rows that count are classes."""
    targets, mask = problem.targets, problem.selection.mask
    index, classes = targets.index, targets.n_classes
    if index is None:
        return
    if index.shape[1] > 1:
        check_top_k(index, classes, None)
    else:
        shown = index if mask is None else torch.where(mask[:, None], index, 0)
        check_index(shown[:, 0], classes, -100, None)


@_rows.register_fake
def _(given: Sequence[Tensor], present: Sequence[bool], check: bool, *form: Any) -> Any:
    decoded = _decoded(*form)
    some = given[0]  # a tensor of N rows, whatever it is
    dtype, n = statistics_dtype(some.device), some.shape[0]
    columns = _columns(decoded, spread(tuple(given), tuple(present), len(present)))
    of_rows = some.new_empty((columns, n), dtype=dtype)
    saved = some.new_empty((decoded.n_saved, n), dtype=dtype)
    return of_rows, saved, some.new_empty(n, dtype=torch.int64)


@torch.library.custom_op("xent::rows_gradient", mutates_args=())
def _rows_gradient(
    upstream: Tensor,  # (columns, N), as `_packed`
    saved: Tensor,  # (saved, N)
    wants: Sequence[bool],  # of the leaves
    given: Sequence[Tensor],
    present: Sequence[bool],
    leaves: Sequence[int],
    numbers: Sequence[float],
    budget: int,
    product_dtype: torch.dtype | None,
    teacher_product_dtype: torch.dtype | None,
    requested: Sequence[bool],
) -> list[Tensor]:
    form = _decoded(leaves, numbers, budget, product_dtype, teacher_product_dtype, requested)
    tensors = spread(tuple(given), tuple(present), len(present))
    selection, chosen = _resolved(form, tensors)
    if selection.index is not None:
        upstream, saved = upstream[:, selection.index], saved[:, selection.index]
    of_rows = _unpacked(upstream, form)
    of_saved = tuple(t if there else None for t, there in zip(saved.unbind(), form.saves, strict=True))
    gradients = form.gradient(chosen, of_saved, of_rows, tuple(wants)).finish(None)
    return [
        torch.zeros_like(t) if g is None else g
        for g, t, want in zip(gradients, tensors, wants, strict=False)
        if want and t is not None
    ]


@_rows_gradient.register_fake
def _(
    upstream: Tensor,
    saved: Tensor,
    wants: Sequence[bool],
    given: Sequence[Tensor],
    present: Sequence[bool],
    *_: Any,
) -> list[Tensor]:
    tensors = spread(tuple(given), tuple(present), len(present))
    chosen = (t for t, want in zip(tensors, wants, strict=False) if want and t is not None)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in chosen]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, present, _, *form = inputs
    ctx.present, ctx.form = present, form
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1], *given)


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    saved, *given = ctx.saved_tensors
    needed = spread(tuple(ctx.needs_input_grad[0]), tuple(ctx.present), len(ctx.present))
    n_leaves = _decoded(*ctx.form).n_leaves
    wants = [bool(need) for need in needed[:n_leaves]]
    found = torch.ops.xent.rows_gradient(upstream, saved, wants, given, ctx.present, *ctx.form)
    every = spread(tuple(found), tuple(wants), len(ctx.present))
    return [g for g, there in zip(every, ctx.present, strict=True) if there], *(None,) * 8


_rows.register_autograd(_backward, setup_context=_setup_context)


def top_k(problem: Problem, k: int) -> tuple[Tensor, Tensor]:
    """Return probabilities and classes (N, k), which have no derivative."""
    refuse_derivatives()
    form, tensors = problem.flatten()
    given, present, *encoded = arguments(OneHead(form), tensors)
    found: tuple[Tensor, Tensor] = torch.ops.xent.top_k([t.detach() for t in given], present, k, *encoded)
    return found


@torch.library.custom_op("xent::top_k", mutates_args=())
def _top_k(
    given: Sequence[Tensor],
    present: Sequence[bool],
    k: int,
    leaves: Sequence[int],
    numbers: Sequence[float],
    budget: int,
    product_dtype: torch.dtype | None,
    teacher_product_dtype: torch.dtype | None,
    requested: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    form = _decoded(leaves, numbers, budget, product_dtype, teacher_product_dtype, requested)
    assert isinstance(form, OneHead)
    return streaming.top_k(form.form.bind(spread(tuple(given), tuple(present), len(present))), k)


@_top_k.register_fake
def _(given: Sequence[Tensor], present: Sequence[bool], k: int, *_: Any) -> tuple[Tensor, Tensor]:
    x = given[0]
    p = x.new_empty((x.shape[0], k), dtype=statistics_dtype(x.device))
    return p, x.new_empty((x.shape[0], k), dtype=torch.int64)
