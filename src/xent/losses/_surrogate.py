"""The log-free surrogate of cross-entropy: a value without a logarithm, with cross-entropy's derivatives.

    L₂ = ⟨a·p − t, z⟩ = ℓ − a·H(p)        ∂L₂/∂z := a·p − t        ∂²L₂/∂z² := a·J

The derivatives are supplied, cross-entropy's in place of the value's own. As a function of z the value has
the gradient a·p − t + a·J·z; with p held constant the first derivative is a·p − t, and the second would be 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xent._arguments.call import require_target, resolve_logits
from xent._arguments.options import Options
from xent._autograd.one_head import scattered
from xent._core.statistics import RequestedOutputs
from xent._core.target import TopKTarget
from xent._core.validators import ReductionName


def surrogate_cross_entropy(
    input: Tensor, target: Tensor | TopKTarget, *, reduction: ReductionName = "mean"
) -> Tensor:
    r"""Return a logarithm-free surrogate of cross-entropy that has the gradient of cross-entropy.

    The value of a row is ``Σ_c (a·p_c − t_c)·z_c``, with ``p = softmax(z)`` and ``a = Σ_c t_c``. It equals
    ``ℓ − a·H(p)``, cross-entropy less a times the entropy of p, so it may be negative and does not measure
    the fit: equal logits score 0. Autograd is given the derivatives of cross-entropy, ``a·p − t`` and ``a·J``
    with ``J = diag(p) − p pᵀ``. The derivative of the value itself is ``a·p − t + a·J·z``; finite differences
    find that one. The function shows that training needs no logarithm. For practical training
    :func:`cross_entropy` is as safe, since no logarithm of 0 occurs where the loss is computed from logits.

    Args:
        input: logits z, (C,), (N, C) or (N, C, d1, ...).
        target: as in :func:`xent.cross_entropy`; rows of class −100 are ignored. No gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in :func:`xent.cross_entropy`.

    Returns:
        A scalar, or for ``"none"`` a tensor of the shape of an index target, in nats, of the type of
        ``input``. A masked class (logit −inf) adds nothing if its target mass is 0, else +inf.

    Raises:
        IndexError, ValueError, TypeError: as :func:`xent.cross_entropy`.

    Example:
        >>> import torch, xent
        >>> z = torch.tensor([[0.0, 200.0]], requires_grad=True)
        >>> loss = xent.surrogate_cross_entropy(z, torch.tensor([0]))
        >>> loss.item(), torch.autograd.grad(loss, z)[0].tolist()
        (200.0, [[-1.0, 1.0]])
    """
    if isinstance(target, Tensor) and target.requires_grad:
        raise ValueError("the surrogate's target is held constant: pass target.detach()")
    require_target(target)
    call = resolve_logits(Options.of(reduction=reduction), input, target)
    (problem,) = call.problems
    found = scattered(problem.request(RequestedOutputs(entropy=True)))
    assert found.entropy is not None
    rows = call.stack([found.loss], found.loss.dtype)
    uncertain = call.stack([found.entropy], found.entropy.dtype).detach() * _mass(input, target)
    values = rows - uncertain
    if reduction == "none":
        return values.to(call.dtype)
    scale = call.reduction.scale(call.problems)
    return call.reduction.total(values, scale).to(call.dtype)


def _mass(input: Tensor, target: Tensor | TopKTarget) -> Tensor | float:
    """Return a, in the shape of the rows."""
    if isinstance(target, TopKTarget):
        full = (
            target.remainder == "spread" and target.indices.shape[-1] < input.shape[min(1, input.dim() - 1)]
        )
        return 1.0 if full else target.probabilities.sum(-1, dtype=torch.float64)
    return target.sum(min(1, input.dim() - 1), dtype=torch.float64) if target.is_floating_point() else 1.0
