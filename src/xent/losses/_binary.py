"""Losses over two classes, and the divergence of given log-probabilities, element by element.

Binary cross-entropy is the formula ℓ = a·lse(z) − ⟨t, z⟩ over two classes, with logits z = (0, s) or
probabilities (1 − p, p), and targets t = (1 − y, w₊·y) of mass a = t₀ + t₁. Relative to the larger logit,
with h = 1 where s ≥ 0 and 0 elsewhere,

    ℓ = a·log1p(e^−|s|) + (h·t₀ − (1 − h)·t₁)·s        ℓ = −t₀·log1p(−p) − t₁·log p

The factor of s is the mass of the class that the logit is against. Where it is 0 nothing is subtracted, so
the loss of a confident and correct logit keeps its digits. For probabilities t and logarithms x,

    KL = t·(log t − x)        or, with t given as its logarithm,        eᵗ·(t − x)

Throughout 0·∞ = 0, in values and gradients. Each loss stands here twice. `_of_...` composes it of operations
of torch that are smooth on either branch, so that torch forms all derivatives, in any mode and of any order.
`_..._terms` writes values and first derivatives into buffers, for a plain backward on a CPU (`_elementwise`).
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from xent._arguments.validation import autocasts, check_tensors, require_tensors
from xent._autograd import transforms
from xent._core.logits import compute_dtype
from xent._core.validators import FLOATING, KlReductionName, OneOf, ReductionName, valid
from xent.losses._elementwise import Into, loss

KL_REDUCTIONS = OneOf(get_args(KlReductionName))
LOGITS = "logits go to binary_cross_entropy_with_logits"
TARGETS = "targets of any sign go to binary_cross_entropy_with_logits"
NEGATIVE = "pass log_target=True if the target holds logarithms of probabilities"
LOGARITHMS = "the logarithm of no probability is −inf"


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: ReductionName = "mean",
    clamp: bool = False,
) -> Tensor:
    r"""Return the binary cross-entropy of probabilities, in nats.

    The loss of an element is ``−y·log p − (1 − y)·log(1 − p)``. The function replaces
    :func:`torch.nn.functional.binary_cross_entropy`, with two differences. A probability of exactly 0 for
    what is true costs +inf, where torch's function returns 100. Gradients are the derivatives of the
    loss at every p. Where logits are available, use :func:`binary_cross_entropy_with_logits`: it keeps digits
    that a p near 1 cannot hold.

    Args:
        input: p, probabilities in [0, 1], of any shape.
        target: y, in [0, 1], of the shape of ``input``. It may require gradient.
        weight: a factor for each element, of a shape that broadcasts to that of ``input``. No gradient. An
            element of weight 0 is left out, whatever it holds.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean is over all elements, whatever their weights;
            the mean over no elements is 0.
        clamp: whether to compute as torch does: logarithms are at least −100, and the divisor p(1 − p) of the
            gradient in p is at least 1e-12.

    Returns:
        A scalar, or for ``"none"`` a tensor of the shape of ``input``, in nats, of the common type of
        ``input`` and ``target`` (float32 under autocast). Half types are computed in float32 and rounded
        once.

    Raises:
        ValueError: an input or target that is nan or outside [0, 1]; the message names position and value. On
            other devices than a CPU an asynchronous assertion fails instead. In a graph and under ``vmap``,
            where no check can run, such an element costs nan. Also shapes or options that do not fit.
        TypeError: tensors that are not floating.

    Example:
        >>> import torch, xent
        >>> p, y = torch.tensor([0.7, 0.2]), torch.tensor([1.0, 0.0])
        >>> xent.binary_cross_entropy(p, y, reduction="none")
        tensor([0.3567, 0.2231])
        >>> xent.binary_cross_entropy(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), reduction="none")
        tensor([inf, 0.])
    """
    clamp = valid("clamp", clamp)
    dtype = _check(input, target, weight, reduction)
    input, target, weight = transforms.thawed(input), transforms.thawed(target), transforms.thawed(weight)
    p, y = _leave_out(weight, (input, 0.5), (target, 0.5), dtype=dtype)
    p = _within("input", p, 0.0, 1.0, LOGITS)
    y = _within("target", y, 0.0, 1.0, TARGETS)
    of, terms = (_clamped, None) if clamp else (_of_probabilities, _probability_terms)
    return loss(of, terms, reduction, p, y, weight).to(dtype)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: ReductionName = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Return the binary cross-entropy of logits, in nats.

    The loss of an element is ``−w₊·y·log σ(s) − (1 − y)·log σ(−s)`` with ``σ(s) = 1/(1 + exp(−s))``. The
    function replaces :func:`torch.nn.functional.binary_cross_entropy_with_logits`. The loss and all its
    derivatives keep their digits for large logits of either sign, and are exact at infinite logits.

    Args:
        input: s, logits, of any shape.
        target: y, of the shape of ``input``. As a probability it is in [0, 1], but any sign is allowed. It
            may require gradient.
        weight: a factor for each element, of a shape that broadcasts to that of ``input``. No gradient. An
            element of weight 0 is left out, whatever it holds.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean is over all elements, whatever their weights;
            the mean over no elements is 0.
        pos_weight: w₊, a factor for the positive class, of a shape that broadcasts to that of ``input``. No
            gradient.

    Returns:
        A scalar, or for ``"none"`` a tensor of the shape of ``input``, in nats, of the common type of
        ``input`` and ``target`` (float32 under autocast). Half types are computed in float32 and rounded
        once.

    Raises:
        ValueError: shapes or options that do not fit.
        TypeError: tensors that are not floating.

    Example:
        >>> import torch, xent
        >>> s, y = torch.tensor([40.0, -torch.inf], dtype=torch.float64), torch.tensor([1.0, 0.0])
        >>> xent.binary_cross_entropy_with_logits(s, y, reduction="none").tolist()
        [4.248354255291589e-18, 0.0]
    """
    dtype = _check(input, target, weight, reduction, pos_weight)
    input, target = transforms.thawed(input), transforms.thawed(target)
    weight, pos_weight = transforms.thawed(weight), transforms.thawed(pos_weight)
    s, y = _leave_out(weight, (input, 0.0), (target, 0.0), dtype=dtype)
    return loss(_of_logits, _logit_terms, reduction, s, y, weight, pos_weight).to(dtype)


def kl_div(
    input: Tensor, target: Tensor, *, reduction: KlReductionName = "mean", log_target: bool = False
) -> Tensor:
    r"""Return the Kullback-Leibler divergence from log-probabilities, element by element, in nats.

    The value of an element is ``t·(log t − x)``. The function replaces :func:`torch.nn.functional.kl_div`. An
    element without target mass costs 0 even where x is −inf, also where ``target`` holds logarithms.

    Args:
        input: x, logarithms of probabilities (as ``log_softmax`` returns them), of any shape.
        target: t, probabilities, or their logarithms with ``log_target``, of a shape that broadcasts with
            that of ``input``. They may have any mass and may require gradient. At t = 0 the derivative of
            t·log t, −inf, counts as 0.
        reduction: ``"batchmean"`` divides the sum by ``input.size(0)`` and so gives the mean divergence of a
            batch of distributions. ``"mean"`` divides it by the number of elements. ``"sum"`` and ``"none"``
            do not divide. A mean over nothing is 0.
        log_target: whether ``target`` holds logarithms.

    Returns:
        A scalar, or for ``"none"`` a tensor of the common shape, in nats, of the common type of ``input`` and
        ``target`` (float32 under autocast). Half types are computed in float32 and rounded once.

    Raises:
        ValueError: a target that is nan, or negative without ``log_target``; the message names position and
            value. On other devices than a CPU an asynchronous assertion fails instead. In a graph and under
            ``vmap``, where no check can run, such an element costs nan. Also options that do not fit.
        TypeError: tensors that are not floating.

    Example:
        >>> import torch, xent
        >>> q, p = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.5, 0.5]])
        >>> round(xent.kl_div(p.log(), q, reduction="batchmean").item(), 6)
        0.020136
        >>> xent.kl_div(torch.tensor([0.0, -torch.inf]), torch.tensor([1.0, 0.0]), reduction="sum")
        tensor(0.)
    """
    KL_REDUCTIONS("reduction", reduction)
    log_target = valid("log_target", log_target)
    require_tensors(input=input, target=target)
    dtype = _loss_dtype(input, target)
    at = compute_dtype(dtype)
    x, t = transforms.thawed(input).to(at), transforms.thawed(target).to(at)
    if log_target:
        t = _within("target", t, -math.inf, math.inf, LOGARITHMS)
    else:
        t = _within("target", t, 0.0, math.inf, NEGATIVE)
    if log_target:
        return loss(_of_logarithms, _logarithm_terms, reduction, x, t).to(dtype)
    return loss(_of_masses, _mass_terms, reduction, x, t).to(dtype)


def _logit_terms(into: Into, s: Tensor, y: Tensor, positive: Tensor | None) -> None:
    """Write ℓ of logits and ∂ℓ/∂s, by the formula of `_of_logits`."""
    value, slope = into.value, into.slope
    e, c, t0, t1, *_ = into.spare
    torch.abs(s, out=e).neg_().exp_()
    torch.ge(s, 0.0, out=c)  # h
    if slope is not None:
        torch.sub(c, 0.5, out=slope)  # ±½, with the sign of s
    if positive is None:
        c.sub_(y)
    else:
        torch.mul(positive, y, out=t1)
        torch.sub(y.new_ones(()), y, out=t0)
        torch.sub(c, 1.0, out=value)
        c.mul_(t0).addcmul_(value, t1)
        mass = t0.add_(t1)
    if slope is not None:
        torch.div(e, torch.add(e, 1.0, out=value), out=value)
        if positive is not None:
            value.mul_(mass)
        into.scale(torch.addcmul(c, slope, value, value=-2.0, out=slope))
    torch.log1p(e, out=value)
    if positive is not None:
        value.mul_(mass)
    value.addcmul_(c, s)


def _probability_terms(into: Into, p: Tensor, y: Tensor) -> None:
    """Write ℓ of probabilities and ∂ℓ/∂p, by the formula of `_of_probabilities`."""
    t0, a, b, *_ = into.spare
    one = y.new_ones(())
    torch.sub(one, y, out=t0)
    torch.neg(p, out=a).log1p_().mul_(t0)
    torch.log(p, out=b)
    torch.addcmul(a, y, b, out=into.value).neg_()
    if into.slope is not None:
        torch.sub(one, p, out=a)
        y = into.scale(b.copy_(y))  # first, as 1/p may be more than the type holds
        torch.div(into.scale(t0), a, out=into.slope).sub_(torch.div(y, p, out=a))


def _mass_terms(into: Into, x: Tensor, t: Tensor) -> None:
    """Write KL from probabilities t and ∂KL/∂x, by the formula of `_of_masses`."""
    info = torch.finfo(t.dtype)
    torch.clamp(t, min=info.smallest_normal * info.eps, out=into.value).log_().sub_(x).mul_(t)
    if into.slope is not None:
        into.scale(torch.neg(t, out=into.slope))


def _logarithm_terms(into: Into, x: Tensor, t: Tensor) -> None:
    """Write KL from logarithms t and ∂KL/∂x, by the formula of `_of_logarithms`."""
    mass = torch.exp(t, out=into.spare[0])
    torch.sub(t, x, out=into.value).mul_(mass)
    if into.slope is not None:
        into.scale(torch.neg(mass, out=into.slope))


def _of_logits(s: Tensor, y: Tensor, positive: Tensor | None) -> Tensor:
    """Return ℓ of logits s, targets y and weights of the positive class, elementwise."""
    # a constant ±1 where |·| has a derivative of its own: 0 at s = 0, where the loss's is ½ a − t₁
    sign = torch.copysign(s.detach().new_ones(()), s.detach())
    h = sign.clamp(min=0)  # 1 where s ≥ 0, else 0
    softplus = (-sign * s).exp().log1p()
    if positive is None:
        return softplus + _times(h - y, s)
    t0, t1 = 1 - y, positive * y
    return (t0 + t1) * softplus + _times(torch.where(sign > 0, t0, -t1), s)


def _of_probabilities(p: Tensor, y: Tensor) -> Tensor:
    """Return ℓ of probabilities p and targets y, elementwise."""
    low, high = _bounds(p)
    t0, p0, p1 = 1 - y, p, p
    if high >= 1:
        p0 = p.masked_fill((t0 == 0) & (p == 1), 0.0)
    if low <= 0:
        p1 = p.masked_fill((y == 0) & (p == 0), 1.0)
    return -t0 * torch.log1p(-p0) - y * p1.log()


def _clamped(p: Tensor, y: Tensor) -> Tensor:
    """Return torch's own loss; autocast would refuse it, though p and y are of no half type here."""
    if not autocasts(p):
        return F.binary_cross_entropy(p, y, reduction="none")
    with torch.autocast(p.device.type, enabled=False):
        return F.binary_cross_entropy(p, y, reduction="none")


def _of_masses(x: Tensor, t: Tensor) -> Tensor:
    """Return KL of logarithms x from probabilities t, elementwise."""
    low, _ = _bounds(t)
    logarithm = t
    if low <= 0:
        nothing = t == 0
        x, logarithm = x.masked_fill(nothing & x.isinf(), 0.0), t.masked_fill(nothing, 1.0)
    return t * (logarithm.log() - x)


def _of_logarithms(x: Tensor, t: Tensor) -> Tensor:
    """Return KL of logarithms x from logarithms t, elementwise."""
    mass, gap = t.exp(), t - x
    if not (_finite(x) and _finite(t)):
        gap = gap.masked_fill(mass == 0, 0.0)
    return mass * gap


def _times(c: Tensor, u: Tensor) -> Tensor:
    """Return c·u with 0·∞ = 0."""
    return c * (u if _finite(u) else u.masked_fill((c == 0) & u.isinf(), 0.0))


def _finite(t: Tensor) -> bool:
    """Return whether t is known to be finite."""
    return all(math.isfinite(bound) for bound in _bounds(t))


def _bounds(t: Tensor) -> tuple[float, float]:
    """Return bounds of the entries of t: infinite where data cannot be read, nan where an entry is."""
    if t.device.type != "cpu" or _blind(t) or t.numel() == 0:
        return -math.inf, math.inf
    low, high = t.detach().aminmax()  # a tenth of what selecting costs on a CPU; elsewhere it would wait
    return low.item(), high.item()


def _blind(t: Tensor) -> bool:
    """Return whether t holds no data, or data that must not decide."""
    return transforms.is_opaque(t) or transforms.batched(t)


def _within(name: str, t: Tensor, low: float, high: float, advice: str) -> Tensor:
    """Return t; raise for an entry outside [low, high], or make it nan where data cannot be read."""
    least, most = _bounds(t)
    if low <= least and most <= high and not _blind(t):
        return t
    good = (t.detach() >= low) & (t.detach() <= high)
    if _blind(t):
        return t.masked_fill(~good, math.nan)
    range_ = f"outside [{low:g}, {high:g}]" if math.isfinite(high) else "negative"
    if t.device.type != "cpu":
        wrong = "nan" if math.isinf(low) else f"nan or {range_}"
        torch._assert_async(good.all(), f"{name} is {wrong}; {advice}")
    elif not good.all():
        at = tuple(good.logical_not().nonzero()[0].tolist())
        where = "" if not at else f" at row {at[0]}" if len(at) == 1 else f" at position {at}"
        value = t[at].item()
        wrong = "is not a number" if math.isnan(value) else f"is {range_}"
        raise ValueError(f"{name} {value:g}{where} {wrong}; {advice}")
    return t


def _check(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    pos_weight: Tensor | None = None,
) -> torch.dtype:
    """Return the type of the loss; raise for arguments that do not fit together."""
    valid("reduction", reduction)
    require_tensors(input=input, target=target)
    check_tensors(weight=weight, pos_weight=pos_weight)
    dtype = _loss_dtype(input, target)
    if target.shape != input.shape:
        raise ValueError(
            f"target must have the shape of input, {tuple(input.shape)}; got {tuple(target.shape)}"
        )
    for name, factor in (("weight", weight), ("pos_weight", pos_weight)):
        if factor is None:
            continue
        sizes = zip(reversed(factor.shape), reversed(input.shape), strict=False)
        if factor.dim() > input.dim() or any(a != 1 and a != b for a, b in sizes):
            raise ValueError(
                f"{name} must broadcast to the shape of input, {tuple(input.shape)}; "
                f"got {tuple(factor.shape)}"
            )
        if factor.requires_grad or transforms.has_tangent(factor):
            raise ValueError(f"{name} takes no gradient: pass {name}.detach()")
    return dtype


def _loss_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """Return the common type, float32 at least under autocast; raise for a type that is not floating."""
    for name, t in (("input", input), ("target", target)):
        if t.dtype not in FLOATING:
            raise TypeError(
                f"{name} must be of a floating type of 16, 32 or 64 bits, got {t.dtype}: convert it with "
                f"{name}.to(torch.float32)"
            )
    dtype = torch.promote_types(input.dtype, target.dtype)
    return torch.float32 if autocasts(input) and dtype != torch.float64 else dtype


def _leave_out(
    weight: Tensor | None, *tensors: tuple[Tensor, float], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return each tensor in the type of the computation, replaced by a number where the weight is 0."""
    found = tuple(t.to(compute_dtype(dtype)) for t, _ in tensors)
    if weight is None:
        return found
    low, high = _bounds(weight)
    if low > 0 or high < 0:
        return found
    out = weight == 0
    return tuple(t.masked_fill(out, number) for t, (_, number) in zip(found, tensors, strict=True))
