"""The problem of logits and their targets, and what all problems of a call share.

options, shapes → Reduction, ranks, what is known of the targets      + Logits, target → Problem
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xent._arguments import class_parallel
from xent._arguments.options import Options
from xent._arguments.targets import bucket_of, check_classes, check_target, is_index, select
from xent._arguments.validation import check_devices, check_tensors, is_readable
from xent._autograd import transforms
from xent._core.class_indices import Checked
from xent._core.collectives import ClassGroup
from xent._core.logits import LinearHead, Logits
from xent._core.margin import TargetShift
from xent._core.ops import BATCHED
from xent._core.problem import Problem
from xent._core.reduction import Reduction
from xent._core.row_losses import RowLoss
from xent._core.selection import Selection
from xent._core.target import Target, TopKTarget, tensors_of
from xent._core.targets import Targets

LARGEST_SHIFT = 600.0  # exp of it is a float64


class Common(NamedTuple):
    """The parts of a call that all of its problems share."""

    options: Options
    reduction: Reduction
    ranks: ClassGroup | None
    checked: Checked
    row_loss: RowLoss | None
    plain: bool
    device: torch.device


def common_of(
    options: Options,
    input: Tensor,
    target: Target,
    classes: int,  # that this process holds
    features: int | tuple[int, int] | None,  # with the rank of a low-rank term
    rows_shape: torch.Size,
    full_shape: torch.Size,
    row_loss: RowLoss | None,
    *,
    plain: bool,
) -> Common:
    """Check options and target against the logits' shape, and return what all problems share."""
    weight, s, log_q = options.target.weight, options.target.sample_weight, options.logits.log_q
    if not plain:
        check_tensors(weight=weight, sample_weight=s, log_q=log_q)
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"weight must have shape ({classes},), one a class; got {tuple(weight.shape)}")
    for name, value in (("weight", weight), ("log_q", log_q)):
        if value is not None and value.requires_grad:
            raise ValueError(f"{name} takes no gradient: pass {name}.detach()")
    if s is not None and s.shape != rows_shape:
        raise ValueError(
            f"sample_weight must have the shape of the unreduced loss, {tuple(rows_shape)}; "
            f"got {tuple(s.shape)}"
        )
    check_target(options, target, rows_shape, full_shape)
    if row_loss is not None and target is not None and not is_index(target):
        raise ValueError("this loss needs a target of class indices: it is a function of that class's p")
    reduction = _reduction(options, input, target)
    group = options.execution.group
    ranks = None if group is None else _ranks(options, input, features, classes, rows_shape, target)
    checked = check_classes(options, target, classes, ranks, plain=plain)
    if row_loss is not None:
        if not isinstance(row_loss, RowLoss):
            raise TypeError(f"a row loss must be a RowLoss, got {type(row_loss).__name__}")
        row_loss.check(classes if ranks is None else ranks.classes)
    return Common(options, reduction, ranks, checked, row_loss, plain, input.device)


def check_temperatures(temperature: Tensor, selection: Selection) -> None:
    """Raise a ValueError that names a row that counts whose temperature is not positive and finite."""
    good = (temperature > 0) & (temperature < math.inf)
    of_counted = selection.gather(good)
    if not of_counted.all():
        at = int(of_counted.logical_not().nonzero()[0])
        row = at if selection.index is None else int(selection.index[at])
        raise ValueError(
            f"temperature must be positive and finite, got {temperature[row].item()} for row {row}"
        )


def _ranks(
    options: Options,
    input: Tensor,
    features: int | tuple[int, int] | None,
    held: int,
    rows_shape: torch.Size,
    target: Target,
) -> ClassGroup | None:
    """Return the group of processes that share the classes; None where this process is alone."""
    refuse_slices(options)
    s = options.target.sample_weight
    if transforms.is_opaque(input):
        raise NotImplementedError(class_parallel.IN_GRAPH)
    if transforms.batched(input, s, *tensors_of(target)):
        raise NotImplementedError(BATCHED)
    indices = [t for t in tensors_of(target) if not t.is_floating_point()]
    kind = "class indices" if indices else "probabilities"
    temperature = options.logits.temperature
    about: dict[str, Any] = {
        "rows": tuple(rows_shape),
        "features a row": features,
        "dtype": str(input.dtype),
        "input.requires_grad": input.requires_grad and torch.is_grad_enabled(),
        "the kind of target": type(target).__name__ if not isinstance(target, Tensor) else kind,
        "the remainder of the target": target.remainder if isinstance(target, TopKTarget) else None,
        "targets, of which this is a checksum": class_parallel.checksum(*indices),
        "weights, of which this says whether there are any": options.target.weight is not None,
        "sample_weight, of which this says whether there is one": s is not None,
        "rows of sample_weight 0, of which this is a checksum": class_parallel.checksum(
            *() if s is None else (s.detach() == 0,)
        ),
        "margin": str(options.logits.margin),
        "reduction": options.reduction.reduction,
        "check_targets": options.execution.check_targets,
        "normalize": options.logits.normalize,
    }
    if isinstance(temperature, Tensor):
        about["temperature"] = f"one a row, of mean {temperature.double().mean().item():.6g}"
    numbers = {
        "ignored": options.target.ignored,
        "label_smoothing": options.target.label_smoothing,
        "z_loss": options.reduction.z_loss,
        "softcap": options.logits.softcap,
        "logit_scale": options.logits.logit_scale,
        "temperature": None if isinstance(temperature, Tensor) else temperature,
        "denominator": options.reduction.denominator,
    }
    for name, value in numbers.items():  # whose type is no difference
        about.setdefault(name, None if value is None else f"{float(value):.6g}")
    return class_parallel.ranks_of(options.execution.group, held, about)


def refuse_slices(options: Options) -> None:
    for name in ("classes", "log_q"):
        if options.execution.group is not None and getattr(options.logits, name) is not None:
            raise ValueError(f"{name} does not go with group: sample among the classes of one process")


def problem_of(
    common: Common,
    logits: Logits,
    target: Target,  # (N,), (N, C), (N, k) or none
    sample_weight: Tensor | None,  # (N,)
    budget: int,
    n: int,
    classes: int,
) -> Problem:
    """Return the problem of logits and their targets."""
    options, ranks, row_loss = common.options, common.ranks, common.row_loss
    in_graph = by_mask = False
    of_map = logits.map
    each = of_map.temperature if isinstance(of_map.temperature, Tensor) else None
    if not common.plain:
        leaves, given = logits.leaves, tensors_of(target)
        others = (sample_weight, options.target.weight, each)
        in_graph = transforms.is_opaque(*given, *leaves)
        if in_graph:  # where no operation would notice, and the loss be anything
            check_devices(*leaves, *given, *others)
        by_mask = in_graph or transforms.batched(*given, *others, *leaves)
    by_mask = by_mask or (ranks is None and common.device.type in Selection.masked_on)
    targets, row_weight = select(
        options,
        target,
        classes,
        common.checked,
        sample_weight,
        n,
        common.device,
        by_mask=by_mask,
        ranks=ranks,
    )
    kept = targets.selection.mask
    if each is not None:
        if kept is not None:
            logits = replace(logits, map=replace(of_map, temperature=each.masked_fill(~kept, 1.0)))  # type: ignore[type-var]
        elif is_readable(each):
            check_temperatures(each, targets.selection)
    if kept is not None and not in_graph:  # in a graph the operator selects for itself
        logits = logits.select(kept)
    shift = None
    if options.logits.margin is not None or of_map.log_q is not None:
        shift = _shift(options, logits, targets, known=not by_mask)
    bucket = None
    if isinstance(target, TopKTarget) and target.remainder == "bucket":
        everywhere = classes if ranks is None else ranks.classes
        bucket = bucket_of(target, everywhere, targets.selection)
    if row_loss is not None and targets.index is not None:
        row_loss = row_loss.for_rows(targets.index[:, 0] + (0 if ranks is None else ranks.first))
    return Problem(
        logits,
        targets,
        budget,
        ranks=ranks,
        row_weight=row_weight,
        shift=shift,
        row_loss=row_loss,
        bucket=bucket,
        in_graph=in_graph,
        check=options.execution.check_targets,
        weight_elsewhere=ranks is not None and is_index(target) and options.target.weight is not None,
    )


def _shift(options: Options, logits: Logits, targets: Targets, *, known: bool) -> TargetShift:
    """Return how the targets' logits are shifted by a margin and log Q."""
    margin, log_q = options.logits.margin, logits.map.log_q
    assert margin is None or not isinstance(margin, float)
    t = logits.map.temperature
    if margin is not None and logits.map.scale != 1.0:
        raise ValueError(
            "margin is subtracted from cosines, so logit_scale cannot be given with it: "
            "pass the scale as temperature=1/logit_scale"
        )
    if margin is not None:
        least = t.min().item() if isinstance(t, Tensor) and known and t.numel() else t
        size = abs(margin.cosine) + 2 * (margin.angle > 0)
        if not isinstance(least, Tensor) and size / least > LARGEST_SHIFT:
            raise ValueError(
                f"a margin over temperature of {size / least:.4g} is beyond what exponentials hold, "
                f"{LARGEST_SHIFT:g}"
            )
    assert targets.index is not None
    y = targets.index[:, 0]
    whole = targets.held is None  # else these come with the statistics
    return TargetShift(
        margin,
        targets.selection.gather(t) if isinstance(t, Tensor) else t,
        torch.finfo(logits.dtype).eps,
        # one outside has a cost of nan already
        None if log_q is None else log_q[y.clamp(0, targets.n_classes - 1)],
        targets.index_mass[:, 0] if whole and targets.index_mass is not None else None,
        targets.other_mass[:, 0] if whole and targets.other_mass is not None else None,
        check=known and logits.device.type == "cpu",
        way_out=_to_cosines(options, has_bias=isinstance(logits, LinearHead) and logits.b is not None),
    )


def _to_cosines(options: Options, *, has_bias: bool) -> str:
    """Say how scores that are not cosines become so."""
    if options.logits.normalize and has_bias:
        return "the bias is added to the cosine: pass no linear_bias"
    bias = ", pass no linear_bias" if has_bias else ""
    return f"normalise features and classifier{bias}, and give the scale as temperature=1/scale"


def _reduction(options: Options, input: Tensor, target: Target) -> Reduction:
    kind, denominator, z_loss, data_group = (
        options.reduction.reduction,
        options.reduction.denominator,
        options.reduction.z_loss,
        options.reduction.data_group,
    )
    if denominator is None and data_group is None:
        return Reduction(kind, z_loss)
    if denominator is not None and kind != "mean":
        raise ValueError(f"denominator replaces the divisor of reduction='mean'; reduction is {kind!r}")
    if isinstance(denominator, Tensor) and denominator.device != input.device:
        raise ValueError(f"denominator is on {denominator.device} and input on {input.device}: move one")
    average = None
    if data_group is not None:
        if kind != "mean" or denominator is not None:
            raise ValueError(
                "data_group is whose rows the divisor of reduction='mean' counts: "
                + ("drop denominator" if kind == "mean" else f"reduction is {kind!r}")
            )
        average = class_parallel.average_over(data_group)
    nothing = not isinstance(denominator, Tensor) and denominator == 0
    readable = nothing and is_readable(input, options.target.sample_weight, *tensors_of(target))
    return Reduction(kind, z_loss, denominator, average, readable)
