"""Steps shared by the functions of triplets: options, a class for each row, rows scattered back to all N.

A row's triplets need a positive, so the target is one class a row. Functions that only report on rows have no
derivative; they raise where one is asked for instead of returning zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xent._arguments.call import Call, Options, Part
from xent._autograd import transforms
from xent._core.ops import tile_ops_for
from xent._core.tiles.sweep import Problem


def require_class_indices(target: Tensor) -> None:
    """Raise a TypeError unless the target may hold class indices."""
    if not isinstance(target, Tensor) or target.is_floating_point():
        given = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"a triplet has one positive: target must be a tensor of class indices, got {given}")


def report_options(
    ignore_index: int | None,
    softcap: float | None,
    temperature: float,
    check_targets: bool | None,
    product_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    *,
    reduction: str = "none",
    sample_weight: Tensor | None = None,
) -> Options:
    """Validate the options of a function that reports on rows, in the order of the public signatures."""
    return Options.of(
        ignore_index=ignore_index,
        reduction=reduction,
        sample_weight=sample_weight,
        softcap=softcap,
        temperature=temperature,
        check_targets=check_targets,
        product_dtype=product_dtype,
        memory_budget=memory_budget,
    )


def report_rows(call: Call, compute: Callable[[Problem], Sequence[Tensor]]) -> list[list[Tensor]]:
    """Return the outputs of `compute` for each part, scaled by the row weights and scattered to N rows."""
    return [_report_part(part, compute) for part in call.parts]


def _report_part(part: Part, compute: Callable[[Problem], Sequence[Tensor]]) -> list[Tensor]:
    problem = eager_problem(part)
    with transforms.plain(problem.logits.device):
        outputs = []
        for value in compute(problem):
            if part.row_weight is not None and value.is_floating_point():
                value = value * _expand_rows(part.row_weight, value)
            outputs.append(scatter_rows(part, value))
        return outputs


def eager_problem(part: Part) -> Problem:
    """Return the problem of a part without a derivative; raise NotImplementedError where one is asked for."""
    problem = part.problem
    if part.opaque:
        raise NotImplementedError(
            "triplets are described of tensors with data: call this outside of the graph"
        )
    if transforms.derived():
        raise NotImplementedError(
            "a description by triplets has no derivative: differentiate xent.cross_entropy, "
            "xent.triplets.triplet_loss or xent.triplets.smooth_triplet_loss"
        )
    return problem._replace(ops=tile_ops_for(*problem.logits.tensors, problem.targets.own))


def scatter_rows(part: Part, value: Tensor) -> Tensor:
    """Scatter (M, ...) to (N, ...). Rows that are left out get 0, or −1 where the values are classes."""
    return part.selection.scatter(value, 0 if value.is_floating_point() else -1)


def _expand_rows(rows: Tensor, value: Tensor) -> Tensor:
    """Reshape (M,) to broadcast against (M, ...)."""
    return rows.reshape(-1, *(1,) * (value.dim() - 1))


def no_autocast(device: torch.device) -> torch.autocast:
    """Disable autocast: the types, those that autocast asks for included, were chosen with the arguments."""
    return torch.autocast(device.type, enabled=False)
