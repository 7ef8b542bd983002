"""Curvature products through any model: torch.func for the model, closed forms for the head and the loss.

    G v = Jacᵀ (H_out (Jac v))        H v = d/dε ∇L(θ + ε v)        Jac = ∂out/∂θ

out are logits, or features that enter a linear head; H_out is the Gauss–Newton matrix of the loss in them.
Neither Jac nor H_out is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from xent._arguments.call import resolve_logits
from xent._arguments.options import Options
from xent._arguments.validation import check_tensors, require_tensors
from xent._autograd.transforms import plain
from xent._core.target import Target, tensors_of
from xent._core.validators import OneOf, TotalName
from xent.curvature._batches import OPTIONS, check_options, check_target, refuse_derivatives
from xent.curvature._heads import HeadGGN
from xent.curvature._right_hand_sides import RightHandSides, Stacks
from xent.curvature._row_gradients import loss_options
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
    r"""Multiply the generalised Gauss–Newton matrix of a model's loss by a vector.

    The matrix is ``Jacᵀ H_out Jac``, with Jac the derivative of the model's outputs in its parameters and
    H_out the curvature of the loss in the outputs. Neither is formed. The product takes one forward-mode and
    one reverse-mode pass through the model; between them the loss's curvature is applied in closed form. The
    matrix is positive semidefinite where no target mass is negative. Source: Schraudolph, "Fast curvature
    matrix-vector products for second-order gradient descent", 2002.

    Args:
        model: a module, with its own buffers, or a function of ``(params, inputs)``. It returns logits, (N,
            C) or of another shape that :func:`xent.cross_entropy` takes, or with a ``head`` features (...,
            D). Put a module in eval mode: each pass calls it once, and in training mode dropout would draw
            another mask in each.
        params: the parameters: ``dict(module.named_parameters())`` or any part of it; for a function, its
            first argument.
        inputs: the model's inputs; a tuple holds several.
        target: as in :func:`xent.cross_entropy`.
        vector: in the structure of ``params``, or flat (P,). The product is differentiable in it.
        head: ``(weight,)`` or ``(weight, bias)``, (C, D) and (C,), of a linear head after the model, whose
            logits are then not stored. It is held constant.
        options: ``reduction`` (``"mean"`` or ``"sum"``), ``class_weight``, ``ignore_index``,
            ``label_smoothing``, ``sample_weight``, ``z_loss``, ``softcap``, ``temperature``, ``denominator``,
            and with a head ``memory_budget``, as in :class:`HeadHessian`.

    Returns:
        The product, in the structure of ``vector``.

    Raises:
        ValueError: shapes or structures that do not fit together.
        TypeError: an option that does not exist; types that do not fit.
        NotImplementedError: differentiation of ``torch.func`` in ``params`` or in a tensor held constant.

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
    _check_arguments(target, head, options)
    refuse_derivatives(*(t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor)), *tensors_of(target))
    run, params, tangent, restore = _prepare(model, params, inputs, vector)
    out, output_tangent = jvp(run, (params,), (tangent,))[:2]
    output_product = _multiply_output_curvature(out.detach(), output_tangent, target, head, options)
    pull_back = vjp(run, params)[1]
    return restore(pull_back(output_product)[0])


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
    r"""Multiply the Hessian of a model's loss in its parameters by a vector.

    The product is ``d/dε ∇L(θ + ε v)`` at ε = 0, with θ the parameters: forward mode over reverse mode, where
    the loss's second derivative is its closed form. The Hessian is indefinite in general. With a ``head`` no
    logits are stored.

    Args:
        model, params, inputs, target, vector, head: as in :func:`ggn_vector_product`.
        options: as in :func:`ggn_vector_product`, and all others of :func:`xent.cross_entropy`, or with a
            head of :func:`xent.linear_cross_entropy`, such as ``margin`` and ``log_q``.

    Returns:
        The product, in the structure of ``vector``.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`ggn_vector_product`.

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
    _check_arguments(target, head, options)
    run, params, tangent, restore = _prepare(model, params, inputs, vector)
    settings = loss_options(options)
    OneOf(get_args(TotalName))("reduction", settings.get("reduction", "mean"))

    def loss(params: Any) -> Tensor:
        if head is None:
            return _cross_entropy.cross_entropy(run(params), target, **settings)  # type: ignore[arg-type]
        weight, bias = _checked_head(head)
        return _cross_entropy.linear_cross_entropy(
            run(params),
            weight.detach(),
            target,  # type: ignore[arg-type]
            linear_bias=None if bias is None else bias.detach(),
            **settings,
        )

    return restore(jvp(grad(loss), (params,), (tangent,))[1])


def _prepare(
    model: Model, params: Any, inputs: Any, vector: Any
) -> tuple[Callable[[Any], Tensor], Any, Any, Callable[[Any], Any]]:
    """Return θ ↦ outputs, the parameters, the vector in their structure, and the map back to its own."""
    refuse_derivatives(*tree_flatten(params)[0])
    params = tree_map(lambda p: p.detach(), params)
    leaves, structure = tree_flatten(params)
    if isinstance(vector, dict) and isinstance(params, dict) and vector.keys() == params.keys():
        vector = {name: vector[name] for name in params}  # in the order of params
    if isinstance(vector, Tensor) and not isinstance(params, Tensor):
        sizes = [leaf.numel() for leaf in leaves]
        if vector.shape != (sum(sizes),):
            raise ValueError(f"a flat vector must have shape ({sum(sizes)},), got {tuple(vector.shape)}")
        parts = [v.reshape(p.shape) for v, p in zip(vector.split(sizes), leaves, strict=True)]
        tangent = tree_unflatten(parts, structure)

        def restore(product: Any) -> Any:
            return torch.cat([t.reshape(-1) for t in tree_flatten(product)[0]])
    else:
        tangent = vector
        parts, vector_structure = tree_flatten(tangent)
        if vector_structure != structure or any(
            a.shape != b.shape for a, b in zip(parts, leaves, strict=True)
        ):
            raise ValueError("vector must have the structure and shapes of params, or be flat")

        def restore(product: Any) -> Any:
            return product

    several = inputs if isinstance(inputs, tuple) else (inputs,)

    def run(params: Any) -> Tensor:
        if isinstance(model, nn.Module):
            out: Tensor = functional_call(model, params, several)
            return out
        return model(params, inputs)

    return run, params, tangent, restore


def _check_arguments(target: object, head: Head | None, options: dict[str, Any]) -> None:
    """Raise an error that names the target, the head or the class weights if one is invalid."""
    check_target(target)
    check_tensors(class_weight=options.get("class_weight"))
    if head is not None:
        _checked_head(head)


def _multiply_output_curvature(
    out: Tensor, output_tangent: Tensor, target: Target, head: Head | None, options: dict[str, Any]
) -> Tensor:
    """Multiply H_out by a tangent of the outputs."""
    if head is not None:
        weight, bias = _checked_head(head)
        features = HeadGGN(out.to(weight.dtype), weight, target, bias=bias, wrt="features", **options)
        return (features @ output_tangent.to(weight.dtype)).to(output_tangent.dtype)
    reduction = options.get("reduction", "mean")
    OneOf(get_args(TotalName))("reduction", reduction)
    settings = Options.of(**loss_options(options))
    with plain(out.device):
        call = resolve_logits(settings, out, target)
        (problem,) = call.problems
        scale = call.reduction.scale(call.problems)
        of_logits = Curvature.of(
            problem, Form.GAUSS_NEWTON, scale, problem.row_weight, settings.reduction.z_loss
        )
    axis, rows = min(1, out.dim() - 1), problem.logits.shape

    def product(stacks: Stacks) -> Stacks:
        sides = stacks[0].movedim(1 + axis, -1)
        with plain(out.device):
            products = of_logits.products([(side.reshape(rows),) for side in sides], (True,))
        joined = torch.stack([in_logits for (in_logits,) in products if in_logits is not None])
        return (joined.reshape(sides.shape).movedim(-1, 1 + axis),)

    right_hand_sides = RightHandSides((output_tangent.shape,), output_tangent.dtype)
    result: Tensor = right_hand_sides.apply(output_tangent, product)
    return result


def _checked_head(head: object) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias, None where the head has no bias."""
    if not isinstance(head, tuple | list) or not 1 <= len(head) <= 2:
        size = f" of {len(head)}" if isinstance(head, tuple | list) else ""
        raise ValueError(f"head must be (weight,) or (weight, bias), got a {type(head).__name__}{size}")
    weight, bias = (*head, None)[:2]
    require_tensors(**{"the head's weight": weight})
    check_tensors(**{"the head's bias": bias})
    assert weight is not None
    return weight, bias
