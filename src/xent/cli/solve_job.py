"""The solver's part of ``xent fit``: an objective over the rows of all ranks, and the way to its minimum."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from xent._processes.group import Ranks
from xent._processes.leader import Leader
from xent.cli.checkpoints import Saved, Stage
from xent.data.table import Missing
from xent.errors import needs
from xent.linear_model.labelled_rows import LabelledRows
from xent.linear_model.solvers import choose
from xent.linear_model.wide import make_objective

if TYPE_CHECKING:
    from xent.linear_model.descent import Descent, Progress
    from xent.linear_model.workers import Workers


CURVES = "training_curve", "validation_curve"
"""Arrays of a checkpoint and of an outcome: nats, of each iteration."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a fit; kept with the model."""

    validation: float = 0.2  # share of the rows, 0 for none
    l2: float = 1.0  # 1/C of the estimator
    l2_path: tuple[float, float, int] | None = None  # start, stop, count: l2 is chosen among these
    tol: float = 1e-4
    max_iter: int = 1000
    solver: str = "auto"  # or the name of a registered one
    stopping: str = "objective"  # what tol bounds; or "gradient"
    seed: int = 0  # of the split
    standardize: bool = True
    missing: Missing = "error"
    class_weight: str | None = None  # "balanced": every class weighs alike
    calibrate: bool = False  # whether the temperature is fitted to the validation rows


@dataclasses.dataclass(frozen=True)
class Gap:
    """The certificate of a fit: its objective is at most so far above the minimum."""

    nats: float
    relative: float  # to the objective, or to 10⁻³·log C where that is larger
    by: str  # "duality gap" or "Newton decrement"

    @classmethod
    def of(cls, descent: Descent) -> Gap:
        """Return that of the point that a descent has reached."""
        certificate = descent.certificate
        return cls(certificate.bound, certificate.bound / descent.yardstick, certificate.kind)


@dataclasses.dataclass(frozen=True)
class How:
    """The choices made for a fit, and the reason."""

    name: str  # of the solver
    why: str
    threads: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a solver, on rank 0."""

    coef: np.ndarray
    intercept: np.ndarray
    training_curve: list[float]
    validation_curve: list[float]
    seconds: float
    gradient_norm: float
    gap: Gap
    converged: bool
    advice: str
    interrupted: bool
    how: How


def solve(
    training: LabelledRows,
    validation: LabelledRows,
    masses: tuple[float, float],  # of training and validation rows of all ranks: their weights
    n_classes: int,
    settings: Settings,
    scaling: tuple[np.ndarray, np.ndarray],  # mean and scale of the features, (D,) each
    on_iteration: Callable[[Progress], None] | None,
    ranks: Ranks,
    threads: Workers,
    stage: Stage,
) -> Outcome:
    """Minimise over the rows of all ranks; return, on all of them, where rank 0 came to.

    It goes on from what the stage has saved; of a fit that has ended there that is its outcome.
    """
    with needs("probe"):
        from xent.linear_model.advice import advice, command_words
        from xent.linear_model.descent import Descent
    leader, (training_mass, validation_mass) = Leader(ranks), masses
    C = 1 / settings.l2 if settings.l2 else np.inf
    objective = make_objective(
        training, n_classes, C, fit_intercept=True, leader=leader, workers=threads, standardisation=scaling
    )
    # not to be interrupted, so that both curves have a point
    validation_loss = leader.register(lambda m: objective.loss(m, validation), interruptible=False)
    solver, why = choose(objective, settings.solver, settings.tol, settings.stopping)
    saved, before = stage.saved, 0.0
    training_curve: list[float] = []
    validation_curve: list[float] = []
    if saved is not None:
        training_curve, validation_curve = (saved.arrays[k].tolist() for k in CURVES)
        before = saved.about["seconds"]
    left = max(0, settings.max_iter - len(training_curve))
    descent = Descent(objective, solver, settings.tol, left, settings.stopping)

    def watch(now: Progress) -> None:
        if validation_mass:
            model = np.concatenate([now.coef, now.intercept[:, None]], axis=1)
            validation_curve.append(float(validation_loss(model.ravel())[0]) / validation_mass)
        penalty = settings.l2 * 0.5 * float(np.vdot(now.coef, now.coef)) / training_mass
        training_curve.append(now.objective - penalty)
        stage.keep(lambda: Saved(arrays(now.coef, now.intercept), {"seconds": seconds()}))
        if on_iteration is not None:
            on_iteration(now)

    def arrays(coef: np.ndarray, intercept: np.ndarray) -> dict[str, np.ndarray]:
        curves = dict(zip(CURVES, map(np.array, (training_curve, validation_curve)), strict=True))
        return {"coef": coef, "intercept": intercept, **curves}

    def seconds() -> float:
        return before + time.perf_counter() - started

    def run() -> Outcome:
        if saved is not None and _has_ended(saved, settings):
            return _outcome(saved)
        start, interrupted = None, False
        if saved is not None:
            start = objective.to_solver(saved.arrays["coef"], saved.arrays["intercept"])
        try:
            descent.run(start, watch)
        except KeyboardInterrupt:
            if not training_curve:
                raise
            interrupted = True
        words = command_words(ranks.slices > 1, settings.standardize)
        outcome = Outcome(
            descent.coef,
            descent.intercept,
            training_curve,
            validation_curve,
            seconds(),
            descent.gradient_norm,
            Gap.of(descent),
            descent.converged,
            "" if descent.converged else advice(descent, words),
            interrupted,
            How(solver.name, why, str(threads)),
        )
        about = _ended(outcome) if not interrupted else {"seconds": outcome.seconds}
        stage.keep(lambda: Saved(arrays(outcome.coef, outcome.intercept), about), now=True)
        return outcome

    started = time.perf_counter()
    return leader.run(run)


def _ended(outcome: Outcome) -> dict[str, Any]:
    """Return what of an outcome is no array, as JSON values."""
    plain = {k: v for k, v in vars(outcome).items() if k not in ("coef", "intercept", *CURVES)}
    return plain | {"gap": dataclasses.asdict(outcome.gap), "how": dataclasses.asdict(outcome.how)}


def _has_ended(saved: Saved, settings: Settings) -> bool:
    """Return whether a fit has ended, and not for want of iterations that it is given now."""
    return "converged" in saved.about and (
        saved.about["converged"] or len(saved.arrays[CURVES[0]]) >= settings.max_iter
    )


def _outcome(saved: Saved) -> Outcome:
    """Return the outcome of a fit that has ended."""
    plain = saved.about | {"gap": Gap(**saved.about["gap"]), "how": How(**saved.about["how"])}
    curves = {name: saved.arrays[name].tolist() for name in CURVES}
    return Outcome(coef=saved.arrays["coef"], intercept=saved.arrays["intercept"], **curves, **plain)
