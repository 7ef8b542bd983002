"""The strength of the penalty, chosen by the loss on the validation rows along one warm-started path."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from xent.errors import needs

if TYPE_CHECKING:
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
    **options: Any,
) -> Strengths:
    """Fit the training rows at each strength, and judge each model on the validation rows.

    The options are those of `regularisation_path`: solver, tol, max_iter, stopping.
    """
    with needs("probe"):
        from xent.linear_model.objective import Objective
        from xent.linear_model.path import regularisation_path
    C = 1 / float(l2[0])
    objective = Objective(training, n_classes, C, True, workers=threads, standardisation=standardisation)
    n_training, n_validation = len(training.target), len(validation.target)
    rows = []
    for point in regularisation_path(objective, 1 / l2, **options):
        model = np.concatenate([point.coef, point.intercept[:, None]], axis=1).ravel()
        logits = objective.logits(point.coef, point.intercept, validation)
        right = sum(int((z.argmax(1) == y).sum()) for z, y, _ in logits)
        rows.append(
            (
                float(objective.loss(model, training)[0]) / n_training,
                float(objective.loss(model, validation)[0]) / n_validation,
                right / n_validation,
                point.n_iter,
            )
        )
    return Strengths(l2, *(np.array(column) for column in zip(*rows, strict=True)))
