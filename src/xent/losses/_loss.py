"""The way from a call's arguments to its loss, the same for every loss of class scores.

    arguments → Options → Call (problems, reduction) → loss

On one process, outside of every transform of torch, nothing about processes or transforms is looked at again.
"""

from __future__ import annotations

from torch import Tensor

from xent._arguments import call as calls
from xent._arguments.call import agreed
from xent._arguments.options import Options
from xent._autograd.transforms import is_plain
from xent._core.low_rank import Weight, tensors_of_weight
from xent._core.row_losses import RowLoss
from xent._core.target import Target
from xent._core.validators import valid


def loss_of_logits(
    options: Options, input: Tensor, target: Target, row_loss: RowLoss | None = None
) -> Tensor:
    """Return a loss of given logits, (C,), (N, C) or (N, C, d1, ...)."""
    calls.require_target(target)
    if options.on_one_process and is_plain(input, target, *options.tensors()):
        return calls.resolve_logits(options, input, target, row_loss, plain=True).loss(plain=True)
    return agreed(lambda: calls.resolve_local_logits(options, input, target, row_loss).loss(), options, input)


def loss_of_head(
    options: Options,
    input: Tensor,
    linear_weight: Weight,
    linear_bias: Tensor | None,
    target: Target,
    row_loss: RowLoss | None = None,
) -> Tensor:
    """Return a loss of a head, input (..., D), linear_weight (C, D) or (C, d1, ..., D)."""
    calls.require_target(target)
    head = (input, linear_weight, linear_bias)
    tensors = tensors_of_weight(linear_weight)
    given = linear_weight is not None  # what is missing is named below
    if given and options.on_one_process and is_plain(*head, target, *options.tensors()):
        return calls.resolve_head(options, *head, target, row_loss, plain=True).loss(plain=True)
    return agreed(
        lambda: calls.resolve_local_head(options, *head, target, row_loss).loss(), options, *tensors
    )


def refuse_smoothing(function: str, label_smoothing: object) -> None:
    """Raise a ValueError unless label smoothing is 0."""
    if valid("label_smoothing", label_smoothing) != 0.0:
        raise ValueError(
            f"{function} is a function of one class's probability: label_smoothing must be 0, "
            f"got {label_smoothing}"
        )
