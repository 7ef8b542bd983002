"""The temperature of a classifier's logits: one convex problem in the inverse temperature β = 1/T.

    f(β) = Σ s (a·lse(β u) − β⟨t, u⟩)        u = z − max z
    f′(β) = Σ s a ⟨p, u⟩ − k                 k = Σ s ⟨t, u⟩        p = softmax(β u)
    f″(β) = Σ s a Var_p(u) ≥ 0

So f′ rises from f′(0), where p is uniform over the unmasked classes, to f′(∞) = −k, where p lies on the
largest logits. If it changes sign, f has exactly one minimum, and Newton's method on log β with bisection as
a safeguard finds it, whatever the scale of the logits. If it does not, no temperature is the best, which is
an error. The targets enter by s·a and k alone, so every step reads only the logits.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from xent._arguments.call import require_target, resolve_logits
from xent._arguments.options import Options
from xent._calibration_inputs import read_held_out
from xent._core.problem import Problem
from xent._core.target import TopKTarget
from xent._core.targets import Targets
from xent.errors import NoBestTemperature

CHUNK = 1 << 18  # logits at a time: a few float64 copies of them fit the cache
EPS = sys.float_info.epsilon
STEPS = 200  # an upper bound: bisection of the whole range of float64 takes 60
MAX_LOG_BETA = 690.0  # the range of float64


def fit_temperature(
    logits: Tensor | ArrayLike,
    target: Tensor | TopKTarget | ArrayLike,
    *,
    classes: Tensor | ArrayLike | None = None,
    ignore_index: int | None = -100,
    sample_weight: Tensor | ArrayLike | None = None,
) -> float:
    r"""Return the temperature T > 0 that minimises ``cross_entropy(logits, target, temperature=T)``.

    This is temperature scaling: T is fitted on rows held out from training, and the model then predicts
    ``softmax(logits / T)``. The order of the classes stays the same. At the minimum the model's expected
    logit ⟨p, z⟩ and the target's logit ⟨t, z⟩ have the same sum over the rows; this does not calibrate each
    class, or each level of confidence, by itself. The loss is convex in ``β = 1/T``, so there is at most one
    minimum. It is found to rounding for logits of any scale. Source: Guo et al., "On calibration of modern
    neural networks", 2017.

    Args:
        logits: z, (C,), (N, C) or (N, C, d1, ...): a tensor of any floating type, an array or a list. Masked
            classes are −inf. Beside N labels, (N,) are the logits of two classes, (0, s), as
            ``decision_function`` of scikit-learn returns them. The computation is in float64, some rows at a
            time.
        target: class indices, (), (N,) or (N, d1, ...), or labels of ``classes``; or probabilities, of the
            shape of ``logits``; or a :class:`TopKTarget`. No row may have a negative mass. Floating numbers
            are labels only with ``classes``: beside logits (C,), C floating numbers are the probabilities of
            one row.
        classes: (C,) the labels of the columns, in their order: text, whole numbers or bools. For logits (0,
            s) these are two. None: the target holds positions of columns.
        ignore_index: rows with this target are left out. None means −100.
        sample_weight: s, of the shape of an index target, not negative. A row of weight 0 is left out.

    Returns:
        T, a Python float without a unit. Where the loss does not depend on T (the logits of each row are
        equal, or no row counts) it is 1.0, with a ``UserWarning``.

    Raises:
        NoBestTemperature: a ValueError; the loss keeps falling as T goes to its ``limit``, 0.0 or
            ``math.inf``.
        ValueError: shapes that do not fit; a row with nan, with +inf, with masked classes alone, or with a
            target on a masked class; a weight or mass that is negative or not finite; a label that is not in
            ``classes``. The message names the row. Also ``classes`` that differ in number from the columns,
            or that are not distinct.
        IndexError, TypeError: as :func:`cross_entropy`; text without ``classes``.

    Example:
        >>> import torch, xent
        >>> logits, target = torch.tensor([[10.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])
        >>> temperature = xent.fit_temperature(logits, target)  # three of four are right: log 3 apart
        >>> round(10 / temperature, 6), round((logits / temperature).softmax(1)[0, 0].item(), 6)
        (1.098612, 0.75)
        >>> scores, labels = [5.0, 5.0, 5.0, 5.0], ["no", "yes", "yes", "yes"]  # of "yes" against "no"
        >>> round(5 / xent.fit_temperature(scores, labels, classes=["no", "yes"]), 6)
        1.098612
    """
    with torch.no_grad():
        given = read_held_out(logits, target, classes, ignore_index, sample_weight)
        options = Options.of(ignore_index=given.ignore_index, sample_weight=given.sample_weight)
        call = resolve_logits(options, given.logits, given.target)
        require_target(given.target)
        (problem,) = call.problems
        return _solve(_read(problem))


class Rows(NamedTuple):
    """The logits of the M rows that count, and the sums over their targets."""

    logits: Tensor  # (N, C), as given
    targets: Targets
    weight: Tensor  # (M,) float64: s·a
    masked: bool  # whether any logit is −inf
    scale: float  # the largest −u of an unmasked class; below, u is in units of it
    target_logit: float  # k = Σ s ⟨t, u⟩
    size: float  # Σ s ⟨|t|, |u|⟩, the scale of the rounding error of k

    def chunks(self) -> Iterator[slice]:
        return _chunks(self.targets.count, self.targets.n_classes)


class Derivatives(NamedTuple):
    """The derivatives of f at one β."""

    first: float  # f′
    second: float  # f″
    size: float  # of the terms whose difference is f′


def _chunks(rows: int, classes: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(classes, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _load(logits: Tensor, targets: Targets, chunk: slice) -> Tensor:
    """Return a chunk of the rows that count, (R, C) float64, on the CPU if the device has no float64."""
    device = torch.device("cpu") if logits.device.type == "mps" else logits.device
    return logits[targets.pick(chunk)].to(device).to(torch.float64)


def _read(problem: Problem) -> Rows:
    """Check logits and targets in one pass, and compute the sums over the targets."""
    (logits,), targets, row_weight = problem.logits.leaves, problem.targets, problem.row_weight
    assert logits is not None
    classes = targets.n_classes
    weights, target_logits, sizes, scale, masked = (
        [torch.zeros(0, dtype=torch.float64, device="cpu")],
        [],
        [],
        0.0,
        False,
    )
    for chunk in _chunks(targets.count, classes):
        z = _load(logits, targets, chunk)
        u = z - z.amax(1, keepdim=True)
        _raise_for_first(
            u.isnan().any(1), targets, chunk, "has no softmax: it holds nan or +inf, or every class is −inf"
        )
        masked_classes = u == -math.inf
        _raise_for_first(
            (masked_classes & (z != -math.inf)).any(1), targets, chunk, "spans more than float64 holds"
        )
        t = _target_rows(targets, chunk).to(u.device)
        _raise_for_first(~t.isfinite().all(1), targets, chunk, "has a target that holds nan or an infinity")
        _raise_for_first(
            (masked_classes & (t != 0)).any(1),
            targets,
            chunk,
            "has a target on a class that is masked (−inf)",
        )
        s = torch.ones_like(u[:, 0])
        if row_weight is not None:
            s = row_weight[chunk].to(u.device)
            bad = ~((s >= 0) & (s < math.inf))
            _raise_for_first(bad, targets, chunk, "has a sample weight that is negative, infinite or nan")
        a = t.sum(1)
        # the sum of cancelling signed targets is rounding of either sign
        a = torch.where(a.abs() <= classes * EPS * t.abs().sum(1), 0.0, a)
        _raise_for_first(
            ~(a >= 0), targets, chunk, "has a target of negative mass, whose loss is not convex in 1/T"
        )
        u = u.masked_fill(masked_classes, 0.0)
        weights.append((s * a).cpu())
        target_logits.append(float((s * (t * u).sum(1)).sum()))
        sizes.append(float((s * (t * u).abs().sum(1)).sum()))
        scale, masked = max(scale, -float(u.min())), masked or bool(masked_classes.any())
    unit = scale or 1.0
    weight = torch.cat(weights).to(_load(logits, targets, slice(0, 0)).device)
    return Rows(
        logits, targets, weight, masked, scale, math.fsum(target_logits) / unit, math.fsum(sizes) / unit
    )


def _target_rows(targets: Targets, chunk: slice) -> Tensor:
    """Return t of a chunk of rows, (R, C) float64."""
    rows, classes = chunk.stop - chunk.start, targets.n_classes
    t = targets.tile(chunk, slice(0, classes), torch.float64)
    if targets.index is None:
        assert isinstance(t, Tensor)
        return t
    own = targets.index[chunk]
    mass = torch.ones_like(own, dtype=torch.float64)
    if targets.index_mass is not None:
        mass = targets.index_mass[chunk].to(torch.float64)
    base = t if isinstance(t, Tensor) else torch.zeros(rows, classes, dtype=torch.float64, device=own.device)
    return base.scatter(1, own, mass)


def _raise_for_first(bad: Tensor, targets: Targets, chunk: slice, why: str) -> None:
    """Raise a ValueError that names the first bad row of a chunk, if there is one; bad is (R,)."""
    if bad.any():
        row = chunk.start + int(bad.to(torch.uint8).argmax())
        raise ValueError(
            f"row {row if targets.selection.index is None else int(targets.selection.index[row])} {why}"
        )


def _derivatives(rows: Rows, beta: float) -> Derivatives:
    """Return f′ and f″ at β, in units of 1/scale."""
    sums = []
    for chunk in rows.chunks():
        u = _load(rows.logits, rows.targets, chunk)
        u = (u - u.amax(1, keepdim=True)).div_(rows.scale)
        masked_classes = u == -math.inf if rows.masked else None
        p = (u * beta).exp_()
        if masked_classes is not None:  # also at β = 0, where 0·(−inf) must be 0
            p, u = p.masked_fill_(masked_classes, 0.0), u.masked_fill_(masked_classes, 0.0)
        normaliser = p.sum(1)
        mean = torch.linalg.vecdot(p, u) / normaliser
        variance = torch.linalg.vecdot(p, u.sub_(mean[:, None]).square_()) / normaliser
        w = rows.weight[chunk]
        sums.append(torch.stack([w @ mean, w @ variance]))
    mean_logit, second = torch.stack(sums).sum(0).tolist()
    return Derivatives(mean_logit - rows.target_logit, second, abs(mean_logit) + rows.size)


def _solve(rows: Rows) -> float:
    """Return the T at which f′ = 0; raise NoBestTemperature where f′ keeps its sign."""
    if rows.scale == 0.0:
        why = "no row counts" if rows.targets.count == 0 else "the logits of every row are equal"
        return _warn_any(why)
    at_zero = _derivatives(rows, 0.0)
    never_falls = at_zero.first >= -16 * EPS * at_zero.size
    never_rises = -rows.target_logit <= 4 * EPS * rows.size
    if never_falls and never_rises:
        return _warn_any("the loss is the same for all of them")
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
    start = -at_zero.first / at_zero.second if at_zero.second > 0 else 1.0
    return rows.scale / math.exp(_root(rows, math.log(start)))


def _root(rows: Rows, x: float) -> float:
    """Return x = log β with f′(β) = 0, by Newton steps while these stay in bounds and shrink, else bisection.

    The Newton steps are those for log((f′ + k)/k) = 0, which is nearly linear in β where rows are confident:
    there f′ + k decays like exp(−β), and Newton's method on f′ itself would converge slowly.
    """
    low, high = -math.inf, math.inf
    reach, before = 4.0, math.inf  # the largest step while a bound is missing; the size of the last step
    for _ in range(STEPS):
        beta = math.exp(x)
        at = _derivatives(rows, beta)
        if abs(at.first) <= EPS * at.size:
            return x
        low, high = (low, x) if at.first > 0 else (x, high)
        step = _newton_step(at, rows.target_logit) / beta
        step = math.log1p(step) if step > -1 else -math.inf
        if abs(step) <= 4 * EPS * max(1.0, abs(x)):  # relative to x, so that T is accurate
            return x + step
        if math.isinf(low) or math.isinf(high):
            step, reach = max(-reach, min(reach, step)), 2 * reach
        elif not low < x + step < high or abs(step) > before / 2:
            step = (low + high) / 2 - x
        after = max(-MAX_LOG_BETA, min(MAX_LOG_BETA, x + step))
        if abs(after - x) <= EPS * max(1.0, abs(x)):  # no number is left between the bounds
            return x
        x, before = after, abs(after - x)
    return x


def _newton_step(at: Derivatives, target_logit: float) -> float:
    """Return the Newton step from β towards the root."""
    if at.second == 0:
        return math.copysign(math.inf, -at.first)
    mean_logit = at.first + target_logit  # Σ s a ⟨p, u⟩, never positive
    if mean_logit < 0 and target_logit < 0:
        return -mean_logit / at.second * math.log(mean_logit / target_logit)
    return -at.first / at.second


def _warn_any(why: str) -> float:
    """Warn that the loss does not depend on the temperature, and return 1.0."""
    warnings.warn(f"every temperature is as good, {why}: 1.0 changes nothing", UserWarning, stacklevel=4)
    return 1.0
