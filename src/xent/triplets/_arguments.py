"""What the functions of triplets share: a class for each row, and rows put back where they came from.

A row's triplets need a positive: the target is one class. What only describes has no derivative, and refuses
to be differentiated instead of answering zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xent._arguments.call import Call, Part
from xent._autograd import transforms
from xent._core.ops import tile_ops_for
from xent._core.tiles.sweep import Problem


def one_class(target: Tensor) -> None:
    """TypeError unless the target may hold class indices."""
    if not isinstance(target, Tensor) or target.is_floating_point():
        given = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"a triplet has one positive: target must be a tensor of class indices, got {given}")


def described(call: Call, describe: Callable[[Problem], Sequence[Tensor]]) -> list[list[Tensor]]:
    """What `describe` says of each part's rows, times their weights, at all N rows."""
    return [_described(part, describe) for part in call.parts]


def _described(part: Part, describe: Callable[[Problem], Sequence[Tensor]]) -> list[Tensor]:
    problem = eager(part)
    with transforms.plain(problem.logits.device):
        found = []
        for value in describe(problem):
            if part.row_weight is not None and value.is_floating_point():
                value = value * _beside(part.row_weight, value)
            found.append(at_all_rows(part, value))
        return found


def eager(part: Part) -> Problem:
    """The problem of a part that is only described, NotImplementedError where it would be differentiated."""
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


def at_all_rows(part: Part, value: Tensor) -> Tensor:
    """(M, ...) -> (N, ...): 0, and −1 for a class, in rows that are left out."""
    value, targets = _kept(part, value), part.problem.targets
    if targets.rows is None:
        return value
    return value.new_full((targets.total, *value.shape[1:]), _nothing(value)).index_copy(
        0, targets.rows, value
    )


def _kept(part: Part, value: Tensor) -> Tensor:
    return value if part.kept is None else value.masked_fill(~_beside(part.kept, value), _nothing(value))


def _beside(rows: Tensor, value: Tensor) -> Tensor:
    """(M,) as something that broadcasts to (M, ...)."""
    return rows.reshape(-1, *(1,) * (value.dim() - 1))


def _nothing(value: Tensor) -> int:
    return 0 if value.is_floating_point() else -1


def no_autocast(device: torch.device) -> torch.autocast:
    """Types are chosen at the door, and so are those that autocast asks for."""
    return torch.autocast(device.type, enabled=False)
