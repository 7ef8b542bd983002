"""Tables as people have them: text, gaps, weights, masses, ids; and the report that is kept of a fit."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import logsumexp
from sklearn.calibration import calibration_curve
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score, log_loss, precision_recall_fscore_support
from sklearn.utils.class_weight import compute_class_weight

import xent
from running import run
from xent import SoftmaxRegression
from xent.data import model_file


def test_a_weight_is_so_many_rows(tmp_path):
    """Means, scales and medians are those of the table that writes each row as often as its weight says."""
    frame = penguins(90).assign(w=np.arange(90) % 3)
    frame.loc[frame.w == 0, "bill"] *= 1000
    frame.loc[4::9, "mass"] = np.nan
    frame.to_csv("w.csv", index=False)
    frame.loc[frame.index.repeat(frame.w)].drop(columns="w").to_csv("r.csv", index=False)
    options = [
        "--label",
        "kind",
        "--validation",
        0,
        "--missing",
        "impute",
        "--features",
        "bill,mass",
        "--quiet",
    ]
    run("fit", "w.csv", *options, "--weight", "w", "--out", "a")
    run("fit", "r.csv", *options, "--out", "b")
    a, b = (model_file.load(Path(f"{m}/model.safetensors")) for m in "ab")
    for name in ("mean", "scale"):
        np.testing.assert_allclose(getattr(a, name)[0], getattr(b, name)[0], rtol=1e-12)
    x = frame[["bill", "mass"]].fillna(0)[:9]
    loaded = [xent.load_model(f"{m}/model.safetensors").predict_proba(x) for m in "ab"]
    np.testing.assert_allclose(*loaded, atol=2e-3)  # tol is 1e-4 of the objective


def test_gaps_that_the_training_rows_do_not_have(tmp_path):
    frame = penguins(120)[["bill", "mass", "kind"]].dropna(ignore_index=True)
    frame.to_csv("whole.csv", index=False)
    gap = frame.copy()
    gap.loc[5, "mass"] = np.nan
    gap.to_csv("gap.csv", index=False)
    options = ["--label", "kind", "--missing", "impute", "--quiet", "--out", "m"]
    run("fit", "whole.csv", *options, "--test", "gap.csv")
    run("predict", "m/model.safetensors", "gap.csv", "-o", "p.csv", "--label", "kind")
    loaded = xent.load_model("m/model.safetensors")
    filled = gap.fillna({"mass": model_file.load(Path("m/model.safetensors")).encoding.fill[1]})
    np.testing.assert_allclose(loaded.predict_proba(gap), loaded.predict_proba(filled), rtol=1e-12)
    np.testing.assert_allclose(
        pd.read_csv("p.csv").iloc[5, :3].astype(float), loaded.predict_proba(filled)[5]
    )


def test_gaps_in_arrays(tmp_path):
    X = np.random.default_rng(0).normal(size=(150, 5))
    y = (X[:, 0] > 0).astype(int)
    X[::9, 1] = np.nan
    np.save("X.npy", X)
    np.save("y.npy", y)
    run("fit", "X.npy", "--label", "y.npy", "--missing", "impute", "--out", "m", "--quiet")
    run("predict", "m/model.safetensors", "X.npy", "-o", "p.csv")
    assert (pd.read_csv("p.csv").prediction == y).mean() > 0.9
    assert xent.load_model("m/model.safetensors").n_features_in_ == 6


def test_what_two_options_or_two_columns_call_by_one_name(tmp_path):
    frame = penguins(60)
    twice = f"sex={frame.sex.dropna().iloc[0]}"
    frame[twice] = 1.0 * np.arange(60)
    frame["w"] = [[1.0, 2.0]] * 60
    frame.to_parquet("a.parquet", index=False)
    base = ["fit", "a.parquet", "--label", "kind", "--out", "m"]
    said = run(*base, "--categorical", "sex", "--exclude", "sex,w", code=2).stderr
    assert "column 'sex' is named in --exclude and in --categorical" in said
    said = run(*base, "--categorical", "sex", "--missing", "drop", "--exclude", "w", code=2).stderr
    assert f"two features would be called '{twice}'; rename a column, or leave one out with --exclude" in said
    for some in (["--features", twice], ["--missing", "drop"]):
        said = run(*base, *some, "--weight", "w", code=2).stderr
        assert "column 'w' (--weight) holds lists of double, not numbers" in said


def test_a_folder_is_fitted_again_and_again(tmp_path):
    frame = penguins(60).dropna()
    frame.to_csv("a.csv", index=False)
    for _ in range(2):
        run("fit", ".", "--label", "kind", "--quiet", "--out", "m")
    frame.to_csv("validation.parquet", index=False)
    assert "would be overwritten" in run("fit", ".", "--label", "kind", "--out", ".", code=2).stderr


def test_what_is_used_goes_by_its_name(tmp_path):
    frame = penguins(60).dropna().rename(columns={"bill": "emb[0]"})
    done = run("fit", "-", "--label", "kind", "--out", "m", input=frame.to_csv(index=False))
    assert "standard input.csv: 3 classes" in done.stdout or "standard input: 3 classes" in done.stdout
    assert "xent-" not in done.stdout
    assert "used: emb[0], mass" in done.stdout


def test_a_missing_category_is_a_bad_row(tmp_path):
    frame = penguins(80).dropna()
    frame.to_csv("a.csv", index=False)
    run("fit", "a.csv", "--label", "kind", "--categorical", "sex", "--out", "m", "--quiet")
    frame.iloc[7, frame.columns.get_loc("sex")] = None
    frame.to_csv("b.csv", index=False)
    run("predict", "m/model.safetensors", "b.csv", "-o", "p.csv", "--skip-bad")
    assert 8 not in pd.read_csv("p.csv").row_number.tolist()
    assert "row 8, column 'sex' is missing" in (
        run("predict", "m/model.safetensors", "b.csv", "-o", "q.csv", code=2).stderr
    )


def penguins(rows: int = 300, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, rows)
    frame = pd.DataFrame(
        {
            "bill": rng.normal(size=rows) + kind,
            "mass": rng.normal(size=rows) - kind,
            "sex": rng.choice(["female", "male"], rows),
            "island": np.where(rng.random(rows) < 0.7, np.array(["B", "D", "T"])[kind], "B"),
            "ringed": rng.random(rows) < 0.5,
            "weight": rng.integers(0, 4, rows) / 2,
            "kind": np.array(["Adelie", "Chinstrap", "Gentoo"])[kind],
        }
    )
    frame.loc[rng.random(rows) < 0.1, "bill"] = np.nan
    frame.loc[rng.random(rows) < 0.1, "sex"] = None
    return frame


FIT = ["--label", "kind", "--exclude", "weight", "--categorical", "auto", "--out", "m", "--json"]


def test_text_and_gaps_are_learnt_from_and_predicted_for():
    penguins().to_csv("a.csv", index=False)
    penguins(seed=1).to_parquet("b.parquet", index=False)
    found = json.loads(run("fit", "a.csv", *FIT, "--missing", "impute").stdout)
    model = model_file.load("m/model.safetensors")
    assert model.feature_names == (
        "bill", "mass", "bill is missing", "sex is missing", "sex=female", "sex=male",
        "island=B", "island=D", "island=T", "ringed=False", "ringed=True",
    )  # fmt: skip
    said = json.loads(run("predict", "m/model.safetensors", "b.parquet", "-o", "p.parquet", "--json").stdout)
    assert said["evaluation"]["accuracy"] > found["validation"]["accuracy"] - 0.1
    # by hand, on the rows of another format
    frame, predicted = pd.read_parquet("b.parquet"), pd.read_parquet("p.parquet")
    training = penguins().bill  # the median is that of the training rows: between the quartiles of all
    fill = model.encoding.fill[0]
    assert training.quantile(0.4) < fill < training.quantile(0.6)
    x = np.column_stack(
        [
            frame.bill.fillna(fill), frame["mass"], frame.bill.isna(), frame.sex.isna(),
            frame.sex == "female", frame.sex == "male",
            frame.island == "B", frame.island == "D", frame.island == "T", ~frame.ringed, frame.ringed,
        ]
    ).astype(float)  # fmt: skip
    np.testing.assert_allclose(predicted[model.classes], np.exp(model.log_proba(x)), rtol=1e-9)


def test_rows_that_lack_a_value_are_dropped_and_counted():
    frame = penguins()
    frame.to_csv("a.csv", index=False)
    done = run("fit", "a.csv", *FIT[:-1], "--missing", "drop")
    gaps = int(frame[["bill", "sex"]].isna().any(axis=1).sum())
    assert f"dropped: {gaps} rows that lack a value" in done.stdout
    said = json.loads(Path("m/summary.json").read_text())
    assert said["dropped_rows"] == gaps
    assert said["training"]["rows"] + said["validation"]["rows"] == len(frame) - gaps
    done = run("predict", "m/model.safetensors", "a.csv", "-o", "p.csv", code=2)
    assert "is missing where a" in done.stderr


def test_a_category_that_the_model_does_not_know_is_zero_and_counted():
    frame = penguins().dropna()
    frame.to_csv("a.csv", index=False)
    run("fit", "a.csv", *FIT)
    other = frame.assign(island=np.where(frame.island == "T", "X", frame.island))
    other.to_csv("b.csv", index=False)
    done = run("predict", "m/model.safetensors", "b.csv", "-o", "p.csv")
    assert f"unknown categories: island in {int((other.island == 'X').sum())} rows" in done.stdout


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
def test_weights_are_those_of_the_estimator(solver):
    frame = penguins().dropna()
    frame.to_parquet("a.parquet")
    options = ["--features", "bill,mass", "--no-standardize", "--tol", 1e-10, "--stopping", "gradient"]
    run("fit", "a.parquet", "--label", "kind", "--weight", "weight", "--validation", 0, *options,
        "--solver", solver, "--out", "m")  # fmt: skip
    model = model_file.load("m/model.safetensors")
    X = frame[["bill", "mass"]].to_numpy()
    right = SoftmaxRegression(tol=1e-10, stopping="gradient").fit(X, frame.kind, frame.weight)
    np.testing.assert_allclose(model.weight, right.coef_, atol=1e-7)
    said = json.loads(Path("m/summary.json").read_text())
    assert said["training"]["loss"] == pytest.approx(
        log_loss(frame.kind, right.predict_proba(X), sample_weight=frame.weight), rel=1e-6
    )
    assert said["training"]["accuracy"] == pytest.approx(right.score(X, frame.kind, frame.weight))


def test_balanced_classes_are_those_of_the_estimator():
    frame = penguins().dropna().query("kind != 'Gentoo' or mass < -2.5")
    frame.to_parquet("a.parquet")
    options = ["--features", "bill,mass", "--no-standardize", "--tol", 1e-10, "--stopping", "gradient"]
    run("fit", "a.parquet", "--label", "kind", "--class-weight", "balanced", "--validation", 0, *options,
        "--out", "m")  # fmt: skip
    X = frame[["bill", "mass"]].to_numpy()
    weights = compute_class_weight("balanced", classes=np.unique(frame.kind), y=frame.kind)
    of_class = dict(zip(np.unique(frame.kind), weights, strict=True))
    right = SoftmaxRegression(class_weight=of_class, tol=1e-10, stopping="gradient").fit(X, frame.kind)
    np.testing.assert_allclose(model_file.load("m/model.safetensors").weight, right.coef_, atol=1e-7)


@pytest.mark.parametrize("form", ["csv", "parquet", "lists", "npz", "npy"])
def test_masses_of_classes_are_learnt(form):
    frame = penguins().dropna()
    rng = np.random.default_rng(0)
    masses = rng.dirichlet([1, 1, 1], len(frame)) * rng.integers(1, 3, (len(frame), 1))
    X = frame[["bill", "mass"]].to_numpy()
    names = ["p", "q", "r"]
    soft = pd.DataFrame(masses, columns=names).assign(bill=X[:, 0], mass=X[:, 1])
    data, labels = f"a.{form}", "p,q,r"
    if form == "csv":
        soft.to_csv("a.csv", index=False)
    elif form == "parquet":
        soft.to_parquet("a.parquet")
    elif form == "lists":
        data, labels = "a.parquet", "t"
        soft.drop(columns=names).assign(t=list(masses)).to_parquet("a.parquet")
    else:
        labels = "t"
        np.savez("a.npz", X=X, t=masses)
        np.save("a.npy", X)
        np.save("t.npy", masses)
        labels = "t.npy" if form == "npy" else "t"
    run("fit", data, "--soft-labels", labels, "--validation", 0.25, "--no-standardize", "--tol", 1e-9,
        "--stopping", "gradient", "--out", "m")  # fmt: skip
    said = json.loads(Path("m/summary.json").read_text())
    held = pd.read_parquet("m/validation.parquet").row_number.to_numpy() - 1
    kept = np.setdiff1d(np.arange(len(X)), held)
    right = SoftmaxRegression(tol=1e-9, stopping="gradient").fit(X[kept], masses[kept])
    np.testing.assert_allclose(model_file.load("m/model.safetensors").weight, right.coef_, atol=1e-6)
    log_p = right.predict_log_proba(X[held])
    loss = -(masses[held] * log_p).sum() / masses[held].sum()
    assert said["validation"]["loss"] == pytest.approx(loss, rel=1e-5)
    frequencies = masses[kept].sum(0) / masses[kept].sum()
    entropy = -(masses[held].sum(0) @ np.log(frequencies)) / masses[held].sum()
    assert said["validation"]["label_entropy"] == pytest.approx(entropy, rel=1e-9)


def test_the_report_is_that_of_scikit_learn():
    frame = penguins(600).dropna()
    frame.to_parquet("a.parquet")
    said = json.loads(run("fit", "a.parquet", *FIT).stdout)
    written = pd.read_parquet("m/validation.parquet")
    true, predicted = written.true_label, written.prediction
    precision, recall, f1, rows = precision_recall_fscore_support(true, predicted)
    for j, row in enumerate(said["per_class"]):
        assert row["rows"] == rows[j]
        for key, right in (("precision", precision), ("recall", recall), ("f1", f1)):
            assert row[key] == pytest.approx(right[j])
        own = written[true == row["class"]]
        assert row["loss"] == pytest.approx(-np.log(own[row["class"]]).mean())
    assert said["validation"]["macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro"))
    p = written[["Adelie", "Chinstrap", "Gentoo"]].to_numpy().max(1)
    accuracy, confidence = calibration_curve(true == predicted, p, n_bins=15)
    assert [each["accuracy"] for each in said["reliability"]] == pytest.approx(accuracy.tolist())
    assert [each["confidence"] for each in said["reliability"]] == pytest.approx(confidence.tolist())
    share = np.array([each["weight"] for each in said["reliability"]]) / len(true)
    error = float(share @ np.abs(accuracy - confidence))
    assert said["validation"]["calibration_error"] == pytest.approx(error)


def test_a_temperature_is_fitted_stored_and_used():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(200, 40)), rng.integers(0, 3, 200)  # noise, which a weak penalty believes
    frame = pd.DataFrame(X).rename(columns=str).assign(kind=np.array(["a", "b", "c"])[y])
    frame.to_csv("a.csv", index=False)
    fit = ["fit", "a.csv", "--label", "kind", "--l2", 0.1, "--validation", 0.3]
    plain = json.loads(run(*fit, "--out", "m", "--json").stdout)
    done = run(*fit, "--out", "t", "--calibrate")
    said = json.loads(Path("t/summary.json").read_text())
    assert "temperature" in done.stdout
    found = said["calibration"]
    assert found["temperature"] > 2
    assert found["before"]["loss"] == pytest.approx(plain["validation"]["loss"])
    assert found["after"]["loss"] == pytest.approx(said["validation"]["loss"])
    assert found["after"]["loss"] < found["before"]["loss"]
    assert said["validation"]["accuracy"] == plain["validation"]["accuracy"]
    a, b = (model_file.load(f"{name}/model.safetensors") for name in "mt")
    z = a.logits(X) / found["temperature"]
    np.testing.assert_allclose(b.log_proba(X), z - logsumexp(z, axis=1, keepdims=True), atol=1e-12)


def test_a_temperature_that_does_not_exist_is_said():
    frame = penguins(60).dropna()
    frame = frame.assign(bill=frame.kind.map({"Adelie": 0.0, "Chinstrap": 5.0, "Gentoo": 10.0}))
    frame.to_csv("a.csv", index=False)
    done = run("fit", "a.csv", "--label", "kind", "--features", "bill", "--calibrate", "--l2", 1e-3)
    assert "no temperature was fitted" in done.stdout
    assert json.loads(Path("xent-model/summary.json").read_text())["calibration"]["temperature"] == 1


def test_a_test_file_judges_the_model_that_is_written():
    penguins().to_csv("a.csv", index=False)
    frame = penguins(seed=2)
    frame.loc[0, "kind"] = "Emperor"
    frame.to_parquet("b.parquet", index=False)
    done = run(
        "fit", "a.csv", *FIT[:-1], "--missing", "impute", "--test", "b.parquet", "--l2-path", "1:100:3"
    )
    assert "only rows of --test can judge it" in done.stdout
    assert "labels that are no class, Emperor (1)" in done.stdout
    said = json.loads(Path("m/summary.json").read_text())
    again = json.loads(run("predict", "m/model.safetensors", "b.parquet", "-o", "p.csv", "--json").stdout)
    assert said["test"]["rows"] == again["evaluation"]["rows"] == 299
    assert said["test"]["loss"] == pytest.approx(again["evaluation"]["loss"])
    assert (
        "no such file" in run("fit", "a.csv", *FIT, "--missing", "impute", "--test", "c.csv", code=2).stderr
    )


def test_standard_input_is_a_file():
    text = penguins().dropna().to_csv(index=False)
    done = run("fit", "-", *FIT, input=text)
    assert json.loads(done.stdout)["training"]["rows"] > 100
    done = run("predict", "m/model.safetensors", "-", "-o", "p.csv", input=text)
    assert "accuracy" in done.stdout
    done = run("fit", "-", "--label", "kind", input="bill,kind\n1,a\nx,b\n1,b\n2,a\n", code=2)
    assert done.stderr.startswith("xent: standard input: row 2, column 'bill' holds 'x'")
    assert "no such format" in run("fit", "-", *FIT, "--format", "doc", code=2).stderr
    run("fit", "-", *FIT, "--format", "csv.gz", input=gzip.compress(text.encode()))
    Path("a.csv").write_text(text)
    done = run("fit", "a.csv", *FIT, "--test", "-", input=text)
    assert json.loads(done.stdout)["test"]["rows"] == text.count("\n") - 1
    assert "name - once" in run("fit", "-", *FIT, "--test", "-", input=text, code=2).stderr
    for command in (["fit", "a.csv", *FIT], ["predict", "m/model.safetensors", "a.csv", "-o", "p.csv"]):
        assert "--format is of standard input" in run(*command, "--format", "csv", code=2).stderr


def test_an_archive_of_training_and_test_rows():
    X, y = load_digits(return_X_y=True)
    np.savez("d.npz", train=X[:1000], y_train=y[:1000], test=X[1000:], y_test=y[1000:])
    fit = [
        "fit",
        "d.npz",
        "--array",
        "train",
        "--label",
        "y_train",
        "--test",
        "d.npz",
        "--out",
        "m",
        "--json",
    ]
    done = run(*fit, "--test-array", "test", "--test-label", "y_test")
    assert json.loads(done.stdout)["test"]["rows"] == len(X) - 1000


def test_columns_that_look_like_ids_are_named():
    frame = penguins(100).dropna()
    rng = np.random.default_rng(0)
    frame = frame.assign(
        id=rng.permutation(len(frame)),
        when=np.sort(rng.random(len(frame))),
        days=rng.integers(0, 9, len(frame)),
    )
    frame.to_csv("a.csv", index=False)
    done = run("fit", "a.csv", *FIT)
    assert done.stderr.splitlines() == [
        "xent: column 'id' looks like an id: --exclude id leaves it out",
        "xent: column 'when' looks like an id: --exclude when leaves it out",
    ]
    frame.to_csv("b.csv")
    done = run("fit", "b.csv", *FIT[:-1], "--exclude", "id,when,weight")
    assert "not used: the column without a name (the index of the data frame)" in done.stdout


USAGE = {
    "both labels": (["a.csv", "--label", "kind", "--soft-labels", "bill,mass"], "do not go together"),
    "no test": (["a.csv", "--label", "kind", "--test-label", "kind"], "--test-label is of --test"),
    "two marks": (["a.csv", "--label", "kind", "--delimiter", ";;"], "--delimiter is one character"),
    "calibrate": (["a.csv", "--label", "kind", "--validation", 0, "--calibrate"], "--calibrate fits"),
    "weight": (
        ["a.csv", "--label", "kind", "--weight", "sex"],
        "; correct or drop the row, or name another column with --weight",
    ),
    "zero": (["z.csv", "--label", "kind", "--weight", "weight"], "fewer than two classes"),
    "both": (["a.csv", "--label", "kind", "--weight", "kind"], "is named in --weight and in --label"),
}


@pytest.mark.parametrize("name", USAGE)
def test_options_that_do_not_go_together(tmp_path, name):
    penguins().dropna().to_csv("a.csv", index=False)
    penguins().dropna().assign(weight=0).to_csv("z.csv", index=False)
    options, message = USAGE[name]
    done = run("fit", *options, "--out", "m", code=2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_help_lists_the_common_options_first():
    text = run("fit", "--help").output
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Common options:", "Rows and columns:", "Files:", "Solver:", "Machine:", "Output:"]
    assert text.index("--label") < text.index("--out") < text.index("--delimiter") < text.index("--solver")
