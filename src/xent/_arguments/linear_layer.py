"""The weight and bias of a linear layer that is read instead of called.

    linear(x) = x Wᵀ + b

A fused loss takes W and b from the layer and never calls it. So all that a call would do beside this product
(an adapter's term, a quantised product, a hook that makes the weight anew) would be left out in silence.
That is an error, which names the way out. Parametrizations make the weight when it is read, and are right.
"""

from __future__ import annotations

from torch import Tensor, nn

from xent._arguments.validation import is_ordinary

CALLS = ("__call__", "_wrapped_call_impl", "_call_impl")
FSDP = "torch.distributed.fsdp"  # its hooks gather and free the parameters
DTENSOR = "torch.distributed.tensor"  # its hooks place what goes in and out, and the weight says its group
OUT = "or call the layer yourself and pass its logits to xent.cross_entropy"


def weight_and_bias(layer: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Return the weight (C, D) and the bias (C,) of a layer, seen to compute x Wᵀ + b and nothing else.

    Raises:
        TypeError: a call of the layer would do more than that; the message says what, and the way out.
    """
    kind = type(layer).__name__
    if not isinstance(layer, nn.Linear) or any(
        getattr(type(layer), name) is not getattr(nn.Module, name) or name in layer.__dict__ for name in CALLS
    ):
        raise TypeError(
            f"{name} is a {kind} and no torch.nn.Linear: the loss reads the weight and would leave out the "
            "rest; merge an adapter into the weight and put the torch.nn.Linear back, dequantise a quantised "
            f"layer, {OUT}"
        )
    if type(layer).forward is not nn.Linear.forward or "forward" in layer.__dict__:
        raise TypeError(
            f"{name} ({kind}) has a forward of its own, which the loss, reading the weight, would leave out; "
            f"merge what it adds into the weight and put the torch.nn.Linear back, {OUT}"
        )
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
    weight, bias = layer.weight, layer.bias
    for which, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None and which == "weight":
            raise TypeError(f"{name}.weight must be a tensor, got None")
        if tensor is not None and not is_ordinary(tensor):
            raise TypeError(
                f"{name}.{which} is a {type(tensor).__name__}, whose products are not those of a plain "
                f"tensor: dequantise it, {OUT}"
            )
    return weight, bias


def _module_of(hook: object) -> str:
    """Return where a hook comes from."""
    return str(getattr(hook, "__module__", ""))


def _gather(layer: nn.Linear, name: str) -> None:
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
