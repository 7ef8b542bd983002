"""Divergences of two linear heads, whose logits never exist, as losses.

    KL(t ‖ p) = Σ t·φ(log p − log t)        ∂/∂z_S = p − t        ∂/∂z_T = t∘(log t − log p − KL)

In reverse, KL(p ‖ t), the heads change their places.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from xent._arguments.call import Call, agreed, harmless, resolve_head, resolve_local_head
from xent._arguments.options import Options
from xent._arguments.targets import select
from xent._arguments.validation import check_devices, check_tensors, require_tensors, require_weight
from xent._autograd import transforms, two_heads
from xent._autograd.chain import needs_gradient
from xent._core.class_indices import UNCHECKED
from xent._core.logits import LinearHead, compute_dtype
from xent._core.low_rank import LowRank, Weight, tensors_of_weight
from xent._core.reduction import Scale
from xent._core.selection import Selection
from xent._core.target import TopKTarget
from xent._core.tiles.pair import Pair
from xent._core.validators import DirectionName, ReductionName, valid
from xent.losses._top_k_divergence import as_bucket, top_k_divergence

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Head: TypeAlias = tuple[Tensor, Weight] | tuple[Tensor, Weight, Tensor | None]


def linear_kl_divergence(
    *,
    student: Head,
    teacher: Head | TopKTarget,
    direction: DirectionName = "forward",
    temperature: float | Tensor = 1.0,
    scale_by_t2: bool = False,
    reduction: ReductionName = "mean",
    sample_weight: Tensor | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    softcap: float | tuple[float | None, float | None] | None = None,
    memory_budget: int | None = None,
    group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""Return the Kullback-Leibler divergence of a student's linear head from a teacher's, without storing
    logits.

    The value is ``kl_divergence(target=x_T @ w_T.T + b_T, input=x_S @ w_S.T + b_S, target_is_logits=True)``,
    as distillation needs it, with x_T, w_T, b_T of the teacher and x_S, w_S, b_S of the student. It is
    computed in tiles of rows × classes. Where ``memory_budget`` holds 128 rows of both heads' logits, the
    student costs three matrix products and a teacher without gradient, the usual case, one; where it does
    not, each head's logits are computed once more. Two derivatives are in closed form: with p of the student
    and t of the teacher, ``∂KL/∂z_S = p − t`` and ``∂KL/∂z_T = t∘(log t − log p − KL)``.

    Args:
        student: ``(features, weight)`` or ``(features, weight, bias)``, of shapes (..., D), (C, D) and (C,).
            The weight may be a :class:`LowRank`.
        teacher: the same, over the same rows and classes; its D may differ. Or a :class:`TopKTarget` with the
            remainder ``"bucket"`` or ``"drop"``, whose probabilities are taken as they are, without the
            temperature. The result is then the exact divergence of k + 1 classes, at the cost of two
            products.
        direction: ``"forward"`` for KL(teacher ‖ student), or ``"reverse"`` for KL(student ‖ teacher).
        temperature: T; it divides both heads' logits. One number, or a tensor (...) with a number for each
            row. No gradient.
        scale_by_t2: as in :func:`kl_divergence`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean divides by Σ ``sample_weight``, or by the
            number of rows, and is 0 over no rows.
        sample_weight: s, (...), a factor for each row. A row of weight 0 is left out, whatever it holds.
        logit_scale: a factor of the logits, as some language models have it: one number for both heads, or a
            pair for student and teacher. Beside a :class:`TopKTarget` one number.
        softcap: k; logits are replaced by k·tanh(z/k), after the scale and before the temperature. One number
            or None for both heads, or a pair, as ``logit_scale``.
        memory_budget: as in :func:`linear_cross_entropy`.
        group: with a :class:`TopKTarget`, the processes that share the student's classes, as in
            :func:`linear_cross_entropy`.

    Returns:
        A scalar, or for ``"none"`` a tensor (...), in nats, of the type of the student's features (float32
        under autocast).

    Raises:
        ValueError: shapes or option values that do not fit together; the message names the head.
        TypeError: types that do not fit together.
        NotImplementedError: a third derivative. :func:`kl_divergence` of logits has derivatives of any order.

    Example:
        >>> import torch, xent
        >>> even, odds = torch.zeros(2, 1), torch.tensor([[0.6], [0.4]]).log()
        >>> one = torch.ones(3, 1)
        >>> round(xent.linear_kl_divergence(student=(one, even), teacher=(one, odds)).item(), 6)
        0.020136
    """
    beta = {"forward": 0.0, "reverse": 1.0}[valid("direction", direction)]
    of_logits = logit_scale, softcap
    options = _Options(temperature, scale_by_t2, reduction, sample_weight, *of_logits, memory_budget, group)
    return _divergence(student, teacher, beta, options)


def linear_js_divergence(
    *,
    student: Head,
    teacher: Head | TopKTarget,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    scale_by_t2: bool = False,
    reduction: ReductionName = "mean",
    sample_weight: Tensor | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    softcap: float | tuple[float | None, float | None] | None = None,
    memory_budget: int | None = None,
    group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""Return the generalised Jensen–Shannon divergence of two linear heads, without storing logits, in nats.

    The value is :func:`js_divergence` of both heads' logits: ``β·KL(t ‖ M) + (1 − β)·KL(p ‖ M)`` with t of
    the teacher, p of the student and ``M = (1 − β)·p + β·t``. Where ``memory_budget`` holds 128 rows of both
    heads' logits, the student costs three matrix products and a teacher without gradient one; where it does
    not, each head's logits are computed twice more. Two derivatives are in closed form.

    Args:
        student, teacher, temperature, scale_by_t2, reduction: as in :func:`linear_kl_divergence`.
        sample_weight, logit_scale, softcap, memory_budget, group: as in :func:`linear_kl_divergence`.
        beta: β, the weight of the teacher in the mixture, from 0 to 1. As trainers of language models have
            it, 0 returns KL(teacher ‖ student) and 1 returns KL(student ‖ teacher).

    Returns:
        A scalar or a tensor (...), as :func:`linear_kl_divergence`.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`linear_kl_divergence`.

    Example:
        >>> import torch, xent
        >>> x, w = torch.ones(1, 1), torch.tensor([[0.0], [-800.0]])
        >>> apart = xent.linear_js_divergence(student=(x, w), teacher=(x, w.flip(0)))
        >>> round(apart.item(), 6)  # log 2
        0.693147
    """
    share: float = valid("beta", beta)
    of_logits = logit_scale, softcap
    options = _Options(temperature, scale_by_t2, reduction, sample_weight, *of_logits, memory_budget, group)
    return _divergence(student, teacher, share, options)


class _Options(NamedTuple):
    temperature: float | Tensor
    scale_by_t2: bool
    reduction: ReductionName
    sample_weight: Tensor | None
    logit_scale: float | tuple[float, float]
    softcap: float | tuple[float | None, float | None] | None
    memory_budget: int | None
    group: Any


def divergence_of_rows(
    student: Head,
    teacher: Head,
    beta: float,
    *,
    temperature: float = 1.0,
    logit_scale: tuple[float, float] = (1.0, 1.0),
    softcap: tuple[float | None, float | None] = (None, None),
) -> Tensor:
    """Return JS_β of each row of two heads (...), float32 for half types; 0 and 1 are KL and its reverse."""
    share: float = valid("beta", beta)
    options = _Options(temperature, False, "none", None, logit_scale, softcap, None, None)
    return _divergence(student, teacher, share, options, wide=True)


def _divergence(
    student: Head, teacher: Head | TopKTarget, beta: float, options: _Options, *, wide: bool = False
) -> Tensor:
    """Return JS_β of two heads, of which 0 and 1 are KL forward and in reverse; ``wide``: not rounded."""
    by_t2 = valid("scale_by_t2", options.scale_by_t2)
    check_tensors(sample_weight=options.sample_weight)
    sample_weight = transforms.thawed(options.sample_weight)
    each = options.temperature
    if isinstance(each, Tensor) and sample_weight is not None and each.shape == sample_weight.shape:
        # a row that is left out may have any; one whose weight is learnt counts
        left_out = (sample_weight == 0) & (not sample_weight.requires_grad)
        each = torch.where(left_out, 1.0, each) if each.dim() else each
    of_head = Options.of(
        reduction=options.reduction,
        temperature=each,
        memory_budget=options.memory_budget,
    )
    scales = _of_both("logit_scale", options.logit_scale, teacher)
    softcaps = _of_both("softcap", options.softcap, teacher)
    of_student, of_teacher = (
        of_head.with_options(logit_scale=scale, softcap=softcap)
        for scale, softcap in zip(scales, softcaps, strict=True)
    )
    if isinstance(teacher, TopKTarget):
        of_head = of_student.with_options(sample_weight=sample_weight, group=options.group, bucket=True)
        return _of_top_k(student, as_bucket(teacher, beta), beta, of_head, by_t2=by_t2)
    if options.group is not None:
        raise ValueError("group needs a teacher that is a TopKTarget: two heads lie on one process")
    student_head, teacher_head = (
        _head(role, head, of_one, sample_weight)
        for role, head, of_one in (("student", student, of_student), ("teacher", teacher, of_teacher))
    )
    distillation = _resolve(student_head, teacher_head, sample_weight)
    call, pair, weight, in_graph = distillation
    kind, selection = call.reduction.kind, pair.selection
    scale = _scale(kind, weight, selection.count)
    if beta == 1.0:  # it is the student whose distribution weighs the logarithms
        pair = replace(pair, student=pair.teacher, teacher=pair.student)
    else:
        pair = replace(pair, beta=beta)
    distillation = distillation._replace(pair=pair)
    if by_t2:
        t = pair.student.map.temperature
        square = (selection.gather(t) if isinstance(t, Tensor) else t) ** 2
        if isinstance(square, Tensor):
            weight = square if weight is None else weight * square
        else:
            scale = scale * square
    if kind != "none" and distillation.one_backward:
        return two_heads.loss(pair, weight, scale, call.dtype)
    kl = selection.masked(two_heads.rows(pair, in_graph=in_graph))  # before weighing: 0·nan is not 0
    if kind != "none":
        return two_heads.total(kl, weight, scale).to(call.dtype)
    kl = kl if weight is None else kl * weight
    return call.stack([selection.scatter(kl)], compute_dtype(call.dtype) if wide else None)


def _of_top_k(student: Head, teacher: TopKTarget, beta: float, options: Options, *, by_t2: bool) -> Tensor:
    """Return the divergence of a head from a target with a bucket."""
    features, weight, bias = _tensors("student", student)

    def found() -> Tensor:
        call = resolve_local_head(options, features, weight, bias, teacher)
        return top_k_divergence(call, beta, options.target.sample_weight, by_t2=by_t2)

    return agreed(found, options, *tensors_of_weight(weight))


def _of_both(name: str, value: Any, teacher: Any) -> tuple[Any, Any]:
    """Return an option's value for the student and for the teacher, of one for both or of a pair."""
    if not isinstance(value, tuple | list):
        return value, value
    if isinstance(teacher, TopKTarget):
        raise ValueError(f"{name} must be one number where the teacher is a TopKTarget, got {value}")
    if len(value) != 2:
        raise ValueError(f"{name} must be a number, or one for the student and one for the teacher: {value}")
    return value[0], value[1]


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
    by_mask = weight is not None and (
        in_graph or transforms.batched(weight, *leaves) or student.device.type in Selection.masked_on
    )
    targets, weight = select(Options(), None, classes, UNCHECKED, weight, n, student.device, by_mask=by_mask)
    kept = targets.selection.mask
    if kept is not None and not in_graph:  # in a graph the operator selects for itself
        student, teacher = student.select(kept), teacher.select(kept)
    (problem,) = call.problems
    return _Distillation(call, Pair(student, teacher, targets.selection, problem.budget), weight, in_graph)


def _scale(kind: ReductionName, weight: Tensor | None, count: int) -> Scale:
    """Return one over the divisor; 0 where there is nothing to divide."""
    if kind != "mean":
        return 1.0
    if weight is None:
        return 1.0 / max(1, count)
    divisor = weight.sum()
    nothing = divisor == 0
    return (1.0 / divisor.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


def _head(role: str, given: Head, options: Options, sample_weight: Tensor | None) -> tuple[Call, LinearHead]:
    """Resolve one head, as every loss from features does; an error names the role."""
    features, weight, bias = _tensors(role, given)
    if isinstance(weight, LowRank):
        features = harmless(options.with_options(sample_weight=sample_weight), features, None)
    try:
        call = resolve_head(options, features, weight, bias, None)
    except (ValueError, TypeError) as error:
        raise type(error)(f"the {role}: {error}") from None
    (problem,) = call.problems
    return call, cast(LinearHead, problem.logits)


def _tensors(role: str, given: object) -> tuple[Tensor, Weight, Tensor | None]:
    """Return features, weight and bias of a head."""
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        raise ValueError(f"{role} must be (features, weight) or (features, weight, bias)")
    features, weight, bias = (*given, None)[:3]
    require_tensors(**{f"the {role}'s features": features}, spread=True)
    require_weight(**{f"the {role}'s weight": weight}, spread=True)
    assert isinstance(features, Tensor)
    assert isinstance(weight, Tensor | LowRank)
    if len(weight.shape) != 2:
        raise ValueError(f"the {role}'s weight must be (C, D), got {tuple(weight.shape)}")
    return features, weight, bias
