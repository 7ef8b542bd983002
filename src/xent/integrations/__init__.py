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
    """The classifier of a layer, by the names of the arguments of a loss from features.

    Example:
        >>> import torch
        >>> from xent.integrations import head_of
        >>> head = head_of(torch.nn.Linear(16, 100))
        >>> {name: tuple(tensor.shape) for name, tensor in head.items()}
        {'linear_weight': (100, 16), 'linear_bias': (100,)}
    """

    linear_weight: Tensor | LowRank  # W, (C, D)
    linear_bias: Tensor | None  # b, (C,); None without one


def head_of(module: nn.Module) -> Head:
    """Return the weight and bias of a layer as arguments of a loss from features; the layer is not called.

    It knows ``torch.nn.Linear``, ``torch.nn.Embedding`` (as a tied head), and PEFT's LoRA layer with one
    active adapter, of either kind of scaling. The weight of a LoRA layer is a :class:`xent.LowRank`, or the
    base weight where the adapter is disabled or merged. It also knows the copy of a layer that PEFT trains in
    its place. A weight that FSDP2 shards is gathered. A DTensor placed by its classes brings its group to the
    loss.

    Args:
        module: a layer whose call is ``x @ weight.T + bias``.

    Returns:
        A :class:`Head`, ``{"linear_weight": ..., "linear_bias": ...}``. Call the function anew in each step,
        as adapters and hooks may change between two calls.

    Raises:
        TypeError: a call of the layer would compute more: another class, a forward of its own, a hook, a
            quantised weight, several active adapters, an adapter with dropout or of a variant such as DoRA.
            The message names the cause and the way out.

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
