"""From a table to a model and what to know about it: split, standardise, fit, evaluate, write.

The yardstick beside every loss is label entropy: the loss of a model that ignores the features and answers
with the class frequencies of the training rows.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xent.probe import model_file
from xent.probe.data import Table
from xent.probe.errors import BadInput, needs
from xent.probe.evaluate import COLUMNS, Evaluation, check_names, evaluate, write_predictions
from xent.probe.files import aside
from xent.probe.model_file import Model
from xent.probe.text import class_text, json_text, printable, quoted

if TYPE_CHECKING:
    from xent.probe.softmax_regression import Progress, SoftmaxRegression

VALIDATION, FIGURES = "validation.parquet", ("loss.png", "confusion.png")
"""Files that not every fit writes."""

MOST_SHOWN = 24
"""Classes in the confusion figure; with more it shows the most confused."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What ``fit`` is asked for; kept with the model."""

    validation: float = 0.2  # share of the rows, 0 for none
    l2: float = 1.0  # 1/C of the estimator
    tol: float = 1e-4
    max_iter: int = 1000
    solver: str = "lbfgs"  # or "newton-cg"
    seed: int = 0  # of the split
    standardize: bool = True


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A model and how it came about."""

    model: Model
    training: Evaluation
    validation: Evaluation | None
    validation_rows: np.ndarray  # (n,) positions in the table, ascending
    training_curve: np.ndarray  # (iterations + 1,) nats, without the penalty
    validation_curve: np.ndarray  # the same on the validation rows; empty without them
    iterations: int
    seconds: float
    gradient_norm: float
    converged: bool
    interrupted: bool
    skipped: tuple[str, ...]  # columns left out for not being numeric

    @property
    def judged(self) -> Evaluation:
        """The validation rows where there are some, else the training rows."""
        return self.training if self.validation is None else self.validation

    def summary(self) -> dict[str, Any]:
        """Everything worth reading, as plain JSON values."""
        text = [class_text(value) for value in self.model.classes]
        return {
            "classes": len(text),
            "features": len(self.model.feature_names),
            "skipped": list(self.skipped),
            "training": self.training.summary(),
            "validation": None if self.validation is None else self.validation.summary(),
            "iterations": self.iterations,
            "seconds": self.seconds,
            "gradient_norm": self.gradient_norm,
            "converged": self.converged,
            "interrupted": self.interrupted,
            "most_confused": [
                {"classes": [text[a], text[b]], "a_as_b": ab, "b_as_a": ba, "rows": rows}
                for a, b, ab, ba, rows in self.judged.most_confused(3)
            ],
            "settings": self.model.settings,
        }


def split(table: Table, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the validation rows, ascending; every class in both, by the seed."""
    assert table.codes is not None
    assert table.classes is not None
    rows, classes = len(table.codes), len(table.classes)
    if classes < 2:
        only = quoted(class_text(table.classes[0]))
        where = f" in {table.label_name!r}" if table.label_name else ""
        raise BadInput(f"{table.source}: every label{where} is {only}; a classifier needs two classes")
    if settings.validation == 0:
        return np.arange(rows), np.arange(0)
    counts = np.bincount(table.codes, minlength=classes)
    if counts.min() < 2:
        lone = int(counts.argmin())
        row = int(np.flatnonzero(table.codes == lone)[0])
        raise BadInput(
            f"{table.source}: class {quoted(class_text(table.classes[lone]))} has a single row "
            f"(row {row + 1}) and a validation split needs two; drop it, or fit with --validation 0"
        )
    held = math.ceil(settings.validation * rows)
    if held < classes or rows - held < classes:
        raise BadInput(
            f"{table.source}: --validation {settings.validation:g} of {rows} rows leaves "
            f"{min(held, rows - held)} on one side, fewer than the {classes} classes; "
            "choose another share, or --validation 0"
        )
    with needs("probe"):
        from sklearn.model_selection import train_test_split
    training, validation = train_test_split(
        np.arange(rows), test_size=held, stratify=table.codes, random_state=settings.seed
    )
    training, validation = _with_every_class(training, validation, table.codes)
    validation, training = _with_every_class(validation, training, table.codes)
    return np.sort(training), np.sort(validation)


def _with_every_class(
    rows: np.ndarray, others: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Move a row of each class that ``rows`` lacks there; a class of few rows may fall on one side alone."""
    found, first = np.unique(codes[others], return_index=True)
    moved = first[~np.isin(found, codes[rows])]
    return np.concatenate([rows, others[moved]]), np.delete(others, moved)


def fit(table: Table, settings: Settings, on_iteration: Callable[[Progress], None] | None = None) -> Fitted:
    """Fit a softmax regression to a table with labels.

    ``on_iteration`` sees every iteration. Ctrl-C during the iterations ends them: the result is then the
    model of the last one, with ``interrupted`` set; before the first, ``KeyboardInterrupt`` goes on.

    >>> from xent.probe.sources import digits
    >>> fitted = fit(digits(), Settings(seed=1))
    >>> fitted.validation.accuracy > 0.94, fitted.validation.loss < fitted.validation.baseline / 10
    (True, True)

    Raises ``BadInput`` for one class only, too few rows to split, or a class called like a column of the
    predictions.
    """
    with needs("probe"):
        import pyarrow  # noqa: F401  (needed to write; a missing one is to be known before the work)
        import safetensors  # noqa: F401
        from sklearn.exceptions import ConvergenceWarning

        from xent.probe.softmax_regression import SoftmaxRegression
    training, validation = split(table, settings)
    assert table.codes is not None
    assert table.classes is not None
    codes = table.codes
    check_names(table.classes, COLUMNS, table.source)
    _check_range(table)
    mean, scale = _standardisation(table.features[training], settings.standardize)

    def prepared(rows: np.ndarray) -> np.ndarray:
        x: np.ndarray = (table.features[rows] - mean) / scale
        return x

    x_training, x_validation = prepared(training), prepared(validation)
    training_curve, validation_curve = [], []

    def watch(now: Progress) -> None:
        penalty = settings.l2 * 0.5 * float(np.vdot(now.coef, now.coef)) / len(training)
        training_curve.append(now.objective - penalty)
        if len(validation):
            validation_curve.append(_mean_loss(x_validation, codes[validation], now.coef, now.intercept))
        if on_iteration is not None:
            on_iteration(now)

    estimator = SoftmaxRegression(
        C=1.0 / settings.l2 if settings.l2 else np.inf,
        tol=settings.tol,
        max_iter=settings.max_iter,
        solver=settings.solver,
    )
    started = time.perf_counter()
    interrupted = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # `converged` says it
            estimator.fit(x_training, codes[training], callback=watch)
    except KeyboardInterrupt:
        if not training_curve:
            raise
        interrupted = True
    seconds = time.perf_counter() - started

    model = _model(table, settings, estimator, mean, scale)
    at_start = math.log(len(table.classes))  # W = 0: every class alike
    frequencies = np.bincount(codes[training], minlength=len(table.classes)) / len(training)
    return Fitted(
        model=model,
        training=evaluate(model, table.features, codes, training, frequencies, table.source),
        validation=evaluate(model, table.features, codes, validation, frequencies, table.source)
        if len(validation)
        else None,
        validation_rows=validation,
        training_curve=np.array([at_start, *training_curve]),
        validation_curve=np.array([at_start, *validation_curve] if len(validation) else []),
        iterations=len(training_curve),
        seconds=seconds,
        gradient_norm=estimator.gradient_norm_,
        converged=estimator.converged_,
        interrupted=interrupted,
        skipped=table.skipped,
    )


def write(fitted: Fitted, table: Table, out: Path) -> list[Path]:
    """Write the model, the validation predictions and the summary into ``out``; the paths, model first.

    What an earlier fit left there and this one does not write goes: it would be taken for this model's.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "model.safetensors"]
    model_file.save(fitted.model, paths[0])
    for name in (VALIDATION, *FIGURES):
        (out / name).unlink(missing_ok=True)
    if len(fitted.validation_rows):
        paths.append(out / VALIDATION)
        write_predictions(fitted.model, table, paths[-1], fitted.validation_rows)
    paths.append(out / "summary.json")
    with aside(paths[-1]) as temporary:
        temporary.write_text(json_text(fitted.summary(), indent=2) + "\n", encoding="utf-8")
    return paths


def draw(fitted: Fitted, out: Path) -> list[Path]:
    """Loss curve and confusion figure as PNG in ``out``. Raises ``MissingExtra`` without matplotlib."""
    with needs("report"):
        import matplotlib  # noqa: F401
    from xent import figures

    baseline = fitted.judged.baseline
    assert baseline is not None
    paths = [out / name for name in FIGURES]
    with aside(paths[0]) as temporary:
        figures.loss_curve(temporary, fitted.training_curve, fitted.validation_curve, baseline)
    counts, shown = fitted.judged.confusion(MOST_SHOWN)
    names = [printable(class_text(value)) for value in fitted.model.classes[shown]]
    of = f"{fitted.judged.rows:,} {'training' if fitted.validation is None else 'validation'} rows"
    with aside(paths[1]) as temporary:
        figures.confusion(
            temporary, counts, fitted.judged.per_class[shown], names, of, classes=len(fitted.model.classes)
        )
    return paths


def _check_range(table: Table) -> None:
    """Squares of features, and their sums over rows, are to be numbers neither infinite nor 0."""
    x = table.features
    limit = 1e150 if x.dtype == np.float64 else 1e30
    peaks = np.maximum(x.max(axis=0), -x.min(axis=0))
    beyond = np.flatnonzero((peaks > limit) | ((peaks > 0) & (peaks < 1 / limit)))
    if len(beyond):
        raise BadInput(
            f"{table.source}: the numbers in column {table.feature_names[beyond[0]]!r} reach "
            f"{peaks[beyond[0]]:.3g}, outside {1 / limit:g} to {limit:g}; rescale or exclude the column"
        )


def _standardisation(x: np.ndarray, wanted: bool) -> tuple[np.ndarray, np.ndarray]:  # (N, D) -> (D,), (D,)
    if not wanted:
        return np.zeros(x.shape[1], x.dtype), np.ones(x.shape[1], x.dtype)
    mean = x.mean(axis=0, dtype=np.float64)
    scale = x.std(axis=0, dtype=np.float64)
    # a constant feature's deviation is rounding; dividing by it would make noise of size 1
    constant = scale <= 10 * np.finfo(x.dtype).eps * np.abs(mean)
    return mean.astype(x.dtype), np.where(constant, 1.0, scale).astype(x.dtype)


def _mean_loss(x: np.ndarray, codes: np.ndarray, coef: np.ndarray, intercept: np.ndarray) -> float:
    import torch

    from xent.functional import linear_cross_entropy

    if len(coef) == 1:  # logits (0, s)
        coef, intercept = np.concatenate([0 * coef, coef]), np.concatenate([0 * intercept, intercept])
    with torch.no_grad():
        loss = linear_cross_entropy(
            torch.from_numpy(x),
            torch.from_numpy(np.ascontiguousarray(coef)),
            torch.from_numpy(codes),
            linear_bias=torch.from_numpy(np.ascontiguousarray(intercept)),
        )
    return float(loss)


def _model(
    table: Table, settings: Settings, estimator: SoftmaxRegression, mean: np.ndarray, scale: np.ndarray
) -> Model:
    assert table.classes is not None
    return Model(
        weight=estimator.coef_,
        bias=estimator.intercept_,
        mean=mean,
        scale=scale,
        classes=table.classes,
        feature_names=table.feature_names,
        label_name=table.label_name,
        settings=dataclasses.asdict(settings),
    )
