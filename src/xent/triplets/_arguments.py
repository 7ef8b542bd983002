"""Steps shared by the functions of triplets: options, a class for each row, rows scattered back to all N.

A row's triplets need a positive, so the target is one class a row. Functions that only report on rows have no
derivative; they raise where one is asked for instead of returning zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from xent._arguments.call import Call, resolve_head
from xent._arguments.options import Options
from xent._arguments.validation import require_tensors
from xent._autograd import transforms
from xent._core.ops import any_batched
from xent._core.problem import Problem


def class_indices(target: object) -> Tensor:
    """Return the target; raise a TypeError unless it may hold class indices."""
    if not isinstance(target, Tensor) or target.is_floating_point():
        given = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"a triplet has one positive: target must be a tensor of class indices, got {given}")
    return target


def resolve_plain_head(
    options: Options, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor
) -> Call:
    """Resolve a head whose weight is a tensor, and a class for each row."""
    require_tensors(linear_weight=linear_weight)
    return resolve_head(options, input, linear_weight, linear_bias, class_indices(target))


def report_options(
    ignore_index: int | None,
    softcap: float | None,
    temperature: float,
    check_targets: bool | None,
    product_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    logit_scale: float = 1.0,
    **reducing: Any,
) -> Options:
    """Validate the options of a function that reports on rows; without `reducing`, on each of them."""
    return Options.of(
        ignore_index=ignore_index,
        softcap=softcap,
        temperature=temperature,
        check_targets=check_targets,
        product_dtype=product_dtype,
        memory_budget=memory_budget,
        logit_scale=logit_scale,
        **(reducing or {"reduction": "none"}),
    )


def report_rows(call: Call, compute: Callable[[Problem], Sequence[Tensor]]) -> list[list[Tensor]]:
    """Return the outputs of `compute` for each part, scaled by the row weights and scattered to N rows."""
    outputs = []
    for part in call.problems:
        problem, weight = eager_problem(part), part.row_weight
        with transforms.plain(problem.logits.device):
            values = compute(problem)
            if weight is not None:  # (M,), against values (M, ...) that are no classes
                values = [
                    v * weight.reshape(-1, *(1,) * (v.dim() - 1)) if v.is_floating_point() else v
                    for v in values
                ]
            outputs.append([scatter_rows(part, value) for value in values])
    return outputs


def eager_problem(problem: Problem) -> Problem:
    """Return the problem without a derivative; raise NotImplementedError where one is asked for."""
    if problem.in_graph:
        raise NotImplementedError(
            "triplets are described of tensors with data: call this outside of the graph"
        )
    if transforms.derived():
        raise NotImplementedError(
            "a description by triplets has no derivative: differentiate xent.cross_entropy, "
            "xent.triplets.triplet_loss or xent.triplets.smooth_triplet_loss"
        )
    return replace(problem, batched=any_batched(*problem.logits.leaves, problem.targets.index))


def scatter_rows(problem: Problem, value: Tensor) -> Tensor:
    """Scatter (M, ...) to (N, ...). Rows that are left out get 0, or −1 where the values are classes."""
    return problem.selection.scatter(value, 0 if value.is_floating_point() else -1)


def join_parts(call: Call, columns: Sequence[Tensor]) -> Tensor:
    """Join one tensor (N, ...) from each part to the shape of the unreduced loss, and then (...)."""
    rows = columns[0] if len(columns) == 1 else torch.stack(list(columns), dim=1)
    return rows.reshape(call.rows_shape + columns[0].shape[1:])


def no_autocast(device: torch.device) -> torch.autocast:
    """Disable autocast: the types, those that autocast asks for included, were chosen with the arguments."""
    return torch.autocast(device.type, enabled=False)
