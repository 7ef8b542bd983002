"""KL(t ‖ softmax(z)) of given logits, and of two linear heads whose logits never exist.

    KL = Σ t·(log t − log p) = Σ t·φ(log p − log(t/a)) + a·log a        a = Σ t, φ(δ) = e^δ − 1 − δ

which adds what cannot cancel (every term of φ is at least 0), where the plain sum subtracts numbers of the
size of an entropy to find a difference that may be a billionth of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from xent._arguments.call import Call, resolve_head, resolve_logits, row_temperatures
from xent._arguments.options import Options
from xent._arguments.problem import check_temperatures
from xent._arguments.targets import select
from xent._arguments.validation import (
    check_devices,
    check_floating,
    check_tensors,
    is_readable,
    loss_dtype,
    require_tensors,
)
from xent._autograd import transforms, two_heads
from xent._autograd.chain import needs_gradient
from xent._core.class_indices import UNCHECKED
from xent._core.logits import LinearHead, compute_dtype
from xent._core.reduction import Kind, Scale
from xent._core.selection import Selection
from xent._core.statistics import statistics_dtype
from xent._core.target import TopKTarget, thawed_target
from xent._core.tiles.two_heads import NEAR, PIECE, Pair, phi
from xent._core.validators import valid

Head: TypeAlias = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]


def kl_divergence(
    *,
    target: Tensor | TopKTarget,
    input: Tensor,
    target_is_logits: bool = False,
    temperature: float | Tensor = 1.0,
    bits: bool = False,
) -> Tensor:
    r"""Return KL(t ‖ softmax(z/temperature)) of each row, ``Σ t·(log t − log p)``, in nats.

    Differentiable in both arguments any number of times, in every mode of torch. Computed without
    cancellation: of two logits it is never negative, equal ones are at 0, and distributions that differ by
    1e-8 keep their digits, as do rows that are right beyond all doubt.

    Args:
        target: t, the shape of ``input``: probabilities of any non-negative mass, 0·log 0 = 0 (the slope
            there, asked for, is −inf); or with ``target_is_logits`` the teacher's logits. Or a
            :class:`TopKTarget`, of which nothing is spread where its probabilities exceed 1.
        input: logits z, (C,), (N, C) or (N, C, d1, ...). A class masked by −inf costs nothing without
            target mass, and +inf with it.
        target_is_logits: t is softmax(target/temperature): to be preferred where the teacher learns too, and
            where teacher and student are nearly equal.
        temperature: divides the logits: a number, or one for each row, a tensor of the shape of the result.
            No gradient.
        bits: divide by log 2.

    Returns:
        (), (N,) or (N, d1, ...), of the type of ``input`` (float32 under autocast).

    Raises:
        ValueError: shapes that differ; a temperature that is not positive and finite (of a tensor: on a CPU,
            naming the row); on a CPU a probability
            that is negative, infinite or nan, naming the place (elsewhere it costs nan).
        TypeError: types that are not floating.

    Example:
        >>> import torch, xent
        >>> even, odds = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.6, 0.4])
        >>> round(xent.kl_divergence(target=odds, input=even).item(), 6)
        0.020136
    """
    require_tensors(input=input)
    if not isinstance(target, TopKTarget):
        require_tensors(target=target)
    each = Options.of(temperature=temperature).logits.temperature
    bits = valid("bits", bits)
    target_is_logits = valid("target_is_logits", target_is_logits)
    input, target = transforms.thawed(input), thawed_target(target)
    if isinstance(target, TopKTarget):
        target = _spelt_out(target, input, target_is_logits)
    axis = _check(target, input)
    dtype = compute_dtype(torch.promote_types(input.dtype, target.dtype))
    if not target_is_logits:
        _check_probabilities(target)
    z, t = (v.movedim(axis, -1) for v in (input, target))
    settings = _Settings(target_is_logits, dtype)
    if isinstance(each, Tensor):
        each = row_temperatures(transforms.thawed(each), z.shape[:-1])[..., None]
        if is_readable(each, z):
            check_temperatures(each.reshape(-1), Selection(each.numel()))
        each = each.to(dtype)
    if input.numel() <= _at_a_time(z) or transforms.is_opaque(z, t) or transforms.transformed(z, t):
        kl = _rows(t, z, each, settings)
    else:
        flat = (v.reshape(-1, v.shape[-1]) for v in (t, z))
        each = each.reshape(-1, 1) if isinstance(each, Tensor) else each
        kl = _ByChunks.apply(settings, each, *flat).reshape(z.shape[:-1])
    return (kl / math.log(2) if bits else kl).to(loss_dtype(input))


def linear_kl_divergence(
    *,
    student: Head,
    teacher: Head,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    r"""Return KL(teacher ‖ student) of two linear heads, straight from features, without any logits.

    ``kl_divergence(target=x_T @ w_T.T + b_T, input=x_S @ w_S.T + b_S, target_is_logits=True)`` for
    distillation, visited in tiles of rows × classes. A frozen teacher, the usual case, costs one matrix
    product of its own, and the student three where the budget holds 128 rows of both heads' logits; where it
    does not, each head's logits are computed once more. Two derivatives in closed form. Formulas:
    ``∂KL/∂z_S = p − t``, ``∂KL/∂z_T = t∘(log t − log p − KL)``.

    Args:
        student: ``(features, weight)`` or ``(features, weight, bias)``: (..., D), (C, D), (C,).
        teacher: the same over the same rows and classes; its features may be of another width.
        temperature: divides both heads' logits: a number, or one for each row, a tensor (...). No gradient.
            Distillation often multiplies the loss by its square, so that gradients keep their size; that is
            left to the caller.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean divides by Σ ``sample_weight``, or by the
            number of rows, and is 0 over no rows.
        sample_weight: (...), a factor for each row. A row of weight 0 is left out, whatever it holds.
        memory_budget: bytes of working memory beside inputs, gradients and O(N); 64 MiB by default,
            whatever N and C. For half types the float32 accumulator of a gradient comes beside it.

    Returns:
        A scalar in nats, or (...) for ``"none"``, of the type of the student's features (float32 under
        autocast).

    Raises:
        ValueError: shapes or option values that do not fit together, naming the head.
        TypeError: types that do not.
        NotImplementedError: a third derivative; :func:`kl_divergence` of logits has any number of them.

    Example:
        >>> import torch, xent
        >>> even, odds = torch.zeros(2, 1), torch.tensor([[0.6], [0.4]]).log()
        >>> one = torch.ones(3, 1)
        >>> round(xent.linear_kl_divergence(student=(one, even), teacher=(one, odds)).item(), 6)
        0.020136
    """
    check_tensors(sample_weight=sample_weight)
    sample_weight = transforms.thawed(sample_weight)
    each = temperature
    if isinstance(each, Tensor) and sample_weight is not None and each.shape == sample_weight.shape:
        # a row that is left out may have any; one whose weight is learnt counts
        left_out = (sample_weight == 0) & (not sample_weight.requires_grad)
        each = torch.where(left_out, 1.0, each) if each.dim() else each
    options = Options.of(reduction=reduction, temperature=each, memory_budget=memory_budget)
    distillation = _resolve(
        _head("student", student, options), _head("teacher", teacher, options), sample_weight
    )
    call, pair, weight, in_graph = distillation
    kind, selection = call.reduction.kind, pair.selection
    scale = _scale(kind, weight, selection.count)
    if kind != "none" and distillation.one_backward:
        return two_heads.loss(pair, weight, scale, call.dtype)
    kl = selection.masked(two_heads.rows(pair, in_graph=in_graph))  # before weighing: 0·nan is not 0
    if kind != "none":
        return two_heads.total(kl, weight, scale).to(call.dtype)
    kl = kl if weight is None else kl * weight
    return call.stack([selection.scatter(kl)])


class _Distillation(NamedTuple):
    """A call's arguments, resolved."""

    call: Call  # the student's: reduction, shape of the rows, type of the loss
    pair: Pair
    weight: Tensor | None  # (M,)
    in_graph: bool  # whether the sweep is to be one operator

    @property
    def one_backward(self) -> bool:
        """The case that one plain backward will follow, whose gradient the forward sweep can form."""
        leaves = (*self.pair.student.leaves, *self.pair.teacher.leaves)
        return not (
            self.pair.selection.mask is not None
            or self.in_graph
            or not needs_gradient(leaves)
            or (self.weight is not None and self.weight.requires_grad)
            or transforms.transformed(*leaves, self.weight)
        )


def _resolve(
    one: tuple[Call, LinearHead], other: tuple[Call, LinearHead], sample_weight: Tensor | None
) -> _Distillation:
    """Match the student's and the teacher's rows, and return both with the weights of rows that count."""
    (call, student), (teaching, teacher) = one, other
    rows_shape = tuple(call.rows_shape)
    if call.rows_shape != teaching.rows_shape or student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student and teacher must have the same rows and classes; got rows {rows_shape} and "
            f"{tuple(teaching.rows_shape)}, {student.shape[1]} and {teacher.shape[1]} classes"
        )
    if student.dtype != teacher.dtype:
        raise TypeError(
            f"the student is computed in {student.dtype} and the teacher in {teacher.dtype}: "
            "convert one of them"
        )
    if sample_weight is not None and tuple(sample_weight.shape) != rows_shape:
        raise ValueError(
            f"sample_weight must have the shape of the rows, {rows_shape}; got {tuple(sample_weight.shape)}"
        )
    n, classes = student.shape
    leaves = (*student.leaves, *teacher.leaves)
    weight = None if sample_weight is None else sample_weight.reshape(n)
    in_graph = transforms.is_opaque(weight, *leaves)
    if in_graph:
        check_devices(weight, *leaves)
    by_mask = weight is not None and (in_graph or transforms.batched(weight, *leaves))
    targets, weight = select(Options(), None, classes, UNCHECKED, weight, n, student.device, by_mask=by_mask)
    kept = targets.selection.mask
    if kept is not None and not in_graph:  # in a graph the operator selects for itself
        student, teacher = student.select(kept), teacher.select(kept)
    (problem,) = call.problems
    return _Distillation(call, Pair(student, teacher, targets.selection, problem.budget), weight, in_graph)


def _scale(kind: Kind, weight: Tensor | None, count: int) -> Scale:
    """Return one over the divisor; 0 where there is nothing to divide."""
    if kind != "mean":
        return 1.0
    if weight is None:
        return 1.0 / max(1, count)
    divisor = weight.sum()
    nothing = divisor == 0
    return (1.0 / divisor.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


def _head(role: str, given: Head, options: Options) -> tuple[Call, LinearHead]:
    """Resolve one head, as every loss from features does; an error names the role."""
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        raise ValueError(f"{role} must be (features, weight) or (features, weight, bias)")
    features, weight, bias = (*given, None)[:3]
    require_tensors(**{f"the {role}'s features": features, f"the {role}'s weight": weight})
    assert weight is not None
    if weight.dim() != 2:
        raise ValueError(f"the {role}'s weight must be (C, D), got {tuple(weight.shape)}")
    try:
        call = resolve_head(options, features, weight, bias, None)
    except (ValueError, TypeError) as error:
        raise type(error)(f"the {role}: {error}") from None
    (problem,) = call.problems
    return call, cast(LinearHead, problem.logits)


def _spelt_out(target: TopKTarget, input: Tensor, target_is_logits: bool) -> Tensor:
    """Return a sparse target as a dense one in the shape of the logits."""
    if target_is_logits:
        raise ValueError("a TopKTarget holds probabilities: pass target_is_logits=False")
    (problem,) = resolve_logits(Options(), input, target).problems  # which checks shape and indices
    classes = problem.targets.n_classes
    q = target.probabilities.to(compute_dtype(torch.promote_types(input.dtype, target.probabilities.dtype)))
    _check_probabilities(q)
    t = TopKTarget(target.indices, q, target.remainder).to_dense(classes).clamp_min(0.0)
    return t if input.dim() == 1 else t.movedim(-1, 1)


def _check(target: Tensor, input: Tensor) -> int:
    """Return the axis of the classes."""
    if input.dim() == 0:
        raise ValueError("input needs a class dimension: (C,), (N, C) or (N, C, d1, ...); got a scalar")
    if target.shape != input.shape:
        raise ValueError(
            f"target must have the shape of input, {tuple(input.shape)}; got {tuple(target.shape)}"
        )
    axis = 0 if input.dim() == 1 else 1
    if input.shape[axis] == 0:
        raise ValueError("there must be at least one class, got 0")
    check_floating(input=input)
    check_floating(target=target)
    return axis


def _check_probabilities(t: Tensor) -> None:
    """Name negative, infinite and nan ones where asking costs nothing and is possible."""
    if t.device.type != "cpu" or not t.numel() or transforms.is_opaque(t) or transforms.batched(t):
        return
    low, high = t.detach().aminmax()
    if low >= 0 and high < math.inf:  # nan is neither
        return
    bad = ~((t >= 0) & (t < math.inf))
    at = tuple(bad.nonzero()[0].tolist())
    raise ValueError(
        f"target holds probabilities, which must be finite and not negative; got {t[at].item()} at {at} "
        "(for logits pass target_is_logits=True)"
    )


class _Settings(NamedTuple):
    logits: bool  # whether the target is
    dtype: torch.dtype  # of the computation


Temperature: TypeAlias = float | Tensor  # a number, or (..., 1) in the type of the computation


def _rows(target: Tensor, z: Tensor, temperature: Temperature, settings: _Settings) -> Tensor:
    """Return KL of each row, (..., C) and (..., C) -> (...), of torch's own operations."""
    given, z = target.to(settings.dtype), z.to(settings.dtype)
    log_p = _log_softmax(z, temperature)
    p, mass = log_p.exp(), None
    if settings.logits:
        log_t = _log_softmax(given, temperature)
        t = log_t.exp()
    else:
        t, mass = given, given.sum(-1, keepdim=True, dtype=statistics_dtype(given.device))
        p = p * mass.to(p.dtype)
        log_t = torch.where(t == 0, 1.0, t).log() - torch.where(mass == 0, 1.0, mass).log().to(t.dtype)
    absent = t == 0
    delta = torch.where(absent, 0.0, log_p - log_t)
    if settings.logits:
        delta = delta + _lost(delta, z, given, temperature, log_t).masked_fill(absent, 0.0)
    near = (delta.abs() < NEAR) & ~absent
    terms = torch.where(near, t * phi(delta.clamp(-NEAR, NEAR)), p - t - t * delta)
    if mass is None:
        return terms.sum(-1, dtype=statistics_dtype(t.device))
    # the slope of t·log t at 0
    terms = terms - torch.special.entr(torch.where(absent & (p > 0), t, 1.0))
    return terms.sum(-1, dtype=mass.dtype) - torch.special.entr(mass.squeeze(-1))


class _ByChunks(torch.autograd.Function):
    """`_rows` of many rows, some at a time and once more for their gradient: what it makes stays small."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, temperature: Temperature, target: Tensor, z: Tensor) -> Tensor:
        ctx.settings = settings
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        ctx.save_for_backward(target, z, temperature if isinstance(temperature, Tensor) else None)
        chunks = _chunks(target, z, temperature)
        return torch.cat([_rows(t, some, each, settings) for t, some, each in chunks])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        target, logits, each = ctx.saved_tensors
        given, temperature = (target, logits), ctx.temperature if each is None else each
        wants = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or transforms.batched(upstream) or transforms.transformed(upstream):

            def again(target: Tensor, z: Tensor) -> Tensor:
                return _rows(target, z, temperature, ctx.settings)

            return None, None, *transforms.gradients_of(again, given, wants, upstream)
        answers = [torch.empty_like(t) if want else None for t, want in zip(given, wants, strict=True)]
        start = 0
        for *chunk, of_chunk in _chunks(target, logits, temperature):
            rows = slice(start, start + len(chunk[0]))
            start = rows.stop
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_(want) for t, want in zip(chunk, wants, strict=True)]
                kl = _rows(leaves[0], leaves[1], of_chunk, ctx.settings)
            kl.backward(upstream[rows])
            for answer, leaf in zip(answers, leaves, strict=True):
                if answer is not None and leaf.grad is not None:
                    answer[rows] = leaf.grad
        return None, None, *answers


def _chunks(
    target: Tensor, z: Tensor, temperature: Temperature
) -> Iterator[tuple[Tensor, Tensor, Temperature]]:
    """Split tensors (N, C), and the temperatures (N, 1) where each row has one, into some rows at a time."""
    n, classes = z.shape
    size = max(1, _at_a_time(z) // classes)
    for start in range(0, max(n, 1), size):
        rows = slice(start, start + size)
        yield target[rows], z[rows], temperature[rows] if isinstance(temperature, Tensor) else temperature


def _at_a_time(z: Tensor) -> int:
    """Return how many elements are worth a step: what a cache holds, or what keeps a device busy."""
    return PIECE if z.device.type == "cpu" else 256 * PIECE


def _log_softmax(z: Tensor, temperature: Temperature) -> Tensor:
    """Return (z − m)/T − log1p(r), (..., C); r leaves the maximum's own term out, for confident rows."""
    m, top = z.max(-1, keepdim=True)
    shifted = (z - m) / temperature
    r = shifted.exp().scatter(-1, top, 0.0).sum(-1, keepdim=True, dtype=statistics_dtype(z.device))
    return shifted - torch.log1p(r).to(z.dtype)


def _lost(direct: Tensor, z: Tensor, teacher: Tensor, temperature: Temperature, log_t: Tensor) -> Tensor:
    """Return what rounding took from δ = log p − log t: a constant, 0 where nothing better is known.

    With k the teacher's first class and w = (z_c − z_k) − (y_c − y_k), y the teacher's logits, which loses
    nothing: δ = w − log1p(Σ t·expm1(w)). Near logits lose log t's own rounding otherwise.
    """
    with torch.no_grad():
        direct, z, teacher, log_t = (v.detach() for v in (direct, z, teacher, log_t))
        k = teacher.argmax(-1, keepdim=True)
        first, first_error = _difference(z, z.gather(-1, k))
        second, second_error = _difference(teacher, teacher.gather(-1, k))
        w = ((first - second) + (first_error - second_error)) / temperature
        t = log_t.exp()
        far = torch.exp(first / temperature + log_t.gather(-1, k)) - t  # the same, and finite where w is not
        moved = torch.where(w.abs() < 1, t * torch.expm1(w), far)
        change = moved.sum(-1, keepdim=True, dtype=statistics_dtype(z.device))
        exact = w - torch.log1p(change).to(w.dtype)
        better = (change.abs() < NEAR) & exact.isfinite() & direct.isfinite()
        return torch.where(better, exact - direct, 0.0)


def _difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return a − b and its rounding error, exactly (Knuth)."""
    d = a - b
    other = a - d
    return d, (a - (d + other)) + (other - b)
