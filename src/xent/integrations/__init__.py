"""The ways between xent and libraries that train models, each of which is imported where it is used.

`head_of` reads the classifier of a layer. `xent.integrations.transformers`, `xent.integrations.trl` and
`xent.integrations.lightning` are modules of their own, which need these libraries.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor, nn

from xent._arguments.linear_layer import weight_and_bias
from xent._core.low_rank import LowRank

__all__ = ["Head", "head_of"]


class Head(TypedDict):
    """The classifier of a layer, by the names of the arguments of a loss from features."""

    linear_weight: Tensor | LowRank
    linear_bias: Tensor | None


def head_of(module: nn.Module) -> Head:
    """Return the weight and bias of a layer as arguments of a loss from features, which never calls it.

    Known are ``torch.nn.Linear``, ``torch.nn.Embedding`` (as a tied head), PEFT's LoRA layer of either kind
    of scaling with one active adapter (the weight is then a :class:`xent.LowRank`; of a disabled or merged
    adapter, the base weight), and the copy of a layer that PEFT trains in its place. A weight that FSDP2
    shards is gathered, a DTensor placed by its classes says its group to the loss.

    Args:
        module: a layer whose call is ``x @ weight.T + bias``.

    Returns:
        ``{"linear_weight": ..., "linear_bias": ...}``, read anew in each step: adapters and hooks may change
        between two calls.

    Raises:
        TypeError: a call of the layer would do more: another class, a forward of its own, a hook, a quantised
            weight, several active adapters, an adapter with dropout or of a variant such as DoRA. The message
            names it and the way out.

    Example:
        >>> import torch, xent
        >>> from xent.integrations import head_of
        >>> lm_head = torch.nn.Linear(16, 100, bias=False)
        >>> hidden, labels = torch.randn(8, 16), torch.randint(100, (8,))
        >>> loss = xent.linear_cross_entropy(hidden, target=labels, **head_of(lm_head))
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    weight, bias = weight_and_bias(module, "module")
    return {"linear_weight": weight, "linear_bias": bias}
