"""Models as files and back: the same probabilities for frames, arrays and files."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError

import xent
from xent.cli.commands import cli
from xent.data import model_file
from xent.errors import BadInput


def data(classes: int, labels: str, rows: int = 120):
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, rows)
    X = rng.normal(size=(rows, 4)) + rng.normal(size=(classes, 4))[y]
    names = {"text": np.array(["é", "b", "c", "d"]), "int": np.arange(4) - 1, "bool": np.array([False, True])}
    return X, names[labels][y]


@pytest.mark.parametrize("classes, labels", [(2, "text"), (2, "bool"), (2, "int"), (4, "text"), (4, "int")])  # noqa: PT006
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_saved_estimator_predicts_the_same(tmp_path, classes, labels, dtype, temperature):
    X, y = data(classes, labels)
    X = X.astype(dtype)
    fitted = xent.SoftmaxRegression().fit(X, y)
    fitted.temperature_ = temperature
    fitted.save(tmp_path / "m.safetensors")
    loaded = xent.load_model(tmp_path / "m.safetensors")
    np.testing.assert_allclose(loaded.predict_proba(X), fitted.predict_proba(X), rtol=1e-5)
    assert (loaded.predict(X) == fitted.predict(X)).all()
    assert loaded.classes_.tolist() == fitted.classes_.tolist()
    assert not hasattr(loaded, "feature_names_in_")
    np.testing.assert_allclose(loaded.predict_proba(csr_array(X)), fitted.predict_proba(X), rtol=1e-5)
    loaded.save(tmp_path / "n.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "n.safetensors").read_bytes()
    p = torch.softmax(loaded.to_torch()(torch.from_numpy(X.astype(float))), 1).detach().numpy()
    np.testing.assert_allclose(p, fitted.predict_proba(X), rtol=1e-5)
    np.testing.assert_allclose(loaded.to_sklearn().predict_proba(X), fitted.predict_proba(X), rtol=1e-4)


def test_a_saved_estimator_keeps_its_parameters(tmp_path):
    X, y = data(3, "text")
    made = {"C": 0.1, "fit_intercept": False, "class_weight": "balanced", "tol": 1e-7, "solver": "lbfgs"}
    xent.SoftmaxRegression(**made).fit(X, y).save(tmp_path / "m.safetensors")
    loaded = xent.load_model(tmp_path / "m.safetensors")
    assert {name: loaded.get_params()[name] for name in made} == made
    np.testing.assert_array_equal(loaded.fit(X, y).coef_, xent.SoftmaxRegression(**made).fit(X, y).coef_)


def test_a_temperature_divides_the_logits():
    X, y = data(4, "int")
    fitted = xent.SoftmaxRegression(C=1e3).fit(X[:60], y[:60])
    plain = fitted.decision_function(X)
    fitted.temperature_ = xent.fit_temperature(
        fitted.decision_function(X[60:]), y[60:], classes=fitted.classes_
    )
    np.testing.assert_allclose(fitted.decision_function(X), plain / fitted.temperature_)
    unscaled = np.exp(plain) / np.exp(plain).sum(1, keepdims=True)
    losses = [xent.metrics.log_loss(y[60:], p[60:]) for p in (fitted.predict_proba(X), unscaled)]
    assert losses[0] < losses[1]
    assert fitted.fit(X, y).temperature_ == 1
    assert xent.SoftmaxRegressionCV(Cs=3, cv=2).fit(X, y).temperature_ == 1


@pytest.fixture
def penguins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 200)
    frame = pd.DataFrame(
        {
            "bill": rng.normal(size=200) + kind,
            "sex": rng.choice(["f", "m"], 200),
            "ringed": rng.random(200) < 0.5,
            "island": np.where(rng.random(200) < 0.7, np.array(["B", "D", "T"])[kind], "B"),
            "kind": np.array(["Adelie", "Chinstrap", "Gentoo"])[kind],
        }
    )
    frame.loc[::7, "bill"] = np.nan
    frame.loc[::9, "sex"] = None
    frame.to_parquet("a.parquet", index=False)
    options = ["--categorical", "auto", "--missing", "impute", "--calibrate", "--out", "m", "--quiet"]
    done = CliRunner().invoke(cli, ["fit", "a.parquet", "--label", "kind", *options])
    assert done.exit_code == 0, done.output
    return frame


def predicted(path: str) -> pd.DataFrame:
    done = CliRunner().invoke(cli, ["predict", "m/model.safetensors", path, "-o", "p.parquet"])
    assert done.exit_code == 0, done.output
    return pd.read_parquet("p.parquet")


def test_a_model_of_a_table_takes_frames_with_its_columns(penguins):
    loaded = xent.load_model("m/model.safetensors")
    right = predicted("a.parquet")
    shuffled = penguins[["island", "kind", "bill", "ringed", "sex"]].set_index(np.arange(200) + 7)
    for frame in (penguins, shuffled, pa.Table.from_pandas(penguins)):
        np.testing.assert_allclose(loaded.predict_proba(frame), right[loaded.classes_], rtol=1e-9)
        assert loaded.predict(frame).tolist() == right.prediction.tolist()
    assert loaded.feature_names_in_.tolist()[:3] == ["bill", "bill is missing", "sex is missing"]
    assert loaded.score(penguins, penguins.kind) == (right.prediction == penguins.kind).mean()
    # the features themselves, as an array and as a frame of them
    x = model_file.load("m/model.safetensors").encoding
    from xent.data import Wanted, read_table

    made = x.encoded(read_table("a.parquet", Wanted("kind", categorical="auto", missing="impute")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(loaded.predict_proba(made.features), right[loaded.classes_], rtol=1e-9)
    of_features = pd.DataFrame(made.features, columns=made.feature_names)
    np.testing.assert_allclose(loaded.predict_proba(of_features), right[loaded.classes_], rtol=1e-9)


def test_a_pipeline_of_scikit_learn_takes_the_same_frames(penguins):
    loaded = xent.load_model("m/model.safetensors")
    mixed = penguins.assign(extra=1)[["extra", "island", "sex", "ringed", "bill"]]
    pipeline = pickle.loads(pickle.dumps(loaded.to_sklearn()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for frame in (penguins, mixed, pa.Table.from_pandas(mixed)):
            np.testing.assert_allclose(pipeline.predict_proba(frame), loaded.predict_proba(frame), rtol=1e-12)
        features = pipeline[0].transform(penguins)
        np.testing.assert_allclose(
            pipeline.predict_proba(features), loaded.predict_proba(penguins), rtol=1e-12
        )
        assert pipeline[:-1].get_feature_names_out().tolist() == loaded.feature_names_in_.tolist()
        again = clone(pipeline).set_params(logisticregression__tol=1e-8).fit(penguins, penguins.kind)
        assert again[-1].coef_.shape == loaded.coef_.shape


def test_what_is_changed_is_saved(penguins):
    loaded = xent.load_model("m/model.safetensors")
    loaded.temperature_ = 3.0
    loaded.save("t.safetensors")
    again = xent.load_model("t.safetensors")
    assert again.temperature_ == 3.0
    np.testing.assert_array_equal(again.predict_proba(penguins), loaded.predict_proba(penguins))
    loaded.coef_ = 2 * loaded.coef_
    loaded.save("t.safetensors")
    again = xent.load_model("t.safetensors")
    np.testing.assert_allclose(again.predict_proba(penguins), loaded.predict_proba(penguins), rtol=1e-12)
    chosen = xent.SoftmaxRegressionCV(Cs=[1e-3, 1e-2], cv=2).fit(*data(3, "text"))
    chosen.save("c.safetensors")
    assert xent.load_model("c.safetensors").C == chosen.C_


def test_every_kind_of_frame_is_taken(penguins):
    loaded = xent.load_model("m/model.safetensors")
    table = pa.Table.from_pandas(penguins)
    right = loaded.predict_proba(penguins)
    for frame in (table.to_reader(), *table.to_batches()):
        np.testing.assert_array_equal(loaded.predict_proba(frame), right)


def test_other_columns_of_a_frame_may_hold_anything(penguins):
    loaded = xent.load_model("m/model.safetensors")
    odd = penguins.assign(notes=[1, "text", None, {}] * 50)
    np.testing.assert_array_equal(loaded.predict_proba(odd), loaded.predict_proba(penguins))


def test_categories_that_a_model_does_not_know_are_warned_of(penguins):
    loaded = xent.load_model("m/model.safetensors")
    unseen = penguins.assign(sex=["x", *penguins.sex[1:]], island=["y", "z", *penguins.island[2:]])
    for predict in (loaded.predict_proba, loaded.to_sklearn().predict_proba):
        with pytest.warns(UserWarning, match="does not know: 'sex' in 1 rows, 'island' in 2 rows"):
            p = predict(unseen)
        np.testing.assert_allclose(p[2:], loaded.predict_proba(penguins)[2:], rtol=1e-12)


@pytest.mark.parametrize("nothing", [None, np.nan, pd.NA])
@pytest.mark.parametrize("column", ["bill", "sex"])
def test_columns_without_any_value(penguins, column, nothing):
    loaded = xent.load_model("m/model.safetensors")
    row = penguins[penguins[column].isna()][:1]
    given = pd.DataFrame([{**row.iloc[0].to_dict(), column: nothing}])
    np.testing.assert_allclose(loaded.predict_proba(given), loaded.predict_proba(row), rtol=1e-12)


def test_a_model_of_lists_takes_frames_of_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X, y = data(4, "text")
    frame = pd.DataFrame({"emb": list(X.astype(np.float32)), "kind": y})
    frame.to_parquet("a.parquet", index=False)
    assert CliRunner().invoke(cli, ["fit", "a.parquet", "--label", "kind", "--out", "m"]).exit_code == 0
    loaded = xent.load_model("m/model.safetensors")
    p = loaded.predict_proba(frame)
    np.testing.assert_allclose(p, predicted("a.parquet")[loaded.classes_], rtol=1e-5)
    np.testing.assert_allclose(loaded.predict_proba(X.astype(np.float32)), p, rtol=1e-6)
    assert loaded.feature_names_in_.tolist() == [f"emb[{i}]" for i in range(4)]
    for width in (3, 5):
        other = pd.DataFrame({"emb": list(np.zeros((2, width), np.float32))})
        with pytest.raises(BadInput, match="the lists of column 'emb' hold"):
            loaded.predict(other)
        other.to_parquet("b.parquet", index=False)
        done = CliRunner().invoke(cli, ["predict", "m/model.safetensors", "b.parquet", "-o", "q.csv"])
        assert "the lists of column 'emb' hold" in done.stderr
    some = ["--features", "emb[0],emb[1]", "--out", "n"]
    assert CliRunner().invoke(cli, ["fit", "a.parquet", "--label", "kind", *some]).exit_code == 0
    assert xent.load_model("n/model.safetensors").predict_proba(frame).shape == p.shape


def test_frames_that_lack_something_are_named(penguins):
    loaded = xent.load_model("m/model.safetensors")
    with pytest.raises(BadInput, match=r"X: no column 'bill' \(a feature of m/model.safetensors\)"):
        loaded.predict(penguins.drop(columns="bill"))
    with pytest.raises(BadInput, match=r"row 1, column 'bill' holds inf"):
        loaded.predict(penguins.assign(bill=np.inf))
    with pytest.raises(ValueError, match=r"X has 3 features, but m/model.safetensors has 10"):
        loaded.predict(np.zeros((2, 3)))


def test_a_loaded_model_can_be_fitted_anew(penguins):
    loaded = xent.load_model("m/model.safetensors")
    X, y = load_iris(return_X_y=True)
    right = xent.SoftmaxRegression(C=loaded.C).fit(X, y)
    np.testing.assert_allclose(loaded.fit(X, y).predict_proba(X), right.predict_proba(X))


def test_what_cannot_be_saved(tmp_path):
    X, _ = data(2, "int")
    with pytest.raises(NotFittedError):
        xent.SoftmaxRegression().save(tmp_path / "m.safetensors")
    fitted = xent.SoftmaxRegression().fit(X, np.arange(len(X)) % 2 + 0.0)
    with pytest.raises(BadInput, match=r"the class 0\.0 cannot be written"):
        fitted.save(tmp_path / "m.safetensors")
    with pytest.raises(BadInput, match="no such model file"):
        xent.load_model(tmp_path / "m.safetensors")
    with pytest.raises(TypeError, match=r"path must be a str or an os\.PathLike, got int"):
        xent.load_model(5)
