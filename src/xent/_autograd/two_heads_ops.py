"""The divergence of two heads as custom operators, for `torch.compile`, `torch.export`, tensors without data.

``xent::kl_rows`` and its derivative ``xent::kl_rows_gradient`` stand in a graph for sweeps whose loops must
not be unrolled into it. They have one derivative and no rule for torch.func, which is why eager code never
goes through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from xent._autograd.transforms import refuse_derivatives, refuse_tangents, spread
from xent._autograd.two_heads import LEAVES, SAVED, Leaves, both, chosen, found_of, saved_of, wanted
from xent._core.logits import LinearHead, Transform
from xent._core.selection import Selection
from xent._core.statistics import statistics_dtype
from xent._core.targets import no_targets
from xent._core.tiles import two_heads
from xent._core.tiles.two_heads import Pair


def rows(pair: Pair, kept: Tensor | None) -> Tensor:
    """Return KL of all N rows by one operator, zero in rows not kept (N,); differentiable once."""
    refuse_derivatives()
    student, teacher = pair.student, pair.teacher
    kl, _ = torch.ops.xent.kl_rows(
        *student.tensors,
        *teacher.tensors,
        kept,
        student.transform.temperature,
        student.product_dtype,
        teacher.product_dtype,
        pair.budget,
    )
    return kl


@torch.library.custom_op("xent::kl_rows", mutates_args=())
def _kl_rows(
    x: Tensor,  # (N, D)
    w: Tensor,  # (C, D)
    b: Tensor | None,  # (C,)
    teacher_x: Tensor,  # (N, D′)
    teacher_w: Tensor,  # (C, D′)
    teacher_b: Tensor | None,  # (C,)
    kept: Tensor | None,  # (N,) bool
    temperature: float,
    product_dtype: torch.dtype | None,
    teacher_product_dtype: torch.dtype | None,
    budget: int,
) -> tuple[Tensor, Tensor]:
    leaves = (x, w, b, teacher_x, teacher_w, teacher_b)
    refuse_tangents(*leaves)
    pair = _pair(leaves, kept, temperature, product_dtype, teacher_product_dtype, budget)
    found = two_heads.values(pair)
    selection = Selection(x.shape[0], pair.targets.rows)
    saved = torch.stack([selection.scatter(t) for t in saved_of(found)])
    return saved[-1].clone(), saved


@_kl_rows.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(x.device)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty((SAVED, x.shape[0]), dtype=dtype)


@torch.library.custom_op("xent::kl_rows_gradient", mutates_args=())
def _kl_rows_gradient(
    upstream: Tensor,  # (N,)
    saved: Tensor,  # (SAVED, N)
    wants: Sequence[bool],
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    teacher_x: Tensor,
    teacher_w: Tensor,
    teacher_b: Tensor | None,
    kept: Tensor | None,
    temperature: float,
    product_dtype: torch.dtype | None,
    teacher_product_dtype: torch.dtype | None,
    budget: int,
) -> list[Tensor]:
    leaves = (x, w, b, teacher_x, teacher_w, teacher_b)
    pair = _pair(leaves, kept, temperature, product_dtype, teacher_product_dtype, budget)
    if pair.targets.rows is not None:
        upstream, saved = upstream[pair.targets.rows], saved[:, pair.targets.rows]
    _, accumulators = two_heads.gradient(pair, found_of(saved.unbind()), upstream, both(wants))
    return list(wanted(wants, accumulators, leaves))


@_kl_rows_gradient.register_fake
def _(upstream: Tensor, saved: Tensor, wants: Sequence[bool], *given: Any) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in chosen(wants, given)]


def _pair(
    leaves: Leaves,
    kept: Tensor | None,
    temperature: float,
    product_dtype: torch.dtype | None,
    teacher_product_dtype: torch.dtype | None,
    budget: int,
) -> Pair:
    transform = Transform(None, temperature)
    x, w, b, teacher_x, teacher_w, teacher_b = leaves
    assert x is not None
    assert w is not None
    assert teacher_x is not None
    assert teacher_w is not None
    picked = Selection(x.shape[0], mask=kept).resolved().index
    targets = no_targets(x.shape[0], w.shape[0], x.device, None)
    return Pair(
        LinearHead(x, w, b, transform=transform, product_dtype=product_dtype),
        LinearHead(teacher_x, teacher_w, teacher_b, transform=transform, product_dtype=teacher_product_dtype),
        replace(targets, rows=picked),
        budget,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = inputs[LEAVES + 1 :]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[: LEAVES + 1])


def _backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> Leaves:
    saved, *tensors = ctx.saved_tensors
    leaves = zip(ctx.needs_input_grad, tensors[:LEAVES], strict=False)
    wants = [bool(need) and t is not None for need, t in leaves]
    found = torch.ops.xent.kl_rows_gradient(upstream, saved, wants, *tensors, *ctx.settings)
    return *spread(tuple(found), tuple(wants), LEAVES), *(None,) * 5


_kl_rows.register_autograd(_backward, setup_context=_setup_context)
