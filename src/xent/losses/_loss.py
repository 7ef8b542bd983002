"""The way from a call's arguments to its loss, the same for every loss of class scores.

    arguments → Options → Call (problems, reduction) → loss

On one process, outside of every transform of torch, nothing about processes or transforms is looked at again.
"""

from __future__ import annotations

from torch import Tensor

from xent._arguments import call as calls
from xent._arguments.call import Call, agreed
from xent._arguments.options import Options
from xent._autograd import one_head
from xent._autograd.transforms import is_plain
from xent._core.row_losses import RowLoss
from xent._core.target import Target


def loss_of_logits(
    options: Options, input: Tensor, target: Target, row_loss: RowLoss | None = None
) -> Tensor:
    """Return a loss of given logits, (C,), (N, C) or (N, C, d1, ...)."""
    calls.require_target(target)
    if options.on_one_process and is_plain(input, target, *options.tensors()):
        return _loss(calls.resolve_logits(options, input, target, row_loss, plain=True), plain=True)
    return agreed(lambda: _loss(calls.resolve_local_logits(options, input, target, row_loss)), options, input)


def loss_of_head(
    options: Options,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Target,
    row_loss: RowLoss | None = None,
) -> Tensor:
    """Return a loss of a head, input (..., D), linear_weight (C, D) or (C, d1, ..., D)."""
    calls.require_target(target)
    head = (input, linear_weight, linear_bias)
    if options.on_one_process and linear_weight is not None and is_plain(*head, target, *options.tensors()):
        return _loss(calls.resolve_head(options, *head, target, row_loss, plain=True), plain=True)
    return agreed(
        lambda: _loss(calls.resolve_local_head(options, *head, target, row_loss)), options, linear_weight
    )


def _loss(call: Call, *, plain: bool = False) -> Tensor:
    """Return one loss of problems that share its divisor, or one for each row."""
    problems, reduction = call.problems, call.reduction
    if reduction.kind != "none":
        return one_head.loss(problems, reduction, call.dtype, plain=plain)
    columns = [one_head.loss((problem,), reduction, call.dtype, plain=plain) for problem in problems]
    return call.stack(columns)
