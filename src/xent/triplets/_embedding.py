"""The triplet loss between embeddings (anchor, positive, negative), without classes.

φ(‖a − p + ε‖_p − ‖a − n + ε‖_p + margin)        φ = max(·, 0), torch's loss, or softplus
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from xent._arguments.validation import require_tensors
from xent._autograd.transforms import thawed
from xent._core.validators import ReductionName, valid
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
    reduction: ReductionName = "mean",
    smooth: bool = False,
) -> Tensor:
    r"""Return the triplet loss of embeddings (anchor, positive, negative), or a smooth form of it.

    The loss of a triplet is ``max(d(anchor, positive) − d(anchor, negative) + margin, 0)``, with the distance
    ``d(u, v) = ‖u − v + eps‖`` in the norm of exponent ``p``. The function replaces
    :func:`torch.nn.functional.triplet_margin_loss`. With ``smooth`` the softplus ``log(1 + exp(u))`` replaces
    ``max(u, 0)``.

    Args:
        anchor, positive, negative: (N, D) or (D,), of shapes that broadcast.
        margin: the distance by which the negative must be farther away than the positive. It is above 0, as
            in torch, unless ``smooth``.
        p: the exponent of the norm.
        eps: a number that is added to every coordinate of a difference.
        swap: whether the negative's distance is measured from the anchor or from the positive, whichever is
            nearer.
        reduction: ``"mean"`` (0 over no rows), ``"sum"`` or ``"none"``.
        smooth: whether to use softplus in place of the hinge, so that every triplet has a gradient.

    Returns:
        A scalar, or for ``"none"`` (N,), of the type of the embeddings.

    Raises:
        ValueError, RuntimeError: as torch's function.
        TypeError: an argument of the wrong kind.

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
