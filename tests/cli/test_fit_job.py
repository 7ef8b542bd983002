"""From a table to a model: what is split, fitted, counted and drawn."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, log_loss

from xent.cli import fit_job as job
from xent.cli import predict_job
from xent.cli.solve_job import Settings
from xent.data import Table, sources
from xent.data.split import split
from xent.errors import BadInput
from xent.report import figures
from xent.report.evaluation import Evaluation, evaluate
from xent.report.predictions import write_predictions


def table(counts=(30, 20, 10), features=3, seed=0, classes=("a", "b", "c"), dtype=np.float64) -> Table:
    """Classes that overlap, in shuffled order, with a constant feature at the end."""
    rng = np.random.default_rng(seed)
    codes = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    x = rng.normal(size=(len(codes), features)) + rng.normal(size=(len(counts), features))[codes]
    x = np.concatenate([x, np.full((len(codes), 1), 0.1)], axis=1).astype(dtype)
    names = tuple(f"u{j}" for j in range(x.shape[1]))
    return Table("rows.csv", x, names, "kind", codes, np.array(classes))


def test_split_keeps_the_classes_shares_and_the_seed():
    t = table((300, 200, 100))
    training, validation = split(t, 0.2, 1)
    assert sorted([*training, *validation]) == list(range(600))
    assert np.bincount(t.codes[validation]).tolist() == [60, 40, 20]
    np.testing.assert_array_equal(validation, split(t, 0.2, 1)[1])
    assert (validation != split(t, 0.2, 2)[1]).any()
    assert len(split(t, 0.0, 0)[1]) == 0


@pytest.mark.parametrize(
    ("counts", "share", "message"),
    [
        ((5,), 0.2, r"rows\.csv: every label in 'kind' is 'a'; a classifier needs two classes"),
        ((5, 1, 5), 0.2, r"class 'b' has a single row \(row \d+\) and a validation split needs two"),
        ((9, 9, 9), 0.05, r"leaves 2 on one side, fewer than the 3 classes"),
        ((2, 2, 2), 0.9, r"leaves 0 on one side"),
    ],
)
def test_what_cannot_be_split(counts, share, message):
    with pytest.raises(BadInput, match=message):
        split(table(counts, classes=("a", "b", "c")[: len(counts)]), share, 0)


@pytest.mark.parametrize("share", [0.03, 0.1, 0.5, 0.9, 0.97])
def test_rare_classes_are_on_both_sides(share):
    t = table((100, 2, 2))
    sides = split(t, share, 0)
    assert sorted(np.concatenate(sides)) == list(range(104))
    assert all((np.diff(side) > 0).all() for side in sides)
    assert all(np.bincount(t.codes[side], minlength=3).min() >= 1 for side in sides)


@pytest.mark.parametrize(("scale", "dtype"), [(1e200, float), (1e-200, float), (1e35, np.float32)])
def test_features_beyond_what_can_be_squared_are_refused(scale, dtype):
    t = table(dtype=dtype)
    t.features[:, 1] *= dtype(scale)
    with pytest.raises(BadInput, match=r"rows\.csv: the numbers in column 'u1' reach .*rescale or exclude"):
        job.fit(t, Settings())


def test_a_single_row_is_enough_without_validation():
    assert job.fit(table((5, 1, 5)), Settings(validation=0)).validation is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("counts", [(30, 20, 10), (30, 20)], ids=["three", "two"])
def test_the_model_is_logistic_regression_on_standardised_features(counts, dtype):
    t = table(counts, classes=("a", "b", "c")[: len(counts)], dtype=dtype)
    fitted = job.fit(
        t, Settings(validation=0, l2=0.5, tol=1e-6 if dtype == np.float32 else 1e-9, stopping="gradient")
    )
    x = t.features.astype(float)
    scale = np.where(np.arange(4) == 3, 1.0, x.std(axis=0))  # the constant feature keeps its scale
    np.testing.assert_allclose(fitted.model.scale, scale, rtol=1e-6)
    peer = LogisticRegression(C=2.0, tol=1e-10, max_iter=1000).fit((x - x.mean(axis=0)) / scale, t.codes)
    p = peer.predict_proba((x - x.mean(axis=0)) / scale)
    np.testing.assert_allclose(np.exp(fitted.model.log_proba(t.features)), p, atol=1e-4)
    assert fitted.training.loss == pytest.approx(log_loss(t.codes, p), rel=1e-4)
    assert fitted.training.accuracy == pytest.approx((p.argmax(axis=1) == t.codes).mean())
    assert fitted.model.weight.dtype == dtype


def test_without_standardising_the_features_are_taken_as_they_are():
    t = table()
    model = job.fit(t, Settings(standardize=False)).model
    assert (model.mean == 0).all()
    assert (model.scale == 1).all()


def test_label_entropy_is_the_loss_of_the_training_frequencies():
    t = table((300, 200, 100))
    fitted = job.fit(t, Settings(validation=0.2))
    f = np.array([3, 2, 1]) / 6
    assert fitted.training.baseline == pytest.approx(-(f * np.log(f)).sum(), rel=1e-12)
    assert fitted.validation.baseline == pytest.approx(-(f * np.log(f)).sum(), rel=1e-12)


def test_curves_end_at_the_losses():
    for counts, classes in (((300, 200, 100), "abc"), ((300, 200), "ab")):
        fitted = job.fit(table(counts, classes=tuple(classes)), Settings())
        assert len(fitted.training_curve) == len(fitted.validation_curve) == fitted.iterations + 1
        assert fitted.training_curve[0] == fitted.validation_curve[0] == math.log(len(counts))
        assert fitted.training_curve[-1] == pytest.approx(fitted.training.loss, rel=1e-9)
        assert fitted.validation_curve[-1] == pytest.approx(fitted.validation.loss, rel=1e-9)


def test_interrupting_gives_the_model_so_far():
    def at(iteration):
        def interrupt(now):
            if now.iteration == iteration:
                raise KeyboardInterrupt

        return interrupt

    t = table()
    fitted = job.fit(t, Settings(tol=1e-9), at(3))
    assert fitted.interrupted
    assert fitted.iterations == 3
    assert fitted.training.loss < fitted.training.baseline


def test_evaluation_counts_as_scikit_learn_does():
    t = table((60, 50, 40), seed=3)
    model = job.fit(t, Settings(validation=0)).model
    rows = np.arange(0, 150, 2)
    done = evaluate(model, t, t.codes, rows)
    predicted = model.log_proba(t.features).argmax(axis=1)
    counts, shown = done.confusion(10)
    np.testing.assert_array_equal(counts, confusion_matrix(t.codes[rows], predicted[rows]))
    assert shown.tolist() == [0, 1, 2]
    assert done.errors[:, 2].sum() == (t.codes[rows] != predicted[rows]).sum() > 0


def test_chunks_change_nothing(monkeypatch):
    t = table((60, 50, 40), seed=3)
    model = job.fit(t, Settings(validation=0)).model
    whole = evaluate(model, t, t.codes, np.arange(150))
    monkeypatch.setattr("xent.report.predictions.CHUNK", 21)
    parts = evaluate(model, t, t.codes, np.arange(150))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-14)
    np.testing.assert_array_equal(parts.errors, whole.errors)


def test_most_confused_joins_both_directions():
    errors = np.array([[3, 2, 5], [0, 1, 4], [2, 3, 3], [1, 0, 1], [0, 3, 1]])
    done = Evaluation(100, 0.1, None, 0.86, errors, np.array([10, 20, 30, 40]))
    assert done.most_confused(2) == [(3, 2, 5, 3, 70), (0, 1, 4, 1, 30)]
    assert len(done.most_confused(9)) == 3
    counts, shown = done.confusion(2)
    assert shown.tolist() == [2, 3]
    assert counts.tolist() == [[27, 3], [5, 35]]


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize("classes", [("a", "b", "c"), (3, 5, 9), (False, True)], ids=str)
def test_predictions_are_a_column_a_class(tmp_path, classes, suffix):
    t = table((30, 20, 10)[: len(classes)], classes=classes)
    model = job.fit(t, Settings(validation=0)).model
    path = tmp_path / f"p{suffix}"
    write_predictions(model, t, path)
    read = parquet.read_table(path) if suffix == ".parquet" else csv.read_csv(path)
    names = ["false", "true"] if classes == (False, True) else [str(value) for value in classes]
    assert read.column_names == [*names, "prediction"]
    p = np.stack([read.column(name).to_numpy() for name in names], axis=1)
    np.testing.assert_allclose(p, np.exp(model.log_proba(t.features)), rtol=1e-12)
    assert read.column("prediction").to_pylist() == model.classes[p.argmax(axis=1)].tolist()


def test_a_class_called_like_a_column_is_refused(tmp_path):
    t = table(classes=("a", "b", "prediction"))
    with pytest.raises(BadInput, match="a class is called 'prediction'"):
        write_predictions(job.fit(t, Settings(validation=0)).model, t, tmp_path / "p.parquet")


def test_scores_compare_labels_as_text():
    t = table((20, 20, 20), classes=("3", "5", "9"))
    model = job.fit(t, Settings(validation=0)).model
    whole = predict_job.score(model, t)
    as_numbers = Table(t.source, t.features, t.feature_names, "kind", t.codes, np.array([3, 5, 9]))
    assert predict_job.score(model, as_numbers).evaluation.loss == whole.evaluation.loss
    codes = t.codes.copy()
    codes[:4] = -1
    other = Table(t.source, t.features, t.feature_names, "kind", codes, np.array(["3", "5", "eleven"]))
    scored = predict_job.score(model, other)
    assert scored.unlabelled == 4
    assert scored.unknown == {"eleven": int((codes == 2).sum())}
    assert scored.evaluation.rows == int(((codes == 0) | (codes == 1)).sum())


def test_writing_and_the_validation_rows(tmp_path):
    t = table()
    fitted = job.fit(t, Settings())
    paths = job.write(fitted, t, tmp_path / "new" / "out")
    assert [path.name for path in paths] == ["model.safetensors", "validation.parquet", "summary.json"]
    read = parquet.read_table(paths[1])
    np.testing.assert_array_equal(read.column("row_number").to_numpy() - 1, fitted.validation_rows)
    assert read.column("true_label").to_pylist() == t.classes[t.codes[fitted.validation_rows]].tolist()
    assert json.loads(paths[2].read_text()) == fitted.summary()


def test_nothing_of_an_earlier_fit_stays_beside_the_model(tmp_path):
    t = table()
    fitted = job.fit(t, Settings())
    job.write(fitted, t, tmp_path)
    job.draw(fitted, tmp_path)
    job.write(job.fit(t, Settings(validation=0)), t, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "summary.json"]


def test_digits_as_parquet(tmp_path):
    digits = sources.digits()
    rows = np.arange(1, 1797, 5)
    read = parquet.read_table(sources.write_parquet(digits, rows, tmp_path / "d.parquet"))
    assert read.num_rows == len(rows)
    assert read.column("digit").to_pylist() == digits.codes[rows].tolist()
    assert read.schema.field("digit").type == pa.int64()
    assert read.column_names[:2] == ["pixel_0_0", "pixel_0_1"]


def is_png(path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


@pytest.mark.parametrize("classes", [2, 3, 30])
@pytest.mark.parametrize("validation", [0, 0.2])
def test_figures_of_few_and_many_classes(tmp_path, classes, validation):
    names = tuple(f"a class with a long name {c}" for c in range(classes))
    fitted = job.fit(table((12,) * classes, classes=names), Settings(validation=validation))
    assert [path.name for path in job.draw(fitted, tmp_path)] == [
        "loss.png",
        "confusion.png",
        "reliability.png",
    ]
    assert is_png(tmp_path / "loss.png")
    assert is_png(tmp_path / "confusion.png")


@pytest.mark.filterwarnings("error")
def test_figures_of_names_that_mean_something_to_matplotlib_or_a_terminal(tmp_path, monkeypatch):
    shown = []
    confusion = figures.confusion
    monkeypatch.setattr(figures, "confusion", lambda *a, **k: (shown.extend(a[3]), confusion(*a, **k)))
    fitted = job.fit(table((12,) * 4, classes=("$x_$", "\x1b[31mred", "日本語", "عربي")), Settings())
    assert is_png(job.draw(fitted, tmp_path)[1])
    assert shown == ["$x_$", r"\x1b[31mred", "日本語", "عربي"]


def test_figures_of_a_perfect_and_a_hopeless_classifier(tmp_path):
    figures.confusion(tmp_path / "a.png", np.diag([3, 4]), np.array([3, 4]), ["a", "b"], "7 rows")
    figures.confusion(tmp_path / "b.png", np.array([[0, 3], [4, 0]]), np.array([3, 4]), ["a", "b"], "7 rows")
    figures.loss_curve(tmp_path / "c.png", np.array([0.69, 0.0]), np.array([]), 0.69)
    figures.loss_curve(tmp_path / "d.png", np.array([0.69]), np.array([0.69]), 0.69)
    assert all(is_png(tmp_path / f"{name}.png") for name in "abcd")


def test_figures_leave_matplotlib_as_it_was(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.loss_curve(tmp_path / "a.png", np.array([1.0, 0.5]), np.array([]), 1.0)
    assert dict(matplotlib.rcParams) == before
