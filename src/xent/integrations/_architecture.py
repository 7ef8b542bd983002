"""The head of a causal language model of Transformers: its layer, and what becomes of the logits behind it.

    logits = softcap · tanh(logit_scale · (x Wᵀ + b) / softcap)        x the base model's hidden states

Scale and softcap are read from the config, where architectures give them different names. Whether this is
what the model computes is seen by `check`, which compares both losses on a few tokens, once as they are and
once with the hidden states made larger, so that a softcap which small logits would not show is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from xent._arguments.linear_layer import weight_and_bias
from xent._arguments.validation import autocasts
from xent._core.low_rank import LowRank
from xent.integrations._wrappers import forward_replaced, unbound, wrappers

FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # of the logits
DIVISORS = ("logits_scaling",)
MULTIPLIES = ("hyperclovax",)  # whose logits_scaling is a factor
TOKENS = 16  # that are compared
LARGE = 30.0  # the size of logits at which they are compared once more

_checked: WeakKeyDictionary[nn.Module, tuple[float, float | None]] = WeakKeyDictionary()
"""The scale and softcap with which a model's loss has been found to be ours."""


class LanguageHead(TypedDict):
    """The head of a language model, by the names of the arguments of a loss from features."""

    linear_weight: Tensor | LowRank
    linear_bias: Tensor | None
    logit_scale: float
    softcap: float | None


def language_head(model: Any) -> LanguageHead:
    """Return the head of a causal language model of Transformers, as arguments of a loss from its features.

    Args:
        model: a causal language model of Transformers, without wrappers.

    Returns:
        ``{"linear_weight": ..., "linear_bias": ..., "logit_scale": ..., "softcap": ...}``; scale and softcap
        are those of the model's config.

    Raises:
        TypeError: a model that has no head of its own, or one that computes more than x Wᵀ + b.

    Example:
        >>> import transformers
        >>> from xent.integrations.transformers import language_head
        >>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=100)
        >>> head = language_head(transformers.GPT2LMHeadModel(config))
        >>> tuple(head["linear_weight"].shape), head["logit_scale"], head["softcap"]
        ((100, 8), 1.0, None)
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise TypeError(f"{type(model).__name__} has no head: get_output_embeddings() is None")
    weight, bias = weight_and_bias(layer, "lm_head")
    scale, softcap = _of_config(model.config.get_text_config())
    return {"linear_weight": weight, "linear_bias": bias, "logit_scale": scale, "softcap": softcap}


def _of_config(config: Any) -> tuple[float, float | None]:
    """Return the factor of the logits and their softcap."""
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = 1.0
    for name in (*FACTORS, *DIVISORS):
        value = getattr(config, name, None)
        if value is not None:
            divides = name in DIVISORS and config.model_type not in MULTIPLIES
            scale = 1.0 / value if divides else float(value)
            break
    return scale, None if softcap is None else float(softcap)


def last_hidden(model: Any, inputs: dict[str, Any], *args: Any) -> Tensor:
    """Return hidden states (..., D) on the device of the head and, but for autocast, in its type.

    Raises:
        ValueError: a mixture of experts that adds its balancing loss.
        TypeError: the model has no base model, or does more between it and the head.
    """
    name, base, weight = type(model).__name__, _base(model), model.get_output_embeddings().weight
    if inputs.get("output_router_logits", getattr(model.config, "output_router_logits", False)):
        raise ValueError(
            f"{name} adds the balancing loss of its experts (output_router_logits), which is not made here: "
            "set config.output_router_logits = False"
        )
    found = base(*args, **{**inputs, "use_cache": False, "return_dict": True})
    hidden: Tensor = found[0] if isinstance(found, tuple) else found.last_hidden_state
    if hidden.shape[-1] != weight.shape[1]:
        raise TypeError(
            f"{name} does more between its base model and its head: hidden states have {hidden.shape[-1]} "
            f"features, and the head takes {weight.shape[1]}"
        )
    if hidden.dtype != weight.dtype and not autocasts(hidden):  # as models that cast do before their head
        hidden = hidden.to(weight.dtype)
    return hidden.to(weight.device)


def _base(model: Any) -> Any:
    """Return the model below the head."""
    for found in (model.base_model, getattr(model, "model", None)):
        if found is not None and found is not model:
            return found
    raise TypeError(f"{type(model).__name__} names no base model, whose hidden states its head takes")


def check(model: Any, inner: Any, input_ids: Tensor, loss: Callable[[Tensor, float], Tensor]) -> None:
    """Raise a ValueError, with both numbers, where the model's own loss is another; once for each model.

    ``loss`` gives ours of tokens, with hidden states multiplied by a number. Dropout is off while the two are
    compared, and random numbers are not touched.

    model: with its wrappers; inner: without them.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be (batch, tokens), got {tuple(input_ids.shape)}")
    ids, settings = input_ids[:1, :TOKENS], _of_config(inner.config.get_text_config())
    if _checked.get(inner) == settings or ids.numel() < 2:
        return
    with (
        _evaluating(inner),
        _original_forwards(model),
        torch.no_grad(),
        torch.autocast(ids.device.type, enabled=False),
    ):
        largest = _compare(model, inner, ids, loss, 1.0)
        if 0.0 < largest < LARGE:
            _compare(model, inner, ids, loss, LARGE / largest)
    _checked[inner] = settings


def _compare(
    model: Any, inner: Any, ids: Tensor, loss: Callable[[Tensor, float], Tensor], size: float
) -> float:
    """Compare both losses of hidden states that are `size` times as large; return the largest logit."""
    reached = size == 1.0

    def enlarge(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal reached
        reached = True
        return (given[0] * size, *given[1:])

    head = inner.get_output_embeddings()
    handle = None if size == 1.0 else head.register_forward_pre_hook(enlarge)
    try:
        own = model(input_ids=ids, labels=ids, use_cache=False, return_dict=True)
    finally:
        if handle is not None:
            handle.remove()
    if not reached:
        return 0.0  # the model does not call its head, so its hidden states are out of reach
    if own.loss is None:
        raise TypeError(f"{type(inner).__name__} has no loss of its own to compare with: check_model=False")
    ours, largest = loss(ids, size).item(), own.logits.float().abs().max().item()
    near = 1e-4 + 2 * max(_rounding(t) for t in (own.logits, head.weight)) * largest
    if not abs(ours - own.loss.item()) <= near:
        scale, softcap = _of_config(inner.config.get_text_config())
        where = "" if size == 1.0 else f", its hidden states multiplied by {size:.3g}"
        raise ValueError(
            f"the loss of {type(inner).__name__} is {own.loss.item():.7g} on {ids.numel()} tokens{where}, "
            f"and that of its hidden states and head, with logit_scale {scale:g} and softcap {softcap}, is "
            f"{ours:.7g}: the model does more around its head than its config says; use the model's own "
            "loss, or pass hidden states and head to xent.linear_cross_entropy yourself"
        )
    return largest


def _rounding(t: Tensor) -> float:
    """Return the relative rounding of products of a tensor, which TF32 makes larger where it is allowed."""
    eps = torch.finfo(t.dtype).eps
    reduced = t.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return max(eps, 2.0**-10) if reduced else eps


@contextmanager
def _original_forwards(model: nn.Module) -> Iterator[None]:
    """Take off the mixed precision of Accelerate, which is a forward of the model or of a wrapper."""
    with ExitStack() as stack:
        for module in wrappers(model):
            original = module.__dict__.get("_original_forward")
            if original is not None:
                stack.enter_context(forward_replaced(module, unbound(original)))
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation, and each of its modules back into its mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
