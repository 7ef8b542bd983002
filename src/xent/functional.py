"""Losses with torch's names, defaults and shapes: options become objects here, and nothing below sees them.

input, (weight, bias)  → Scores        target, weight, smoothing, ignoring → Targets
reduction, z-loss, denominator → Reduction        memory budget → Plan
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from xent import autograd, opaque, small
from xent.core.plan import DEFAULT_BUDGET
from xent.core.reduction import Kind, Reduction, Scale
from xent.core.scores import LinearHead, Logits, Scores, Transform, compute_dtype
from xent.core.statistics import statistics_dtype
from xent.core.sweep import Problem
from xent.core.targets import UNCHECKED, Checked, check_index, index_targets, probability_targets


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    denominator: float | Tensor | None = None,
    check_targets: bool | None = None,
) -> Tensor:
    r"""Softmax cross-entropy of logits, ``a·lse(z) − ⟨t, z⟩`` a row, in nats.

    A drop-in for :func:`torch.nn.functional.cross_entropy`, computed relative to each row's maximum, so that
    large logits, confident rows and masked (−inf) classes keep their digits. Formula: mathematics page, §1.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ...).
        target: class indices of any integer type, (), (N,) or (N, d1, ...); or probabilities, the shape of
            ``input``, of any sign and mass, which may require gradient.
        weight: (C,), a factor for each class. No gradient.
        ignore_index: rows with this target are left out. None means −100.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean divides by Σ s·w[target] over rows not
            ignored (indices) or by Σ s (probabilities), and is 0 over no rows.
        label_smoothing: ε in [0, 1]; the target becomes (1 − ε)·t + ε/C.
        sample_weight: s, the shape of the unreduced loss. A row of weight 0 is left out.
        z_loss: λ; adds λ·s·lse² to each row that is not ignored.
        softcap: k; logits pass through k·tanh(z/k) first.
        temperature: logits are divided by it, after the softcap. No gradient.
        denominator: replaces the divisor of ``"mean"`` (gradient accumulation).
        check_targets: None checks targets on a CPU and asserts asynchronously elsewhere; True always
            checks and names the row; False does not check, and a target outside the classes costs nan.

    Returns:
        A scalar, or the shape of an index target for ``"none"``, of the type of ``input`` (float32 under
        autocast).

    Raises:
        IndexError: a target outside 0..C−1, naming row and value.
        ValueError: shapes or option values that do not fit together.
        TypeError: types that do not.

    Example:
        >>> import torch, xent
        >>> round(xent.cross_entropy(torch.tensor([0.1, 0.12, 0.78]).log(), torch.tensor(2)).item(), 7)
        0.2484614
    """
    if _without_options(
        weight, label_smoothing, sample_weight, z_loss, softcap, temperature, denominator, check_targets
    ):
        value = small.loss(
            input, None, None, target, ignore_index, reduction, _again(ignore_index, reduction)
        )
        if value is not None:
            return value
    if input.dim() == 0:
        raise ValueError("input needs a class dimension: (C,), (N, C) or (N, C, d1, ...); got a scalar")
    _check_floating(input=input)
    axis = 0 if input.dim() == 1 else 1
    classes = input.shape[axis]
    rows_shape = input.shape[:axis] + input.shape[axis + 1 :]
    options = _Options.check(
        classes,
        rows_shape,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        sample_weight=sample_weight,
        z_loss=z_loss,
        denominator=denominator,
    )
    is_index, checked = options.kind_of(target, rows_shape, tuple(input.shape), check_targets)
    n = math.prod(rows_shape)
    t = target.reshape(n) if is_index else target.movedim(axis, -1).reshape(n, classes)
    s = None if sample_weight is None else sample_weight.reshape(n)
    scores = Logits(input.movedim(axis, -1).reshape(n, classes), _transform(softcap, temperature))
    return _loss(
        [options.part(scores, t, is_index, checked, s, check_targets)],
        options.reduction,
        rows_shape,
        _loss_dtype(input),
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    denominator: float | Tensor | None = None,
    check_targets: bool | None = None,
    product_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    r"""Softmax cross-entropy of a linear head, straight from features: the logits never exist.

    ``cross_entropy(input @ linear_weight.T + linear_bias, target)``, visited in tiles of rows × classes. For
    ``"mean"`` and ``"sum"`` the gradient is formed in the forward sweep (three matrix products in all where
    the budget holds 128 rows of logits, else four); ignored rows are left out before the products; a frozen
    input or weight costs nothing. Formula: mathematics page, §§1, 2, 4.

    Args:
        input: features, (..., D): any number of leading batch dimensions.
        linear_weight: (C, D); or (C, d1, ..., D), one classifier for each position d.
        target: class indices of any integer type, (..., d1, ...); or probabilities (..., C, d1, ...).
        linear_bias: (C,), or (C, d1, ...).
        product_dtype: the type to which the matrix products round their factors. None means float32 for half
            types on a CPU, whose half products round their results too (a loss then errs by 1e-2 where it
            erred by 1e-6), and the type of ``input`` elsewhere. ``torch.bfloat16`` asks for speed on
            processors that have such products; everything but the factors stays float32.
        memory_budget: bytes of working memory beside inputs, gradients and O(N); 64 MiB by default,
            whatever N and C. For half types the float32 accumulator of a gradient comes beside it.
        weight, ignore_index, reduction, label_smoothing, sample_weight, z_loss, softcap, temperature,
            denominator, check_targets: as in :func:`cross_entropy`.

    Returns:
        A scalar, or the shape of an index target for ``"none"``, of the type of ``input`` (float32 under
        autocast, whose half type the products' factors then take).

    Raises:
        IndexError, ValueError, TypeError: as :func:`cross_entropy`.

    Example:
        >>> import torch, xent
        >>> features, classifier = torch.eye(3), torch.tensor([0.1, 0.12, 0.78]).log()[:, None].expand(3, 3)
        >>> round(xent.linear_cross_entropy(features, classifier, torch.tensor([2, 2, 2])).item(), 7)
        0.2484614
    """
    if (
        memory_budget is None
        and product_dtype is None
        and _without_options(
            weight, label_smoothing, sample_weight, z_loss, softcap, temperature, denominator, check_targets
        )
    ):
        again = _again(ignore_index, reduction)
        value = small.loss(input, linear_weight, linear_bias, target, ignore_index, reduction, again)
        if value is not None:
            return value
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
            f"linear_bias must have shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    dtype = _loss_dtype(input)
    input, linear_weight = _lower(input), _lower(linear_weight)
    linear_bias = None if linear_bias is None else _lower(linear_bias)
    _check_floating(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    batch = input.shape[:-1]
    rows_shape = torch.Size((*batch, *positions))
    options = _Options.check(
        classes,
        rows_shape,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        sample_weight=sample_weight,
        z_loss=z_loss,
        denominator=denominator,
    )
    budget = _check_budget(memory_budget)
    is_index, checked = options.kind_of(target, rows_shape, (*batch, classes, *positions), check_targets)
    transform = _transform(softcap, temperature)
    factor = _product_dtype(product_dtype, input)
    places, n = math.prod(positions), math.prod(batch)
    x = input if input.dim() == 2 else input.reshape(n, features)
    if places > 1:
        x = x.to(
            compute_dtype(x.dtype)
        )  # so that the gradients of all positions add up before they are rounded
    # unbind: its backward is one stack, where slicing would make a zero gradient of the whole each time
    if is_index:
        t = target.reshape(n, places).unbind(1) if places != 1 else (target.reshape(n),)
    else:
        t = target.reshape(n, classes, places).unbind(2) if positions else (target.reshape(n, classes),)
    w = linear_weight.reshape(classes, places, features).unbind(1) if positions else (linear_weight,)
    b = (None,) * places if linear_bias is None else linear_bias.reshape(classes, places).unbind(1)
    s = (None,) * places if sample_weight is None else sample_weight.reshape(n, places).unbind(1)
    parts = [
        options.part(
            LinearHead(x, w[k], b[k], transform, factor), t[k], is_index, checked, s[k], check_targets, budget
        )
        for k in range(places)
    ]
    return _loss(parts, options.reduction, rows_shape, dtype)


def _without_options(
    weight: Tensor | None,
    label_smoothing: float,
    sample_weight: Tensor | None,
    z_loss: float,
    softcap: float | None,
    temperature: float,
    denominator: float | Tensor | None,
    check_targets: bool | None,
) -> bool:
    """Whether a loss is the plain one, for which there is a shorter way."""
    return (
        weight is None
        and sample_weight is None
        and softcap is None
        and denominator is None
        and check_targets is None
        and label_smoothing == 0.0
        and z_loss == 0.0
        and temperature == 1.0
    )


def _again(ignore_index: int | None, reduction: str) -> small.General:
    """The plain loss by the sweep, for what the shorter way cannot do."""

    def general(x: Tensor, w: Tensor | None, b: Tensor | None, y: Tensor) -> Tensor:
        # targets that are checked explicitly are no plain call
        if w is None:
            return cross_entropy(x, y, ignore_index=ignore_index, reduction=reduction, check_targets=True)
        return linear_cross_entropy(
            x, w, y, linear_bias=b, ignore_index=ignore_index, reduction=reduction, check_targets=True
        )

    return general


class _Part(NamedTuple):
    problem: Problem
    row_weight: Tensor | None  # (M,)
    kept: Tensor | None  # (M,) bool: rows that count, where they could not be selected beforehand
    opaque: bool  # whether the sweep is to be one operator
    check: bool | None  # of targets, by that operator


def _loss(parts: Sequence[_Part], reduction: Reduction, rows_shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """One loss from parts that share its divisor (the positions of a K-dimensional head)."""
    if reduction.kind == "none":
        columns = [_unreduced(part, reduction) for part in parts]
        rows = columns[0] if len(columns) == 1 else torch.stack(columns, dim=1)
        return rows.to(dtype).reshape(rows_shape)
    scale = reduction.scale([(part.problem.targets, part.row_weight) for part in parts])
    total: Tensor | None = None
    for part in parts:
        # one part only: the gradients of several, kept until backward, would be several times the memory
        value = _early(part, reduction, scale) if len(parts) == 1 else None
        if value is None:
            value = reduction.total(_values(part, reduction), scale)
        total = value if total is None else total + value
    assert total is not None
    return total.to(dtype)


def _early(part: _Part, reduction: Reduction, scale: Scale) -> Tensor | None:
    """The loss whose gradient is formed in the forward sweep; None where that would not pay or not do."""
    problem, s = part.problem, part.row_weight
    q = problem.targets.probabilities
    if part.opaque or not problem.scores.early or any(t is not None and t.requires_grad for t in (s, q)):
        return None
    if not autograd.needs_gradient(problem) or autograd.transformed(*problem.scores.tensors, q, s):
        return None
    return autograd.reduced(problem, reduction, s, scale)


def _values(part: _Part, reduction: Reduction) -> Tensor:
    """What each of the M rows adds to the loss, before the divisor."""
    if part.opaque:
        nll, logsumexp = opaque.rows(part.problem, part.kept, part.check)
    else:
        nll, logsumexp = autograd.rows(part.problem)
    if part.kept is not None:  # select before weighing: 0·nan is not 0
        nll, logsumexp = (v.masked_fill(~part.kept, 0.0) for v in (nll, logsumexp))
    return reduction.values(nll, logsumexp, part.row_weight)


def _unreduced(part: _Part, reduction: Reduction) -> Tensor:
    """Losses of all N rows of a part, zero where a row is left out."""
    targets = part.problem.targets
    values = _values(part, reduction)
    if targets.rows is None:
        return values
    return values.new_zeros(targets.total).index_copy(0, targets.rows, values)


class _Options(NamedTuple):
    """The options of a loss, checked once."""

    classes: int
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    reduction: Reduction

    @classmethod
    def check(
        cls,
        classes: int,
        rows_shape: torch.Size,
        *,
        weight: Tensor | None,
        ignore_index: int | None,
        reduction: str,
        label_smoothing: float,
        sample_weight: Tensor | None,
        z_loss: float,
        denominator: float | Tensor | None,
    ) -> _Options:
        if classes == 0:
            raise ValueError("there must be at least one class, got 0")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
        if weight is not None and weight.shape != (classes,):
            raise ValueError(f"weight must have shape ({classes},), one a class; got {tuple(weight.shape)}")
        for name, value in (("weight", weight), ("denominator", denominator)):
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(f"{name} takes no gradient: pass {name}.detach()")
        if sample_weight is not None and sample_weight.shape != rows_shape:
            raise ValueError(
                f"sample_weight must have the shape of the unreduced loss, {tuple(rows_shape)}; "
                f"got {tuple(sample_weight.shape)}"
            )
        return cls(
            classes,
            weight,
            -100 if ignore_index is None else ignore_index,
            label_smoothing,
            _reduction(reduction, z_loss, denominator),
        )

    def kind_of(
        self, target: Tensor, rows_shape: torch.Size, full_shape: tuple[int, ...], check: bool | None
    ) -> tuple[bool, Checked]:
        """Whether a target holds indices, and what a check of these has shown."""
        shape = tuple(target.shape)
        if target.is_floating_point() and shape == full_shape:
            if self.ignore_index != -100:
                raise ValueError(
                    f"ignore_index={self.ignore_index} has no meaning for a target of probabilities; "
                    "leave rows out with sample_weight 0"
                )
            return False, UNCHECKED
        if shape == rows_shape and not target.is_floating_point():
            if target.is_complex() or target.dtype == torch.bool:
                raise TypeError(f"a target of class indices must be of an integer type, got {target.dtype}")
            target = target.to(torch.int64)  # a narrow type cannot even hold what it is compared with
            # in a graph the operator checks; under vmap nothing can, and a bad target costs nan
            if opaque.is_opaque(target) or autograd.batched(target):
                return True, UNCHECKED
            return True, check_index(target, self.classes, self.ignore_index, check)
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

    def part(
        self,
        scores: Scores,
        target: Tensor,  # (N,) or (N, C)
        is_index: bool,
        checked: Checked,
        sample_weight: Tensor | None,  # (N,)
        check: bool | None,
        budget: int = DEFAULT_BUDGET,
    ) -> _Part:
        """Scores with their targets, and the weights of the rows that take part."""
        learnt = sample_weight is not None and sample_weight.requires_grad and torch.is_grad_enabled()
        fixed = None if learnt else sample_weight  # a learnt weight of 0 still has a gradient
        kept = None
        in_graph = opaque.is_opaque(target, *scores.tensors)
        if in_graph or autograd.batched(target, sample_weight, self.weight, *scores.tensors):
            # data cannot choose rows here: those that do not count become harmless, and are taken out later
            if is_index:
                kept = target != self.ignore_index
                target = target.masked_fill(~kept, 0)
            else:
                kept = torch.ones_like(target[:, 0], dtype=torch.bool)
            if fixed is not None:
                kept = kept & (fixed != 0)
            if not in_graph:  # the operator selects for itself
                scores = scores.select(kept)
            weight = kept.to(statistics_dtype(kept.device)) if sample_weight is None else sample_weight
            sample_weight, fixed, learnt = weight.masked_fill(~kept, 0.0), None, True
        if is_index:
            targets = index_targets(
                target,
                self.classes,
                class_weight=self.weight,
                ignore_index=self.ignore_index,
                smoothing=self.label_smoothing,
                sample_weight=fixed,
                checked=checked if kept is None else Checked(classes=False, none_ignored=True),
            )
        else:
            targets = probability_targets(
                target, class_weight=self.weight, smoothing=self.label_smoothing, sample_weight=fixed
            )
        problem = Problem(scores, targets, budget)
        if sample_weight is None or not learnt:
            return _Part(problem, targets.row_weight, kept, in_graph, check)
        weight = sample_weight.to(statistics_dtype(sample_weight.device))
        weight = weight if targets.rows is None else weight[targets.rows]
        return _Part(problem, weight, kept, in_graph, check)


def _reduction(kind: str, z_loss: float, denominator: float | Tensor | None) -> Reduction:
    if not math.isfinite(z_loss):
        raise ValueError(f"z_loss must be finite, got {z_loss}")
    if denominator is not None and kind != "mean":
        raise ValueError(f"denominator replaces the divisor of reduction='mean'; reduction is {kind!r}")
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator must be one number, got shape {tuple(denominator.shape)}")
        denominator = denominator.detach().reshape(())
    elif denominator is not None and not denominator > 0:
        raise ValueError(f"denominator must be positive, got {denominator}")
    if kind not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {kind!r}")
    return Reduction(cast(Kind, kind), z_loss, denominator)


def _transform(softcap: float | None, temperature: float) -> Transform:
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be positive and finite, or None; got {softcap}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    return Transform(softcap, float(temperature))


_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_floating(**tensors: Tensor | None) -> None:
    """All floating, and of one type."""
    given = {name: t.dtype for name, t in tensors.items() if t is not None}
    first, *_ = given
    for name, dtype in given.items():
        if dtype not in _FLOATING:
            raise TypeError(f"{name} must be of a floating type of 16, 32 or 64 bits, got {dtype}")
        if dtype != given[first]:
            raise TypeError(
                f"{first} is {given[first]} but {name} is {dtype}: convert one of them, or use torch.autocast"
            )


def _check_budget(memory_budget: int | None) -> int:
    if memory_budget is None:
        return DEFAULT_BUDGET
    if memory_budget <= 0:
        raise ValueError(f"memory_budget is a number of bytes and must be positive, got {memory_budget}")
    return int(memory_budget)


def _product_dtype(asked: torch.dtype | None, input: Tensor) -> torch.dtype:
    full = compute_dtype(input.dtype)
    if asked is None:
        return full if input.device.type == "cpu" else input.dtype
    allowed = (full, torch.bfloat16, input.dtype) if full == torch.float32 else (full,)
    if asked not in allowed:
        names = ", ".join(sorted({str(dtype) for dtype in allowed}))
        raise ValueError(f"product_dtype of {input.dtype} features can be {names}; got {asked}")
    return asked


def _lower(tensor: Tensor) -> Tensor:
    """What autocast does to a factor of a product: every floating type but float64 becomes its half type."""
    if not _autocasts(tensor):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _loss_dtype(tensor: Tensor) -> torch.dtype:
    """The type of the loss: that of the scores, but never a half type under autocast."""
    return torch.float32 if _autocasts(tensor) else tensor.dtype


def _autocasts(tensor: Tensor) -> bool:
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64
