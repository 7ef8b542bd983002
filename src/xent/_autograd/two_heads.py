"""The divergence of two heads inside torch's differentiation: rows, and one loss of them."""

from __future__ import annotations

import torch
from torch import Tensor

from xent._autograd import chain, custom_ops
from xent._autograd.chain import Loss
from xent._autograd.forms import Tensors, TwoHeads, pair_saved
from xent._autograd.transforms import split
from xent._core.backend import Gradients
from xent._core.record import record
from xent._core.reduction import Scale
from xent._core.statistics import statistics_dtype
from xent._core.tiles import two_heads
from xent._core.tiles.pair import Found, Pair


def rows(pair: Pair, *, in_graph: bool) -> Tensor:
    """Return KL of the M rows, or in a graph of all N; float64, twice differentiable, in a graph once."""
    form, tensors = pair.flatten()
    if in_graph:
        (kl,), _ = custom_ops.rows(TwoHeads(form), tensors, None)
    else:
        (kl,), _, _ = chain.rows(TwoHeads(form), tensors)
    assert kl is not None
    return kl


def total(kl: Tensor, weight: Tensor | None, scale: Scale) -> Tensor:
    """Return Σ weight·KL·scale: 0 where the weights leave nothing to count."""
    value = (kl if weight is None else kl * weight).sum() * scale
    return value.masked_fill(scale == 0, 0.0) if isinstance(scale, Tensor) else value


@record
class _Step:
    """The step from the rows' KL to their weighted sum."""

    form: TwoHeads
    count: int  # M
    device: torch.device
    weight: Tensor | None
    scale: Scale
    dtype: torch.dtype

    is_linear = True

    def fused(self, pair: Pair, wants: tuple[bool, ...]) -> tuple[Tensor, Found, Gradients]:
        gamma = self._gamma()
        found, gradients = two_heads.fused(pair, lambda chunk: gamma[chunk], self.form.both(wants))
        return self.loss((pair.divergence.value(found.moments),)), found, gradients

    def saved(self, found: Found) -> Tensors:
        return pair_saved(found)

    def loss(self, outputs: Tensors) -> Tensor:
        (kl,) = outputs
        assert kl is not None
        return total(kl, self.weight, self.scale).to(self.dtype)

    def upstream(self, found: Found, upstream: Tensor) -> Tensors:
        return (self._gamma() * upstream,)

    def _gamma(self) -> Tensor:
        """Return ∂(Σ weight·KL·scale)/∂KL, (M,)."""
        one = torch.ones(self.count, dtype=statistics_dtype(self.device), device=self.device)
        return (one if self.weight is None else self.weight) * self.scale


def loss(pair: Pair, weight: Tensor | None, scale: Scale, dtype: torch.dtype) -> Tensor:
    """Return Σ weight·KL·scale (), its gradient formed in the forward sweep."""
    flat, tensors = pair.flatten()
    form = TwoHeads(flat)
    step = _Step(form, pair.selection.count, pair.student.device, weight, scale, dtype)
    leaves, others = split(tensors, form.n_leaves)
    value: Tensor = Loss.apply(pair, step, form, (*others, None), *leaves)
    return value
