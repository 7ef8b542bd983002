"""Curvature through any feature extractor: torch.func for the extractor, closed form for what follows it.

    G v = Jacᵀ (H_out (Jac v))        H v = d/dε ∇L(θ + ε v)        Jac = ∂out/∂θ

out are logits, or features that a linear head follows; H_out is the Gauss–Newton matrix of the loss in them.
Neither Jac nor H_out is ever a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from xent import functional
from xent.core.curvature import Curvature, Form
from xent.curvature.heads import HeadGGN
from xent.modes import plain
from xent.options import Options, Target

Model: TypeAlias = nn.Module | Callable[[Any, Any], Tensor]
Head: TypeAlias = tuple[Tensor] | tuple[Tensor, Tensor | None]


def ggn_vector_product(
    model: Model,
    params: Any,
    inputs: Any,
    target: Target,
    vector: Any,
    *,
    head: Head | None = None,
    **options: Any,
) -> Any:
    r"""The generalised Gauss–Newton matrix of a model's loss, times a vector.

    One forward-mode and one reverse-mode pass through the model; between them the loss's own curvature in
    closed form. Positive semidefinite where no target mass is negative. Source: Schraudolph, "Fast curvature
    matrix-vector products for second-order gradient descent", 2002.

    Args:
        model: a module, called as it stands (with its own buffers: put it in eval mode), or a function of
            ``(params, inputs)``; returns logits (N, C), or features (..., D) where there is a ``head``.
        params: the parameters to differentiate in, as the model takes them:
            ``dict(module.named_parameters())`` or any part of it; for a function, whatever it takes.
        inputs: the model's inputs; a tuple holds several.
        target: as in :func:`xent.cross_entropy`.
        vector: of the structure of ``params``, or flat (P,).
        head: ``(weight,)`` or ``(weight, bias)``, (C, D) and (C,), of a linear head after the model, whose
            logits are then never made. It is held constant.
        options: ``reduction`` (``"mean"`` or ``"sum"``), ``class_weight``, ``ignore_index``,
            ``label_smoothing``, ``sample_weight``, ``z_loss``, ``softcap``, ``temperature``,
            ``denominator``, and with a head ``memory_budget``: as in :class:`HeadHessian`.

    Returns:
        The product, as ``vector`` was given.

    Example:
        >>> import torch, xent
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> params = dict(model.named_parameters())
        >>> x, y, v = torch.randn(16, 4), torch.randint(3, (16,)), torch.ones(8 * 4 + 8 + 3 * 8 + 3)
        >>> product = xent.curvature.ggn_vector_product(model, params, x, y, v)
        >>> product.shape, bool(product @ v >= -1e-6)
        (torch.Size([67]), True)
    """
    run, params, along, given = _prepared(model, params, inputs, vector)
    out, moved = jvp(run, (params,), (along,))[:2]
    bent = _of_outputs(out.detach(), moved.detach(), target, head, options)
    pull = vjp(run, params)[1]
    return given(pull(bent)[0])


def hessian_vector_product(
    model: Model,
    params: Any,
    inputs: Any,
    target: Target,
    vector: Any,
    *,
    head: Head | None = None,
    **options: Any,
) -> Any:
    r"""The Hessian of a model's loss in its parameters, times a vector: forward over reverse.

    Indefinite in general. The loss's own second derivative is the closed form; with a ``head`` no logits are
    kept.

    Args:
        model, params, inputs, target, vector, head, options: as in :func:`ggn_vector_product`.

    Returns:
        The product, as ``vector`` was given.

    Example:
        >>> import torch, xent
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(16, 4), torch.randint(3, (16,))
        >>> v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        >>> params = dict(model.named_parameters())
        >>> H = xent.curvature.hessian_vector_product(model, params, x, y, v)
        >>> G = xent.curvature.ggn_vector_product(model, params, x, y, v)
        >>> torch.allclose(H["weight"], G["weight"], atol=1e-6)  # equal, as logits are linear in both
        True
    """
    run, params, along, given = _prepared(model, params, inputs, vector)
    settings = _named(options)

    def loss(params: Any) -> Tensor:
        if head is None:
            return functional.cross_entropy(run(params), target, **settings)  # type: ignore[arg-type]
        weight, bias = (*head, None)[:2]
        assert weight is not None
        return functional.linear_cross_entropy(
            run(params),
            weight.detach(),
            target,  # type: ignore[arg-type]
            linear_bias=None if bias is None else bias.detach(),
            **settings,
        )

    return given(jvp(grad(loss), (params,), (along,))[1])


def row_gradient_norms(
    features: Tensor, weight: Tensor, target: Target, *, bias: Tensor | None = None, **options: Any
) -> Tensor:
    r"""The norm of each row's own gradient in a linear head, ``s·‖∂ℓ/∂u‖·‖x̃‖``, without forming any.

    Args:
        features, weight, target, bias: of the head, as in :class:`HeadHessian`. x̃ = (x, 1) with a bias,
            else x.
        options: ``class_weight``, ``ignore_index``, ``label_smoothing``, ``sample_weight``, ``z_loss``,
            ``softcap``, ``temperature``, ``memory_budget``.

    Returns:
        (...) of the rows, 0 where a row is left out. One matrix product.

    Example:
        >>> import torch, xent
        >>> x, w = torch.tensor([[3.0, 4.0]]), torch.zeros(2, 2)
        >>> xent.curvature.row_gradient_norms(x, w, torch.tensor([0]))  # ‖(−½, ½)‖·5
        tensor([3.5355])
    """
    with torch.no_grad():
        call = _options(options, "sum").of_head(
            features.detach(), weight.detach(), None if bias is None else bias.detach(), target
        )
        (part,) = call.parts
        problem, z_loss = part.problem, float(options.get("z_loss", 0.0))
        with plain(weight.device):
            squares = Curvature.of(problem, Form.OUTER, z_loss=z_loss).logit_traces()
        norms = squares.to(torch.float64).sqrt()
        if part.row_weight is not None:
            norms = norms * part.row_weight.abs()
        rows = problem.targets.rows
        x = features.detach().reshape(-1, features.shape[-1])
        x = (x if rows is None else x[rows]).to(torch.float64)
        norms = norms * (x.square().sum(1) + (bias is not None)).sqrt()
        if rows is not None:
            norms = norms.new_zeros(problem.targets.total).index_copy(0, rows, norms)
        return call.stack([norms])


def row_gradients(
    features: Tensor, weight: Tensor, target: Target, *, bias: Tensor | None = None, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Each row's own gradient in a linear head, ``s·(∂ℓ/∂u) xᵀ``: a matrix for each of these rows.

    Args:
        features: (N, D), the rows to look at.
        weight, target, bias, options: as in :func:`row_gradient_norms`.

    Returns:
        (N, C, D), and with a bias a pair of that and (N, C).

    Example:
        >>> import torch, xent
        >>> xent.curvature.row_gradients(torch.tensor([[3.0, 4.0]]), torch.zeros(2, 2), torch.tensor([0]))
        tensor([[[-1.5000, -2.0000],
                 [ 1.5000,  2.0000]]])
    """
    if features.dim() != 2:
        raise ValueError(f"features must be (N, D), got {tuple(features.shape)}")
    settings = _named({k: v for k, v in options.items() if k != "memory_budget"}) | {"reduction": "sum"}
    x = features.detach()
    with torch.enable_grad():
        logits = nn.functional.linear(x, weight.detach(), None if bias is None else bias.detach())
        logits.requires_grad_()
        (g,) = torch.autograd.grad(functional.cross_entropy(logits, target, **settings), logits)  # type: ignore[arg-type]
    # a row that is left out may hold anything
    x = torch.where((g == 0).all(1, keepdim=True), 0.0, x)
    gradients = g[:, :, None] * x[:, None, :]
    return gradients if bias is None else (gradients, g)


def _prepared(
    model: Model, params: Any, inputs: Any, vector: Any
) -> tuple[Callable[[Any], Tensor], Any, Any, Callable[[Any], Any]]:
    """θ ↦ outputs, the parameters, the vector in their structure, and the way back to how it was given."""
    params = tree_map(lambda p: p.detach(), params)
    leaves, structure = tree_flatten(params)
    if isinstance(vector, Tensor) and not isinstance(params, Tensor):
        sizes = [leaf.numel() for leaf in leaves]
        if vector.shape != (sum(sizes),):
            raise ValueError(f"a flat vector must have shape ({sum(sizes)},), got {tuple(vector.shape)}")
        parts = [v.reshape(p.shape) for v, p in zip(vector.split(sizes), leaves, strict=True)]
        along = tree_unflatten(parts, structure)

        def given(product: Any) -> Any:
            return torch.cat([t.reshape(-1) for t in tree_flatten(product)[0]])
    else:
        along = tree_map(lambda v: v.detach(), vector)
        parts, theirs = tree_flatten(along)
        if theirs != structure or any(a.shape != b.shape for a, b in zip(parts, leaves, strict=True)):
            raise ValueError("vector must have the structure and shapes of params, or be flat")

        def given(product: Any) -> Any:
            return product

    several = inputs if isinstance(inputs, tuple) else (inputs,)

    def run(params: Any) -> Tensor:
        if isinstance(model, nn.Module):
            out: Tensor = functional_call(model, params, several)
            return out
        return model(params, inputs)

    return run, params, along, given


def _of_outputs(
    out: Tensor, moved: Tensor, target: Target, head: Head | None, options: dict[str, Any]
) -> Tensor:
    """H_out times a tangent of the outputs."""
    if head is not None:
        weight, bias = (*head, None)[:2]
        assert weight is not None
        product: Tensor = HeadGGN(out, weight, target, bias=bias, wrt="features", **options) @ moved
        return product
    if out.dim() != 2:
        raise ValueError(f"the model must return logits (N, C); got {tuple(out.shape)}")
    settings = _options(options, options.get("reduction", "mean"))
    call = settings.of_logits(out, target)
    (part,) = call.parts
    with torch.no_grad(), plain(out.device):
        scale = call.reduction.scale([(part.problem.targets, part.row_weight)])
        of_logits = Curvature.of(part.problem, Form.GAUSS_NEWTON, scale, part.row_weight, settings.z_loss)
        ((bent,),) = of_logits.products([(moved,)], (True,))
    assert bent is not None
    return bent


def _options(given: dict[str, Any], reduction: str) -> Options:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    return Options(**_named(given) | {"reduction": reduction})


def _named(options: dict[str, Any]) -> dict[str, Any]:
    """As the losses name them."""
    return {"weight" if name == "class_weight" else name: value for name, value in options.items()}
