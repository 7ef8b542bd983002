"""KL and generalised Jensen–Shannon divergences of given logits and a target.

    KL = Σ t·(log t − log p) = Σ t·φ(log p − log(t/a)) + a·log a        a = Σ t, φ(δ) = e^δ − 1 − δ

which adds what cannot cancel (every term of φ is at least 0), where the plain sum subtracts numbers of the
size of an entropy to find a difference that may be a billionth of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from xent._arguments.call import resolve_logits, row_temperatures
from xent._arguments.options import Options
from xent._arguments.problem import check_temperatures
from xent._arguments.validation import (
    check_floating,
    check_tensors,
    is_readable,
    loss_dtype,
    require_tensors,
)
from xent._autograd import transforms
from xent._core.logits import compute_dtype
from xent._core.selection import Selection
from xent._core.target import TopKTarget, thawed_target
from xent._core.validators import DirectionName, ReductionName, valid
from xent.losses._divergence_rows import (
    ByChunks,
    Settings,
    at_a_time,
    check_probabilities,
    reduced,
    rows,
)
from xent.losses._top_k_divergence import refuse_dropped, top_k_divergence


def kl_divergence(
    *,
    target: Tensor | TopKTarget,
    input: Tensor,
    direction: DirectionName = "forward",
    target_is_logits: bool = False,
    temperature: float | Tensor = 1.0,
    scale_by_t2: bool = False,
    reduction: ReductionName = "none",
    sample_weight: Tensor | None = None,
    bits: bool = False,
) -> Tensor:
    r"""Return the Kullback-Leibler divergence between a target and the softmax of logits, in nats.

    With ``p = softmax(z/T)`` the divergence of a row is ``KL(t ‖ p) = Σ t·(log t − log p)`` forward and
    ``KL(p ‖ t) = Σ p·(log p − log t)`` in reverse. It is differentiable in both arguments any number of
    times, under autograd, ``torch.func`` and forward mode. The sum is arranged so that nothing cancels.
    Between two rows of logits the divergence is never negative, and it is 0 for equal ones. Distributions
    that differ by 1e-8, and rows whose p is within rounding of one class, keep their digits. Source: Kullback
    and Leibler, "On information and sufficiency", 1951.

    Args:
        target: t, of the shape of ``input``: probabilities of any mass that is not negative, with 0·log 0 = 0
            (the derivative there is −inf); or with ``target_is_logits`` the teacher's logits. Or a
            :class:`TopKTarget`. With ``remainder="spread"`` nothing is spread where its probabilities sum to
            more than 1. A bucket counts as one class more of both distributions; the result then has two
            derivatives.
        input: logits z, (C,), (N, C) or (N, C, d1, ...). Forward, a class masked by −inf costs 0 if its
            target mass is 0, else +inf. In reverse, a class without target mass costs +inf unless p is 0
            there.
        direction: ``"forward"`` for KL(t ‖ p), which is large where the target has mass and the model has
            none; ``"reverse"`` for KL(p ‖ t), which is large where the model has mass and the target has
            none.
        target_is_logits: whether ``target`` holds logits; t is then softmax(target/T). Choose it where the
            teacher is trained too, and where teacher and student are nearly equal.
        temperature: T; it divides the logits. One number, or a tensor of the shape of the rows with a number
            for each row. No gradient.
        scale_by_t2: whether each row is multiplied by T², so that the size of the gradients does not depend
            on T. Source: Hinton et al., "Distilling the knowledge in a neural network", 2015.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``. The mean divides by Σ ``sample_weight``, or by the
            number of rows, and is 0 over no rows.
        sample_weight: s, a factor for each row, of the shape of the rows. A row of weight 0 is left out,
            whatever it holds.
        bits: whether the result is divided by log 2.

    Returns:
        A tensor of the shape of the rows, (), (N,) or (N, d1, ...), or a scalar, in nats (or bits). Its type
        is that of ``input`` (float32 under autocast).

    Raises:
        ValueError: shapes that differ; a temperature that is not positive and finite; the reverse direction
            of a :class:`TopKTarget` whose remainder is dropped. On a CPU also a probability that is negative,
            infinite or nan, and such a temperature of a row; the message names the place. Elsewhere these
            cost nan.
        TypeError: types that are not floating.

    Example:
        >>> import torch, xent
        >>> even, odds = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.6, 0.4])
        >>> round(xent.kl_divergence(target=odds, input=even).item(), 6)
        0.020136
        >>> round(xent.kl_divergence(target=odds, input=even, direction="reverse").item(), 6)
        0.020411
    """
    beta = {"forward": 0.0, "reverse": 1.0}[valid("direction", direction)]
    options = _Options(target_is_logits, temperature, scale_by_t2, reduction, sample_weight, bits)
    return _divergence(target, input, beta, options)


def js_divergence(
    *,
    target: Tensor | TopKTarget,
    input: Tensor,
    beta: float = 0.5,
    target_is_logits: bool = False,
    temperature: float | Tensor = 1.0,
    scale_by_t2: bool = False,
    reduction: ReductionName = "none",
    sample_weight: Tensor | None = None,
    bits: bool = False,
) -> Tensor:
    r"""Return the generalised Jensen–Shannon divergence between a target and the softmax of logits, in nats.

    With ``p = softmax(z/T)`` and the mixture ``M = (1 − β)·p + β·t`` the divergence of a row is
    ``β·KL(t ‖ M) + (1 − β)·KL(p ‖ M)``. For β = ½ and two distributions it is at most log 2. It tends to 0
    with β, and divided by β it tends to KL(t ‖ p). By convention, as trainers of language models have it, β =
    0 returns KL(t ‖ p) and β = 1 returns KL(p ‖ t). It is differentiable as :func:`kl_divergence` is, and
    computed without cancellation. Source: Lin, "Divergence measures based on the Shannon entropy", 1991.

    Args:
        target, input, target_is_logits, temperature: as in :func:`kl_divergence`.
        scale_by_t2, reduction, sample_weight, bits: as in :func:`kl_divergence`.
        beta: β, the weight of the target in the mixture, from 0 to 1.

    Returns:
        A tensor or a scalar, as :func:`kl_divergence`.

    Raises:
        ValueError, TypeError: as :func:`kl_divergence`.

    Example:
        >>> import torch, xent
        >>> one, other = torch.tensor([1.0, 0.0]), torch.tensor([-torch.inf, 0.0])
        >>> xent.js_divergence(target=one, input=other, bits=True).item()
        1.0
    """
    share: float = valid("beta", beta)
    options = _Options(target_is_logits, temperature, scale_by_t2, reduction, sample_weight, bits)
    return _divergence(target, input, share, options)


class _Options(NamedTuple):
    target_is_logits: bool
    temperature: float | Tensor
    scale_by_t2: bool
    reduction: ReductionName
    sample_weight: Tensor | None
    bits: bool


def _divergence(target: Tensor | TopKTarget, input: Tensor, beta: float, options: _Options) -> Tensor:
    """Return JS_β, of which 0 and 1 are KL forward and in reverse."""
    require_tensors(input=input)
    if not isinstance(target, TopKTarget):
        require_tensors(target=target)
    weight = transforms.thawed(options.sample_weight)
    check_tensors(sample_weight=weight)
    of_logits = Options.of(temperature=options.temperature, reduction=options.reduction)
    each = of_logits.logits.temperature
    bits, by_t2 = valid("bits", options.bits), valid("scale_by_t2", options.scale_by_t2)
    target_is_logits = valid("target_is_logits", options.target_is_logits)
    input, target = transforms.thawed(input), thawed_target(target)
    if isinstance(target, TopKTarget):
        if target_is_logits:
            raise ValueError("a TopKTarget holds probabilities: pass target_is_logits=False")
        refuse_dropped(target, beta)
        if target.remainder == "bucket":
            call = resolve_logits(of_logits.with_options(sample_weight=weight, bucket=True), input, target)
            value = top_k_divergence(call, beta, weight, by_t2=by_t2)
            return value / math.log(2) if bits else value
        target = _spelt_out(target, input)
    axis = _check(target, input)
    dtype = compute_dtype(torch.promote_types(input.dtype, target.dtype))
    z, t = (v.movedim(axis, -1) for v in (input, target))
    shape = z.shape[:-1]
    if weight is not None:
        if weight.shape != shape:
            raise ValueError(
                f"sample_weight must have the shape of the rows, {tuple(shape)}; got {tuple(weight.shape)}"
            )
        left_out = (weight == 0) & (not weight.requires_grad)
        z = torch.where(left_out[..., None], 0.0, z)
        t = torch.where(left_out[..., None], 1.0, t)  # whatever they held reaches nothing
    if not target_is_logits:
        check_probabilities(t.movedim(-1, axis))
    settings = Settings(target_is_logits, dtype, beta)
    if isinstance(each, Tensor):
        each = row_temperatures(transforms.thawed(each), shape)[..., None]
        each = each if weight is None else torch.where(left_out[..., None], 1.0, each)
        if is_readable(each, z):
            check_temperatures(each.reshape(-1), Selection(each.numel()))
        each = each.to(dtype)
    if input.numel() <= at_a_time(z) or transforms.is_opaque(z, t) or transforms.transformed(z, t):
        value = rows(t, z, each, settings)
    else:
        flat = (v.reshape(-1, v.shape[-1]) for v in (t, z))
        per_row = each.reshape(-1, 1) if isinstance(each, Tensor) else each
        value = ByChunks.apply(settings, per_row, *flat).reshape(shape)
    if by_t2:
        value = value * (each[..., 0] ** 2 if isinstance(each, Tensor) else each**2)
    value = value / math.log(2) if bits else value
    return reduced(value, weight, of_logits.reduction.reduction).to(loss_dtype(input))


def _spelt_out(target: TopKTarget, input: Tensor) -> Tensor:
    """Return a sparse target as a dense one in the shape of the logits."""
    (problem,) = resolve_logits(Options(), input, target).problems  # which checks shape and indices
    classes = problem.targets.n_classes
    q = target.probabilities.to(compute_dtype(torch.promote_types(input.dtype, target.probabilities.dtype)))
    check_probabilities(q)
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
