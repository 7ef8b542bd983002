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

from xent._arguments.call import Options
from xent._arguments.validation import check_tensors, require_tensors
from xent._autograd.transforms import plain
from xent._core.target import Target, tensors_of
from xent._core.validators import OneOf
from xent.curvature._batches import OPTIONS, check_options, check_target, refuse_derivatives
from xent.curvature._heads import HeadGGN
from xent.curvature._right_hand_sides import Sides, Stacks
from xent.curvature._tiles import Curvature, Form
from xent.losses import _cross_entropy

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
        model: a module, called as it stands, with its own buffers, or a function of ``(params, inputs)``;
            returns logits, (N, C) or of another shape that :func:`xent.cross_entropy` takes, or features
            (..., D) where there is a ``head``. Put it in eval mode: it is called once for each pass, and in
            training mode dropout would draw a mask for each, and the product be that of two models.
        params: the parameters to differentiate in, as the model takes them:
            ``dict(module.named_parameters())`` or any part of it; for a function, whatever it takes.
        inputs: the model's inputs; a tuple holds several.
        target: as in :func:`xent.cross_entropy`.
        vector: of the structure of ``params``, or flat (P,). The product is differentiable in it.
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
    known = OPTIONS if head is not None else [name for name in OPTIONS if name != "memory_budget"]
    check_options("ggn_vector_product", options, known)
    _check(target, head, options)
    refuse_derivatives(*(t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor)), *tensors_of(target))
    run, params, along, given = _prepared(model, params, inputs, vector)
    out, moved = jvp(run, (params,), (along,))[:2]
    bent = _of_outputs(out.detach(), moved, target, head, options)
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
        model, params, inputs, target, vector, head: as in :func:`ggn_vector_product`.
        options: as there, and every other one of :func:`xent.cross_entropy`, or with a head of
            :func:`xent.linear_cross_entropy`: ``margin``, ``log_q``, ...

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
    _check(target, head, options)
    run, params, along, given = _prepared(model, params, inputs, vector)
    settings = _named(options)
    OneOf(("mean", "sum"))("reduction", settings.get("reduction", "mean"))

    def loss(params: Any) -> Tensor:
        if head is None:
            return _cross_entropy.cross_entropy(run(params), target, **settings)  # type: ignore[arg-type]
        weight, bias = _of_head(head)
        return _cross_entropy.linear_cross_entropy(
            run(params),
            weight.detach(),
            target,  # type: ignore[arg-type]
            linear_bias=None if bias is None else bias.detach(),
            **settings,
        )

    return given(jvp(grad(loss), (params,), (along,))[1])


def _prepared(
    model: Model, params: Any, inputs: Any, vector: Any
) -> tuple[Callable[[Any], Tensor], Any, Any, Callable[[Any], Any]]:
    """θ ↦ outputs, the parameters, the vector in their structure, and the way back to how it was given."""
    refuse_derivatives(*tree_flatten(params)[0])
    params = tree_map(lambda p: p.detach(), params)
    leaves, structure = tree_flatten(params)
    if isinstance(vector, dict) and isinstance(params, dict) and vector.keys() == params.keys():
        vector = {name: vector[name] for name in params}  # in whatever order they were given
    if isinstance(vector, Tensor) and not isinstance(params, Tensor):
        sizes = [leaf.numel() for leaf in leaves]
        if vector.shape != (sum(sizes),):
            raise ValueError(f"a flat vector must have shape ({sum(sizes)},), got {tuple(vector.shape)}")
        parts = [v.reshape(p.shape) for v, p in zip(vector.split(sizes), leaves, strict=True)]
        along = tree_unflatten(parts, structure)

        def given(product: Any) -> Any:
            return torch.cat([t.reshape(-1) for t in tree_flatten(product)[0]])
    else:
        along = vector
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


def _check(target: object, head: Head | None, options: dict[str, Any]) -> None:
    """Raise an error that names the target, the head or the class weights where they are none."""
    check_target(target)
    check_tensors(class_weight=options.get("class_weight"))
    if head is not None:
        _of_head(head)


def _of_outputs(
    out: Tensor, moved: Tensor, target: Target, head: Head | None, options: dict[str, Any]
) -> Tensor:
    """H_out times a tangent of the outputs."""
    if head is not None:
        weight, bias = _of_head(head)
        features = HeadGGN(out.to(weight.dtype), weight, target, bias=bias, wrt="features", **options)
        return (features @ moved.to(weight.dtype)).to(moved.dtype)
    reduction = options.get("reduction", "mean")
    OneOf(("mean", "sum"))("reduction", reduction)
    settings = Options.of(**_named(options))
    with plain(out.device):
        call = settings.of_logits(out, target)
        (part,) = call.parts
        scale = call.reduction.scale([(part.problem.targets, part.row_weight)])
        of_logits = Curvature.of(part.problem, Form.GAUSS_NEWTON, scale, part.row_weight, settings.z_loss)
    axis, rows = min(1, out.dim() - 1), part.problem.logits.shape

    def product(stacks: Stacks) -> Stacks:
        sides = stacks[0].movedim(1 + axis, -1)
        with plain(out.device):
            bent = of_logits.products([(side.reshape(rows),) for side in sides], (True,))
        return (
            torch.stack([b for (b,) in bent if b is not None]).reshape(sides.shape).movedim(-1, 1 + axis),
        )

    bent: Tensor = Sides((moved.shape,), moved.dtype).through(moved, product)
    return bent


def _of_head(head: Head) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, of a head that may have no bias."""
    if not isinstance(head, tuple | list) or not 1 <= len(head) <= 2:
        size = f" of {len(head)}" if isinstance(head, tuple | list) else ""
        raise ValueError(f"head must be (weight,) or (weight, bias), got a {type(head).__name__}{size}")
    weight, bias = (*head, None)[:2]
    require_tensors(**{"the head's weight": weight})
    check_tensors(**{"the head's bias": bias})
    assert weight is not None
    return weight, bias


def _named(options: dict[str, Any]) -> dict[str, Any]:
    """As the losses name them."""
    return {"weight" if name == "class_weight" else name: value for name, value in options.items()}
