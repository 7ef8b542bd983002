"""``SoftmaxRegressionCV``: the strength of the penalty chosen by cross-validation, along warm-started paths.

C* = argmax_C  mean over folds of score(model fitted at C to the other folds, fold)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import get_scorer
from sklearn.model_selection import check_cv

from xent._core.validators import BalancedName, StoppingName, valid
from xent.data.rows import parts
from xent.linear_model.labelled_rows import LabelledRows
from xent.linear_model.path import COMPARED, Point, regularisation_path
from xent.linear_model.softmax_regression import SoftmaxRegression
from xent.linear_model.wide import make_objective
from xent.linear_model.workers import workers

LOSS = "neg_log_loss"
CHOICE = ("Cs", "cv", "scoring", "refit")
SPAN = (-4.0, 4.0)
"""Powers of ten between which a whole number of strengths is spaced, as scikit-learn has it."""


class SoftmaxRegressionCV(SoftmaxRegression):
    """A ``SoftmaxRegression`` that chooses the strength of its penalty by cross-validation.

    The strength is the C with the best mean score over the folds: each fold is scored by the model that was
    fitted to the other folds. Each fold is fitted along a path from the strongest penalty to the weakest,
    where every fit starts from the end of the last one, so that 45 strengths cost a few fits. The parameters
    are those of scikit-learn's ``LogisticRegressionCV``. The class needs the extra ``xent[probe]``.

    Args:
        Cs: the inverse strengths, an array of numbers; or a whole number, for that many from 1e-4 to 1e4,
            evenly in the logarithm.
        cv: the folds: their number, a splitter, an iterable of (training, test) positions, or None for 5
            folds stratified by class.
        scoring: None or ``"neg_log_loss"`` for the least mean loss; or the name of a scorer of scikit-learn,
            such as ``"accuracy"``; or a function ``scoring(estimator, X, y)``.
        refit: whether to fit all rows at the best strength. False averages the folds' coefficients there.
        tol: as in :class:`xent.SoftmaxRegression`, for the fit to all rows; folds are fitted within 10·tol.
        max_iter, fit_intercept, class_weight, solver: as in :class:`xent.SoftmaxRegression`.
        stopping, random_state, verbose: as in :class:`xent.SoftmaxRegression`.

    Attributes:
        C_: the best strength; of several equally good ones the strongest penalty.
        Cs_: (k,) the strengths, ascending.
        scores_: (folds, k) the score of each fold at each strength; greater is better.
        n_iter_path_: (folds, k) the numbers of iterations.
        coef_: as in :class:`xent.SoftmaxRegression`, of the last fit, and so are its other attributes.

    Raises:
        MissingExtra: an ImportError at the first use of the name; scikit-learn or SciPy is not installed.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = SoftmaxRegressionCV(Cs=[0.01, 1.0, 100.0]).fit(X, y)
        >>> model.C_, model.scores_.shape
        (100.0, (5, 3))
    """

    C_: float
    Cs_: np.ndarray
    scores_: np.ndarray
    n_iter_path_: np.ndarray

    def __init__(
        self,
        Cs: int | Iterable[float] = 10,
        *,
        cv: Any = None,
        scoring: str | Callable[..., float] | None = None,
        refit: bool = True,
        tol: float = 1e-4,
        max_iter: int = 1000,
        fit_intercept: bool = True,
        class_weight: dict[Any, float] | BalancedName | None = None,
        solver: str = "auto",
        stopping: StoppingName = "objective",
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.Cs = Cs
        self.cv = cv
        self.scoring = scoring
        self.refit = refit
        self.tol = tol
        self.max_iter = max_iter
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.solver = solver
        self.stopping = stopping
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SoftmaxRegressionCV:  # type: ignore[override]
        """Choose the strength by the folds' scores, then fit all rows.

        Args:
            X, y, sample_weight: as in :meth:`xent.SoftmaxRegression.fit`.

        Returns:
            The estimator itself.

        Raises:
            ValueError: as :meth:`xent.SoftmaxRegression.fit`; also ``Cs`` without a strength or with one that
                is not positive, and a score that is not finite.
            TypeError: as :meth:`xent.SoftmaxRegression.fit`.
        """
        parameters = self._parameters()
        self.Cs_ = strengths(self.Cs)
        rows, classes = self._labelled_rows(parameters.class_weight, X, y, sample_weight)
        hard = rows.target if rows.target.ndim == 1 else rows.target.argmax(axis=1)
        folds = list(check_cv(self.cv, hard, classifier=True).split(hard, hard))
        scores, iterations = np.empty((len(folds), len(self.Cs_))), np.empty((len(folds), len(self.Cs_)), int)
        paths: list[list[Point]] = []
        self.classes_, self.temperature_ = classes, 1.0
        names = self.__dict__.pop("feature_names_in_", None)  # the rows of a fold are an array
        for fold, (training, test) in enumerate(folds):
            held, points = rows.take(np.sort(test)), []
            for k, point in enumerate(self._path(parameters, rows.take(np.sort(training)), self.Cs_)):
                self.coef_, self.intercept_ = point.coef, point.intercept
                scores[fold, k], iterations[fold, k] = self._scored(held), point.n_iter
                points.append(point)
            paths.append(points)
        if names is not None:
            self.feature_names_in_ = names
        self.scores_, self.n_iter_path_ = scores, iterations
        best = int(scores.mean(axis=0).argmax())
        self.C_ = float(self.Cs_[best])
        if not np.isfinite(scores).all():
            raise ValueError(
                f"scoring={self.scoring!r} is not finite on a fold; choose another, or other folds"
            )
        if parameters.refit:
            self._refit(X, y, sample_weight)
        else:
            self.coef_ = np.mean([points[best].coef for points in paths], axis=0)
            self.intercept_ = np.mean([points[best].intercept for points in paths], axis=0)
            self.n_iter_ = int(iterations[:, best].max())
        return self

    def _refit(self, X: Any, y: Any, sample_weight: Any) -> None:
        """Fit all rows at the strength chosen, and take what that fit has found."""
        alike = {k: v for k, v in self.get_params(deep=False).items() if k not in CHOICE}
        final = SoftmaxRegression(C=self.C_, **alike).fit(X, y, sample_weight)
        for name, value in vars(final).items():
            if name.endswith("_") and not name.startswith("_"):
                setattr(self, name, value)

    def _parameters(self) -> SimpleNamespace:
        """Return the parameters as plain Python objects, those of the choice less but ``refit``."""
        alike = {k: v for k, v in self.get_params(deep=False).items() if k not in CHOICE}
        checked = SoftmaxRegression(**alike)._parameters()
        checked.refit = valid("refit", self.refit)
        return checked

    def _path(self, parameters: Any, rows: LabelledRows, Cs: np.ndarray) -> Iterable[Point]:
        shape = (rows.source.shape[0], rows.source.width, len(self.classes_))
        at_work = workers(*shape, device=rows.device.type)
        with torch.inference_mode(False), torch.enable_grad(), at_work as threads:
            objective = make_objective(
                rows, len(self.classes_), float(Cs[0]), parameters.fit_intercept, workers=threads
            )
            late = []
            for point in regularisation_path(
                objective,
                Cs,
                solver=parameters.solver,
                tol=parameters.tol * (COMPARED if parameters.refit else 1.0),
                max_iter=parameters.max_iter,
                stopping=parameters.stopping,
            ):
                late += [] if point.converged else [point.C]
                yield point
        if late:
            at = ", ".join(f"{C:.3g}" for C in late)
            warnings.warn(
                f"{type(self).__name__} has not converged at C = {at}; raise max_iter or tol, or drop these",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _scored(self, held: LabelledRows) -> float:
        """Return the score of the coefficients as they are on rows held out; greater is better."""
        if self.scoring not in (None, LOSS):
            batches = [batch for _, batch in held.source.batches()]
            x = batches[0].joined(batches[1:]).as_features()
            y = held.target if held.target.ndim == 2 else self.classes_[held.target]
            scorer = self.scoring if callable(self.scoring) else get_scorer(self.scoring)
            return float(scorer(self, x, y))
        gain = mass = 0.0
        for here, batch in parts(held.source):
            log_p, target = self.predict_log_proba(batch.as_features()), held.target[here]
            if target.ndim == 2:
                of_row, masses = (target * log_p).sum(axis=1), target.sum(axis=1)
            else:
                of_row, masses = log_p[np.arange(len(log_p)), target], np.ones(len(log_p))
            weight = np.ones(len(log_p)) if held.weight is None else held.weight[here].astype(np.float64)
            gain, mass = gain + float(weight @ of_row), mass + float(weight @ masses)
        return gain / mass


def strengths(Cs: Any) -> np.ndarray:
    """Return inverse strengths, ascending, (k,): as given, or as many from 1e-4 to 1e4.

    >>> strengths(3).tolist()
    [0.0001, 1.0, 10000.0]
    """
    if isinstance(Cs, int | np.integer) and not isinstance(Cs, bool):
        if Cs < 1:
            raise ValueError(f"Cs must be at least one strength, got {Cs}")
        return np.logspace(*SPAN, int(Cs)) if Cs > 1 else np.ones(1)
    try:
        found = sorted(float(valid("C", C)) for C in Cs)
    except TypeError as error:
        raise TypeError(f"Cs must be a whole number or an array of positive numbers: {error}") from None
    if not found:
        raise ValueError("Cs holds no strength; give at least one")
    return np.array(found)
