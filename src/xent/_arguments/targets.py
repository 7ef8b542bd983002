"""A call's target, seen to fit its logits, becomes `Targets`, the rows that count, and their weights.

class indices (N,) · probabilities (N, C) · a TopKTarget (N, k) · none      → Targets, row weights (M,)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xent._arguments.options import Options
from xent._arguments.validation import is_readable
from xent._autograd import transforms
from xent._core.bucket import SLACK, Bucket, bucket_mass
from xent._core.class_indices import UNCHECKED, Checked, check_index, check_top_k, holds_integers
from xent._core.collectives import ClassGroup
from xent._core.selection import Selection
from xent._core.statistics import statistics_dtype
from xent._core.target import Target, TopKTarget
from xent._core.targets import (
    ClassSlice,
    Targets,
    index_targets,
    no_targets,
    probability_targets,
    top_k_targets,
)


def is_index(target: object) -> bool:
    """Return whether a target holds one class a row."""
    return isinstance(target, Tensor) and not target.is_floating_point()


def check_target(
    options: Options, target: Target, rows_shape: torch.Size, full_shape: tuple[int, ...]
) -> None:
    """Raise an error unless the target, None apart, fits logits of `full_shape` and the options."""
    if target is None:
        return
    if not isinstance(target, Tensor | TopKTarget):
        raise TypeError(f"target must be a tensor or a TopKTarget, got {type(target).__name__}")
    if isinstance(target, TopKTarget):
        require_index(options, target)
        if tuple(target.indices.shape[:-1]) != tuple(rows_shape):
            raise ValueError(
                f"a TopKTarget's indices must have shape {(*rows_shape, 'k')}, "
                f"got {tuple(target.indices.shape)}"
            )
        _refuse_ignoring(options)
        if target.remainder == "bucket":
            _check_bucket(options, target)
        return
    shape, floating = target.shape, target.is_floating_point()
    if not floating and shape == rows_shape:
        if target.dtype is not torch.int64 and not holds_integers(target):
            raise TypeError(f"a target of class indices must be of an integer type, got {target.dtype}")
        return
    if floating:
        require_index(options, target)
        if shape == full_shape:
            _refuse_ignoring(options)
            return
    if shape == full_shape:
        raise TypeError(
            f"a target of shape {tuple(shape)} holds probabilities and must be floating, got {target.dtype}"
        )
    if shape == rows_shape:
        raise TypeError(
            f"a target of shape {tuple(shape)} holds class indices and must be of an integer type, "
            f"got {target.dtype}"
        )
    raise ValueError(
        f"target must have shape {tuple(rows_shape)} (class indices) or {full_shape} (probabilities); "
        f"got {tuple(shape)}"
    )


def require_index(options: Options, target: Target) -> None:
    """Raise a ValueError where an option needs a target of one class a row, and this is none."""
    for name in ("margin", "classes", "log_q"):
        if getattr(options.logits, name) is not None:
            raise ValueError(
                f"{name} needs a target of class indices: only such a row has one class of its own"
            )


def _check_bucket(options: Options, target: TopKTarget) -> None:
    """Raise a ValueError where a function or an option needs a mass for every class, which a bucket hides."""
    of_target = options.target
    if not of_target.bucket:
        raise ValueError(
            "a TopKTarget of remainder 'bucket' goes with cross_entropy, kl_divergence, js_divergence and "
            "their linear forms alone: here pass remainder='spread' or 'drop'"
        )
    for name, given in (
        ("weight", of_target.weight is not None),
        ("label_smoothing", of_target.label_smoothing > 0),
    ):
        if given:
            raise ValueError(
                f"{name} does not go with a TopKTarget of remainder 'bucket', whose other classes count as "
                "one: pass remainder='spread' or 'drop'"
            )


def bucket_of(target: TopKTarget, classes: int, selection: Selection) -> Bucket:
    """Return the masses of the rows that count of a target of remainder "bucket", over so many classes.

    Where they can be read, a ValueError names the first row whose bucket has a mass below 0, or has a mass
    although the target names every class.
    """
    dtype = statistics_dtype(target.indices.device)
    mass = selection.gather(target.probabilities.detach()).to(dtype)
    rest = None if target.rest is None else selection.gather(target.rest.detach()).to(dtype)
    others = classes - target.indices.shape[-1]
    found = bucket_mass(mass, rest, others)
    if is_readable(found) and found.isnan().any():
        at = int(found.isnan().nonzero()[0])
        row = at if selection.index is None else int(selection.index[at])
        value = (1 - mass[at].sum() if rest is None else rest[at]).item()
        why = "there is no class for it" if others == 0 else "it must not be negative"
        way = "" if rest is not None else "; pass rest=, or probabilities that add up to at most 1"
        raise ValueError(
            f"the bucket of a TopKTarget has mass {value:.6g} in row {row}, but {why}{way} "
            f"({SLACK:g} of either sign counts as 0)"
        )
    return Bucket(mass, found)


def _refuse_ignoring(options: Options) -> None:
    if options.target.ignored != -100:
        raise ValueError(
            f"ignore_index={options.target.ignore_index} has no meaning for a target of probabilities; "
            "leave rows out with sample_weight 0"
        )


def check_classes(
    options: Options, target: Target, classes: int, ranks: ClassGroup | None, *, plain: bool
) -> Checked:
    """Return what is known of class indices; an error waits until ranks agree on the classes."""
    classes = classes if ranks is None else ranks.classes
    indices = target.indices if isinstance(target, TopKTarget) else target
    check = options.execution.check_targets
    try:
        if classes == 0:
            raise ValueError("there must be at least one class, got 0")
        if indices is None or indices.is_floating_point():
            return UNCHECKED
        # in a graph the operator checks; under vmap nothing can, and a bad target costs nan
        if not plain and (transforms.is_opaque(indices) or transforms.batched(indices)):
            return UNCHECKED
        if isinstance(target, TopKTarget):
            return check_top_k(indices, classes, check, target.name)
        return check_index(indices, classes, options.target.ignored, check)
    except (IndexError, ValueError) as error:
        if ranks is None:
            raise
        ranks.doubts.append(error)
        return UNCHECKED


class Weighted(NamedTuple):
    """Targets, and the weights of the rows that count."""

    targets: Targets
    row_weight: Tensor | None  # (M,) float64


def select(
    options: Options,
    target: Target,  # (N,), (N, C), (N, k) or none
    classes: int,
    checked: Checked,
    sample_weight: Tensor | None,  # (N,)
    n: int,
    device: torch.device,
    *,
    by_mask: bool,  # data cannot choose rows here
    ranks: ClassGroup | None = None,
) -> Weighted:
    """Return targets of the rows that count: not ignored, and of a weight other than 0."""
    s = sample_weight
    learnt = s is not None and s.requires_grad and torch.is_grad_enabled()
    index = target if isinstance(target, Tensor) and not target.is_floating_point() else None
    keep = row_weight = None
    if index is not None and not (checked.none_ignored and not by_mask):
        keep = index != options.target.ignored
    if s is not None and not learnt:  # a learnt weight of 0 still has a gradient
        s = s.detach()
        keep = s != 0 if keep is None else keep & (s != 0)
    if by_mask:
        if keep is None:
            keep = torch.ones(n, dtype=torch.bool, device=device)
        selection = Selection(n, mask=keep)
        weight = keep if s is None else s
        row_weight = weight.to(statistics_dtype(weight.device)).masked_fill(~keep, 0.0)
        if index is not None:
            target = index.masked_fill(~keep, 0)
    else:
        chosen = None if keep is None or bool(keep.all()) else keep.nonzero().squeeze(1)
        selection = Selection(n, chosen)
        if s is not None:
            row_weight = selection.gather(s.to(statistics_dtype(s.device)))
    held = None if ranks is None else ClassSlice(ranks.first, ranks.classes)
    return Weighted(_targets(options, target, classes, checked, selection, held), row_weight)


def _targets(
    options: Options,
    target: Target,
    classes: int,
    checked: Checked,
    selection: Selection,
    held: ClassSlice | None,
) -> Targets:
    weight, smoothing = options.target.weight, options.target.label_smoothing
    if target is None:
        return no_targets(classes, selection)
    if isinstance(target, TopKTarget):
        q = selection.gather(target.probabilities)
        return top_k_targets(
            selection.gather(target.indices),
            torch.zeros_like(q) if target.remainder == "bucket" else q,  # they are the `Bucket`'s
            classes,
            selection,
            spread=target.remainder == "spread",
            class_weight=weight,
            smoothing=smoothing,
            checked=checked.classes,
            held=held,
        )
    if target.is_floating_point():
        return probability_targets(target, selection, class_weight=weight, smoothing=smoothing, held=held)
    index = target if selection.index is None else target[selection.index]
    return index_targets(
        index,
        classes,
        selection,
        class_weight=weight,
        smoothing=smoothing,
        checked=checked.classes and selection.mask is None,
        held=held,
    )
