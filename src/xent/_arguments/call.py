"""A call's tensors and options become problems and a reduction, and nothing below sees the arguments.

    input, (weight, bias), logit options → Logits        target options → Targets, row weights, shift
    reduction options → Reduction                        execution options → budget, product type, ranks

A call becomes one `Problem`, or one for each position of a head with several, which share a divisor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from xent._arguments import class_parallel
from xent._arguments.class_subset import Subset, log_q_of
from xent._arguments.options import Options
from xent._arguments.problem import common_of, problem_of, refuse_slices
from xent._arguments.targets import is_index, require_index
from xent._arguments.validation import (
    autocasts,
    check_devices,
    check_floating,
    check_tensors,
    is_readable,
    loss_dtype,
    lower,
    product_dtype,
    require_tensors,
    require_weight,
)
from xent._autograd import one_head, transforms
from xent._autograd.projection import project
from xent._core.directions import unit
from xent._core.logit_map import LogitMap
from xent._core.logits import DenseLogits, LinearHead, compute_dtype
from xent._core.low_rank import LowRank, Weight, mapped_weight, tensors_of_weight
from xent._core.plan import default_budget
from xent._core.problem import Problem
from xent._core.reduction import Reduction
from xent._core.row_losses import RowLoss
from xent._core.statistics import statistics_dtype
from xent._core.target import Target, TopKTarget, at_positions, tensors_of, thawed_target, with_wide_indices

T = TypeVar("T")


class Call(NamedTuple):
    """A call's problems, and how their rows are put together."""

    problems: Sequence[Problem]
    reduction: Reduction
    rows_shape: torch.Size  # of the unreduced loss
    dtype: torch.dtype  # of the loss
    target: Target = None  # as given, its class indices int64

    def loss(self, *, plain: bool = False) -> Tensor:
        """Return one loss of problems that share its divisor, or one for each row.

        ``plain``: no transform of torch is at work, which has been found out already.
        """
        if self.reduction.kind != "none":
            return one_head.loss(self.problems, self.reduction, self.dtype, plain=plain)
        return self.stack(
            [one_head.loss((problem,), self.reduction, self.dtype, plain=plain) for problem in self.problems]
        )

    def stack(self, columns: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Return one tensor (N,) from each problem as one of the shape of the unreduced loss."""
        rows = columns[0] if len(columns) == 1 else torch.stack(list(columns), dim=1)
        return rows.to(self.dtype if dtype is None else dtype).reshape(self.rows_shape)


def require_target(target: Target) -> None:
    """Raise a TypeError unless a target is given."""
    if target is None:
        raise TypeError("target must be a tensor or a TopKTarget, got None")


def resolve_logits(
    options: Options,
    input: Tensor,
    target: Target,
    row_loss: RowLoss | None = None,
    *,
    plain: bool = False,  # as transforms.is_plain has it
) -> Call:
    """Resolve logits, input (C,), (N, C) or (N, C, d1, ...), and their target."""
    if not plain or input is None:
        require_tensors(input=input)
        given = (*tensors_of(target), *options.tensors())
        if transforms.is_frozen(input, *given):
            options, target = _thawed(options), thawed_target(target)
            return resolve_logits(options, transforms.thawed(input), target, row_loss)
    if not isinstance(target, Tensor) or target.dtype is not torch.int64:
        target = with_wide_indices(target)
    if input.dim() == 0:
        raise ValueError("input needs a class dimension: (C,), (N, C) or (N, C, d1, ...); got a scalar")
    check_floating(input=input)
    if input.dim() == 2:
        (n, classes), rows_shape, u = input.shape, input.shape[:1], input
    else:
        axis = 0 if input.dim() == 1 else 1
        classes, rows_shape = input.shape[axis], input.shape[:axis] + input.shape[axis + 1 :]
        n = math.prod(rows_shape)
        u = input.movedim(axis, -1).reshape(n, classes)
    common = common_of(options, input, target, classes, None, rows_shape, input.shape, row_loss, plain=plain)
    flat = target
    if input.dim() != 2:
        if isinstance(target, TopKTarget):
            flat = at_positions(target, n, classes, 1)[0]
        elif target is not None and target.is_floating_point():
            flat = target.movedim(axis, -1).reshape(n, classes)
        elif target is not None:
            flat = target.reshape(n)
    s, t, log_q = options.target.sample_weight, options.logits.temperature, options.logits.log_q
    each = row_temperatures(t, rows_shape).reshape(n) if isinstance(t, Tensor) else t
    log_q = None if log_q is None else log_q_of(log_q, classes)
    logits = DenseLogits(u, LogitMap(options.logits.softcap, each, log_q))
    problem = problem_of(
        common,
        logits,
        flat,
        None if s is None else s.reshape(n),
        default_budget(u.device, classes),
        n,
        classes,
    )
    return Call((problem,), common.reduction, rows_shape, loss_dtype(input), target)


def resolve_head(
    options: Options,
    input: Tensor,
    linear_weight: Weight,
    linear_bias: Tensor | None,
    target: Target,
    row_loss: RowLoss | None = None,
    *,
    plain: bool = False,  # as transforms.is_plain has it
) -> Call:
    """Resolve a head, input (..., D) and linear_weight (C, D) or (C, d1, ..., D), and its target."""
    if not plain or input is None:
        require_tensors(input=input)
        require_weight(linear_weight=linear_weight)
        check_tensors(linear_bias=linear_bias)
        head = (input, *tensors_of_weight(linear_weight), linear_bias)
        if transforms.is_frozen(*head, *tensors_of(target), *options.tensors()):
            x, w = transforms.thawed(input), mapped_weight(transforms.thawed, linear_weight)
            b = transforms.thawed(linear_bias)
            return resolve_head(_thawed(options), x, w, b, thawed_target(target), row_loss)
    if not isinstance(target, Tensor) or target.dtype is not torch.int64:
        target = with_wide_indices(target)
    if input.dim() < 1 or len(linear_weight.shape) < 2:
        raise ValueError(
            f"input must be (..., D) and linear_weight (C, D) or (C, d1, ..., D); "
            f"got {tuple(input.shape)} and {tuple(linear_weight.shape)}"
        )
    classes, *positions, features = linear_weight.shape
    if input.shape[-1] != features:
        raise ValueError(f"input has {input.shape[-1]} features a row, linear_weight has {features}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"linear_bias must have shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    of_logits, execution = options.logits, options.execution
    if of_logits.classes is not None:
        return _resolve_subset(options, input, linear_weight, linear_bias, target, row_loss)
    if of_logits.sparse_grad:
        raise ValueError("sparse_grad is the form of the gradient of a subset of the classes: pass classes")
    autocast = autocasts(input)
    x, bias = input, linear_bias
    low = up = None
    if isinstance(linear_weight, LowRank):
        weight, (low, up) = linear_weight.weight, _low_rank_factors(options, input, linear_weight, target)
    else:
        weight = linear_weight
    if of_logits.normalize:
        check_floating(input=x, linear_weight=weight)
        x, weight = unit(harmless(options, x, target)), unit(weight)
        bias = None if bias is None else bias.to(compute_dtype(bias.dtype))
    if autocast:
        x, weight, bias = lower(x), lower(weight), None if bias is None else lower(bias)
    check_floating(input=x, linear_weight=weight, linear_bias=bias)
    batch = x.shape[:-1]
    rows_shape = torch.Size((*batch, *positions)) if positions else batch
    full_shape = torch.Size((*batch, classes, *positions))
    dtype = torch.float32 if autocast else input.dtype
    factor = product_dtype(execution.product_dtype, x)
    width = features if up is None else (features, up.shape[1])
    common = common_of(options, x, target, classes, width, rows_shape, full_shape, row_loss, plain=plain)
    places, n = math.prod(positions), math.prod(batch)
    x = x if x.dim() == 2 else x.reshape(n, features)
    log_q = None if of_logits.log_q is None else log_q_of(of_logits.log_q, classes)
    budget = execution.memory_budget
    budget = default_budget(x.device, classes) if budget is None else budget
    s, t = options.target.sample_weight, of_logits.temperature
    each: float | Tensor = row_temperatures(t, rows_shape) if isinstance(t, Tensor) else t
    if not positions:
        flat = target if x is input and isinstance(target, Tensor) else at_positions(target, n, classes, 1)[0]
        each = each.reshape(n) if isinstance(each, Tensor) else each
        of_map = LogitMap(of_logits.softcap, each, log_q, of_logits.logit_scale)
        logits = LinearHead(x, weight, bias, of_map, factor, low, up)
        problem = problem_of(common, logits, flat, None if s is None else s.reshape(n), budget, n, classes)
        return Call((problem,), common.reduction, rows_shape, dtype, target)
    if places > 1:  # so that the gradients of all positions add up before they are rounded
        x = x.to(compute_dtype(x.dtype))
    # unbind: its backward is one stack, where slicing would make a zero gradient of the whole each time
    w_at = weight.reshape(classes, places, features).unbind(1)
    b_at = (None,) * places if bias is None else bias.reshape(classes, places).unbind(1)
    s_at = (None,) * places if s is None else s.reshape(n, places).unbind(1)
    t_at: Sequence[float | Tensor] = (each,) * places
    if isinstance(each, Tensor):
        t_at = each.reshape(n, places).unbind(1)
    problems = [
        problem_of(
            common,
            LinearHead(x, w_k, b_k, LogitMap(of_logits.softcap, t_k, log_q, of_logits.logit_scale), factor),
            y_k,
            s_k,
            budget,
            n,
            classes,
        )
        for w_k, b_k, t_k, y_k, s_k in zip(
            w_at, b_at, t_at, at_positions(target, n, classes, places), s_at, strict=True
        )
    ]
    return Call(problems, common.reduction, rows_shape, dtype, target)


def resolve_local_logits(
    options: Options, input: Tensor, target: Target, row_loss: RowLoss | None = None
) -> Call:
    """Resolve the logits that this process holds; a DTensor is replaced by its local part."""
    require_tensors(spread=True, input=input)
    axis = 0 if input.dim() == 1 else 1
    (input, target, weight), group = class_parallel.localised(
        options.execution.group,
        input=(input, axis),
        target=(target, None),
        weight=(options.target.weight, 0),
    )
    return resolve_logits(options.with_options(group=group, weight=weight), input, target, row_loss)


def resolve_local_head(
    options: Options,
    input: Tensor,
    linear_weight: Weight,
    linear_bias: Tensor | None,
    target: Target,
    row_loss: RowLoss | None = None,
) -> Call:
    """Resolve the head that this process holds; a DTensor is replaced by its local part."""
    w, *factors = tensors_of_weight(linear_weight)
    (x, b, target, weight, w, *factors), group = class_parallel.localised(
        options.execution.group,
        input=(input, None),
        linear_bias=(linear_bias, 0),
        target=(target, None),
        weight=(options.target.weight, 0),
        linear_weight=(w, 0),
        **{name: (t, axis) for name, t, axis in zip(("down", "up"), factors, (None, 0), strict=False)},
    )
    local: Weight = w
    if isinstance(linear_weight, LowRank):
        local = replace(linear_weight, weight=w, down=factors[0], up=factors[1])
    return resolve_head(options.with_options(group=group, weight=weight), x, local, b, target, row_loss)


def _thawed(options: Options) -> Options:
    """Return the options with ordinary tensors for those made under inference mode."""
    t = options.target
    return options.with_options(
        weight=transforms.thawed(t.weight),
        sample_weight=transforms.thawed(t.sample_weight),
        classes=transforms.thawed(options.logits.classes),
        log_q=transforms.thawed(options.logits.log_q),
        temperature=transforms.thawed(options.logits.temperature),
    )


def _resolve_subset(
    options: Options,
    input: Tensor,
    linear_weight: Weight,
    linear_bias: Tensor | None,
    target: Target,
    row_loss: RowLoss | None,
) -> Call:
    """Resolve a softmax over a subset of the classes alone."""
    refuse_slices(options)
    classes, check = options.logits.classes, options.execution.check_targets
    assert classes is not None
    subset = Subset.of(classes, linear_weight.shape[0], check)
    if not isinstance(target, Tensor) or target.is_floating_point():
        require_index(options, target)
        raise TypeError(f"target must be a tensor of class indices, got {type(target).__name__}")
    local = subset.local(target, options.target.ignored, check)
    weight, sparse = options.target.weight, options.logits.sparse_grad
    options = options.with_options(
        classes=None,
        sparse_grad=False,
        weight=None if weight is None else subset.rows(weight),
        ignore_index=-100,
    )
    w: Weight
    if isinstance(linear_weight, LowRank):
        w = replace(
            linear_weight,
            weight=subset.rows(linear_weight.weight, sparse=sparse),
            up=subset.rows(linear_weight.up, sparse=sparse),
        )
    else:
        w = subset.rows(linear_weight, sparse=sparse)
    b = None if linear_bias is None else subset.rows(linear_bias, sparse=sparse)
    return resolve_head(options, input, w, b, local, row_loss)


def row_temperatures(temperature: Tensor, rows_shape: torch.Size) -> Tensor:
    """Return a temperature for each row, of the shape of the unreduced loss, float64."""
    if temperature.dim() and temperature.shape != rows_shape:
        raise ValueError(
            f"temperature must be a number or have the shape of the unreduced loss, {tuple(rows_shape)}; "
            f"got {tuple(temperature.shape)}"
        )
    return temperature.to(statistics_dtype(temperature.device)).expand(rows_shape)


def _low_rank_factors(
    options: Options, input: Tensor, weight: LowRank, target: Target
) -> tuple[Tensor, Tensor]:
    """Return κ x Aᵀ (N, rank), in the type of the computation, and B (C, rank)."""
    if options.logits.normalize:
        raise ValueError(
            "normalize needs the length of each classifier, which a LowRank never forms: "
            "pass linear_weight.to_dense()"
        )
    check_devices(input, *weight.tensors)
    x, down, up = harmless(options, input, target), weight.down, weight.up
    if autocasts(input):
        x, down, up = lower(x), lower(down), lower(up)
    return weight.scale * project(x.reshape(-1, x.shape[-1]), down), up


def harmless(options: Options, input: Tensor, target: Target) -> Tensor:
    """Return features (..., D) with zeros in the rows left out, so that nothing spreads what they hold."""
    batch, s, kept = input.dim() - 1, options.target.sample_weight, None
    if is_index(target):
        assert isinstance(target, Tensor)
        kept = target != options.target.ignored
    if s is not None and not s.requires_grad:
        kept = s != 0 if kept is None else kept & (s != 0)
    if kept is None or kept.shape[:batch] != input.shape[:-1]:  # whose shape is an error found elsewhere
        return input
    if is_readable(kept) and bool(kept.all()):
        return input
    if kept.dim() > batch:
        kept = kept.flatten(batch).any(-1)
    return torch.where(kept[..., None], input, 0.0)


def agreed(run: Callable[[], T], options: Options, *tensors: object) -> T:
    """Return run(), seen through by all processes of the groups that the options name."""
    return class_parallel.agreed(run, (options.execution.group, options.reduction.data_group), *tensors)
