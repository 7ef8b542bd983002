"""The door: a call's tensors and options become scores, targets and a reduction, and nothing below sees them.

input, (weight, bias), softcap, temperature → Scores      target, weight, smoothing, ignoring → Targets
reduction, z-loss, denominator → Reduction                memory budget → Problem

A call becomes one `Part`, or one for each position of a head with several, which share a divisor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from xent._arguments import class_parallel
from xent._arguments.class_subset import Subset, log_q_of
from xent._arguments.validation import (
    check_devices,
    check_floating,
    check_tensors,
    loss_dtype,
    lower,
    product_dtype,
    require_tensors,
)
from xent._autograd import transforms
from xent._core.collectives import ClassGroup
from xent._core.directions import unit
from xent._core.logits import DenseLogits, LinearHead, Logits, Transform, compute_dtype
from xent._core.margin import Margin, TargetShift
from xent._core.ops import BATCHED
from xent._core.reduction import Kind, Reduction
from xent._core.selection import Selection
from xent._core.statistics import RequestedOutputs, statistics_dtype
from xent._core.target import (
    Target,
    TopKTarget,
    at_positions,
    tensors_of,
    thawed_target,
    with_wide_indices,
)
from xent._core.targets import (
    UNCHECKED,
    Checked,
    ClassSlice,
    Targets,
    check_index,
    check_top_k,
    holds_integers,
    index_targets,
    no_targets,
    probability_targets,
    top_k_targets,
)
from xent._core.tiles.plan import DEFAULT_BUDGET
from xent._core.tiles.sweep import Problem
from xent._core.validators import as_number, valid

VALIDATED = (
    "ignore_index",
    "reduction",
    "label_smoothing",
    "z_loss",
    "softcap",
    "temperature",
    "check_targets",
    "product_dtype",
    "memory_budget",
    "sparse_grad",
    "normalize",
)
_NUMBERS = (float, int)
LARGEST_INDEX = 1 << 63
LARGEST_MOVE = 600.0  # exp of it is a float64


class Part(NamedTuple):
    problem: Problem
    row_weight: Tensor | None  # (M,)
    kept: Tensor | None  # (M,) bool: rows that count, where they could not be selected beforehand
    opaque: bool  # whether the sweep is to be one operator
    check: bool | None  # of targets, by that operator
    move: TargetShift | None = None  # of the targets' own scores
    weighs: bool = False  # whether other processes know what some rows add to the divisor of a mean

    @property
    def selection(self) -> Selection:
        """The rows that count."""
        targets = self.problem.targets
        return Selection(targets.total, targets.rows, self.kept)

    def asking(self) -> Problem:
        """Return the problem with the outputs requested that a shift and the divisor of a mean need."""
        targets, moves = self.problem.targets, self.move is not None
        mass = self.weighs or (moves and targets.held is not None and targets.smoothing > 0)
        requested = RequestedOutputs(log_prob=moves, mass=mass)
        return self.problem._replace(requested=requested) if any(requested) else self.problem


class Call(NamedTuple):
    """A call's parts, and how their rows are put together."""

    parts: Sequence[Part]
    reduction: Reduction
    rows_shape: torch.Size  # of the unreduced loss
    dtype: torch.dtype  # of the loss
    target: Target = None  # as given, its class indices int64

    def with_target(self) -> Call:
        """Return the call, seen to have a target."""
        if self.target is None:
            raise TypeError("target must be a tensor or a TopKTarget, got None")
        return self

    def stack(self, columns: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """One tensor (N,) from each part -> the shape of the unreduced loss."""
        rows = columns[0] if len(columns) == 1 else torch.stack(list(columns), dim=1)
        return rows.to(self.dtype if dtype is None else dtype).reshape(self.rows_shape)


class Options(NamedTuple):
    """The options that losses share, as the caller gave them."""

    weight: Tensor | None = None
    ignore_index: int | None = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    sample_weight: Tensor | None = None
    z_loss: float = 0.0
    softcap: float | None = None
    temperature: float = 1.0
    denominator: float | Tensor | None = None
    check_targets: bool | None = None
    product_dtype: torch.dtype | None = None
    memory_budget: int | None = None
    margin: Margin | float | None = None
    classes: Tensor | None = None
    log_q: Tensor | None = None
    sparse_grad: bool = False
    normalize: bool = False
    group: Any = None
    data_group: Any = None

    @classmethod
    def of(cls, **given: Any) -> Options:
        """Return the options that are given, each seen to be of its kind."""
        return cls(**given).checked()

    def checked(self) -> Options:
        """Return the same options as plain Python values; raise an error that names one of the wrong kind."""
        check_tensors(spread=True, weight=self.weight, sample_weight=self.sample_weight, log_q=self.log_q)
        values = {}
        for name in VALIDATED:
            value, default = getattr(self, name), DEFAULTS[name]
            if type(value) is not type(default) or value != default:
                values[name] = valid(name, value)
        if self.denominator is not None:
            values["denominator"] = _denominator(self.denominator)
        return self._replace(**values) if values else self

    @property
    def plain(self) -> bool:
        """The absence of every option, for which there is a shorter way."""
        return (
            self.weight is None
            and self.sample_weight is None
            and self.softcap is None
            and self.denominator is None
            and self.check_targets is None
            and self.product_dtype is None
            and self.memory_budget is None
            and self.margin is None
            and self.classes is None
            and self.log_q is None
            and self.sparse_grad is False
            and self.normalize is False
            and (self.ignore_index is None or type(self.ignore_index) is int)
            and (self.ignore_index is None or -LARGEST_INDEX <= self.ignore_index < LARGEST_INDEX)
            and self.group is None
            and self.data_group is None
            and type(self.reduction) is str
            and type(self.label_smoothing) in _NUMBERS
            and self.label_smoothing == 0.0
            and type(self.z_loss) in _NUMBERS
            and self.z_loss == 0.0
            and type(self.temperature) in _NUMBERS
            and self.temperature == 1.0
        )

    @property
    def ignored(self) -> int:
        return -100 if self.ignore_index is None else self.ignore_index

    def of_logits(self, input: Tensor, target: Target) -> Call:
        """Resolve logits, input (C,), (N, C) or (N, C, d1, ...), and their target."""
        require_tensors(input=input)
        if self._frozen(input, *tensors_of(target)):
            return self._thawed().of_logits(transforms.thawed(input), thawed_target(target))
        if input.dim() == 0:
            raise ValueError("input needs a class dimension: (C,), (N, C) or (N, C, d1, ...); got a scalar")
        check_floating(input=input)
        axis = 0 if input.dim() == 1 else 1
        classes = input.shape[axis]
        rows_shape = input.shape[:axis] + input.shape[axis + 1 :]
        self._check(classes, rows_shape)
        given = target = self._resolve(with_wide_indices(target), rows_shape, tuple(input.shape))
        reduction, transform = self._reduction(input, target), self._transform()
        ranks = self._ranks(input, None, classes, rows_shape, target)
        checked = self._check_classes(target, classes, ranks)
        n = math.prod(rows_shape)
        if isinstance(target, TopKTarget):
            k = target.indices.shape[-1]
            target = TopKTarget(
                target.indices.reshape(n, k), target.probabilities.reshape(n, k), target.remainder
            )
        elif target is not None and target.is_floating_point():
            target = target.movedim(axis, -1).reshape(n, classes)
        elif target is not None:
            target = target.reshape(n)
        s = None if self.sample_weight is None else self.sample_weight.reshape(n)
        log_q = None if self.log_q is None else log_q_of(self.log_q, classes)
        logits = DenseLogits(input.movedim(axis, -1).reshape(n, classes), log_q, transform)
        part = self._part(logits, target, checked, s, DEFAULT_BUDGET, ranks)
        return Call([part], reduction, rows_shape, loss_dtype(input), given)

    def of_head(
        self, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Target
    ) -> Call:
        """Resolve a head, input (..., D) and linear_weight (C, D) or (C, d1, ..., D), and its target."""
        require_tensors(input=input, linear_weight=linear_weight)
        check_tensors(linear_bias=linear_bias)
        if self._frozen(input, linear_weight, linear_bias, *tensors_of(target)):
            return self._thawed().of_head(
                transforms.thawed(input),
                transforms.thawed(linear_weight),
                transforms.thawed(linear_bias),
                thawed_target(target),
            )
        target = with_wide_indices(target)
        if input.dim() < 1 or linear_weight.dim() < 2:
            raise ValueError(
                f"input must be (..., D) and linear_weight (C, D) or (C, d1, ..., D); "
                f"got {tuple(input.shape)} and {tuple(linear_weight.shape)}"
            )
        classes, *positions, features = linear_weight.shape
        if input.shape[-1] != features:
            raise ValueError(f"input has {input.shape[-1]} features a row, linear_weight has {features}")
        if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
            raise ValueError(
                f"linear_bias must have shape {tuple(linear_weight.shape[:-1])}, "
                f"got {tuple(linear_bias.shape)}"
            )
        if self.classes is not None:
            self._no_sample_of_a_slice()
            subset = Subset.of(self.classes, classes, self.check_targets)
            options, target = self._of_subset(subset, target)
            linear_weight = subset.rows(linear_weight, sparse=self.sparse_grad)
            linear_bias = None if linear_bias is None else subset.rows(linear_bias, sparse=self.sparse_grad)
            return options.of_head(input, linear_weight, linear_bias, target)
        if self.sparse_grad:
            raise ValueError(
                "sparse_grad is the form of the gradient of a subset of the classes: pass classes"
            )
        log_q = None if self.log_q is None else log_q_of(self.log_q, classes)
        dtype = loss_dtype(input)
        if self.normalize:
            check_floating(input=input, linear_weight=linear_weight)
            input, linear_weight = unit(self._harmless(input, target)), unit(linear_weight)
            linear_bias = None if linear_bias is None else linear_bias.to(compute_dtype(linear_bias.dtype))
        input, linear_weight = lower(input), lower(linear_weight)
        linear_bias = None if linear_bias is None else lower(linear_bias)
        check_floating(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
        batch = input.shape[:-1]
        rows_shape = torch.Size((*batch, *positions))
        self._check(classes, rows_shape)
        budget = DEFAULT_BUDGET if self.memory_budget is None else self.memory_budget
        target = self._resolve(target, rows_shape, (*batch, classes, *positions))
        reduction, transform = self._reduction(input, target), self._transform()
        factor = product_dtype(self.product_dtype, input)
        ranks = self._ranks(input, features, classes, rows_shape, target)
        checked = self._check_classes(target, classes, ranks)
        places, n = math.prod(positions), math.prod(batch)
        x = input if input.dim() == 2 else input.reshape(n, features)
        if places > 1:  # so that the gradients of all positions add up before they are rounded
            x = x.to(compute_dtype(x.dtype))
        # unbind: its backward is one stack, where slicing would make a zero gradient of the whole each time
        w = linear_weight.reshape(classes, places, features).unbind(1) if positions else (linear_weight,)
        b = (None,) * places if linear_bias is None else linear_bias.reshape(classes, places).unbind(1)
        s = (
            (None,) * places
            if self.sample_weight is None
            else self.sample_weight.reshape(n, places).unbind(1)
        )
        t = at_positions(target, n, classes, places)
        parts = [
            self._part(
                LinearHead(x, w[k], b[k], log_q, transform, factor), t[k], checked, s[k], budget, ranks
            )
            for k in range(places)
        ]
        return Call(parts, reduction, rows_shape, dtype, target)

    def _frozen(self, *tensors: Tensor | None) -> bool:
        """Return whether any tensor of the call was made under inference mode."""
        return transforms.is_frozen(*tensors, self.weight, self.sample_weight, self.classes, self.log_q)

    def _thawed(self) -> Options:
        """Return the options with ordinary tensors for those made under inference mode."""
        names = ("weight", "sample_weight", "classes", "log_q")
        return self._replace(**{name: transforms.thawed(getattr(self, name)) for name in names})

    def of_spread_logits(self, input: Tensor, target: Target) -> Call:
        """Resolve the logits that this process holds; a DTensor is replaced by its local part."""
        require_tensors(spread=True, input=input)
        axis = 0 if input.dim() == 1 else 1
        (input, target, weight), group = class_parallel.localised(
            self.group, input=(input, axis), target=(target, None), weight=(self.weight, 0)
        )
        return self._replace(group=group, weight=weight).of_logits(input, target)

    def of_spread_head(
        self, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Target
    ) -> Call:
        """Resolve the head that this process holds; a DTensor is replaced by its local part."""
        (input, linear_weight, linear_bias, target, weight), group = class_parallel.localised(
            self.group,
            input=(input, None),
            linear_weight=(linear_weight, 0),
            linear_bias=(linear_bias, 0),
            target=(target, None),
            weight=(self.weight, 0),
        )
        options = self._replace(group=group, weight=weight)
        return options.of_head(input, linear_weight, linear_bias, target)

    def _ranks(
        self, input: Tensor, features: int | None, held: int, rows_shape: torch.Size, target: Target
    ) -> ClassGroup | None:
        """Return the group of processes that share the classes, None where the call names none."""
        if self.group is None:
            return None
        self._no_sample_of_a_slice()
        if transforms.is_opaque(input):
            raise NotImplementedError(class_parallel.IN_GRAPH)
        s = self.sample_weight
        if transforms.batched(input, s, *tensors_of(target)):
            raise NotImplementedError(BATCHED)
        indices = [t for t in tensors_of(target) if not t.is_floating_point()]
        kind = "class indices" if indices else "probabilities"
        about: dict[str, Any] = {
            "rows": tuple(rows_shape),
            "features a row": features,
            "dtype": str(input.dtype),
            "input.requires_grad": input.requires_grad and torch.is_grad_enabled(),
            "the kind of target": type(target).__name__ if not isinstance(target, Tensor) else kind,
            "targets, of which this is a checksum": class_parallel.checksum(*indices),
            "weights, of which this says whether there are any": self.weight is not None,
            "sample_weight, of which this says whether there is one": s is not None,
            "rows of sample_weight 0, of which this is a checksum": class_parallel.checksum(
                *() if s is None else (s.detach() == 0,)
            ),
            "margin": str(self.margin),
            "reduction": self.reduction,
            "check_targets": self.check_targets,
            "normalize": self.normalize,
        }
        numbers = ("ignored", "label_smoothing", "z_loss", "softcap", "temperature", "denominator")
        for name in numbers:
            value = getattr(self, name)  # whose type is no difference
            about[name] = None if value is None else f"{float(value):.6g}"
        return class_parallel.ranks_of(self.group, held, about)

    def _no_sample_of_a_slice(self) -> None:
        for name in ("classes", "log_q"):
            if self.group is not None and getattr(self, name) is not None:
                raise ValueError(f"{name} does not go with group: sample among the classes of one process")

    def _check(self, classes: int, rows_shape: torch.Size) -> None:
        check_tensors(weight=self.weight, sample_weight=self.sample_weight, log_q=self.log_q)
        weight, s = self.weight, self.sample_weight
        if weight is not None and weight.shape != (classes,):
            raise ValueError(f"weight must have shape ({classes},), one a class; got {tuple(weight.shape)}")
        for name in ("weight", "log_q"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(f"{name} takes no gradient: pass {name}.detach()")
        if s is not None and s.shape != rows_shape:
            raise ValueError(
                f"sample_weight must have the shape of the unreduced loss, {tuple(rows_shape)}; "
                f"got {tuple(s.shape)}"
            )

    def _check_classes(self, target: Target, classes: int, ranks: ClassGroup | None) -> Checked:
        """Return what is known of class indices; an error waits until ranks agree on the classes."""
        classes = classes if ranks is None else ranks.classes
        indices = target.indices if isinstance(target, TopKTarget) else target
        try:
            if classes == 0:
                raise ValueError("there must be at least one class, got 0")
            if indices is None or indices.is_floating_point():
                return UNCHECKED
            # in a graph the operator checks; under vmap nothing can, and a bad target costs nan
            if transforms.is_opaque(indices) or transforms.batched(indices):
                return UNCHECKED
            if isinstance(target, TopKTarget):
                return check_top_k(indices, classes, self.check_targets)
            return check_index(indices, classes, self.ignored, self.check_targets)
        except (IndexError, ValueError) as error:
            if ranks is None:
                raise
            ranks.doubts.append(error)
            return UNCHECKED

    def _resolve(self, target: Target, rows_shape: torch.Size, full_shape: tuple[int, ...]) -> Target:
        """Return the target, seen to fit the logits."""
        if target is None:
            return None
        if not isinstance(target, Tensor | TopKTarget):
            raise TypeError(f"target must be a tensor or a TopKTarget, got {type(target).__name__}")
        if isinstance(target, TopKTarget) or target.is_floating_point():
            self._of_indices_alone()
        if isinstance(target, TopKTarget):
            if tuple(target.indices.shape[:-1]) != tuple(rows_shape):
                raise ValueError(
                    f"a TopKTarget's indices must have shape {(*rows_shape, 'k')}, "
                    f"got {tuple(target.indices.shape)}"
                )
            self._no_ignoring("a target of probabilities")
            return target
        shape = tuple(target.shape)
        if target.is_floating_point() and shape == full_shape:
            self._no_ignoring("a target of probabilities")
            return target
        if shape == rows_shape and not target.is_floating_point():
            if not holds_integers(target):
                raise TypeError(f"a target of class indices must be of an integer type, got {target.dtype}")
            return target
        if shape == full_shape:
            raise TypeError(
                f"a target of shape {shape} holds probabilities and must be floating, got {target.dtype}"
            )
        if shape == rows_shape:
            raise TypeError(
                f"a target of shape {shape} holds class indices and must be of an integer type, "
                f"got {target.dtype}"
            )
        raise ValueError(
            f"target must have shape {tuple(rows_shape)} (class indices) or {full_shape} (probabilities); "
            f"got {shape}"
        )

    def _of_subset(self, subset: Subset, target: Target) -> tuple[Options, Target]:
        """Return the options and the target for a softmax over the subset alone."""
        if not isinstance(target, Tensor) or target.is_floating_point():
            self._of_indices_alone()
            raise TypeError(f"target must be a tensor of class indices, got {type(target).__name__}")
        weight, ignored = self.weight, self.ignored
        options = self._replace(
            classes=None,
            sparse_grad=False,
            weight=None if weight is None else subset.rows(weight),
            ignore_index=-100,
        )
        return options, subset.local(target, ignored, self.check_targets)

    def _harmless(self, input: Tensor, target: Target) -> Tensor:
        """Features (..., D) with zeros in the rows that are left out: scaling would spread what they hold."""
        batch, s, kept = input.dim() - 1, self.sample_weight, None
        if isinstance(target, Tensor) and not target.is_floating_point():
            kept = target != self.ignored
        if s is not None and not s.requires_grad:
            kept = s != 0 if kept is None else kept & (s != 0)
        if kept is None or kept.shape[:batch] != input.shape[:-1]:  # whose shape is an error found elsewhere
            return input
        if kept.dim() > batch:
            kept = kept.flatten(batch).any(-1)
        return torch.where(kept[..., None], input, 0.0)

    def _of_indices_alone(self) -> None:
        for name in ("margin", "classes", "log_q"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} needs a target of class indices: only such a row has one class of its own"
                )

    def _no_ignoring(self, target: str) -> None:
        if self.ignored != -100:
            raise ValueError(
                f"ignore_index={self.ignore_index} has no meaning for {target}; "
                "leave rows out with sample_weight 0"
            )

    def _part(
        self,
        logits: Logits,
        target: Target,  # (N,), (N, C), (N, k) or none
        checked: Checked,
        sample_weight: Tensor | None,  # (N,)
        budget: int,
        ranks: ClassGroup | None,
    ) -> Part:
        """Scores with their targets, and the weights of the rows that take part."""
        learnt = sample_weight is not None and sample_weight.requires_grad and torch.is_grad_enabled()
        fixed = None if learnt else sample_weight  # a learnt weight of 0 still has a gradient
        is_index = isinstance(target, Tensor) and not target.is_floating_point()
        kept = None
        given = (target.indices, target.probabilities) if isinstance(target, TopKTarget) else (target,)
        in_graph = transforms.is_opaque(*given, *logits.tensors)
        if in_graph:  # where no operation would notice, and the loss be anything
            check_devices(*logits.tensors, *given, sample_weight, self.weight)
        if in_graph or transforms.batched(*given, sample_weight, self.weight, *logits.tensors):
            # data cannot choose rows here: those that do not count become harmless, and are taken out later
            if is_index:
                assert isinstance(target, Tensor)
                kept = target != self.ignored
                target = target.masked_fill(~kept, 0)
                checked = Checked(classes=False, none_ignored=True)
            else:
                some = logits.tensors[0] if given[0] is None else given[0]
                assert some is not None
                kept = torch.ones_like(some[:, 0], dtype=torch.bool)
            if fixed is not None:
                kept = kept & (fixed != 0)
            if not in_graph:  # the operator selects for itself
                logits = logits.select(kept)
            weight = kept.to(statistics_dtype(kept.device)) if sample_weight is None else sample_weight
            sample_weight, fixed, learnt = weight.masked_fill(~kept, 0.0), None, True
        held = None if ranks is None else ClassSlice(ranks.first, ranks.classes)
        targets = self._targets(logits, target, checked, fixed, held)
        problem = Problem(logits, targets, budget, ranks=ranks)
        row_weight = targets.row_weight
        if learnt:
            assert sample_weight is not None
            row_weight = sample_weight.to(statistics_dtype(sample_weight.device))
            row_weight = row_weight if targets.rows is None else row_weight[targets.rows]
        move = self._move(logits, targets, known=not in_graph and kept is None)
        weighs = is_index and held is not None and self.weight is not None
        return Part(problem, row_weight, kept, in_graph, self.check_targets, move, weighs)

    def _move(self, logits: Logits, targets: Targets, *, known: bool) -> TargetShift | None:
        """Return how the targets' logits are shifted by a margin and log Q; None where they are not."""
        margin = as_margin(self.margin)
        log_q = logits.log_q
        if margin is None and log_q is None:
            return None
        size = 0.0 if margin is None else (abs(margin.cosine) + 2 * (margin.angle > 0)) / self.temperature
        if size > LARGEST_MOVE:
            raise ValueError(
                f"a margin over temperature of {size:.4g} is beyond what exponentials hold, {LARGEST_MOVE:g}"
            )
        assert targets.own is not None
        y = targets.own[:, 0]
        whole = targets.held is None  # else these come with the statistics
        mass = targets.index_mass[:, 0] if whole and targets.index_mass is not None else None
        rest = targets.other_mass[:, 0] if whole and targets.other_mass is not None else None
        return TargetShift(
            margin,
            self.temperature,
            torch.finfo(logits.dtype).eps,
            # one outside has a cost of nan already
            None if log_q is None else log_q[y.clamp(0, targets.classes - 1)],
            mass,
            rest,
            check=known and logits.device.type == "cpu",
            way_out=self._to_cosines(has_bias=isinstance(logits, LinearHead) and logits.b is not None),
        )

    def _to_cosines(self, *, has_bias: bool) -> str:
        """Say how scores that are not cosines become so."""
        if self.normalize and has_bias:
            return "the bias is added to the cosine: pass no linear_bias"
        bias = ", pass no linear_bias" if has_bias else ""
        return f"normalise features and classifier{bias}, and give the scale as temperature=1/scale"

    def _targets(
        self,
        logits: Logits,
        target: Target,
        checked: Checked,
        sample_weight: Tensor | None,
        held: ClassSlice | None,
    ) -> Targets:
        rows, classes = logits.shape
        shared: dict[str, Any] = dict(
            class_weight=self.weight, smoothing=self.label_smoothing, sample_weight=sample_weight, held=held
        )
        if target is None:
            return no_targets(rows, classes, logits.device, sample_weight)
        if isinstance(target, TopKTarget):
            return top_k_targets(
                target.indices,
                target.probabilities,
                classes,
                spread=target.remainder == "spread",
                checked=checked,
                **shared,
            )
        if target.is_floating_point():
            return probability_targets(target, **shared)
        return index_targets(target, classes, ignore_index=self.ignored, checked=checked, **shared)

    def _reduction(self, input: Tensor, target: Target) -> Reduction:
        kind, denominator = self.reduction, self.denominator
        if denominator is not None and kind != "mean":
            raise ValueError(f"denominator replaces the divisor of reduction='mean'; reduction is {kind!r}")
        if isinstance(denominator, Tensor) and denominator.device != input.device:
            raise ValueError(f"denominator is on {denominator.device} and input on {input.device}: move one")
        average = None
        if self.data_group is not None:
            if kind != "mean" or denominator is not None:
                raise ValueError(
                    "data_group is whose rows the divisor of reduction='mean' counts: "
                    + ("drop denominator" if kind == "mean" else f"reduction is {kind!r}")
                )
            average = class_parallel.average_over(self.data_group)
        nothing = not isinstance(denominator, Tensor) and denominator == 0
        asks = nothing and _readable(input, self.sample_weight, *tensors_of(target))
        return Reduction(cast(Kind, kind), self.z_loss, denominator, average, asks)

    def _transform(self) -> Transform:
        return Transform(self.softcap, self.temperature)


DEFAULTS = Options._field_defaults


def as_margin(value: object) -> Margin | None:
    """Return a margin, of which a number is the cosine's."""
    if value is None or isinstance(value, Margin):
        return value
    as_number("margin", value, "a number or a xent.Margin")
    return Margin(valid("margin", value))


def _denominator(value: Any) -> float | Tensor | None:
    """Return the divisor that replaces that of a mean: a number where it can be read, else a tensor ()."""
    if isinstance(value, Tensor) and value.numel() == 1 and not _readable(value):
        if value.requires_grad or transforms.followed(value):
            raise ValueError("denominator takes no gradient: pass denominator.detach()")
        return value.reshape(())
    number: float | None = valid("denominator", value)
    return number


def _readable(*tensors: Tensor | None) -> bool:
    """Return whether data may be read here: on a CPU, outside of graphs and vmap."""
    return not (
        transforms.is_opaque(*tensors)
        or any(t is not None and t.device.type != "cpu" for t in tensors)
        or transforms.batched(*tensors)
    )
