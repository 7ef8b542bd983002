"""The target of a row as the t of ℓ = a·lse(z) − ⟨t, z⟩; every option about targets ends here.

    class index y          t = (1 − ε)·w_y·e_y + (ε/C)·w
    probabilities q        t = w∘((1 − ε)·q + ε/C)

with label smoothing ε and class weights w (torch's definitions: weights after smoothing). A row that is
ignored, or whose sample weight is 0, is not multiplied by zero but left out: `rows` lists the others.

t is held as a dense part, asked for tile by tile, and an *own* part of one class a row (the index), which
`sweep` treats as a tile of its own, so that a row that is right beyond all doubt keeps its digits.

Where processes share the classes, each one's `Targets` are those of its slice: ε/C is still of all C, and an
own class that lies elsewhere is here a class without mass at −inf, which adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from xent._core.ops import cut
from xent._core.statistics import statistics_dtype


class ClassSlice(NamedTuple):
    """The slice of all classes that this process holds."""

    start: int
    total: int  # C


@dataclass(frozen=True)
class Targets:
    """Targets of N rows over C classes, M of which take part."""

    classes: int
    total: int  # N
    rows: Tensor | None  # (M,) int64, ascending: the rows that take part; None means all N
    row_weight: Tensor | None  # (M,) sample weights; None means 1
    mean_weight: (
        Tensor | None
    )  # (M,) what a row adds to the divisor of `mean`, over its row_weight; None means 1
    own: Tensor | None  # (M, K) int64: classes of the own tile, counted from the first one here
    index_mass: Tensor | None  # (M, K) all of t at these classes; None means 1
    other_mass: Tensor | None  # (M, 1) a − Σ own_mass, exactly; None means 0
    index_checked: bool  # each of `own` has been seen to be a class
    probabilities: Tensor | None  # (N, C)
    class_weight: Tensor | None  # (C,) float64
    smoothing: float
    spread: Tensor | None = None  # (M, 1) what every class has, before smoothing and class weights
    held: ClassSlice | None = None  # which of all classes these are; None means all

    @property
    def uniform(self) -> float:
        """ε/C."""
        return self.smoothing / (self.classes if self.held is None else self.held.total)

    def elsewhere(self, chunk: slice) -> Tensor | None:
        """Return (R, K) bool, whether another process holds the target class; None where it is alone."""
        if self.held is None or self.own is None:
            return None
        own = cut(self.own, chunk)
        return _inside(own + self.held.start, self.held.total) & ~_inside(own, self.classes)

    def completed(self, a: Tensor) -> Targets:
        """Return the targets completed by the mass a (M,) of all classes."""
        if self.held is None or self.own is None or self.other_mass is not None:
            return self
        if self.own.shape[1] == 1 and not self.dense:
            return self
        assert self.index_mass is not None
        return replace(self, other_mass=a[:, None] - self.index_mass)

    def weighed(self, mass: Tensor) -> Targets:
        """Return the targets with w_y, what each row adds to the divisor of a mean, from t_y (M,)."""
        return replace(self, mean_weight=mass / (1 - self.smoothing + self.uniform))

    @property
    def count(self) -> int:
        """M, the number of rows that take part."""
        return self.total if self.rows is None else self.rows.numel()

    def pick(self, chunk: slice) -> slice | Tensor:
        """Return a chunk of 0..M as something that indexes the N rows of the caller's tensors."""
        return chunk if self.rows is None else self.rows[chunk]

    @property
    def dense(self) -> bool:
        """The presence of a dense part of t."""
        return self.probabilities is not None or self.spread is not None or self.smoothing > 0

    def tile(self, chunk: slice, classes: slice, dtype: torch.dtype) -> Tensor | None:
        """Return the dense part of t over a tile, (R, T) or, where every row's is the same, (1, T)."""
        if not self.dense:
            return None
        w = None if self.class_weight is None else self.class_weight[classes].to(dtype)
        if self.probabilities is None:
            uniform = self.uniform
            assert self.own is not None
            if self.spread is not None:
                t = (cut(self.spread, chunk) * (1 - self.smoothing) + uniform).to(dtype)
                return t.expand(-1, classes.stop - classes.start) if w is None else t * w
            if w is None:
                return torch.full(
                    (1, classes.stop - classes.start), uniform, dtype=dtype, device=self.own.device
                )
            return (w * uniform)[None]
        t = self.probabilities[self.pick(chunk), classes].to(dtype)
        if self.smoothing > 0:
            t = t * (1 - self.smoothing) + self.uniform
        return t if w is None else t * w

    def probability_factor(self, classes: slice, dtype: torch.dtype) -> Tensor | float:
        """Return ∂t/∂q, the same for every row: a number or (T,)."""
        factor = 1 - self.smoothing
        return factor if self.class_weight is None else self.class_weight[classes].to(dtype) * factor


class Checked(NamedTuple):
    """The facts known of class indices."""

    classes: bool  # each is a class, or to be ignored
    none_ignored: bool


UNCHECKED = Checked(classes=False, none_ignored=False)


def holds_integers(tensor: Tensor) -> bool:
    """Return whether a tensor is of an integer type; booleans are none, and would be classes 0 and 1."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def widened(indices: Tensor) -> Tensor:
    """Return class indices as int64: a narrow type cannot hold what they are compared with.

    uint64 beyond int64 becomes the largest int64, which is no class and no ignore index.
    """
    wide = indices.to(torch.int64)
    if indices.dtype == torch.uint64:
        return wide.masked_fill(wide < 0, torch.iinfo(torch.int64).max)
    return wide


def index_targets(
    target: Tensor,  # (N,) int64
    classes: int,
    *,
    class_weight: Tensor | None = None,  # (C,)
    ignore_index: int = -100,
    smoothing: float = 0.0,
    sample_weight: Tensor | None = None,  # (N,)
    checked: Checked = UNCHECKED,
    held: ClassSlice | None = None,
) -> Targets:
    """Targets given as class indices; one outside the classes costs nan (see `check_index`)."""
    rows, weight = None, sample_weight
    if not checked.none_ignored or sample_weight is not None:
        all_of_them = torch.ones((), dtype=torch.bool, device=target.device)
        keep = all_of_them if checked.none_ignored else target != ignore_index
        rows, weight = _taking_part(keep, sample_weight)
    own = target if rows is None else target[rows]
    dtype = statistics_dtype(target.device)
    w = None if class_weight is None else class_weight.detach().to(dtype)
    mean_weight = index_mass = other_mass = None
    if held is not None:
        own = own - held.start
    if w is not None:
        mean_weight = _at(w, own)
        index_mass = mean_weight[:, None]
    if smoothing or held is not None:
        mass = torch.ones_like(own, dtype=dtype)[:, None] if index_mass is None else index_mass
        uniform = smoothing / (classes if held is None else held.total)
        index_mass = mass * (1 - smoothing) + mass * uniform
        if held is None:
            spread = uniform * (classes if w is None else w.sum())  # Σ of the smooth part
            other_mass = spread - mass * uniform
        else:
            index_mass = torch.where(_inside(own, classes)[:, None], index_mass, 0.0)
            mean_weight = None  # of other processes' classes: it comes with the statistics
            if w is None and smoothing:
                other_mass = torch.full_like(index_mass, uniform * (held.total - 1))
    return Targets(
        classes=classes,
        total=target.numel(),
        rows=rows,
        row_weight=weight,
        mean_weight=mean_weight,
        own=own[:, None],
        index_mass=index_mass,
        other_mass=other_mass,
        index_checked=checked.classes and held is None,
        probabilities=None,
        class_weight=w,
        smoothing=smoothing,
        held=held,
    )


def _inside(own: Tensor, classes: int) -> Tensor:
    return (own >= 0) & (own < classes)


def _at(w: Tensor, own: Tensor) -> Tensor:
    """Gather w (C,) at the target classes; out-of-range ones are clamped, and their loss is nan anyway."""
    return w[own.clamp(0, len(w) - 1)] if len(w) else w.new_zeros(own.shape)


def probability_targets(
    target: Tensor,  # (N, C)
    *,
    class_weight: Tensor | None = None,  # (C,)
    smoothing: float = 0.0,
    sample_weight: Tensor | None = None,  # (N,)
    held: ClassSlice | None = None,
) -> Targets:
    """Targets given as one probability (of any sign and mass) for every class."""
    total, classes = target.shape
    rows = weight = None
    if sample_weight is not None:
        rows, weight = _taking_part(torch.ones((), dtype=torch.bool, device=target.device), sample_weight)
    dtype = statistics_dtype(target.device)
    return Targets(
        classes=classes,
        total=total,
        rows=rows,
        row_weight=weight,
        mean_weight=None,
        own=None,
        index_mass=None,
        other_mass=None,
        index_checked=False,
        probabilities=target,
        class_weight=None if class_weight is None else class_weight.detach().to(dtype),
        smoothing=smoothing,
        held=held,
    )


def top_k_targets(
    indices: Tensor,  # (N, k) int64, different ones in each row
    probabilities: Tensor,  # (N, k)
    classes: int,
    *,
    spread: bool,
    class_weight: Tensor | None = None,  # (C,)
    smoothing: float = 0.0,
    sample_weight: Tensor | None = None,  # (N,)
    checked: Checked = UNCHECKED,
    held: ClassSlice | None = None,
) -> Targets:
    """Targets given by k classes a row: all of these are the own tile.

    ``spread``: what is missing to a mass of 1 lies evenly on the other classes; else it is no part of t.
    """
    dtype = statistics_dtype(indices.device)
    rows = weight = None
    if sample_weight is not None:
        rows, weight = _taking_part(torch.ones((), dtype=torch.bool, device=indices.device), sample_weight)
    own = indices if rows is None else indices[rows]
    q = (probabilities if rows is None else probabilities[rows]).detach().to(dtype)
    everywhere = classes if held is None else held.total
    others = everywhere - own.shape[1]
    each = None
    if spread and others > 0:
        each = (1 - q.sum(1, keepdim=True)) / others
    uniform = smoothing / everywhere
    mass = q * (1 - smoothing) + uniform
    dense = uniform if each is None else each * (1 - smoothing) + uniform  # of every other class
    rest = None
    if held is not None:
        own = own - held.start
    if class_weight is None:
        a = mass.sum(1, keepdim=True) + dense * others
    else:
        class_weight = class_weight.detach().to(dtype)
        w = _at(class_weight, own)
        mass = mass * w
        a = mass.sum(1, keepdim=True) + dense * (class_weight.sum() - w.sum(1, keepdim=True))
    if held is None:
        rest = a - mass
    else:
        mass = torch.where(_inside(own, classes), mass, 0.0)
    return Targets(
        classes=classes,
        total=indices.shape[0],
        rows=rows,
        row_weight=weight,
        mean_weight=None,
        own=own,
        index_mass=mass,
        other_mass=rest,
        index_checked=checked.classes and held is None,
        probabilities=None,
        class_weight=class_weight,
        smoothing=smoothing,
        spread=each,
        held=held,
    )


def of_one_class(targets: Targets, labels: Tensor) -> Targets:
    """Return targets for the same rows: of each row the class in `labels` (M,), with mass 1."""
    return replace(
        targets,
        own=labels[:, None],
        index_mass=None,
        other_mass=None,
        index_checked=True,
        probabilities=None,
        class_weight=None,
        smoothing=0.0,
        spread=None,
    )


def no_targets(rows: int, classes: int, device: torch.device, sample_weight: Tensor | None) -> Targets:
    """Return targets without any mass, for what depends on the logits alone."""
    picked = weight = None
    if sample_weight is not None:
        picked, weight = _taking_part(torch.ones((), dtype=torch.bool, device=device), sample_weight)
    return Targets(
        classes=classes,
        total=rows,
        rows=picked,
        row_weight=weight,
        mean_weight=None,
        own=None,
        index_mass=None,
        other_mass=None,
        index_checked=False,
        probabilities=None,
        class_weight=None,
        smoothing=0.0,
    )


def check_top_k(indices: Tensor, classes: int, check: bool | None) -> Checked:
    """Classes, and different ones in each row (N, ..., k): an error names the first that is not.

    As `check_index` does, on a CPU or with ``check=True``; elsewhere an asynchronous assertion fails.
    """
    if check is False or indices.numel() == 0:
        return UNCHECKED
    good = (indices >= 0) & (indices < classes)
    ordered = indices.sort(-1).values
    different = ordered[..., 1:] != ordered[..., :-1]
    if check is None and indices.device.type != "cpu":
        torch._assert_async(
            good.all() & different.all(),
            f"TopKTarget.indices must be different classes of 0..{classes - 1}; check_targets=True names one",
        )
        return UNCHECKED
    if not good.all():
        at = tuple(good.logical_not().nonzero()[0].tolist())
        raise IndexError(f"TopKTarget.indices{list(at)} is {int(indices[at])}, outside 0..{classes - 1}")
    if not different.all():
        *row, column = different.logical_not().nonzero()[0].tolist()
        raise ValueError(
            f"TopKTarget.indices{row} names class {int(ordered[(*row, column)])} twice; "
            "add the probabilities of a class up first"
        )
    return Checked(classes=True, none_ignored=True)


def _taking_part(keep: Tensor, sample_weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the rows to visit (None: all) and their sample weights."""
    if sample_weight is not None:
        sample_weight = sample_weight.detach().to(statistics_dtype(sample_weight.device))
        keep = keep & (sample_weight != 0)
    if keep.all():
        return None, sample_weight
    rows = keep.nonzero().squeeze(1)
    return rows, None if sample_weight is None else sample_weight[rows]


def check_index(target: Tensor, classes: int, ignore_index: int, check: bool | None) -> Checked:
    """Raise an error unless each target, int64, is a class or the ignore index.

    A target outside the classes is never scored as something else.

    On a CPU, and with ``check=True``, IndexError names the first one; elsewhere an asynchronous assertion
    fails; with ``check=False`` it is not looked for, and costs nan.
    """
    if check is False:
        return UNCHECKED
    if target.device.type == "cpu" and target.numel():
        low, high = (int(bound) for bound in target.aminmax())
        if low >= 0 and high < classes and not low <= ignore_index <= high:
            return Checked(classes=True, none_ignored=True)
    good = (target == ignore_index) | ((target >= 0) & (target < classes))
    if check is None and target.device.type != "cpu":
        torch._assert_async(good.all(), f"a target is outside 0..{classes - 1}; check_targets=True names it")
        return UNCHECKED
    if not good.all():
        at = tuple(good.logical_not().nonzero()[0].tolist())
        where = "" if not at else f" at row {at[0]}" if len(at) == 1 else f" at position {at}"
        raise IndexError(
            f"target {int(target[at])}{where} is outside 0..{classes - 1}; "
            f"mark rows to skip with ignore_index (now {ignore_index})"
        )
    return Checked(classes=True, none_ignored=False)
