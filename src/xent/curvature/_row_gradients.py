"""Each row's own gradient in a linear head, a matrix of rank one, and its norm without the matrix.

∂ℓ/∂W = s·(∂ℓ/∂u) xᵀ        ∂ℓ/∂b = s·∂ℓ/∂u        ‖∂ℓ/∂(W, b)‖ = |s|·‖∂ℓ/∂u‖·‖(x, 1)‖
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xent._arguments.call import Call, Options, Part
from xent._arguments.validation import check_tensors, require_tensors
from xent._autograd.transforms import plain
from xent._core.logits import LinearHead
from xent._core.target import Target, tensors_of
from xent.curvature._batches import OPTIONS, check_options, check_target, refuse_derivatives
from xent.curvature._tiles import Curvature, Form, norms

OF_ROWS = [name for name in OPTIONS if name not in ("reduction", "denominator")]


def row_gradient_norms(
    features: Tensor, weight: Tensor, target: Target, *, bias: Tensor | None = None, **options: Any
) -> Tensor:
    r"""The norm of each row's own gradient in a linear head, ``s·‖∂ℓ/∂u‖·‖x̃‖``, without forming any.

    Args:
        features, weight, target, bias: of the head, as in :class:`HeadHessian`, held constant. x̃ = (x, 1)
            with a bias, else x.
        options: ``class_weight``, ``ignore_index``, ``label_smoothing``, ``sample_weight``, ``z_loss``,
            ``softcap``, ``temperature``, ``memory_budget``.

    Returns:
        (...) of the rows, 0 where a row is left out. Two matrix products.

    Example:
        >>> import torch, xent
        >>> x, w = torch.tensor([[3.0, 4.0]]), torch.zeros(2, 2)
        >>> xent.curvature.row_gradient_norms(x, w, torch.tensor([0]))  # ‖(−½, ½)‖·5
        tensor([3.5355])
    """
    require_tensors(features=features)
    with plain(features.device):
        call, part, curvature = _of_rows("row_gradient_norms", features, weight, target, bias, options)
        found = curvature.gradient_norms()
        if part.row_weight is not None:
            found = found * part.row_weight.abs()
        of_inputs = norms(_inputs(curvature))
        if bias is not None:
            of_inputs = torch.hypot(of_inputs, torch.ones_like(of_inputs))
        return call.stack([part.selection.scatter(found * of_inputs)])


def row_gradients(
    features: Tensor, weight: Tensor, target: Target, *, bias: Tensor | None = None, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Each row's own gradient in a linear head, ``s·(∂ℓ/∂u) xᵀ``: a matrix for each of these rows.

    Args:
        features: (N, D), the rows to look at.
        weight, target, bias, options: as in :func:`row_gradient_norms`.

    Returns:
        (N, C, D), and with a bias a pair of that and (N, C). Half types are rounded once.

    Example:
        >>> import torch, xent
        >>> xent.curvature.row_gradients(torch.tensor([[3.0, 4.0]]), torch.zeros(2, 2), torch.tensor([0]))
        tensor([[[-1.5000, -2.0000],
                 [ 1.5000,  2.0000]]])
    """
    require_tensors(features=features)
    if features.dim() != 2:
        raise ValueError(f"features must be (N, D), got {tuple(features.shape)}")
    with plain(features.device):
        call, part, curvature = _of_rows("row_gradients", features, weight, target, bias, options)
        g = curvature.gradients()
        if part.row_weight is not None:
            g = g * part.row_weight.to(g.dtype)[:, None]
        x = _inputs(curvature)
        gradients = part.selection.scatter((g[:, :, None] * x[:, None, :]).to(call.dtype))
        return gradients if bias is None else (gradients, part.selection.scatter(g.to(call.dtype)))


def _of_rows(
    of: str,
    features: Tensor,
    weight: Tensor,
    target: Target,
    bias: Tensor | None,
    options: dict[str, Any],
) -> tuple[Call, Part, Curvature]:
    check_options(of, options, OF_ROWS)
    require_tensors(weight=weight)
    check_tensors(bias=bias, class_weight=options.get("class_weight"))
    check_target(target)
    if weight.dim() != 2:
        raise ValueError(f"weight must be (C, D), got {tuple(weight.shape)}")
    s = options.get("sample_weight")
    check_tensors(sample_weight=s)
    refuse_derivatives(features, weight, bias, *tensors_of(target), s)
    settings = Options.of(
        reduction="sum",
        **{"weight" if name == "class_weight" else name: value for name, value in options.items()},
    )
    head = weight.detach(), None if bias is None else bias.detach()
    call = settings.of_head(features.detach(), *head, target)
    (part,) = call.parts
    return call, part, Curvature.of(part.problem, Form.OUTER, z_loss=settings.z_loss)


def _inputs(curvature: Curvature) -> Tensor:
    """x of the M rows, (M, D), in the type of the computation."""
    logits, rows = curvature.problem.logits, curvature.problem.targets.rows
    assert isinstance(logits, LinearHead)
    return (logits.x if rows is None else logits.x[rows]).to(logits.dtype)
