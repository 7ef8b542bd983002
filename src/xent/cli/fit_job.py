"""The job of ``xent fit``: split a table, standardise, fit, evaluate, write.

The yardstick beside every loss is label entropy: the loss of a model that ignores the features and answers
with the class frequencies of the training rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xent._processes.group import ALONE, Ranks
from xent._util.atomic_write import atomic_write, folder
from xent._util.text import class_text, json_text, printable
from xent.cli.calibration import Calibration, calibrated
from xent.cli.checkpoints import Checkpoints, Stage, identity
from xent.cli.predict_job import score
from xent.cli.solve_job import Gap, How, Outcome, Settings, solve
from xent.cli.strength_job import Strengths, along_the_path, spaced
from xent.data import model_file
from xent.data.encoding import Encoding, check_apart
from xent.data.labels import kind_of
from xent.data.model_file import Model
from xent.data.read import read_table
from xent.data.split import split
from xent.data.table import Table, Wanted
from xent.errors import BadInput, needs
from xent.linear_model.labelled_rows import LabelledRows
from xent.linear_model.scaling import check_range, standardisation
from xent.linear_model.solvers import AUTO, solver_named
from xent.report import evaluation
from xent.report.evaluation import Evaluation, evaluate
from xent.report.predictions import COLUMNS, check_names, write_predictions

if TYPE_CHECKING:
    from xent.linear_model.descent import Progress

VALIDATION, FIGURES = "validation.parquet", ("loss.png", "confusion.png", "reliability.png", "strength.png")
"""Files that not every fit writes."""

SUMMARY = 1
"""The version of the layout of the summary, which :doc:`/reference/model-file` describes."""

CONFUSED = 10
"""Pairs of classes in the summary, those that are confused most often."""

MOST_SHOWN = 24
"""Classes in the confusion figure; with more it shows the most confused."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A model, its evaluation and how its fit ended."""

    model: Model
    judge: Model  # the model of the training rows alone: ``model``, unless that was fitted again to all rows
    strengths: Strengths | None  # the path along which l2 was chosen
    training: Evaluation
    validation: Evaluation | None
    validation_rows: np.ndarray  # (n,) positions in the file, ascending
    training_curve: np.ndarray  # (iterations + 1,) nats, without the penalty
    validation_curve: np.ndarray  # the same on the validation rows; empty without them
    iterations: int
    seconds: float
    gradient_norm: float
    gap: Gap
    how: How
    converged: bool
    advice: str  # why it has not converged, and what helps; empty where it has
    interrupted: bool
    unused: dict[str, str]  # columns that are no features, and why
    dropped: int = 0  # rows left out for what they lack
    calibration: Calibration | None = None
    test: Evaluation | None = None  # of ``model``, on a file of its own
    test_unknown: dict[str, int] = dataclasses.field(default_factory=dict)  # its labels that are no class

    @property
    def judged(self) -> Evaluation:
        """The evaluation on the validation rows where there are some, else on the training rows."""
        return self.training if self.validation is None else self.validation

    def _of_test(self) -> dict[str, Any] | None:
        if self.test is None:
            return None
        return self.test.summary() | {
            "unknown_labels": self.test_unknown,
            "per_class": self.test.classes(self.model.classes),
            "reliability": self.test.reliability(),
        }

    def summary(self) -> dict[str, Any]:
        """Return everything worth reading, as plain JSON values."""
        text = [class_text(value) for value in self.model.classes]
        return {
            "version": SUMMARY,
            "classes": len(text),
            "features": len(self.model.feature_names),
            "skipped": list(self.unused),
            "unused": [{"column": name, "why": why} for name, why in self.unused.items()],
            "dropped_rows": self.dropped,
            "training": self.training.summary(),
            "validation": None if self.validation is None else self.validation.summary(),
            "test": self._of_test(),
            "calibration": None if self.calibration is None else self.calibration.summary(),
            "iterations": self.iterations,
            "seconds": self.seconds,
            "gradient_norm": self.gradient_norm,
            "optimality": dataclasses.asdict(self.gap),
            "solver": dataclasses.asdict(self.how),
            "converged": self.converged,
            "interrupted": self.interrupted,
            "strengths": None if self.strengths is None else self.strengths.summary(),
            "most_confused": [
                {"classes": [text[a], text[b]], "a_as_b": ab, "b_as_a": ba, "rows": rows}
                for a, b, ab, ba, rows in self.judged.most_confused(CONFUSED)
            ],
            "per_class": self.judged.classes(self.model.classes),
            "reliability": self.judged.reliability(),
            "settings": self.model.settings,
        }


def fit(
    table: Table,
    settings: Settings,
    on_iteration: Callable[[Progress], None] | None = None,
    ranks: Ranks = ALONE,
    device: str = "cpu",
    checkpoints: Checkpoints | None = None,
) -> Fitted:
    """Fit a softmax regression to a table with labels, of several ranks each with its share of the rows.

    The rows are computed with on ``device``. With ``checkpoints`` it goes on from the last, and keeps what it
    reaches.

    ``on_iteration`` sees every iteration, on rank 0. Ctrl-C during the iterations ends them: the result is
    then the model of the last one, with ``interrupted`` set; before the first, ``KeyboardInterrupt`` goes on.

    Raises:
        BadInput: one class only, too few rows to split, a class called like a column of the predictions, or
            classes shared by processes where the solver does not take them.

    Example:
        >>> from xent.data.sources import digits
        >>> fitted = fit(digits(), Settings(seed=1))
        >>> fitted.validation.accuracy > 0.94, fitted.validation.loss < fitted.validation.baseline / 10
        (True, True)
    """
    with needs("probe"):
        import pyarrow  # noqa: F401  (needed to write; a missing one is to be known before the work)
        import safetensors  # noqa: F401
        import sklearn  # noqa: F401
        import torch

        from xent.linear_model.workers import workers
    assert table.codes is not None
    assert table.classes is not None
    codes, n_classes = table.codes, len(table.classes)
    ranks.check_equal("command line", settings)
    _check(settings, n_classes, device, ranks)
    training, validation = split(table, settings.validation, settings.seed, ranks)
    check_names(table.classes, COLUMNS, table.source)
    own, held = table.own(training), table.own(validation)
    counted = own if table.weight is None else own[table.weight[own] > 0]
    encoding = Encoding.learnt(table, counted, settings.missing == "impute", ranks)
    check_apart(table.source, encoding.names)
    table = encoding.encoded(table)
    check_range(table, ranks)
    if checkpoints is not None:
        of = identity(table, settings, ranks)
        with ranks.raise_together():
            if ranks.is_main:
                checkpoints.open(of)
    targets, weight = codes if table.soft is None else table.soft.astype(table.rows.dtype), table.weight
    every = LabelledRows(
        table.rows,
        targets,
        None if weight is None else weight.astype(table.rows.dtype),
        torch.device(device),
    )
    rows_own, rows_held = every.take(own), every.take(held)
    class_masses = ranks.sum(evaluation.class_masses(table, codes, own, n_classes))
    _check_masses(table, class_masses, float(ranks.sum(rows_held.mass(slice(None)).sum())), len(validation))
    if settings.class_weight == "balanced":
        rows_own = balanced(rows_own, class_masses)
    of_own = None if table.weight is None else table.weight[own]
    scaling = standardisation(rows_own.source, settings.standardize, ranks, of_own)
    shape = (*rows_own.source.shape, n_classes)
    with workers(*shape, device=device, class_parallel=ranks.slices > 1) as threads:
        strengths = None
        if settings.l2_path is not None:
            l2 = spaced(*settings.l2_path)
            options = {k: getattr(settings, k) for k in ("solver", "tol", "max_iter", "stopping")}
            strengths = along_the_path(
                rows_own, rows_held, n_classes, l2, scaling, threads, Stage("path", checkpoints), **options
            )
            settings = dataclasses.replace(settings, l2=float(l2[strengths.best]))
        done = solve(
            rows_own,
            rows_held,
            (_total(rows_own, ranks), _total(rows_held, ranks)),
            n_classes,
            settings,
            scaling,
            on_iteration,
            ranks,
            threads,
            Stage("fit", checkpoints),
        )

        judge = model = _model(table, settings, done, scaling, encoding)
        if strengths is not None and not done.interrupted:  # again, on all rows
            of_all = standardisation(table.rows, settings.standardize, ranks, table.weight)
            rows = every
            if settings.class_weight == "balanced":
                everyone = np.arange(len(table))
                rows = balanced(every, ranks.sum(evaluation.class_masses(table, codes, everyone, n_classes)))
            again = solve(
                rows,
                every.take(np.empty(0, np.int64)),
                (_total(rows, ranks), 0.0),
                n_classes,
                settings,
                of_all,
                None,
                ranks,
                threads,
                Stage("refit", checkpoints),
            )
            model = _model(table, settings, again, of_all, encoding)
    frequencies = class_masses / class_masses.sum()

    def judged(by: Model, rows: np.ndarray) -> Evaluation:
        return evaluate(by, table, codes, rows, frequencies, ranks)

    calibration = None
    if settings.calibrate:
        calibration = calibrated(judge, table, held, judged(judge, held))
        judge = dataclasses.replace(judge, temperature=calibration.temperature)
        model = dataclasses.replace(model, temperature=calibration.temperature)
    at_start = math.log(n_classes)  # W = 0: every class alike
    return Fitted(
        model=model,
        judge=judge,
        strengths=strengths,
        training=judged(judge, own),
        validation=judged(judge, held) if len(validation) else None,
        calibration=calibration,
        validation_rows=validation,
        training_curve=np.array([at_start, *done.training_curve]),
        validation_curve=np.array([at_start, *done.validation_curve] if len(validation) else []),
        iterations=len(done.training_curve),
        seconds=done.seconds,
        gradient_norm=done.gradient_norm,
        gap=done.gap,
        how=done.how,
        converged=done.converged,
        advice=done.advice,
        interrupted=done.interrupted,
        unused=table.unused,
        dropped=table.dropped,
    )


def balanced(rows: LabelledRows, class_masses: np.ndarray) -> LabelledRows:
    """Return the rows with weights that give every class the same mass, and all together what they had.

    s_c = Σ_k m_k / (C·m_c), scikit-learn's class_weight="balanced".
    """
    scale = class_masses.sum() / (len(class_masses) * np.where(class_masses > 0, class_masses, np.inf))
    scale = scale.astype(rows.source.dtype)
    if rows.target.ndim == 2:
        return dataclasses.replace(rows, target=rows.target * scale)
    each = scale[rows.target]
    return dataclasses.replace(rows, weight=each if rows.weight is None else each * rows.weight)


def _total(rows: LabelledRows, ranks: Ranks) -> float:
    return float(ranks.sum(rows.mass(slice(None)).sum()))


def _check_masses(table: Table, class_masses: np.ndarray, held: float, validation: int) -> None:
    """Raise ``BadInput`` for weights that leave nothing to fit, or to judge."""
    assert table.classes is not None
    if (class_masses > 0).sum() < 2:
        raise BadInput(f"{table.source}: the weights leave fewer than two classes in the training rows")
    if validation and not held:
        raise BadInput(f"{table.source}: the weights of all validation rows are 0; choose another --seed")


def read_test(path: Path, label: str, table: Table, wanted: Wanted, ranks: Ranks = ALONE) -> Table:
    """Return the rows of another file that are to judge the model of a table."""
    columns = dataclasses.replace(
        wanted,
        label=label,
        features=table.feature_names,
        exclude=(),
        categorical=[column.name for column in table.categories],
        known={column.name: column.values for column in table.categories},
        width=table.width,
        lists=table.lists,
    )
    return read_table(path, columns, ranks)


def with_test(fitted: Fitted, table: Table, ranks: Ranks = ALONE) -> Fitted:
    """Return a fit with what another table makes of its model."""
    found = score(fitted.model, fitted.model.encoded(table), ranks)
    assert found is not None
    return dataclasses.replace(fitted, test=found.evaluation, test_unknown=found.unknown)


def _check(settings: Settings, n_classes: int, device: str, ranks: Ranks) -> None:
    """Raise ``BadInput`` for settings that do not go together, before the work."""
    if ranks.slices > n_classes:
        raise BadInput(
            f"--class-parallel {ranks.slices} is more than the {n_classes} classes; use fewer slices"
        )
    if ranks.slices > 1 and device != "cpu":
        raise BadInput(f"--class-parallel does not go with --device {device}; fit on the CPU, or without it")
    if settings.l2_path is not None and not settings.validation:
        raise BadInput(
            "a path of strengths is judged on validation rows; give --validation a share of the rows"
        )
    if settings.l2_path is not None and ranks.size > 1:
        raise BadInput("a path of strengths is fitted by one process; run it without torchrun")
    if settings.calibrate and not settings.validation:
        raise BadInput("--calibrate fits the temperature to validation rows; give --validation a share")
    if settings.calibrate and ranks.size > 1:
        raise BadInput("--calibrate is done by one process; run it without torchrun")
    if settings.solver != AUTO:
        solver_named(settings.solver, ranks.slices)  # an error before the work


def _model(
    table: Table,
    settings: Settings,
    done: Outcome,
    scaling: tuple[np.ndarray, np.ndarray],
    encoding: Encoding,
) -> Model:
    assert table.classes is not None
    return Model(
        weight=done.coef,
        bias=done.intercept,
        mean=scaling[0],
        scale=scaling[1],
        classes=table.classes,
        feature_names=table.feature_names,
        label_name=table.label_name,
        settings=dataclasses.asdict(settings),
        kind=kind_of(table.classes),
        width=table.width,
        lists=table.lists,
        encoding=None if encoding.plain else encoding,
    )


def write(fitted: Fitted, table: Table, out: Path, ranks: Ranks = ALONE) -> list[Path]:
    """Write the model, the validation predictions and the summary into ``out``;
    return the paths, model first.

    All of them are written under temporary names before the first appears there. What an earlier fit left and
    this one does not write goes: it would be taken for this model's.
    """
    names = ["model.safetensors", VALIDATION, "summary.json"]
    paths = [out / name for name in names if name != VALIDATION or len(fitted.validation_rows)]
    with contextlib.ExitStack() as stack:
        with ranks.raise_together():
            if ranks.is_main:
                stack.enter_context(folder(out))
                temporary_of = {path: stack.enter_context(atomic_write(path)) for path in paths}
                model_file.save(fitted.model, temporary_of[paths[0]])
                summary = json_text(fitted.summary(), indent=2) + "\n"
                temporary_of[paths[-1]].write_text(summary, encoding="utf-8")
        if len(fitted.validation_rows):
            target = ranks.broadcast(temporary_of[out / VALIDATION] if ranks.is_main else None)
            assert target is not None
            rows = table.own(fitted.validation_rows)
            write_predictions(fitted.judge, fitted.judge.encoded(table), target, rows, ranks)
        with ranks.raise_together():
            if ranks.is_main:
                for name in (VALIDATION, *FIGURES):
                    (out / name).unlink(missing_ok=True)
            stack.close()
    return paths


def draw(fitted: Fitted, out: Path) -> list[Path]:
    """Draw the loss curve and the confusion figure as PNG; raise ``MissingExtra`` without matplotlib."""
    with needs("report"):
        import matplotlib  # noqa: F401
    from xent.report import figures

    baseline = fitted.judged.baseline
    assert baseline is not None
    paths = [out / name for name in FIGURES]
    if fitted.strengths is None:
        paths.pop()
    else:
        with atomic_write(paths[3]) as temporary:
            found = fitted.strengths
            losses = found.training_loss, found.validation_loss
            figures.strengths(temporary, found.l2, *losses, found.validation_accuracy, found.best)
    with atomic_write(paths[0]) as temporary:
        figures.loss_curve(temporary, fitted.training_curve, fitted.validation_curve, baseline)
    counts, shown = fitted.judged.confusion(MOST_SHOWN)
    names = [printable(class_text(value)) for value in fitted.model.classes[shown]]
    of = f"{fitted.judged.rows:,} {'training' if fitted.validation is None else 'validation'} rows"
    curves = [("", fitted.judged.reliability())]
    if fitted.calibration is not None:
        before, after = fitted.calibration.before, fitted.calibration.after
        curves = [
            ("temperature 1", before.reliability()),
            (f"temperature {fitted.calibration.temperature:.3g}", after.reliability()),
        ]
    with atomic_write(paths[2]) as temporary:
        figures.reliability(temporary, curves, of, fitted.judged.calibration_error)
    with atomic_write(paths[1]) as temporary:
        figures.confusion(
            temporary, counts, fitted.judged.per_class[shown], names, of, classes=len(fitted.model.classes)
        )
    return paths
