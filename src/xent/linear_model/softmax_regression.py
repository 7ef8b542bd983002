"""Multinomial logistic regression on the fused cross-entropy.

    min over W, b of   C · Σ_n s_n ℓ(W x_n + b, t_n)  +  ½ ‖W‖²           ℓ = a·lse(z) − ⟨t, z⟩

The objective is scikit-learn's, and so is its scale inside the solver: divided by C·Σ_n s_n a_n it is a mean
loss in nats plus l2/2·‖W‖² with l2 = 1/(C·Σ s a), and ``tol`` bounds how far *it* is above its minimum. The
intercept b is not penalised.

The solver minimises it over (V, c) instead of (W, b), where W = V/σ and b = c − W μ: the same objective
at the same point, seen with centred features and, by the choice of σ, a Hessian whose diagonal is constant at
W = 0. Raw features with scales from 1e-3 to 1e3 then need tens of iterations where (W, b) need thousands.
L-BFGS does not copy X. An X mapped from a file is never copied, whatever the solver: it is read a chunk at a
time.

Newton's method goes on where L-BFGS stalls, which sees a decrease only as a difference of two objectives: see
`linear_model/solvers/newton_cg.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.validation import assert_all_finite, check_is_fitted, validate_data

from xent._core.validators import BalancedName, OneOf, StoppingName, valid
from xent.data.rows import RowSource, blocks, is_mapped, row_source
from xent.data.sparse_rows import sparse_source
from xent.linear_model.advice import advice, estimator_words
from xent.linear_model.descent import Descent, Progress
from xent.linear_model.exports import Exports
from xent.linear_model.inputs import (
    BLOCK,
    cast_to,
    check_finite,
    check_finite_sparse,
    read_features,
    read_labels,
    read_sample_weight,
    stays_tensor,
)
from xent.linear_model.labelled_rows import HOST, LabelledRows
from xent.linear_model.saved_model import Saved
from xent.linear_model.solvers import choose, solver_names
from xent.linear_model.wide import make_objective
from xent.linear_model.workers import Workers, workers

FLOATING = [np.float64, np.float32, np.float16]
"""Types of features that are left as they are; others become the first."""


class SoftmaxRegression(Exports, Saved, ClassifierMixin, BaseEstimator):
    """Multinomial logistic regression with scikit-learn's parameters and objective, for hard and soft labels.

    ``fit`` minimises ``C·Σ_n s_n·ℓ_n + ½‖W‖²`` over the weight W (``coef_``) and the intercept b, which is
    not penalised, with the cross-entropy ``ℓ = a·lse(z) − ⟨t, z⟩`` of the logits z = W x + b. "The scaled
    objective" below is this divided by ``C·Σ_n s_n·a_n``: a mean loss in nats plus ``l2/2·‖W‖²`` with
    ``l2 = 1/(C·Σ_n s_n·a_n)``. The class needs the extra ``xent[probe]``.

    Args:
        C: the inverse strength of the penalty, in (0, inf]; ``inf`` is no penalty.
        tol: the tolerance. The solver stops when the scaled objective F is within
            ``tol·max(F, 1e-3·log(number of classes))`` of its minimum; see ``stopping``.
        max_iter: the largest number of iterations. scikit-learn's default, 100, is often too few at its own
            tolerance. A fit that does not converge warns.
        fit_intercept: whether to fit b.
        class_weight: a dictionary with a factor of the loss for each class; or ``"balanced"``, which is
            (total mass) / (number of classes · mass of the class); or None.
        solver: ``"auto"``, ``"lbfgs"``, ``"newton-cg"``, or a solver that
            :func:`xent.linear_model.register_solver` added. ``"auto"`` is ``"lbfgs"`` unless ``tol`` is finer
            than L-BFGS resolves. L-BFGS starts from an approximate inverse of the Hessian and reaches the
            default ``tol`` soonest. Newton's method with conjugate gradients reaches a gradient of 1e-10 in
            float64 in tens of iterations, where L-BFGS no longer resolves a decrease. Each of its iterations
            costs some products with X, and it keeps a standardised copy of an X in memory.
        stopping: the quantity that ``tol`` bounds. ``"objective"`` is a bound on the distance of the scaled
            objective from its minimum: the smaller of the duality gap ``‖∂F/∂W‖²/(2·l2)`` and ten times half
            the Newton decrement as the solver estimates it. ``"gradient"`` is the rule of scikit-learn's
            ``LogisticRegression``: the largest component of F's gradient. That component shrinks with the
            number of classes, so the same ``tol`` gives a worse fit of many classes.
        warm_start: whether ``fit`` starts from the coefficients of the last one.
        random_state: accepted as a parameter of scikit-learn's. The solver draws nothing, so it has no
            effect.
        verbose: whether to print a line for each iteration (a positive number).

    Attributes:
        classes_: (C,) the labels, sorted; ``arange(C)`` for soft labels.
        coef_: W, (C, D); for two classes (1, D): one vector, with the logits (0, s).
        intercept_: b, (C,); for two classes (1,).
        n_iter_: the number of iterations.
        loss_curve_: (``n_iter_`` + 1,) the scaled objective in nats, at the start and after each iteration.
        gradient_norm_: the largest component of its gradient at the end.
        objective_gap_: the bound on its distance from its minimum, in nats.
        converged_: whether the quantity of ``stopping`` is at most ``tol``.
        solver_: the name of the solver that was used.
        temperature_: the number by which logits are divided, 1 after ``fit``. It may be set, for instance to
            ``xent.fit_temperature(model.decision_function(X), y, classes=model.classes_)`` of rows held out.
        n_features_in_: D.
        feature_names_in_: (D,) the names of the columns, where X has names.

    Raises:
        MissingExtra: an ImportError at the first use of the name; scikit-learn or SciPy is not installed.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = SoftmaxRegression().fit(X, y)
        >>> model.predict(X[:3]).tolist(), round(model.score(X, y), 3)
        ([0, 0, 0], 0.973)

        Soft labels are rows of numbers that are not negative, with one column for each class:

        >>> T = np.eye(3)[y] * 0.9 + 0.1 / 3
        >>> SoftmaxRegression().fit(X, T).predict_proba(X[:1]).round(2).tolist()
        [[0.92, 0.08, 0.0]]
    """

    classes_: np.ndarray
    coef_: np.ndarray
    intercept_: np.ndarray
    n_iter_: int
    loss_curve_: np.ndarray
    gradient_norm_: float
    objective_gap_: float
    converged_: bool
    solver_: str
    temperature_: float = 1.0

    def __init__(
        self,
        C: float = 1.0,
        *,
        tol: float = 1e-4,
        max_iter: int = 1000,
        fit_intercept: bool = True,
        class_weight: dict[Any, float] | BalancedName | None = None,
        solver: str = "auto",
        stopping: StoppingName = "objective",
        warm_start: bool = False,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.C = C
        self.tol = tol
        self.max_iter = max_iter
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.solver = solver
        self.stopping = stopping
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, callback: Callable[[Progress], None] | None = None
    ) -> SoftmaxRegression:
        """Fit the model to features and labels.

        Args:
            X: features, (N, D), array-like, tensor or SciPy sparse. Tensors are computed with on their
                device. float32 and half types keep their type in memory and are computed with in float32,
                other types in float64. An array that ``np.load(path, mmap_mode="r")`` maps may be larger than
                memory: it is read a chunk at a time. A sparse matrix or array is computed with as compressed
                rows (CSR), into which other formats are converted once; it is not filled in.
            y: labels of any type, (N,), or soft labels (N, C) with C ≥ 2: the mass of class c in row n, not
                negative. A row need not sum to one: a row of mass a counts a times, and a row of zeros does
                not count. Columns of whole numbers or bools must be one-hot, as they could also be labels
                beside something else.
            sample_weight: s, (N,), not negative, or None.
            callback: a function called with a ``Progress`` after each iteration. If it raises
                ``StopIteration``, the fit ends.

        Returns:
            The estimator itself.

        Raises:
            ValueError: fewer than two classes, labels that are missing, entries that are negative or not
                finite, shapes that do not match, a parameter out of range.
            TypeError: a sparse tensor X, a sparse y, a parameter of the wrong kind.
            KeyboardInterrupt: passed on, with the coefficients of the last iteration in place.
        """
        parameters = self._parameters()
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable or None, got {type(callback).__name__}")
        rows, classes = self._labelled_rows(parameters.class_weight, X, y, sample_weight)
        # the caller may be inside torch.no_grad() or inference_mode(); the gradient is needed all the same
        at_work = workers(rows.source.shape[0], rows.source.width, len(classes), device=rows.device.type)
        with torch.inference_mode(False), torch.enable_grad(), at_work as threads:
            self._fit(parameters, rows, classes, callback, threads)
        return self

    def _labelled_rows(
        self, class_weight: dict[Any, float] | BalancedName | None, X: Any, y: Any, sample_weight: Any
    ) -> tuple[LabelledRows, np.ndarray]:
        """Return the rows with their targets and weights, all of them checked, and the classes, (C,)."""
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        source = self._row_source(X)
        n_rows, dtype = source.shape[0], source.dtype
        y = read_labels(y, n_rows)
        soft = y.ndim == 2
        if soft:
            classes, target = np.arange(y.shape[1]), cast_to(y, dtype, "y")
        else:
            classes, target = np.unique(y, return_inverse=True)
            if len(classes) < 2:
                only = f"the labels hold one class: {classes.tolist()[0]!r}"
                raise ValueError(f"{type(self).__name__} needs at least 2 classes; {only}")
        weight = read_sample_weight(sample_weight, n_rows, dtype)  # (N,) or None
        if class_weight is not None:
            given = _class_weights(class_weight, classes, target, weight)
            per_class = cast_to(given, dtype, "class_weight", "class")  # (C,)
            if soft:
                target = target * per_class
            else:
                weight = per_class[target] if weight is None else weight * per_class[target]
        device = X.device if stays_tensor(X) else HOST
        return LabelledRows(source, target, weight, device), classes

    def _parameters(self) -> SimpleNamespace:
        """Return the parameters as plain Python objects; the error names one that does not fit."""
        given = self.get_params(deep=False)
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                raise TypeError(f"{name} must be a plain value, got a tensor of shape {tuple(value.shape)}")
        solvers = OneOf(solver_names())
        return SimpleNamespace(
            **{
                name: solvers(name, value) if name == "solver" else valid(name, value)
                for name, value in given.items()
            }
        )

    def _row_source(self, X: Any) -> RowSource:
        """Return the features as rows; of a mapped file nothing is copied."""
        if stays_tensor(X):
            validate_data(self, X, skip_check_array=True)
            check_finite(X)
            return row_source(X.detach())
        if issparse(X):
            return sparse_source(self._compressed(X, reset=True))
        if not is_mapped(X):
            return row_source(validate_data(self, read_features(X), dtype=FLOATING, order="C"))
        validate_data(self, X, skip_check_array=True)
        source = row_source(X)
        for _, x in blocks(source):
            assert_all_finite(x.numpy(), estimator_name=type(self).__name__, input_name="X")
        return source

    def _compressed(self, X: Any, reset: bool) -> Any:
        """Return sparse features in CSR, of float32 or float64, finite."""
        X = validate_data(
            self, X, accept_sparse="csr", dtype=FLOATING[:2], ensure_all_finite=False, reset=reset
        )
        check_finite_sparse(X)
        return X

    def __sklearn_tags__(self) -> Any:
        """Return scikit-learn's tags: sparse features are taken."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _fit(
        self,
        parameters: SimpleNamespace,
        rows: LabelledRows,
        classes: np.ndarray,  # (C,)
        callback: Callable[[Progress], None] | None,
        threads: Workers,
    ) -> None:
        objective = make_objective(
            rows, len(classes), parameters.C, parameters.fit_intercept, workers=threads
        )
        _, n_features = rows.source.shape
        start = None
        if parameters.warm_start and hasattr(self, "coef_"):
            shape = (objective.n_vectors, n_features)
            if self.coef_.shape != shape or not np.array_equal(self.classes_, classes):
                raise ValueError(
                    f"warm_start: the last fit has coef_ {self.coef_.shape} for {len(self.classes_)} "
                    f"classes, here {shape} for {len(classes)}; set warm_start=False"
                )
            start = objective.to_solver(self.coef_, self.intercept_)
        self.classes_, self.temperature_ = classes, 1.0

        def watch(now: Progress) -> None:
            if parameters.verbose > 0:
                print(
                    f"iteration {now.iteration}: objective {now.objective:.9g}, "
                    f"gradient {now.gradient_norm:.3g}, at most {now.above:.3g} above the minimum"
                )
            if callback is not None:
                callback(now)

        tol, stopping = parameters.tol, parameters.stopping
        solver, why = choose(objective, parameters.solver, tol, stopping)
        if parameters.verbose > 0:
            print(f"solver {solver.name}: {why}\n{threads}")
        descent = Descent(objective, solver, tol, parameters.max_iter, stopping)
        try:
            descent.run(start, watch if callback is not None or parameters.verbose > 0 else None)
        finally:  # also on Ctrl-C: what has been reached is kept
            self.coef_, self.intercept_ = descent.coef, descent.intercept
            self.n_iter_ = max(0, len(descent.curve) - 1)
            self.loss_curve_ = np.array(descent.curve)
            self.gradient_norm_ = descent.gradient_norm
            self.converged_ = descent.converged
            self.objective_gap_ = descent.certificate.bound
            self.solver_ = solver.name
        if not self.converged_ and not descent.stopped_by_callback:
            self._warn(
                f"stopped after {self.n_iter_} iterations, {descent.reached} above tol {tol:.3g}: "
                f"{advice(descent, estimator_words())}"
            )
        elif objective.runs_away(self.coef_, self.intercept_):
            self._warn(
                "fits rows that a hyperplane separates, without a penalty: the loss has no minimum, and the "
                "weights grow for as long as the solver goes on; give a finite C"
            )

    def _warn(self, message: str) -> None:
        warnings.warn(f"{type(self).__name__} {message}", ConvergenceWarning, stacklevel=4)

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the logits, divided by ``temperature_``.

        Args:
            X: features, (N, D), as for :meth:`fit`.

        Returns:
            (N, C), columns in the order of ``classes_``; for two classes (N,), the logit of ``classes_[1]``
            against 0.
        """
        check_is_fitted(self)
        if stays_tensor(X):
            validate_data(self, X, skip_check_array=True, reset=False)
            check_finite(X)
            logits = self._logits_of(X.detach())
        elif issparse(X):
            logits = self._compressed(X, reset=False) @ self.coef_.T + self.intercept_
        else:
            X = self._dense(X)
            X = X.astype(np.float32) if X.dtype == np.float16 else X
            logits = X @ self.coef_.T + self.intercept_
        logits = logits if self.temperature_ == 1 else logits / logits.dtype.type(self.temperature_)
        return logits[:, 0] if logits.shape[1] == 1 else logits

    def _dense(self, X: Any) -> np.ndarray:
        """Return features (N, D) as an array, those that have been fitted."""
        return validate_data(self, read_features(X), dtype=FLOATING, reset=False)

    def _logits_of(self, X: torch.Tensor) -> np.ndarray:
        """Return the logits of features on a device, (N, K), computed there."""
        W, b = (torch.from_numpy(v).to(X.device) for v in (self.coef_, self.intercept_))
        parts = [torch.addmm(b, x.to(W.dtype), W.t()).cpu() for x in X.split(BLOCK)]
        return torch.cat(parts).numpy()

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probabilities of the classes.

        Args:
            X: features, (N, D), as for :meth:`fit`.

        Returns:
            (N, C), columns in the order of ``classes_``.
        """
        z = self.decision_function(X)
        if z.ndim == 1:
            return np.stack([expit(-z), expit(z)], axis=1)
        return softmax(z, axis=1)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Return the logarithms of the probabilities, computed from the logits: finite where p rounds to 0.

        Args:
            X: features, (N, D), as for :meth:`fit`.

        Returns:
            (N, C) in nats, columns in the order of ``classes_``.
        """
        z = self.decision_function(X)
        if z.ndim == 1:
            return np.stack([log_expit(-z), log_expit(z)], axis=1)
        return log_softmax(z, axis=1)

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each row.

        Args:
            X: features, (N, D), as for :meth:`fit`.

        Returns:
            Labels, (N,).
        """
        best = self._best(X)  # first: it raises where nothing is fitted yet
        return self.classes_[best]

    def _best(self, X: Any) -> np.ndarray:  # (N,) positions in classes_
        z = self.decision_function(X)
        return (z > 0).astype(np.intp) if z.ndim == 1 else z.argmax(axis=1)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy; for soft labels, the share of their mass on the predicted classes.

        Args:
            X: features, (N, D), as for :meth:`fit`.
            y: labels (N,), or soft labels (N, C) with columns in the order of ``classes_``.
            sample_weight: s, (N,), not negative, or None.

        Returns:
            A share, from 0 to 1.

        Raises:
            ValueError: soft labels of another number of columns, or without mass.
        """
        best = self._best(X)
        y = read_labels(y, len(best))
        weight = read_sample_weight(sample_weight, len(best), np.dtype(np.float64))
        if y.ndim == 1:
            return float(accuracy_score(y, self.classes_[best], sample_weight=weight))
        if y.shape[1] != len(self.classes_):
            raise ValueError(
                f"y has {y.shape[1]} columns and the model {len(self.classes_)} classes; soft labels have "
                f"one column for each, in the order of classes_"
            )
        mass = y.astype(np.float64)
        mass /= max(float(mass.max()), 1.0)  # a share, whose sums stay in range
        if weight is not None:
            mass *= weight[:, None]
        total = mass.sum()
        if not total > 0:
            raise ValueError("y has no mass on rows that count; a share of nothing is no score")
        return float(mass[np.arange(len(best)), best].sum() / total)


def _class_weights(
    class_weight: dict[Any, float] | str, classes: np.ndarray, target: np.ndarray, weight: np.ndarray | None
) -> np.ndarray:  # (C,)
    if class_weight != "balanced":
        return compute_class_weight(class_weight, classes=classes, y=classes)
    if target.ndim == 2:
        mass = target.sum(axis=0) if weight is None else weight @ target
    else:
        mass = np.bincount(target, weights=weight, minlength=len(classes))
    # a class without mass has no row to weigh
    balanced: np.ndarray = np.zeros(len(classes))
    np.divide(mass.sum(), len(classes) * mass, out=balanced, where=mass > 0)
    return balanced
