"""One rank's share of a head whose classes many processes hold, from the tensors of a call.

    group=pg         every rank of pg passes all rows, and its slice of the classes, in the order of ranks
    DTensor          a classifier placed Shard(0) on one mesh dimension is such a slice, and says its group
    data_group=pg    every rank of pg passes rows of its own; the divisor of a mean is that of all rows

What a rank expects of the others is kept with the group. It is compared in full at first use, and in the
first all-reduce of every later call (`core.ranks`), so that no rank goes on where another did not follow.
"""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from xent._core.collectives import ClassGroup, Disagreement

T = TypeVar("T")

_expected: WeakKeyDictionary[Any, dict[int, tuple[int, ...]]] = WeakKeyDictionary()
"""The number of classes of every rank, by group and by the number on this rank."""

IN_GRAPH = (
    "processes that share the classes have nothing to say of tensors without data, as torch.export and "
    "meta devices have them"
)
HOW = "every rank passes the same rows, targets and options, and its own slice of the classes"


class RanksDisagree(ValueError):
    """The ranks of a group do not pass what belongs together; raised on all of them."""


def agreed(run: Callable[[], T], groups: tuple[Any, Any], *tensors: object) -> T:
    """Return run(); repeat it once where the ranks hold other slices than this one expected.

    groups: those of the classes and of the rows. A graph that is being made ends before it, and goes on
    behind.
    """
    if torch.compiler.is_compiling() and (groups != (None, None) or any(map(is_dtensor, tensors))):
        return _outside_of_graphs(run, groups[0])
    return _agreed(run, groups[0])


def _agreed(run: Callable[[], T], group: Any) -> T:
    try:
        return run()
    except Disagreement as found:
        if not found.same:
            _compare(found.ranks.group, found.ranks.about)
            raise RanksDisagree(f"the ranks of the group disagree about the call: {HOW}") from None
        _expected[found.ranks.group][found.ranks.held] = found.sizes
    except RanksDisagree:
        raise
    except Exception as error:
        if group is not None:
            _tell(group, error)
        raise
    return run()


def _tell(group: Any, error: Exception) -> None:
    """Send this rank's error to the others, which wait for it where they are about to compare."""
    group = process_group(group, "group")
    if group not in _expected and dist.get_world_size(group) > 1:
        with contextlib.suppress(RanksDisagree):
            _compare(group, {"error": f"{type(error).__name__}: {error}"})


_outside_of_graphs = torch._disable_dynamo(_agreed)  # type: ignore[attr-defined]


def ranks_of(group: Any, held: int, about: dict[str, Any]) -> ClassGroup | None:
    """Return the processes of a group, this one with `held` classes; None where it is alone.

    ``about``: what is to be the same on every rank, by the name under which an error says that it is not.
    """
    group = process_group(group, "group")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size == 1:
        return None
    known = _expected.get(group)
    if known is None:
        known = {held: _compare(group, {**about, "classes": held})}
        _expected[group] = known
    call = zlib.crc32(repr(about).encode())
    sizes = known.get(held) or (max(held, 1),) * size  # a guess, of a slice that is new
    return ClassGroup(group, rank, sizes, held, call, about)


def average_over(group: Any) -> Callable[[Tensor], Tensor]:
    """Return the mean over a group's ranks of a tensor (), each having its own."""
    group = process_group(group, "data_group")

    def average(value: Tensor) -> Tensor:
        averaged: Tensor = _Average.apply(group, value)
        return averaged

    return average


class _Average(torch.autograd.Function):
    """The mean over ranks, which is its own transpose: learnt weights of rows reach every rank's loss."""

    @staticmethod
    def forward(group: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value, group=group)
        return value / dist.get_world_size(group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, Tensor], output: Tensor) -> None:
        ctx.group, _ = inputs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        return None, _Average.apply(ctx.group, upstream)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        averaged: Tensor = _Average.apply(ctx.group, tangent)
        return averaged


def process_group(group: Any, name: str) -> Any:
    """Return the process group that a caller means."""
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise ValueError(
                f"{name} is a mesh of {group.ndim} dimensions; name the one that is meant: mesh['name']"
            )
        group = group.get_group()
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name} must be a torch.distributed process group of which this process is a member, or a "
            f"DeviceMesh of one dimension; got {type(group).__name__}"
        )
    return group


def _compare(group: Any, about: dict[str, Any]) -> tuple[int, ...]:
    """Return how many classes each rank holds; raise for the first setting that differs between ranks."""
    said: list[dict[str, Any]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(said, about, group=group)
    for rank, other in enumerate(said):
        if "error" in other:
            raise RanksDisagree(f"rank {rank} of the group has an error: {other['error']}")
    for name, mine in said[0].items():
        for rank, other in enumerate(said):
            if name != "classes" and other[name] != mine:
                raise RanksDisagree(
                    f"the ranks of the group disagree about {name}: {mine} on rank 0, {other[name]} on rank "
                    f"{rank}; {HOW}"
                )
    return tuple(other.get("classes", 0) for other in said)


def checksum(*tensors: Tensor) -> int:
    """Return a number that differs where integer tensors do."""
    total = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).to(torch.int64)
        places = torch.arange(1, 2 * len(flat) + 1, 2, device=flat.device)
        total += int((flat * places).sum())
    return total


def is_dtensor(tensor: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # which is slow to import, and there if one exists
    return module is not None and isinstance(tensor, module.DTensor)


def here(tensor: Any) -> Any:
    """Return this process's part of a tensor that all processes hold."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def localised(group: Any, **given: tuple[Any, int | None]) -> tuple[tuple[Any, ...], Any]:
    """Return this rank's parts of DTensors, and their group.

    Each is given with the dimension of its classes, None where it has none. Gradients come back placed as the
    tensors are. An ordinary tensor is what this rank holds already.
    """
    tensors = []
    for name, (tensor, axis) in given.items():
        if not is_dtensor(tensor):
            tensors.append(tensor)
            continue
        mesh, placements = tensor.device_mesh, tensor.placements
        first, *others = placements
        if others or not (first.is_replicate() if axis is None else first.is_shard(axis)):
            wanted = "Replicate()" if axis is None else f"Shard({axis})"
            if others:
                way = f"DTensor.from_local({name}.to_local(), mesh['classes'], [{wanted}])"
            else:
                way = f"{name}.redistribute(placements=[{wanted}])"
            raise ValueError(
                f"{name} is a DTensor placed {tuple(placements)}, where a head whose classes are spread over "
                f"one mesh dimension has it ({wanted},): {way}; or pass {name}.full_tensor() to a whole head"
            )
        own = mesh.get_group()
        if group is not None and process_group(group, "group") != own:
            raise ValueError(f"{name} is placed on another group than the one given: drop group=")
        group = own
        tensors.append(tensor.to_local(grad_placements=placements))
    return tuple(tensors), group
