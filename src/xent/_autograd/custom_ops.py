"""The rows' outputs as custom operators, for `torch.compile`, `torch.export`, and tensors without data.

The tile loop must not be unrolled into a graph, so there the two sweeps are operators that a graph holds as
they are: ``xent::rows`` and its derivative ``xent::rows_gradient``. They have one derivative and no rule for
torch.func, which is why eager code never goes through them. ``xent::top_k`` has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from xent._autograd.chain import RowOutputs
from xent._autograd.transforms import refuse_derivatives, refuse_tangents
from xent._core.coefficients import Coefficients
from xent._core.logits import DenseLogits, LinearHead, Logits, Transform
from xent._core.selection import Selection
from xent._core.statistics import LOSS_ONLY, RequestedOutputs, Statistics, statistics_dtype
from xent._core.targets import Targets, check_index, check_top_k
from xent._core.tiles import sweep
from xent._core.tiles import top_k as streaming
from xent._core.tiles.sweep import Problem


def rows(problem: Problem, kept: Tensor | None, check: bool | None) -> RowOutputs:
    """Return each row's outputs (N,), zero (argmax −1) in the rows not kept (N,); differentiable once."""
    refuse_derivatives()
    logits, t = problem.logits, problem.targets
    x, *head = logits.tensors[:3]
    w, b = head if isinstance(logits, LinearHead) else (None, None)
    assert x is not None
    requested = problem.requested
    of_rows, _, argmax = torch.ops.xent.rows(
        x,
        w,
        b,
        t.probabilities,
        t.own,
        t.index_mass,
        t.other_mass,
        t.class_weight,
        t.spread,
        logits.log_q,
        kept,
        t.classes,
        t.smoothing,
        logits.transform.softcap,
        logits.transform.temperature,
        logits.product_dtype if isinstance(logits, LinearHead) else None,
        problem.budget,
        requested.entropy,
        requested.log_prob,
        requested.argmax,
        check is not False,
    )
    loss, logsumexp, entropy, log_prob = of_rows
    return RowOutputs(
        loss,
        logsumexp,
        entropy if requested.entropy else None,
        log_prob if requested.log_prob else None,
        argmax if requested.argmax else None,
    )


@torch.library.custom_op("xent::rows", mutates_args=())
def _rows(
    x: Tensor,  # (N, D) features, or (N, C) logits where there is no w
    w: Tensor | None,  # (C, D)
    b: Tensor | None,  # (C,)
    q: Tensor | None,  # (N, C)
    own: Tensor | None,  # (N, K)
    index_mass: Tensor | None,  # (N, K)
    other_mass: Tensor | None,  # (N, K)
    class_weight: Tensor | None,  # (C,)
    spread: Tensor | None,  # (N, 1)
    log_q: Tensor | None,  # (C,)
    kept: Tensor | None,  # (N,) bool
    classes: int,
    smoothing: float,
    softcap: float | None,
    temperature: float,
    product_dtype: torch.dtype | None,
    budget: int,
    entropy: bool,
    log_prob: bool,
    argmax: bool,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    refuse_tangents(x, w, b, q)
    if own is not None and check:
        if own.shape[1] > 1:
            check_top_k(own, classes, None)
        else:
            shown = own if kept is None else torch.where(kept[:, None], own, 0)
            check_index(shown[:, 0], classes, -100, None)
    problem = _problem(
        x,
        w,
        b,
        q,
        own,
        index_mass,
        other_mass,
        class_weight,
        spread,
        log_q,
        kept,
        classes,
        smoothing,
        softcap,
        temperature,
        product_dtype,
        budget,
        RequestedOutputs(entropy, argmax, log_prob),
    )
    found = sweep.statistics(problem)
    zero = torch.zeros_like(found.m)
    of_class = zero if found.own is None else found.target_log_prob
    outputs = (found.loss, found.logsumexp, zero if found.e is None else found.entropy, of_class)
    saved = (found.m, found.r, found.a, zero if found.e is None else found.e)
    k = torch.zeros_like(zero, dtype=torch.int64) if found.k is None else found.k
    selection = Selection(x.shape[0], problem.targets.rows)
    out, stacked = (torch.stack([selection.scatter(t) for t in some]) for some in (outputs, saved))
    return out, stacked, selection.scatter(k, -1)


@_rows.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    dtype, n = statistics_dtype(x.device), x.shape[0]
    of_rows, saved = (x.new_empty((4, n), dtype=dtype) for _ in range(2))
    return of_rows, saved, x.new_empty(n, dtype=torch.int64)


@torch.library.custom_op("xent::rows_gradient", mutates_args=())
def _rows_gradient(
    upstream: Tensor,  # (4, N) of ℓ, lse, H, log p_y
    statistics: Tensor,  # (4, N) m, r, a, e
    wants: Sequence[bool],
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    q: Tensor | None,
    own: Tensor | None,
    index_mass: Tensor | None,
    other_mass: Tensor | None,
    class_weight: Tensor | None,
    spread: Tensor | None,
    log_q: Tensor | None,
    kept: Tensor | None,
    classes: int,
    smoothing: float,
    softcap: float | None,
    temperature: float,
    product_dtype: torch.dtype | None,
    budget: int,
    entropy: bool,
    log_prob: bool,
) -> list[Tensor]:
    problem = _problem(
        x,
        w,
        b,
        q,
        own,
        index_mass,
        other_mass,
        class_weight,
        spread,
        log_q,
        kept,
        classes,
        smoothing,
        softcap,
        temperature,
        product_dtype,
        budget,
        RequestedOutputs(entropy, False, log_prob),
    )
    of_rows = torch.cat((upstream, statistics))
    if problem.targets.rows is not None:
        of_rows = of_rows[:, problem.targets.rows]
    loss, logsumexp, of_entropy, of_class, m, r, a, e = of_rows
    found = Statistics(m=m, r=r, d=torch.zeros_like(m), a=a, e=e if entropy else None)
    accumulator, dq = sweep.gradient(
        problem,
        found,
        Coefficients(loss, logsumexp, of_entropy if entropy else None, of_class if log_prob else None),
        (*wants[: 1 if w is None else 3], False)[: len(problem.logits.tensors)],
        wants_target=wants[3],
    )
    gradients = [*accumulator.finish(None), None, None][:3]
    gradients.append(None if dq is None or q is None else dq.finish(None, q.dtype))
    return [
        torch.zeros_like(t) if g is None else g
        for g, t, want in zip(gradients, (x, w, b, q), wants, strict=True)
        if want and t is not None
    ]


@_rows_gradient.register_fake
def _(
    upstream: Tensor,
    statistics: Tensor,
    wants: Sequence[bool],
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    q: Tensor | None,
    *_: object,
) -> list[Tensor]:
    wanted = [t for t, want in zip((x, w, b, q), wants, strict=True) if want and t is not None]
    return [t.new_empty(t.shape) for t in wanted]


def top_k(problem: Problem, k: int) -> tuple[Tensor, Tensor]:
    """Probabilities and classes (N, k), which have no derivative."""
    refuse_derivatives()
    logits = problem.logits
    x, w, b = (None if t is None else t.detach() for t in (*logits.tensors, None, None)[:3])
    assert x is not None
    found: tuple[Tensor, Tensor] = torch.ops.xent.top_k(
        x,
        w,
        b,
        k,
        problem.targets.classes,
        logits.transform.softcap,
        logits.transform.temperature,
        logits.product_dtype if isinstance(logits, LinearHead) else None,
        problem.budget,
    )
    return found


@torch.library.custom_op("xent::top_k", mutates_args=())
def _top_k(
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    k: int,
    classes: int,
    softcap: float | None,
    temperature: float,
    product_dtype: torch.dtype | None,
    budget: int,
) -> tuple[Tensor, Tensor]:
    nothing = (None,) * 8  # no target, no sample of the classes, and all rows
    return streaming.top_k(
        _problem(x, w, b, *nothing, classes, 0.0, softcap, temperature, product_dtype, budget, LOSS_ONLY), k
    )


@_top_k.register_fake
def _(x: Tensor, w: Tensor | None, b: Tensor | None, k: int, *_: object) -> tuple[Tensor, Tensor]:
    p = x.new_empty((x.shape[0], k), dtype=statistics_dtype(x.device))
    return p, x.new_empty((x.shape[0], k), dtype=torch.int64)


def _problem(
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    q: Tensor | None,
    own: Tensor | None,
    index_mass: Tensor | None,
    other_mass: Tensor | None,
    class_weight: Tensor | None,
    spread: Tensor | None,
    log_q: Tensor | None,
    kept: Tensor | None,
    classes: int,
    smoothing: float,
    softcap: float | None,
    temperature: float,
    product_dtype: torch.dtype | None,
    budget: int,
    requested: RequestedOutputs,
) -> Problem:
    transform = Transform(softcap, temperature)
    logits: Logits
    logits = (
        DenseLogits(x, log_q, transform)
        if w is None
        else LinearHead(x, w, b, log_q, transform, product_dtype)
    )
    targets = Targets(
        classes=classes,
        total=x.shape[0],
        rows=None,
        row_weight=None,
        mean_weight=None,
        own=own,
        index_mass=index_mass,
        other_mass=other_mass,
        index_checked=False,
        probabilities=q,
        class_weight=class_weight,
        smoothing=smoothing,
        spread=spread,
    )
    chosen = Selection(x.shape[0], mask=kept).resolved().index
    if chosen is not None:
        targets = replace(
            targets,
            rows=chosen,
            own=None if own is None else own[chosen],
            index_mass=None if index_mass is None else index_mass[chosen],
            other_mass=None if other_mass is None else other_mass[chosen],
            spread=None if spread is None else spread[chosen],
        )
    return Problem(logits, targets, budget, requested=requested)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, classes, smoothing, softcap, temperature, product_dtype, budget, entropy, log_prob, _, _ = (
        inputs
    )
    ctx.settings = (classes, smoothing, softcap, temperature, product_dtype, budget, entropy, log_prob)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
    statistics, *tensors = ctx.saved_tensors
    wants = [bool(need) and t is not None for need, t in zip(ctx.needs_input_grad[:4], tensors, strict=False)]
    wanted = iter(torch.ops.xent.rows_gradient(upstream, statistics, wants, *tensors, *ctx.settings))
    return *(next(wanted) if want else None for want in wants), *(None,) * 17


_rows.register_autograd(_backward, setup_context=_setup_context)
