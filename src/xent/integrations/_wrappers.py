"""The wrappers around a causal language model of Transformers: what is inside, and a call through them.

model = torch.compile(DDP(PEFT(inner)))        model(...), with the forward of `inner` replaced meanwhile
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn


def wrappers(model: Any) -> Iterator[Any]:
    """Yield a model, and what is inside each of its wrappers, the innermost last."""
    yield model
    while True:
        kind = type(model)
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif kind.__module__.startswith("torch.distributed.fsdp") and hasattr(model, "module"):
            raise TypeError(
                "model is a FullyShardedDataParallel, which frees the head's weight before the backward: "
                "shard it with torch.distributed.fsdp.fully_shard"
            )
        elif kind.__module__ == "torch.nn.parallel.data_parallel":
            raise TypeError(
                "model is a DataParallel, whose copies cannot compute this loss: use one process a device, "
                "with torchrun"
            )
        elif kind.__module__.startswith("torch.nn.parallel"):  # DDP
            model = model.module
        else:
            return
        yield model


def causal_lm(model: Any) -> Any:
    """Return the causal language model inside its wrappers; raise an error unless it is one."""
    *_, inner = wrappers(model)
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "base_model"):
        raise TypeError(f"model must be a causal language model of Transformers, got {type(inner).__name__}")
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(inner).__name__} is an encoder-decoder, whose labels are not shifted")
    return inner


def is_hooked(model: nn.Module) -> bool:
    """Return whether a call of the model runs more than its forward."""
    hooks = model._forward_hooks or model._forward_pre_hooks or model._backward_hooks
    return bool(hooks or model._backward_pre_hooks)


def unbound(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward as a function of the model and its arguments, whether it is a method or not."""
    function: Callable[..., Any] | None = getattr(forward, "__func__", None)
    return function or (lambda _, *args, **inputs: forward(*args, **inputs))


@contextmanager
def forward_replaced(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of a model by a method, and put its own back on every way out."""
    before = model.__dict__.get("forward")
    model.forward = MethodType(forward, model)
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before
