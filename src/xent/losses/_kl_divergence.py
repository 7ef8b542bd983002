"""KL(t ‖ softmax(z)) of given logits, and of two linear heads whose logits never exist.

    KL = Σ t·(log t − log p) = Σ t·φ(log p − log(t/a)) + a·log a        a = Σ t, φ(δ) = e^δ − 1 − δ

which adds what cannot cancel (every term of φ is at least 0), where the plain sum subtracts numbers of the
size of an entropy to find a difference that may be a billionth of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xent._arguments.call import resolve_logits, row_temperatures
from xent._arguments.options import Options
from xent._arguments.problem import check_temperatures
from xent._arguments.validation import (
    check_floating,
    is_readable,
    loss_dtype,
    require_tensors,
)
from xent._autograd import transforms
from xent._core.logits import compute_dtype
from xent._core.selection import Selection
from xent._core.target import TopKTarget, thawed_target
from xent._core.validators import valid
from xent.losses._divergence_rows import ByChunks, Settings, at_a_time, rows


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
    settings = Settings(target_is_logits, dtype)
    if isinstance(each, Tensor):
        each = row_temperatures(transforms.thawed(each), z.shape[:-1])[..., None]
        if is_readable(each, z):
            check_temperatures(each.reshape(-1), Selection(each.numel()))
        each = each.to(dtype)
    if input.numel() <= at_a_time(z) or transforms.is_opaque(z, t) or transforms.transformed(z, t):
        kl = rows(t, z, each, settings)
    else:
        flat = (v.reshape(-1, v.shape[-1]) for v in (t, z))
        each = each.reshape(-1, 1) if isinstance(each, Tensor) else each
        kl = ByChunks.apply(settings, each, *flat).reshape(z.shape[:-1])
    return (kl / math.log(2) if bits else kl).to(loss_dtype(input))


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
