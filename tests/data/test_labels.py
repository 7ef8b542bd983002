"""Labels across formats: what a model knows of a file's labels, by the kind of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from xent.cli import fit_job as job
from xent.cli.commands import cli
from xent.data import model_file
from xent.data.labels import comparison_kind, kind_of, look_like_numbers, meaning

KINDS = {
    "whole": [["0", "1"], ["10", "9", "-3"], ["+1", "-1"], ["-0", "1"], [3, 7], ["9223372036854775807", "1"]],
    "boolean": [["true", "false"], ["True", "False"], ["FALSE", "true"], [False, True]],
    "text": [
        ["01", "2"],
        ["1.0", "2"],
        ["1", "+1"],
        ["0", "-0"],
        [" 7", "8"],
        ["7 ", "8"],
        ["1e3", "2"],
        ["1", "cat"],
        ["²", "1"],
        ["٣", "1"],
        ["9223372036854775808", "1"],
        ["9" * 50, "1"],
        ["true", "True"],
        ["true", "no"],
        ["true", "1"],
        ["", "1"],
    ],
}


@pytest.mark.parametrize(("kind", "classes"), [(kind, c) for kind in KINDS for c in KINDS[kind]], ids=str)
def test_the_kind_of_labels(kind, classes):
    assert kind_of(np.unique(classes)) == kind


@pytest.mark.parametrize(
    ("label", "whole", "boolean", "text"),
    [
        ("3", 3, None, "3"),
        (" 3.0 ", 3, None, " 3.0 "),
        ("3.", 3, None, "3."),
        ("1e3", 1000, None, "1e3"),
        ("1e+16", None, None, "1e+16"),  # a float64, which neighbours are rounded to
        ("1e+15", 10**15, None, "1e+15"),
        ("12.50e1", 125, None, "12.50e1"),
        ("1e999999999", None, None, "1e999999999"),
        ("-0", 0, False, "-0"),
        ("-0.0", 0, False, "-0.0"),
        ("+1", 1, True, "+1"),
        ("03", None, None, "03"),
        ("3.5", None, None, "3.5"),
        ("nan", None, None, "nan"),
        ("1_0", None, None, "1_0"),
        ("٣", None, None, "٣"),
        ("9" * 50, None, None, "9" * 50),
        (np.int64(2**63 - 1), 2**63 - 1, None, str(2**63 - 1)),
        (np.float64(3.0), 3, None, "3.0"),
        (np.float32(0.1), None, None, "0.1"),
        (np.float64("inf"), None, None, "inf"),
        (np.bool_(True), None, True, "true"),
        ("TRUE", None, True, "TRUE"),
        (" false ", None, False, " false "),
        ("0.0", 0, False, "0.0"),
        ("yes", None, None, "yes"),
        ("2", 2, None, "2"),
    ],
)
def test_what_a_label_means(label, whole, boolean, text):
    assert [meaning(label, kind) for kind in ("whole", "boolean", "text")] == [whole, boolean, text]


def test_labels_that_look_like_numbers():
    assert look_like_numbers(np.array(["4.3", "5", "5.1"]), 100)
    assert look_like_numbers(np.arange(60), 100)
    assert not look_like_numbers(np.arange(40), 100)
    assert not look_like_numbers(np.array(["4.3", "x"]), 2)
    assert not look_like_numbers(np.array([False, True]), 2)


def run(*arguments: object, code: int = 0):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == code, (done.exit_code, done.output, done.exception)
    return done


def write(frame: pd.DataFrame, name: str) -> None:
    frame.to_csv(name, index=False) if name.endswith(".csv") else frame.to_parquet(name)


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "draw", lambda *_: [])


@pytest.mark.usefixtures("in_a_folder")
@pytest.mark.parametrize("missing", [False, True], ids=["full", "one missing"])
@pytest.mark.parametrize("to", ["n.csv", "n.parquet"])
@pytest.mark.parametrize("source", ["f.csv", "f.parquet"])
@pytest.mark.parametrize("kind", ["whole", "boolean", "text"])
def test_the_same_labels_in_another_format(kind, source, to, missing):
    """As pandas writes them: a missing label makes whole numbers floats, and booleans objects."""
    codes = np.arange(40) % 2
    labels = {"whole": codes + 3, "boolean": codes == 1, "text": np.where(codes == 1, "01", "2.0")}[kind]
    x = np.random.default_rng(0).normal(size=40) + 4 * codes
    frame = pd.DataFrame({"x": x, "y": labels})
    write(frame, source)
    run("fit", source, "--label", "y", "--out", "m", "--quiet")
    assert model_file.load("m/model.safetensors").kind == kind
    if missing:
        y = frame["y"].copy() if kind == "whole" else frame["y"].astype(object)
        y[7] = np.nan if kind == "whole" else None
        frame["y"] = y
    write(frame, to)
    said = json.loads(run("predict", "m/model.safetensors", to, "-o", "p.csv", "--json").stdout)
    assert (said["unknown_labels"], said["unlabelled"]) == ({}, int(missing))
    assert said["evaluation"]["rows"] == 40 - missing
    assert said["evaluation"]["accuracy"] > 0.9


@pytest.mark.usefixtures("in_a_folder")
@pytest.mark.parametrize(
    "labels",
    [
        lambda codes: codes.astype(np.uint8),
        lambda codes: codes.astype(np.float32),
        lambda codes: np.where(np.arange(40) == 7, np.nan, codes),
        lambda codes: codes == 1,
        lambda codes: np.where(codes == 1, "1.0", "0"),
        lambda codes: np.where(codes == 1, b"1", b"0"),
    ],
    ids=["uint8", "float32", "nan", "bool", "text", "bytes"],
)
def test_the_same_labels_in_an_array(labels):
    codes = np.arange(40) % 2
    X = np.random.default_rng(0).normal(size=(40, 1)) + 4 * codes[:, None]
    pd.DataFrame({"x0": X[:, 0], "y": codes}).to_csv("f.csv", index=False)
    run("fit", "f.csv", "--label", "y", "--out", "m", "--quiet")
    np.save("X.npy", X)
    np.save("y.npy", labels(codes))
    np.savez("n.npz", X=X, y=labels(codes))
    for data in (["n.npz"], ["X.npy", "--label", "y.npy"]):
        said = json.loads(run("predict", "m/model.safetensors", *data, "-o", "p.csv", "--json").stdout)
        assert said["unknown_labels"] == {}
        assert said["evaluation"]["rows"] + said["unlabelled"] == 40
        assert said["evaluation"]["accuracy"] > 0.9


@pytest.mark.usefixtures("in_a_folder")
def test_some_labels_unknown_and_none_known():
    frame = pd.DataFrame({"x": np.arange(20.0), "y": np.arange(20) % 2})
    write(frame, "f.csv")
    run("fit", "f.csv", "--label", "y", "--out", "m", "--quiet")
    frame["y"] = [0, 1, 2.5, np.nan, *[7] * 16]
    write(frame, "some.parquet")
    said = json.loads(run("predict", "m/model.safetensors", "some.parquet", "-o", "p.csv", "--json").stdout)
    assert said["unknown_labels"] == {"2.5": 1, "7.0": 16}
    assert (said["unlabelled"], said["evaluation"]["rows"]) == (1, 2)
    frame["y"] = "a"
    frame["z"] = "  "
    write(frame, "none.csv")
    for more, message in (
        (
            [],
            "none of its labels in column 'y' is a class of the model: they are 'a', and the classes",
        ),
        (["--label", "y"], "name other labels with --label, or rename the column"),
        (["--label", "z"], "no row has a label in 'z'"),
        (["--label", "w"], "no column 'w' for --label"),
    ):
        done = run("predict", "m/model.safetensors", "none.csv", *more, "-o", "new/p.csv", code=2)
        assert message in done.stderr
        assert not Path("new").exists()
    frame.rename(columns={"y": "other"}).to_csv("renamed.csv")  # the advice, followed
    run("predict", "m/model.safetensors", "renamed.csv", "-o", "new/p.csv")


def older(path) -> None:
    """Take out of a model file what files of earlier versions do not have."""
    from safetensors import safe_open
    from safetensors.numpy import save

    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["xent"])
        tensors = {name: file.get_tensor(name) for name in ("weight", "bias", "mean", "scale")}
    del about["classes"]["kind"]
    del about["width"]
    with open(path, "wb") as file:
        file.write(save(tensors, metadata={"xent": json.dumps(about)}))


@pytest.mark.usefixtures("in_a_folder")
def test_labels_of_an_older_model_are_text():
    frame = pd.DataFrame({"x": np.arange(20.0), "y": np.arange(20) % 2})
    write(frame, "f.csv")
    run("fit", "f.csv", "--label", "y", "--out", "m", "--quiet")
    older("m/model.safetensors")
    assert model_file.load("m/model.safetensors").kind == "text"
    run("predict", "m/model.safetensors", "f.csv", "-o", "p.csv")
    frame["y"] = frame["y"].astype(float)
    write(frame, "g.csv")
    said = run("predict", "m/model.safetensors", "g.csv", "-o", "p.csv", code=2).stderr
    assert "they are '0.0', '1.0', and the classes '0', '1'" in said
    write(frame.astype({"y": bool}), "b.parquet")
    run("fit", "b.parquet", "--label", "y", "--out", "m", "--quiet")
    older("m/model.safetensors")
    assert model_file.load("m/model.safetensors").kind == "boolean"  # as its type says


# Arrays of another width


def model_of_arrays(*options: str, columns: int = 4) -> np.ndarray:
    rng = np.random.default_rng(0)
    y = np.arange(30) % 3
    X = rng.normal(size=(30, columns)) + 3 * np.eye(columns)[y]
    np.savez("f.npz", X=X, y=y)
    run("fit", "f.npz", "--label", "y", "--out", "m", "--quiet", *options)
    return X


@pytest.mark.usefixtures("in_a_folder")
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("options", [[], ["--features", "x2,x0"], ["--exclude", "x3"]], ids=str)
def test_arrays_of_another_width_are_refused(options, suffix):
    X = model_of_arrays(*options)
    assert model_file.load("m/model.safetensors").width == 4

    def predict(array, code, text=""):
        np.save("n.npy", array) if suffix == ".npy" else np.savez("n.npz", X=array)
        assert text in run("predict", "m/model.safetensors", f"n{suffix}", "-o", "p.csv", code=code).stderr

    predict(X, 0)
    for wider in (X.repeat(2, axis=1), np.concatenate([X, X[:, :1]], axis=1)):
        predict(wider, 2, f"has {wider.shape[1]} columns, and m/model.safetensors takes arrays of 4")
    predict(X[:, :3], 2, "has 3 columns, and m/" if options else "no column 'x3' (a feature of m/model")
    predict(X[:, :2], 2)
    # columns of a table have names, and there may be more of them
    pd.DataFrame(X.repeat(2, axis=1), columns=[f"x{j}" for j in range(8)]).to_csv("n.csv", index=False)
    run("predict", "m/model.safetensors", "n.csv", "-o", "p.csv")


@pytest.mark.usefixtures("in_a_folder")
def test_arrays_for_a_model_that_does_not_know_its_width():
    X = model_of_arrays()
    np.save("n.npy", X.repeat(2, axis=1))
    older("m/model.safetensors")  # x0 to x3, which is a whole array
    assert "takes arrays of 4" in run("predict", "m/model.safetensors", "n.npy", "-o", "p.csv", code=2).stderr
    model_of_arrays("--features", "x2,x0")
    older("m/model.safetensors")  # of how many columns nothing says
    run("predict", "m/model.safetensors", "n.npy", "-o", "p.csv")
    pd.DataFrame(X, columns=["x0", "x1", "x2", "x3"]).assign(y=np.arange(30) % 3).to_parquet("t.parquet")
    run("fit", "t.parquet", "--label", "y", "--out", "m", "--quiet")
    assert model_file.load("m/model.safetensors").width is None
    run("predict", "m/model.safetensors", "n.npy", "-o", "p.csv", code=2)


# What a float or a boolean can be


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_a_float_that_stands_for_several_numbers_is_none(kind):
    limit = 2 ** (np.finfo(kind).nmant + 1)
    assert meaning(kind(limit - 1), "whole") == limit - 1
    assert meaning(kind(limit), "whole") is None
    assert meaning(limit, "whole") == limit


def test_text_that_was_a_float_is_judged_as_one():
    assert meaning("9007199254740993", "whole") == 2**53 + 1
    assert meaning("9007199254740992.0", "whole") is None
    assert meaning("3.0", "whole") == 3


@pytest.mark.parametrize("classes", [[0, 1], [1, 2, 3], [0, 1, 2]])
def test_booleans_are_the_numbers_0_and_1_where_there_are_no_others(classes):
    classes = np.array(classes)
    kind = comparison_kind(classes, kind_of(classes))
    both = [[meaning(value, kind) for value in each] for each in ([False, True], ["False", "True"])]
    assert both == ([[False, True]] * 2 if len(classes) == 2 else [[None, None]] * 2)


def test_a_nan_among_classes_is_no_sign_of_numbers():
    assert not look_like_numbers(np.array(["1", "2", "3", "nan"]), 60)
    assert look_like_numbers(np.array(["1.5", "2.5", "3.25"]), 3)
