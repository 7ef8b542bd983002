"""The gradient of each row's loss in a linear head, a matrix of rank one, and its norm without the matrix.

∂ℓ/∂W = s·(∂ℓ/∂u) xᵀ        ∂ℓ/∂b = s·∂ℓ/∂u        ‖∂ℓ/∂(W, b)‖ = |s|·‖∂ℓ/∂u‖·‖(x, 1)‖
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xent._arguments.call import Call, resolve_head
from xent._arguments.options import Options
from xent._arguments.validation import check_tensors, require_tensors
from xent._autograd.transforms import plain
from xent._core.logits import LinearHead
from xent._core.problem import Problem
from xent._core.target import Target, tensors_of
from xent.curvature._batches import OPTIONS, check_options, check_target, refuse_derivatives
from xent.curvature._tiles import Curvature, Form, norms

ROW_OPTIONS = [name for name in OPTIONS if name not in ("reduction", "denominator")]


def row_gradient_norms(
    features: Tensor, weight: Tensor, target: Target, *, bias: Tensor | None = None, **options: Any
) -> Tensor:
    r"""Return the norm of each row's gradient in a linear head, without the gradient.

    The norm is ``|s|·‖∂ℓ/∂u‖·‖x̃‖``, with u the logits, s the sample weight, and x̃ = (x, 1) with a bias,
    else x. It costs two matrix products. Source: Goodfellow, "Efficient per-example gradient computations",
    2015.

    Args:
        features, weight, target, bias: as in :class:`HeadHessian`; they are held constant.
        options: ``class_weight``, ``ignore_index``, ``label_smoothing``, ``sample_weight``, ``z_loss``,
            ``softcap``, ``temperature`` and ``memory_budget``, as in :class:`HeadHessian`.

    Returns:
        (...), one number a row, 0 for a row that is left out.

    Raises:
        ValueError, IndexError: as :func:`xent.linear_cross_entropy`.
        TypeError: an option that does not exist; types that do not fit.
        NotImplementedError: differentiation of ``torch.func`` in a tensor.

    Example:
        >>> import torch, xent
        >>> x, w = torch.tensor([[3.0, 4.0]]), torch.zeros(2, 2)
        >>> xent.curvature.row_gradient_norms(x, w, torch.tensor([0]))  # ‖(−½, ½)‖·5
        tensor([3.5355])
    """
    require_tensors(features=features)
    with plain(features.device):
        call, problem, curvature = _row_curvature(
            "row_gradient_norms", features, weight, target, bias, options
        )
        logit_norms = curvature.gradient_norms()
        if problem.row_weight is not None:
            logit_norms = logit_norms * problem.row_weight.abs()
        input_norms = norms(_inputs(curvature))
        if bias is not None:
            input_norms = torch.hypot(input_norms, torch.ones_like(input_norms))
        return call.stack([problem.selection.scatter(logit_norms * input_norms)])


def row_gradients(
    features: Tensor, weight: Tensor, target: Target, *, bias: Tensor | None = None, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return the gradient of each row's loss in a linear head, the matrix ``s·(∂ℓ/∂u) xᵀ``.

    u are the logits and s the sample weight of the row.

    Args:
        features: x, (N, D).
        weight, target, bias, options: as in :func:`row_gradient_norms`.

    Returns:
        (N, C, D); with a bias a pair of that and (N, C). Half types are rounded once.

    Raises:
        ValueError, IndexError, TypeError, NotImplementedError: as :func:`row_gradient_norms`.

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
        call, problem, curvature = _row_curvature("row_gradients", features, weight, target, bias, options)
        g = curvature.gradients()
        if problem.row_weight is not None:
            g = g * problem.row_weight.to(g.dtype)[:, None]
        x = _inputs(curvature)
        gradients = problem.selection.scatter((g[:, :, None] * x[:, None, :]).to(call.dtype))
        return gradients if bias is None else (gradients, problem.selection.scatter(g.to(call.dtype)))


def _row_curvature(
    function: str,
    features: Tensor,
    weight: Tensor,
    target: Target,
    bias: Tensor | None,
    options: dict[str, Any],
) -> tuple[Call, Problem, Curvature]:
    check_options(function, options, ROW_OPTIONS)
    require_tensors(weight=weight)
    check_tensors(bias=bias, class_weight=options.get("class_weight"))
    check_target(target)
    if weight.dim() != 2:
        raise ValueError(f"weight must be (C, D), got {tuple(weight.shape)}")
    s = options.get("sample_weight")
    check_tensors(sample_weight=s)
    refuse_derivatives(features, weight, bias, *tensors_of(target), s)
    settings = Options.of(reduction="sum", **loss_options(options))
    head = weight.detach(), None if bias is None else bias.detach()
    call = resolve_head(settings, features.detach(), *head, target)
    (problem,) = call.problems
    return call, problem, Curvature.of(problem, Form.OUTER, z_loss=settings.reduction.z_loss)


def loss_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options under the names that the losses use."""
    return {"weight" if name == "class_weight" else name: value for name, value in options.items()}


def _inputs(curvature: Curvature) -> Tensor:
    """Return x of the M rows, (M, D), in the type of the computation."""
    logits, rows = curvature.problem.logits, curvature.problem.selection.index
    assert isinstance(logits, LinearHead)
    return (logits.x if rows is None else logits.x[rows]).to(logits.dtype)
