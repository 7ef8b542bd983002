"""The target of a row as the t of ℓ = a·lse(z) − ⟨t, z⟩; every option about targets ends here.

    class index y          t = (1 − ε)·w_y·e_y + (ε/C)·w
    probabilities q        t = w∘((1 − ε)·q + ε/C)

with label smoothing ε and class weights w (torch's definitions: weights after smoothing). A row that is
ignored, or whose sample weight is 0, is not multiplied by zero but left out: a `Selection` holds the others.

t is held as a dense part, computed tile by tile, and the masses at an index of one class a row (or k), which
the sweep treats as a tile of its own, so that a row that is right beyond all doubt keeps its digits.

Where processes share the classes, each one's `Targets` are those of its slice: ε/C is still of all C, and a
target class that lies elsewhere is here a class without mass at −inf, which adds nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xent._core.ops import cut
from xent._core.record import record
from xent._core.selection import Selection
from xent._core.statistics import statistics_dtype


class ClassSlice(NamedTuple):
    """The slice of all classes that this process holds."""

    start: int
    total: int  # C


@record
class Targets:
    """Targets of N rows over C classes, M of which count."""

    n_classes: int
    selection: Selection
    index: Tensor | None = None  # (M, K) int64: classes of a row's own tile, counted from the first one here
    index_mass: Tensor | None = None  # (M, K) all of t at these classes; None means 1
    other_mass: Tensor | None = None  # (M, 1) a − Σ index_mass, exactly; None means 0
    index_checked: bool = False  # each index has been seen to be a class
    probabilities: Tensor | None = None  # (N, C)
    class_weight: Tensor | None = None  # (C,) float64
    smoothing: float = 0.0
    remainder: Tensor | None = None  # (M, 1) what every class has, before smoothing and class weights
    mean_weight: Tensor | None = None  # (M,) what a row adds to the divisor of a mean; None means 1
    held: ClassSlice | None = None  # which of all classes these are; None means all

    @property
    def count(self) -> int:
        """M, the number of rows that count."""
        return self.selection.count

    @property
    def n_own(self) -> int:
        """K, the number of a row's own classes."""
        return 1 if self.index is None else self.index.shape[1]

    def pick(self, chunk: slice) -> slice | Tensor:
        """Return a chunk of 0..M as something that indexes the N rows of the caller's tensors."""
        return self.selection.pick(chunk)

    @property
    def uniform(self) -> float:
        """ε/C."""
        return self.smoothing / (self.n_classes if self.held is None else self.held.total)

    @property
    def dense(self) -> bool:
        """The presence of a dense part of t."""
        return self.probabilities is not None or self.remainder is not None or self.smoothing > 0

    @property
    def uniform_alone(self) -> bool:
        """The case that the dense part, if any, is the same for every row."""
        return self.probabilities is None and self.remainder is None

    def elsewhere(self, chunk: slice) -> Tensor | None:
        """Return (R, K) bool, whether another process holds the target class; None where it is alone."""
        if self.held is None or self.index is None:
            return None
        index = cut(self.index, chunk)
        return _inside(index + self.held.start, self.held.total) & ~_inside(index, self.n_classes)

    def completed(self, a: Tensor) -> Targets:
        """Return the targets completed by the mass a (M,) of all classes."""
        if self.held is None or self.index is None or self.other_mass is not None:
            return self
        if self.index.shape[1] == 1 and not self.dense:
            return self
        assert self.index_mass is not None
        return replace(self, other_mass=a[:, None] - self.index_mass)

    def weighed(self, mass: Tensor) -> Targets:
        """Return the targets with w_y, what each row adds to the divisor of a mean, from t_y (M,)."""
        return replace(self, mean_weight=mass / (1 - self.smoothing + self.uniform))

    def resolved(self) -> Targets:
        """Return the targets of the same rows by index, for code that may look at data."""
        selection = self.selection.resolved()
        if self.selection.mask is None or selection.index is None:
            return replace(self, selection=selection)
        names = ("index", "index_mass", "other_mass", "remainder")
        held = {name: getattr(self, name) for name in names}
        chosen: dict[str, Any] = {name: None if t is None else t[selection.index] for name, t in held.items()}
        return replace(self, selection=selection, **chosen)

    def tile(self, chunk: slice, classes: slice, dtype: torch.dtype) -> Tensor | float | None:
        """Return the dense part of t over a tile: (R, T), (1, T) if all rows have the same, or a number."""
        if not self.dense:
            return None
        w = None if self.class_weight is None else cut(self.class_weight, classes).to(dtype)
        if self.probabilities is None:
            uniform = self.uniform
            if self.remainder is not None:
                t = (cut(self.remainder, chunk) * (1 - self.smoothing) + uniform).to(dtype)
                return t.expand(-1, classes.stop - classes.start) if w is None else t * w
            return uniform if w is None else (w * uniform)[None]
        t = self.probabilities[self.pick(chunk), classes].to(dtype)
        if self.smoothing > 0:
            t = t * (1 - self.smoothing) + self.uniform
        return t if w is None else t * w

    def probability_factor(self, classes: slice, dtype: torch.dtype) -> Tensor | float:
        """Return ∂t/∂q, the same for every row: a number or (T,)."""
        factor = 1 - self.smoothing
        return factor if self.class_weight is None else self.class_weight[classes].to(dtype) * factor


def index_targets(
    index: Tensor,  # (M,) int64, of the rows that count
    classes: int,
    selection: Selection,
    *,
    class_weight: Tensor | None = None,  # (C,)
    smoothing: float = 0.0,
    checked: bool = False,
    held: ClassSlice | None = None,
) -> Targets:
    """Return targets given as class indices; one outside the classes costs nan (see `check_index`)."""
    if class_weight is None and not smoothing and held is None:
        return Targets(classes, selection, index[:, None], index_checked=checked)
    w = _wide(class_weight)
    mean_weight = index_mass = other_mass = None
    if held is not None:
        index = index - held.start
    if w is not None:
        mean_weight = w.index_select(0, index) if checked and held is None else _at(w, index)
        index_mass = mean_weight[:, None]
    if smoothing or held is not None:
        uniform = smoothing / (classes if held is None else held.total)
        if index_mass is None:
            dtype = statistics_dtype(index.device)
            index_mass = index.new_ones((), dtype=dtype).mul_(1 - smoothing + uniform).expand(len(index), 1)
        else:
            index_mass = index_mass * (1 - smoothing) + index_mass * uniform
        if held is None and w is None:
            other_mass = torch.full_like(index_mass, uniform * (classes - 1))
        elif held is None and w is not None and mean_weight is not None:
            other_mass = uniform * w.sum() - mean_weight[:, None] * uniform
        else:
            index_mass = torch.where(_inside(index, classes)[:, None], index_mass, 0.0)
            mean_weight = None  # of other processes' classes: it comes with the statistics
            if w is None and smoothing and held is not None:
                other_mass = torch.full_like(index_mass, uniform * (held.total - 1))
    return Targets(
        classes,
        selection,
        index[:, None],
        index_mass,
        other_mass,
        index_checked=checked and held is None,
        class_weight=w,
        smoothing=smoothing,
        mean_weight=mean_weight,
        held=held,
    )


def probability_targets(
    target: Tensor,  # (N, C)
    selection: Selection | None = None,  # None means all rows
    *,
    class_weight: Tensor | None = None,  # (C,)
    smoothing: float = 0.0,
    held: ClassSlice | None = None,
) -> Targets:
    """Return targets given as one probability (of any sign and mass) for every class."""
    rows, classes = target.shape
    return Targets(
        classes,
        Selection(rows) if selection is None else selection,
        probabilities=target,
        class_weight=_wide(class_weight),
        smoothing=smoothing,
        held=held,
    )


def top_k_targets(
    index: Tensor,  # (M, k) int64, different ones in each row, of the rows that count
    probabilities: Tensor,  # (M, k)
    classes: int,
    selection: Selection,
    *,
    spread: bool,
    class_weight: Tensor | None = None,  # (C,)
    smoothing: float = 0.0,
    checked: bool = False,
    held: ClassSlice | None = None,
) -> Targets:
    """Return targets given by k classes a row: all of these are the own tile.

    ``spread``: what is missing to a mass of 1 lies evenly on the other classes; else it is no part of t.
    """
    q = probabilities.detach().to(statistics_dtype(index.device))
    everywhere = classes if held is None else held.total
    others = everywhere - index.shape[1]
    each = None
    if spread and others > 0:
        each = (1 - q.sum(1, keepdim=True)) / others
    uniform = smoothing / everywhere
    mass = q * (1 - smoothing) + uniform
    dense = uniform if each is None else each * (1 - smoothing) + uniform  # of every other class
    rest = None
    if held is not None:
        index = index - held.start
    class_weight = _wide(class_weight)
    if class_weight is None:
        a = mass.sum(1, keepdim=True) + dense * others
    else:
        w = _at(class_weight, index)
        mass = mass * w
        a = mass.sum(1, keepdim=True) + dense * (class_weight.sum() - w.sum(1, keepdim=True))
    if held is None:
        rest = a - mass
    else:
        mass = torch.where(_inside(index, classes), mass, 0.0)
    return Targets(
        classes,
        selection,
        index,
        mass,
        rest,
        index_checked=checked and held is None,
        class_weight=class_weight,
        smoothing=smoothing,
        remainder=each,
        held=held,
    )


def of_one_class(targets: Targets, labels: Tensor) -> Targets:
    """Return targets for the same rows: of each row the class in `labels` (M,), with mass 1."""
    return Targets(targets.n_classes, targets.selection, labels[:, None], index_checked=True)


def no_targets(classes: int, selection: Selection) -> Targets:
    """Return targets without any mass, for what depends on the logits alone."""
    return Targets(classes, selection)


def _wide(class_weight: Tensor | None) -> Tensor | None:
    return None if class_weight is None else class_weight.detach().to(statistics_dtype(class_weight.device))


def _inside(index: Tensor, classes: int) -> Tensor:
    return (index >= 0) & (index < classes)


def _at(w: Tensor, index: Tensor) -> Tensor:
    """Gather w (C,) at the target classes; out-of-range ones are clamped, and their loss is nan anyway."""
    return w[index.clamp(0, len(w) - 1)] if len(w) else w.new_zeros(index.shape)
