"""The strength of the penalty, chosen by the loss on the validation rows along one warm-started path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xent.cli.checkpoints import Saved, Stage
from xent.errors import needs
from xent.linear_model.path import COMPARED, Point
from xent.losses._cross_entropy import cross_entropy

if TYPE_CHECKING:
    from xent.linear_model.descent import Progress
    from xent.linear_model.labelled_rows import LabelledRows
    from xent.linear_model.workers import Workers


@dataclasses.dataclass(frozen=True)
class Strengths:
    """A path of strengths and what the model at each of them makes of the rows."""

    l2: np.ndarray  # (k,) descending
    training_loss: np.ndarray  # (k,) nats, without the penalty
    validation_loss: np.ndarray  # (k,)
    validation_accuracy: np.ndarray  # (k,)
    iterations: np.ndarray  # (k,)

    @property
    def best(self) -> int:
        """The position of the least validation loss, the strongest penalty of several."""
        return int(self.validation_loss.argmin())

    @property
    def at_an_end(self) -> bool:
        """True where the best is the first or the last: a wider path may hold a better one."""
        return self.best in (0, len(self.l2) - 1)

    def summary(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        columns = {field.name: getattr(self, field.name).tolist() for field in dataclasses.fields(self)}
        return {"chosen": float(self.l2[self.best]), "at_an_end": self.at_an_end, **columns}


def spaced(start: float, stop: float, count: int) -> np.ndarray:
    """Return as many strengths, evenly in the logarithm, descending.

    >>> spaced(0.01, 100, 5).tolist()
    [100.0, 10.0, 1.0, 0.1, 0.01]
    """
    return np.geomspace(max(start, stop), min(start, stop), count)


def along_the_path(
    training: LabelledRows,
    validation: LabelledRows,
    n_classes: int,
    l2: np.ndarray,  # (k,) descending
    standardisation: tuple[np.ndarray, np.ndarray],  # mean and scale, (D,) each
    threads: Workers,
    stage: Stage,
    tol: float,
    **options: Any,
) -> Strengths:
    """Fit the training rows at each strength, and judge each model on the validation rows.

    It goes on from what the stage has saved. Options are those of `regularisation_path`: solver, max_iter,
    stopping.
    """
    with needs("probe"):
        from xent.linear_model.path import regularisation_path
        from xent.linear_model.wide import make_objective
    objective = make_objective(
        training, n_classes, 1 / float(l2[0]), True, workers=threads, standardisation=standardisation
    )
    total = float(validation.mass(slice(None)).sum())
    done = _Done.of(stage.saved, 1 / l2)
    path = regularisation_path(
        objective,
        1 / l2[len(done.rows) :],
        after=done.points,
        start=done.begun,
        callback=lambda now: stage.keep(done.saved_with(now)),
        tol=COMPARED * tol,
        **options,
    )
    for point in path:
        loss = right = 0.0
        for z, y, weight in objective.logits(point.coef, point.intercept, validation):
            loss += float(cross_entropy(z, y, sample_weight=weight, reduction="sum"))
            mass = torch.ones(len(y)) if weight is None else weight.cpu()
            mass = mass if y.ndim == 1 else mass * y.sum(1).cpu()
            best = y if y.ndim == 1 else y.argmax(1)
            right += float(mass[(z.argmax(1) == best).cpu()].sum(dtype=torch.float64))
        done.add(point, loss / total, right / total)
        stage.keep(done.saved_with(None), now=len(done.rows) == len(l2))
    return Strengths(l2, *(np.array(column) for column in zip(*done.rows, strict=True)))


@dataclasses.dataclass
class _Done:
    """The part of a path that is done: losses, accuracy and iterations a strength; the last two minima."""

    rows: list[tuple[float, float, float, int]]
    points: list[Point]
    begun: tuple[np.ndarray, np.ndarray] | None = None  # coefficients and intercepts at the next strength
    iterations: int = 0  # that have led there

    def add(self, point: Point, validation_loss: float, accuracy: float) -> None:
        """Add the minimum at a strength."""
        self.rows.append((point.loss, validation_loss, accuracy, point.n_iter + self.iterations))
        self.points, self.begun, self.iterations = [*self.points[-1:], point], None, 0

    def saved_with(self, now: Progress | None) -> Callable[[], Saved]:
        """Return what makes the state to keep, with the iteration of a fit that has begun."""

        def made() -> Saved:
            at: list[Point | Progress] = [*self.points] if now is None else [*self.points, now]
            arrays = {"rows": np.array(self.rows).reshape(-1, 4), "coef": np.stack([p.coef for p in at])}
            arrays["intercept"] = np.stack([p.intercept for p in at])
            return Saved(arrays, {"begun": 0 if now is None else now.iteration + self.iterations})

        return made

    @classmethod
    def of(cls, saved: Saved | None, C: np.ndarray) -> _Done:
        """Return what a stage has saved, of a path along C (k,), ascending."""
        if saved is None:
            return cls([], [])
        rows = [(*row[:3], int(row[3])) for row in saved.arrays["rows"].tolist()]
        iterations, minima = saved.about["begun"], list(_pairs(saved))
        begun = minima.pop() if iterations else None
        strengths = C[: len(rows)][-2:].tolist()
        points = [Point(at, *model, 0, True) for at, model in zip(strengths, minima, strict=True)]
        return cls(rows, points, begun, iterations)


def _pairs(saved: Saved) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return zip(saved.arrays["coef"], saved.arrays["intercept"], strict=True)
