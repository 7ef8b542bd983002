"""The triplet loss between embeddings (anchor, positive, negative), without classes.

φ(‖a − p + ε‖_p − ‖a − n + ε‖_p + margin)        φ = max(·, 0), torch's loss, or softplus
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from xent._arguments.validation import require_tensors
from xent._autograd.transforms import thawed
from xent._core.validators import valid
from xent.triplets._forms import softplus


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    *,
    reduction: str = "mean",
    smooth: bool = False,
) -> Tensor:
    r"""Return the triplet loss of embeddings, as torch's function of this name, or a smooth form of it.

    Signature and values are those of :func:`torch.nn.functional.triplet_margin_loss`.

    Args:
        anchor, positive, negative: (N, D) or (D,), of shapes that broadcast.
        margin: how much farther away than the positive the negative must be; above 0, as in torch, unless
            ``smooth``.
        p: the exponent of the norm.
        eps: added to every coordinate of a difference.
        swap: measure the negative's distance from the anchor or from the positive, whichever is nearer.
        reduction: ``"mean"`` (0 over no rows), ``"sum"`` or ``"none"``.
        smooth: softplus in place of the hinge, so that every triplet keeps a gradient.

    Returns:
        A scalar, or (N,) for ``"none"``.

    Raises:
        ValueError, RuntimeError: as torch's.

    Example:
        >>> import torch, xent
        >>> a, p, n = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.5, 0.0]])
        >>> round(xent.triplets.triplet_margin_loss(a, p, n).item(), 4)  # 1 − 1.5 + 1
        0.5
    """
    require_tensors(anchor=anchor, positive=positive, negative=negative)
    anchor, positive, negative = thawed(anchor), thawed(positive), thawed(negative)
    options = {"margin": margin, "p": p, "eps": eps, "swap": swap}
    margin, p, eps, swap = (valid(name, value) for name, value in options.items())
    reduction, smooth = valid("reduction", reduction), valid("smooth", smooth)
    if smooth:
        loss = _smooth(anchor, positive, negative, margin, p, eps, swap)
    else:
        loss = F.triplet_margin_loss(
            anchor, positive, negative, margin=margin, p=p, eps=eps, swap=swap, reduction="none"
        )
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(1, loss.numel())


def _smooth(
    anchor: Tensor, positive: Tensor, negative: Tensor, margin: float, p: float, eps: float, swap: bool
) -> Tensor:
    """Return softplus of the margin violations, (N,) or ()."""
    if anchor.dim() != positive.dim() or anchor.dim() != negative.dim():
        raise ValueError(
            "anchor, positive and negative must have as many dimensions as one another; got "
            f"{anchor.dim()}, {positive.dim()} and {negative.dim()}"
        )
    near = F.pairwise_distance(anchor, positive, p, eps)
    far = F.pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = torch.minimum(far, F.pairwise_distance(positive, negative, p, eps))
    return softplus(near - far + margin)
