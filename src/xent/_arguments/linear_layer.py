"""The weight and bias of a linear layer that is read instead of called.

    linear(x) = x Wᵀ + b        with a LoRA adapter of PEFT: x Wᵀ + b + κ B (A x)

A fused loss takes W and b from the layer and never calls it. So all that a call would do beside this product
(an adapter's term, a quantised product, a hook that makes the weight anew) would be left out in silence.
That is an error, which names the way out. Parametrizations make the weight when it is read, and are right.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from xent._arguments import lora_layer
from xent._arguments.validation import is_ordinary
from xent._core.low_rank import LowRank, Weight

CALLS = ("__call__", "_wrapped_call_impl", "_call_impl")
FSDP = "torch.distributed.fsdp"  # its hooks gather and free the parameters
DTENSOR = "torch.distributed.tensor"  # its hooks place what goes in and out, and the weight says its group
OUT = "or call the layer yourself and pass its logits to xent.cross_entropy"


def weight_and_bias(layer: nn.Module, name: str) -> tuple[Weight, Tensor | None]:
    """Return the weight (C, D) and the bias (C,) of a layer, seen to compute x Wᵀ + b and nothing else.

    The weight of a layer with a LoRA adapter is a `LowRank`. An embedding has a weight and no bias.

    Raises:
        TypeError: a call of the layer would do more than that; the message says what, and the way out.
    """
    copy = lora_layer.saved_copy(layer)
    if copy is not None:
        _check_hooks(layer, name)
        return weight_and_bias(copy, name)
    if lora_layer.is_lora(layer):
        _check_calls(layer, name)
        _check_hooks(layer, name)
        return _adapted(layer, name)
    kind = next((kind for kind in (nn.Linear, nn.Embedding) if isinstance(layer, kind)), None)
    if kind is None:
        raise TypeError(_no_linear(layer, name))
    _check_calls(layer, name)
    own = type(layer).forward is kind.forward and kind.forward.__module__.startswith("torch.nn.modules.")
    if not own or "forward" in layer.__dict__:
        raise TypeError(
            f"{name} ({type(layer).__name__}) has a forward of its own, which the loss, reading the weight, "
            "would leave out; merge what it adds into the weight and put the torch.nn.Linear back, "
            f"dequantise a quantised layer, {OUT}"
        )
    _check_hooks(layer, name)
    weight: Any = layer.weight
    bias: Any = getattr(layer, "bias", None)
    for which, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None and which == "weight":
            raise TypeError(f"{name}.weight must be a tensor, got None")
        if tensor is not None and not is_ordinary(tensor):
            raise TypeError(
                f"{name}.{which} is a {type(tensor).__name__}, whose products are not those of a plain "
                f"tensor: dequantise it, {OUT}"
            )
    return weight, bias


def _adapted(layer: Any, name: str) -> tuple[Weight, Tensor | None]:
    """Return the weight and bias of a layer with an adapter: of the layer below, and of the adapter's two."""
    weight, bias = weight_and_bias(layer.base_layer, f"{name}.base_layer")
    adapter = lora_layer.active_adapter(layer, name, OUT)
    if adapter is None:
        return weight, bias
    down, _ = weight_and_bias(layer.lora_A[adapter], f"{name}.lora_A")
    up, of_up = weight_and_bias(layer.lora_B[adapter], f"{name}.lora_B")
    if not (isinstance(weight, Tensor) and isinstance(down, Tensor) and isinstance(up, Tensor)):
        raise TypeError(f"{name} has an adapter on an adapter: merge one of them, {OUT}")
    scale = float(layer.scaling[adapter])
    if of_up is not None:
        added = scale * of_up if bias is None else bias + scale * of_up
        bias = added.to(weight.dtype)
    return LowRank(weight, down, up, scale), bias


def _no_linear(layer: nn.Module, name: str) -> str:
    return (
        f"{name} is a {_named(layer)} and no torch.nn.Linear: the loss reads the weight and would "
        "leave out the rest; merge an adapter into the weight and put the torch.nn.Linear back, dequantise a "
        f"quantised layer, {OUT}"
    )


def _named(layer: nn.Module) -> str:
    """Return the name of a layer's class, with its module where the name alone would mislead."""
    kind = type(layer)
    return kind.__name__ if kind.__name__ != "Linear" else f"{kind.__module__}.{kind.__name__}"


def _check_calls(layer: nn.Module, name: str) -> None:
    """Raise a TypeError where the layer's call is not that of `nn.Module`."""
    if any(getattr(type(layer), c) is not getattr(nn.Module, c) or c in layer.__dict__ for c in CALLS):
        raise TypeError(_no_linear(layer, name))


def _check_hooks(layer: nn.Module, name: str) -> None:
    """Raise a TypeError for a hook that a call would run; gather what FSDP2 has sharded."""
    for hooks in (
        layer._forward_pre_hooks,
        layer._forward_hooks,
        layer._backward_pre_hooks,
        layer._backward_hooks,
    ):
        for hook in hooks.values():
            if not _module_of(hook).startswith((FSDP, DTENSOR)):
                raise TypeError(_about_hook(name, hook))
    if any(_module_of(hook).startswith(FSDP) for hook in layer._forward_pre_hooks.values()):
        _gather(layer, name)


def _module_of(hook: object) -> str:
    """Return where a hook comes from."""
    return str(getattr(hook, "__module__", ""))


def _gather(layer: nn.Module, name: str) -> None:
    """Gather the parameters of a layer that FSDP2 shards by itself, as its hook before a call does.

    Its gradients are reduced at the end of the outermost module's backward, so there must be such a module.
    """
    state = getattr(layer, "_get_fsdp_state", lambda: None)()
    if getattr(state, "_is_root", None) is not False:
        raise RuntimeError(
            f"{name} is sharded by fully_shard, and nothing around it is: its gradients would never be "
            "reduced, as the loss reads the weight and does not call the layer; apply fully_shard to the "
            "loss module too, or to the whole model"
        )
    layer.unshard()  # type: ignore[operator]


def _about_hook(name: str, hook: object) -> str:
    """Say what a hook on a layer is, and what to do about it."""
    kind = type(hook)
    if kind.__module__ == "torch.nn.utils.prune":
        pruned = getattr(hook, "_tensor_name", "weight")
        way = f"make the pruning permanent with torch.nn.utils.prune.remove({name}, {pruned!r})"
    elif kind.__module__ in ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm"):
        new = kind.__module__.rpartition(".")[2]
        way = f"use torch.nn.utils.parametrizations.{new} in its place"
    else:
        way = "register it on the loss module instead, or remove it"
    said = getattr(hook, "__qualname__", kind.__qualname__)
    return (
        f"{name} has the hook {said}, which would not run, as the loss reads the weight and does not call "
        f"the layer: {way}, {OUT}"
    )
