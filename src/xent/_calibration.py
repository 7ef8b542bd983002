"""The temperature of a classifier's logits: one convex problem in the inverse temperature β = 1/T.

    f(β) = Σ s (a·lse(β u) − β⟨t, u⟩)        u = z − max z
    f′(β) = Σ s a ⟨p, u⟩ − k                 k = Σ s ⟨t, u⟩        p = softmax(β u)
    f″(β) = Σ s a Var_p(u) ≥ 0

So f′ only rises, from f′(0), where p is uniform over the classes that are not masked, to f′(∞) = −k, where p
lies on the largest logits. If it changes its sign, there is one minimum, the only one, and Newton's
method on log β between two bounds finds it, whatever the scale of the logits. If it does not, no temperature
is the best one: that is said. What the target is enters by s·a and k alone, so that every step reads the
logits only.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xent._arguments.call import Options
from xent._arguments.validation import require_tensors
from xent._core.target import TopKTarget
from xent._core.targets import Targets
from xent.errors import NoBestTemperature

CHUNK = 1 << 18  # logits at a time: a few float64 copies of them stay near the cache
EPS = sys.float_info.epsilon
STEPS = 200  # a bound only: a bisection of all of float64 takes 60
FARTHEST = 690.0  # of log β: the range of float64


def fit_temperature(
    logits: Tensor,
    target: Tensor | TopKTarget,
    *,
    ignore_index: int | None = -100,
    sample_weight: Tensor | None = None,
) -> float:
    r"""The temperature T > 0 that minimises ``cross_entropy(logits, target, temperature=T)``.

    Temperature scaling: to be fitted on held-out rows. ``logits / T`` has the same order of classes, and the
    model's expected logit ⟨p, z⟩ is then the targets', summed over those rows; no single class, nor level of
    confidence, is promised to be calibrated. There is at most one minimum, found to rounding, for logits of
    any scale. Formula: mathematics page, §1, as a function of β = 1/T; Guo et al. (2017), *On calibration of
    modern neural networks*.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ...), of any floating type; computed with in float64, some rows at
            a time. Masked classes are −inf.
        target: class indices, (), (N,) or (N, d1, ...); or probabilities, the shape of ``logits``; or a
            :class:`TopKTarget`. No row's mass may be negative.
        ignore_index: rows with this target are left out. None means −100.
        sample_weight: the shape of an index target, not negative. A row of weight 0 is left out.

    Returns:
        T, a Python float. 1.0, with a ``UserWarning``, where every T is as good: logits that are equal in
        each row, or no row that counts.

    Raises:
        NoBestTemperature: a ValueError; ``limit`` is 0.0 or ``math.inf``, the temperature towards which the
            loss falls without end to its fall.
        ValueError: shapes that do not fit; a row with nan, +inf, nothing but masked classes, or a target on
            a masked class; a negative weight or mass, or one that is not finite; each names the row.
        IndexError, TypeError: as :func:`cross_entropy`.

    Example:
        >>> import torch, xent
        >>> logits, target = torch.tensor([[10.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])
        >>> temperature = xent.fit_temperature(logits, target)  # three of four are right: log 3 apart
        >>> round(10 / temperature, 6), round((logits / temperature).softmax(1)[0, 0].item(), 6)
        (1.098612, 0.75)
    """
    require_tensors(logits=logits)
    with torch.no_grad():
        call = Options.of(ignore_index=ignore_index, sample_weight=sample_weight).of_logits(logits, target)
        call.with_target()
        problem = call.parts[0].problem
        return _solve(_read(problem.logits.tensors[0], problem.targets))


class Rows(NamedTuple):
    """What the search needs of the M rows that count."""

    logits: Tensor  # (N, C), as given
    targets: Targets
    weight: Tensor  # (M,) float64: s·a
    masked: bool  # whether any logit is −inf
    scale: float  # the largest −u of a class that is not masked; u is in units of it below
    pull: float  # k = Σ s ⟨t, u⟩
    size: float  # Σ s ⟨|t|, |u|⟩, beside which a k of rounding alone is none

    def chunks(self) -> Iterator[slice]:
        return _chunks(self.targets.count, self.targets.classes)


class Slope(NamedTuple):
    value: float  # f′
    rise: float  # f″
    size: float  # of the terms that f′ is the difference of


def _chunks(rows: int, classes: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(classes, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _load(logits: Tensor, targets: Targets, chunk: slice) -> Tensor:
    """A chunk of the rows that count, in float64 (on the CPU where the device has none): (R, C)."""
    device = torch.device("cpu") if logits.device.type == "mps" else logits.device
    return logits[targets.pick(chunk)].to(device).to(torch.float64)


def _read(logits: Tensor | None, targets: Targets) -> Rows:
    """One look at logits and targets: what is wrong with them, and all that the targets have to say."""
    assert logits is not None
    classes = targets.classes
    weights, pulls, sizes, scale, masked = (
        [torch.zeros(0, dtype=torch.float64, device="cpu")],
        [],
        [],
        0.0,
        False,
    )
    for chunk in _chunks(targets.count, classes):
        z = _load(logits, targets, chunk)
        u = z - z.amax(1, keepdim=True)
        _refuse(
            u.isnan().any(1), targets, chunk, "has no softmax: it holds nan or +inf, or every class is −inf"
        )
        gone = u == -math.inf
        _refuse((gone & (z != -math.inf)).any(1), targets, chunk, "spans more than float64 holds")
        t = _target_rows(targets, chunk).to(u.device)
        _refuse(~t.isfinite().all(1), targets, chunk, "has a target that holds nan or an infinity")
        _refuse((gone & (t != 0)).any(1), targets, chunk, "has a target on a class that is masked (−inf)")
        s = torch.ones_like(u[:, 0])
        if targets.row_weight is not None:
            s = targets.row_weight[chunk].to(u.device)
            bad = ~((s >= 0) & (s < math.inf))
            _refuse(bad, targets, chunk, "has a sample weight that is negative, infinite or nan")
        a = t.sum(1)
        # of signed targets that cancel, rounding leaves either sign
        a = torch.where(a.abs() <= classes * EPS * t.abs().sum(1), 0.0, a)
        _refuse(~(a >= 0), targets, chunk, "has a target of negative mass, whose loss is not convex in 1/T")
        u = u.masked_fill(gone, 0.0)
        weights.append((s * a).cpu())
        pulls.append(float((s * (t * u).sum(1)).sum()))
        sizes.append(float((s * (t * u).abs().sum(1)).sum()))
        scale, masked = max(scale, -float(u.min())), masked or bool(gone.any())
    unit = scale or 1.0
    weight = torch.cat(weights).to(_load(logits, targets, slice(0, 0)).device)
    return Rows(logits, targets, weight, masked, scale, math.fsum(pulls) / unit, math.fsum(sizes) / unit)


def _target_rows(targets: Targets, chunk: slice) -> Tensor:
    """t of a chunk of rows, (R, C) float64."""
    rows, classes = chunk.stop - chunk.start, targets.classes
    t = targets.tile(chunk, slice(0, classes), torch.float64)
    if targets.own is None:
        assert t is not None
        return t
    own = targets.own[chunk]
    mass = torch.ones_like(own, dtype=torch.float64)
    if targets.index_mass is not None:
        mass = targets.index_mass[chunk].to(torch.float64)
    base = torch.zeros(rows, classes, dtype=torch.float64, device=own.device) if t is None else t
    return base.scatter(1, own, mass)


def _refuse(bad: Tensor, targets: Targets, chunk: slice, why: str) -> None:
    """Raise a ValueError that names the first bad row of a chunk (R,)."""
    if bad.any():
        row = chunk.start + int(bad.to(torch.uint8).argmax())
        raise ValueError(f"row {row if targets.rows is None else int(targets.rows[row])} {why}")


def _slope(rows: Rows, beta: float) -> Slope:
    """f′ and f″ at β, which is in units of 1/scale."""
    sums = []
    for chunk in rows.chunks():
        u = _load(rows.logits, rows.targets, chunk)
        u = (u - u.amax(1, keepdim=True)).div_(rows.scale)
        gone = u == -math.inf if rows.masked else None
        p = (u * beta).exp_()
        if gone is not None:  # at β = 0 too, and 0·(−inf) = 0
            p, u = p.masked_fill_(gone, 0.0), u.masked_fill_(gone, 0.0)
        total = p.sum(1)
        mean = torch.linalg.vecdot(p, u) / total
        spread = torch.linalg.vecdot(p, u.sub_(mean[:, None]).square_()) / total
        w = rows.weight[chunk]
        sums.append(torch.stack([w @ mean, w @ spread]))
    level, rise = torch.stack(sums).sum(0).tolist()
    return Slope(level - rows.pull, rise, abs(level) + rows.size)


def _solve(rows: Rows) -> float:
    """The T at which f′ = 0."""
    if rows.scale == 0.0:
        why = "no row counts" if rows.targets.count == 0 else "the logits of every row are equal"
        return _any(why)
    first = _slope(rows, 0.0)
    never_falls = first.value >= -16 * EPS * first.size
    never_rises = -rows.pull <= 4 * EPS * rows.size
    if never_falls and never_rises:
        return _any("the loss is the same for all of them")
    if never_rises:
        raise NoBestTemperature(
            "the logits put every target first, so that the loss falls as T goes to 0 and no T is the best: "
            "fit on rows that are not all classified right, or smooth the targets",
            limit=0.0,
        )
    if never_falls:
        raise NoBestTemperature(
            "the logits say less about the targets than equal logits would, so that the loss falls as T goes "
            "to infinity and no T is the best: check that logits and targets belong together",
            limit=math.inf,
        )
    start = -first.value / first.rise if first.rise > 0 else 1.0
    return rows.scale / math.exp(_root(rows, math.log(start)))


def _root(rows: Rows, x: float) -> float:
    """x = log β where f′(β) = 0: Newton's steps while they stay between the bounds and shrink, else halves.

    The steps are those of log(f′ + k)/k = 0, which is nearly a line in β where rows are confident: there
    f′ + k falls off as exp(−β) does, and steps of f′ itself would creep.
    """
    low, high = -math.inf, math.inf
    reach, before = 4.0, math.inf  # of a step where one bound is missing; the size of the step before
    for _ in range(STEPS):
        beta = math.exp(x)
        found = _slope(rows, beta)
        if abs(found.value) <= EPS * found.size:
            return x
        low, high = (low, x) if found.value > 0 else (x, high)
        step = _step(found, rows.pull) / beta
        step = math.log1p(step) if step > -1 else -math.inf
        if abs(step) <= 4 * EPS * max(1.0, abs(x)):  # of x, so that T has its digits
            return x + step
        if math.isinf(low) or math.isinf(high):
            step, reach = max(-reach, min(reach, step)), 2 * reach
        elif not low < x + step < high or abs(step) > before / 2:
            step = (low + high) / 2 - x
        to = max(-FARTHEST, min(FARTHEST, x + step))
        if abs(to - x) <= EPS * max(1.0, abs(x)):  # nothing is left between the bounds
            return x
        x, before = to, abs(to - x)
    return x


def _step(found: Slope, pull: float) -> float:
    """From β towards the root."""
    if found.rise == 0:
        return math.copysign(math.inf, -found.value)
    level = found.value + pull  # Σ s a ⟨p, u⟩, never positive
    if level < 0 and pull < 0:
        return -level / found.rise * math.log(level / pull)
    return -found.value / found.rise


def _any(why: str) -> float:
    warnings.warn(f"every temperature is as good, {why}: 1.0 changes nothing", UserWarning, stacklevel=4)
    return 1.0
