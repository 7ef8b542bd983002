"""The commands as a person types them: what they print, what they leave behind, how they end."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import types
import warnings

import numpy as np
import pytest
from click.testing import CliRunner
from pyarrow import csv, parquet

from running import run
from xent.__main__ import main
from xent.cli.commands import cli
from xent.data import model_file
from xent.linear_model.advice import command_words


def flowers(path, rows=40, seed=0):
    """Two numbers, an id and a name a row, of three kinds."""
    rng = np.random.default_rng(seed)
    lines = ["id,name,u,v,kind"]
    for i in range(rows):
        c = i % 3
        lines.append(
            f"{i},flower {i},{rng.normal() + 2 * c:.4f},{rng.normal() - c:.4f},{['iris', 'rose', 'tulip'][c]}"
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def test_either_solver_finds_the_same(tmp_path):
    flowers(tmp_path / "f.csv")
    losses = []
    for solver in ("lbfgs", "newton-cg"):
        done = run(
            "fit", "f.csv", "--label", "kind", "--exclude", "id", "--solver", solver, "--tol", 1e-11, "--json"
        )
        said = json.loads(done.stdout)
        assert said["settings"]["solver"] == solver
        losses.append(said["training"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_demo_and_predict(tmp_path):
    done = run("fit", "--demo", "--out", "demo")
    for said in (
        "training",
        "validation",
        "nats",
        "knowing only class frequencies",
        "accuracy",
        "iterations",
    ):
        assert said in done.stdout
    assert done.stdout.count(" taken for ") >= 3
    assert done.stderr == ""  # not a terminal: no progress
    made = {path.name for path in (tmp_path / "demo").iterdir()}
    assert made == {
        "model.safetensors",
        "validation.parquet",
        "summary.json",
        "held-out.parquet",
        "loss.png",
        "confusion.png",
        "reliability.png",
    }
    done = run("predict", "demo/model.safetensors", "demo/held-out.parquet", "-o", "demo/predictions.parquet")
    read = parquet.read_table(tmp_path / "demo" / "predictions.parquet")
    assert read.column_names == [*"0123456789", "prediction"]
    assert read.num_rows == 360
    held_out = json.loads((tmp_path / "demo" / "summary.json").read_text())["validation"]
    assert held_out["accuracy"] > 0.95
    assert held_out["loss"] < 0.15 < held_out["label_entropy"]
    # the last line that is printed is of rows that were not fitted, and the same as the validation column
    accuracy, loss = 100 * held_out["accuracy"], held_out["loss"]
    assert done.stdout.splitlines()[-1] == f"against 'digit': accuracy {accuracy:.2f} %, loss {loss:.4f} nats"
    run("fit", "--demo", "--validation", "0", "--out", "demo")  # no row is held out
    assert not (tmp_path / "demo" / "held-out.parquet").exists()


def test_fit_and_predict_a_csv(tmp_path):
    done = run("fit", flowers(tmp_path / "f.csv"), "--label", "kind", "--exclude", "id", "--out", "m")
    assert "f.csv: 3 classes, 2 features" in done.stdout
    assert "not used: name (text)" in done.stdout
    assert "in m/: model.safetensors" in done.stdout
    (tmp_path / "g.csv").write_text("v,extra,u\n-2,x,4\n0,y,0\n")  # another order, another column, no label
    assert "2 rows, 3 classes: p.csv" in run("predict", "m/model.safetensors", "g.csv", "-o", "p.csv").stdout
    read = csv.read_csv(tmp_path / "p.csv")
    assert read.column_names == ["iris", "rose", "tulip", "prediction"]
    assert read.column("prediction").to_pylist() == ["tulip", "iris"]
    (tmp_path / "h.csv").write_text("u,v,kind\n0,0,iris\n4,-2,rose\n4,-2,\n0,0,daisy\n")
    done = run("predict", "m/model.safetensors", "h.csv", "-o", "p.csv")
    assert "against 'kind': accuracy 50.00 %, loss " in done.stdout
    assert "rows 1 without a label, 1 labelled 'daisy'" in done.stdout
    found = json.loads(run("predict", "m/model.safetensors", "h.csv", "-o", "p.csv", "--json").stdout)
    assert found["evaluation"]["rows"] == 2
    assert found["unknown_labels"] == {"daisy": 1}


def test_fit_and_predict_arrays(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    X = rng.normal(size=(60, 4)) + 3 * np.eye(4)[y]
    np.save(tmp_path / "X.npy", X.astype(np.float32))
    np.save(tmp_path / "y.npy", y)
    np.savez(tmp_path / "a.npz", X=X, y=y)
    run("fit", "X.npy", "--label", "y.npy", "--out", "m")
    assert model_file.load(tmp_path / "m" / "model.safetensors").weight.dtype == np.float32
    # the labels are a file, with rows that are not the next X's: only an explicit --label counts
    assert model_file.load(tmp_path / "m" / "model.safetensors").label_name is None
    np.save(tmp_path / "new.npy", X[:9].astype(np.float32))
    assert "accuracy" not in run("predict", "m/model.safetensors", "new.npy", "-o", "p.parquet").stdout
    said = run("predict", "m/model.safetensors", "X.npy", "--label", "y.npy", "-o", "p.parquet").stdout
    assert "against 'y.npy': accuracy" in said
    run("fit", "a.npz", "--label", "y", "--out", "n")
    assert "accuracy" in run("predict", "n/model.safetensors", "a.npz", "-o", "p.parquet").stdout
    assert (
        "accuracy"
        in run("predict", "n/model.safetensors", "X.npy", "--label", "y.npy", "-o", "p.parquet").stdout
    )


def test_json_is_one_object_and_quiet_is_nothing(tmp_path):
    flowers(tmp_path / "f.csv")
    done = run("fit", "f.csv", "--label", "kind", "--features", "u,v", "--json", "--seed", 3, "--l2", 0.5)
    found = json.loads(done.stdout)
    assert found["settings"]["seed"] == 3
    assert found["settings"]["l2"] == 0.5
    assert found["training"]["rows"] + found["validation"]["rows"] == 40
    assert {"loss", "label_entropy", "accuracy"} < set(found["validation"])
    assert {"iterations", "seconds", "gradient_norm", "converged", "most_confused", "files"} < set(found)
    assert found["skipped"] == []
    assert found["files"][0] == "xent-model/model.safetensors"
    done = run("fit", "f.csv", "--label", "kind", "--quiet")
    assert done.output == ""
    assert json.loads((tmp_path / "xent-model" / "summary.json").read_text())["skipped"] == ["name"]
    assert run("predict", "xent-model/model.safetensors", "f.csv", "-o", "p.parquet", "--quiet").output == ""


def test_the_same_seed_is_the_same_model(tmp_path):
    flowers(tmp_path / "f.csv")
    for out in "ab":
        run("fit", "f.csv", "--label", "kind", "--out", out, "--quiet")
    models = [(tmp_path / out / "model.safetensors").read_bytes() for out in "ab"]
    assert models[0] == models[1]


def test_not_converged_is_said(tmp_path):
    flowers(tmp_path / "f.csv")
    done = run("fit", "f.csv", "--label", "kind", "--max-iter", 2)
    assert "xent: not converged in 2 iterations" in done.stderr
    assert done.stderr.endswith("--tol 0.0001: --max-iter is reached; raise --max-iter or --tol\n")
    assert "not converged after 2 iterations" in done.stdout


@pytest.mark.parametrize(
    ("options", "ways"),
    [
        (["--solver", "lbfgs"], "--solver newton-cg, a larger --l2 or a larger --tol"),
        (
            ["--solver", "lbfgs", "--no-standardize"],
            "--solver newton-cg, --standardize, a larger --l2 or a larger --tol",
        ),
        (["--solver", "newton-cg"], "a larger --l2 or a larger --tol"),
        (
            ["--solver", "newton-cg", "--no-standardize"],
            "--standardize, a larger --l2 or a larger --tol",
        ),
    ],
)
def test_a_stalled_fit_says_what_helps(tmp_path, options, ways):
    flowers(tmp_path / "f.csv")
    done = run("fit", "f.csv", "--label", "kind", "--exclude", "id", "--tol", 0, *options)
    assert done.stderr.endswith(f": the arithmetic resolves no further decrease; try {ways}\n")


def test_a_stalled_fit_of_shared_classes_is_not_sent_where_it_cannot_go():
    """--class-parallel refuses --solver newton-cg."""
    assert command_words(class_parallel=True, standardised=True).solvers == (
        "--solver newton-cg without --class-parallel",
    )
    assert command_words(class_parallel=False, standardised=True).solvers == ("--solver newton-cg",)


def test_no_validation(tmp_path):
    flowers(tmp_path / "f.csv")
    done = run("fit", "f.csv", "--label", "kind", "--validation", 0, "--out", "m")
    assert "validation" not in done.stdout
    assert "most confused on training rows" in done.stdout
    assert not (tmp_path / "m" / "validation.parquet").exists()


# Bad input: one line on stderr, exit code 2, nothing written

GOOD = "u,v,kind\n" + "1,2,a\n2,1,b\n" * 10
BAD = {
    "missing file": (None, [], r"f.csv: no such file"),
    "empty file": ("", [], "the file is empty"),
    "header only": ("u,v,kind\n", ["--features", "u"], "columns but no rows"),
    "no such column": (GOOD.replace("kind", "sort"), [], "no column 'kind' for --label"),
    "no such feature": (GOOD, ["--features", "u,w"], "no column 'w' (--features)"),
    "no numeric column": ("u,kind\n" + "x,a\ny,b\n" * 10, [], "no numeric column"),
    "nan": (GOOD + "nan,1,a\n", [], "row 21, column 'u' is missing"),
    "inf": (GOOD + "1,inf,a\n", [], "row 21, column 'v' holds inf"),
    "missing label": (GOOD + "1,1,\n", [], "row 21 has no label"),
    "one class": ("u,kind\n" + "1,a\n2,a\n" * 10, [], "every label in 'kind' is 'a'"),
    "a spoiled number": (GOOD.replace("2,1", "2,?", 1), [], "row 2, column 'v' holds '?'"),
    "a lone row": (GOOD + "1,1,c\n", [], "class 'c' has a single row (row 21)"),
    "unwritable": (GOOD, ["--out", "f.csv/out"], "f.csv is a file, not a directory"),
    "reserved class": (GOOD.replace("a\n", "prediction\n"), [], "a class is called 'prediction'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, case):
    content, options, message = BAD[case]
    if content is not None:
        (tmp_path / "f.csv").write_text(content)
    before = sorted(tmp_path.rglob("*"))
    done = run("fit", "f.csv", "--label", "kind", *options, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("xent: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a file to fit, or --demo"),
        (["f.csv"], "Name it with --label"),
        (["f.csv", "--demo"], "not both"),
        (["--demo", "--label", "x"], "drop --label"),
        (["f.csv", "--label", "kind", "--features", "u", "--exclude", "v"], "do not go together"),
        (["f.csv", "--label", "kind", "--validation", "1"], "validation"),
        (["f.csv", "--label", "kind", "--validation", "nan"], "'--validation': nan is not a finite number"),
        (["f.csv", "--label", "kind", "--l2", "inf"], "'--l2': inf is not a finite number"),
        (["f.csv", "--label", "kind", "--l2", "nan"], "'--l2': nan is not a finite number"),
        (["f.csv", "--label", "kind", "--tol", "nan"], "'--tol': nan is not a finite number"),
        (["f.csv", "--label", "kind", "--features", "u,u"], "'u' is asked for 2 times"),
        (["f.csv", "--label", "kind", "--exclude", '"u'], "is no row of CSV"),
        (["f.csv", "--label", "kind", "--colour"], "No such option"),
    ],
)
def test_options_that_make_no_sense(tmp_path, arguments, message):
    (tmp_path / "f.csv").write_text(GOOD)
    said = run("fit", *arguments, code=2).stderr
    assert message in said
    assert said.startswith("xent: ")
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["f.csv"]


def test_names_with_commas_and_spaces(tmp_path):
    (tmp_path / "f.csv").write_text('"a,b", c,kind\n' + "1,2,x\n2,1,y\n" * 10)
    run("fit", "f.csv", "--label", "kind", "--features", '"a,b", c', "--out", "m")
    assert model_file.load(tmp_path / "m" / "model.safetensors").feature_names == ("a,b", " c")


def test_bad_predictions(tmp_path):
    run("fit", flowers(tmp_path / "f.csv"), "--label", "kind", "--exclude", "id", "--out", "m", "--quiet")
    whole = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-8])
    (tmp_path / "foreign.safetensors").write_bytes(b"{}")
    (tmp_path / "g.csv").write_text("u,w\n1,2\n")
    (tmp_path / "huge.csv").write_text("u,v\n1,2\n-1e308,1e308\n")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    for model, source, output, message in [
        ("m/model.safetensors", "g.csv", "p.parquet", "no column 'v' (a feature of m/model.safetensors)"),
        ("m/none.safetensors", "f.csv", "p.parquet", "no such model file"),
        ("cut.safetensors", "f.csv", "p.parquet", "not a whole safetensors file"),
        ("foreign.safetensors", "f.csv", "p.parquet", "not a safetensors file"),
        ("m/model.safetensors", "f.csv", "p.xlsx", "written as .parquet, .csv or .jsonl"),
        ("m/model.safetensors", "f.csv", "f.csv/p.parquet", "is a file, not a directory"),
        ("m/model.safetensors", "none.csv", "p.parquet", "none.csv: no such file"),
        ("m/model.safetensors", "f.csv", "m/../f.csv", "is read by this command and would be overwritten"),
        ("m/model.safetensors", "huge.csv", "p.csv", "huge.csv: row 2 has no probabilities"),
    ]:
        done = run("predict", model, source, "-o", output, code=2)
        assert message in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_advice_can_be_followed_with_the_command_that_gives_it(tmp_path):
    (tmp_path / "f.csv").write_text(GOOD)
    (tmp_path / "g.csv").write_text("u,v,kind\n1,2,a\n1,,b\n")
    run("fit", "f.csv", "--label", "kind", "--out", "m", "--quiet")
    start = "xent: g.csv: row 2, column 'v' is missing where a finite number is needed; "
    impute = "correct the row, or let --missing drop or impute it, "
    for command, advice in (
        (["fit", "g.csv", "--label", "kind"], f"{impute}or leave the column out with --exclude v\n"),
        (
            ["fit", "g.csv", "--label", "kind", "--features", "u,v"],
            f"{impute}or leave the column out of --features\n",
        ),
        (
            ["predict", "m/model.safetensors", "g.csv", "-o", "p.csv"],
            "correct or drop the row, or fit a model without the column\n",
        ),
    ):
        assert run(*command, code=2).stderr == start + advice
    run("fit", "g.csv", "--label", "kind", "--missing", "drop", "--validation", 0, code=2)
    parquet.write_table(csv.read_csv("f.csv").drop_columns("v").append_column("v", [["x"] * 20]), "t.parquet")
    for command, advice in (
        (
            ["fit", "t.parquet", "--label", "kind", "--features", "u,v"],
            "learn from its values with --categorical v, or leave the column out of --features\n",
        ),
        (["predict", "m/model.safetensors", "t.parquet", "-o", "p.csv"], "fit a model without the column\n"),
    ):
        assert run(*command, code=2).stderr.endswith(f"holds text, not numbers; {advice}")
    said = run("predict", "m/model.safetensors", "f.csv", "--label", "u", "-o", "p.csv", code=2).stderr
    assert "the label column 'u' cannot be a feature; name another column with --label" in said


NUMBERS = {
    "decimals": [f"{4 + i / 10:.1f}" for i in range(20)],
    "decimals, some of them whole": [f"{i / 4:g}" for i in range(20)],
    "decimals, few to a class": [f"{4 + i // 2 / 10:.1f}" for i in range(20)],
    "a number for each row": [str(1000 + 7 * i) for i in range(20)],
}


@pytest.mark.parametrize("case", NUMBERS)
def test_a_number_is_no_class(tmp_path, case):
    lines = [f"{i},{i % 3},{label}" for i, label in enumerate(NUMBERS[case])]
    (tmp_path / "f.csv").write_text("\n".join(["u,v,kind", *lines]) + "\n")
    said = run("fit", "f.csv", "--label", "kind", code=2).stderr
    classes = len(set(NUMBERS[case]))
    assert (
        f"f.csv: the labels in 'kind' look like numbers, not classes: {classes} different ones in 20 rows"
        in said
    )


@pytest.mark.parametrize(
    "labels", [["0.5", "1.5"] * 10, [str(i // 4) for i in range(20)]], ids=["halves", "five"]
)
def test_classes_that_are_numbers_are_classes(tmp_path, labels):
    lines = [f"{i},{i % 3},{label}" for i, label in enumerate(labels)]
    (tmp_path / "f.csv").write_text("\n".join(["u,v,kind", *lines]) + "\n")
    run("fit", "f.csv", "--label", "kind", "--validation", 0.25, "--out", "m")


def test_every_message_counts_rows_of_the_file_from_1(tmp_path):
    """Row 8 is spoiled, in every way that is told with a row."""
    (tmp_path / "f.csv").write_text(GOOD)
    run("fit", "f.csv", "--label", "kind", "--out", "m", "--quiet")
    for spoiled in (
        "nan,1,a",
        ",1,a",
        "?,1,a",
        "1,1,",
        "1,1",
        "1,1,a,b",
        "1,1,lone",
        "1e200,1,a",
        "1e308,1,a",
    ):
        lines = GOOD.splitlines()
        lines[8] = spoiled
        (tmp_path / "g.csv").write_text("\n".join(lines) + "\n")
        commands = [["fit", "g.csv", "--label", "kind", "--out", "n"]]
        commands += [["predict", "m/model.safetensors", "g.csv", "-o", "p.csv"]]
        for command in commands:
            done = CliRunner().invoke(cli, command)
            if done.exit_code == 2 and "1e" not in spoiled:
                assert "row 8" in done.stderr.lower(), done.stderr
            assert not re.search(r"row #?(?!8\b)\d", done.stderr.lower()), done.stderr
            if command[0] == "fit":
                assert done.exit_code == 2


def test_losses_that_add_up_to_infinity_are_no_warning(tmp_path):
    (tmp_path / "f.csv").write_text("u,kind\n" + "1,a\n2,b\n" * 10)
    run("fit", "f.csv", "--label", "kind", "--no-standardize", "--validation", 0, "--l2", 10, "--out", "m")
    steep = abs(model_file.load(tmp_path / "m" / "model.safetensors").weight).max()
    (tmp_path / "g.csv").write_text("u,kind\n" + f"{1.5e308 / max(steep, 1):g},a\n" * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = run("predict", "m/model.safetensors", "g.csv", "-o", "p.csv", "--json")
    assert json.loads(done.stdout)["evaluation"]["loss"] is None  # JSON has no word for it


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "f.csv").write_text(GOOD)

    def fail(*_):
        raise OSError("disk full")

    run("fit", "f.csv", "--label", "kind", "--out", "m", "--quiet")
    before = sorted(tmp_path.rglob("*"))
    times = [path.stat().st_mtime_ns for path in before]
    monkeypatch.setattr("xent.cli.predict_job.log_proba", fail)
    assert (
        "disk full" in run("predict", "m/model.safetensors", "f.csv", "-o", "new/deeper/p.csv", code=1).stderr
    )
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("xent.cli.fit_job.write_predictions", fail)
    for out in ("m", "new"):
        assert "disk full" in run("fit", "f.csv", "--label", "kind", "--out", out, code=1).stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert [path.stat().st_mtime_ns for path in before if path.is_file()] == [
        time for path, time in zip(before, times, strict=True) if path.is_file()
    ]


def test_the_input_of_a_fit_is_not_its_output(tmp_path):
    run("fit", flowers(tmp_path / "f.csv"), "--label", "kind", "--exclude", "id", "--out", "m", "--quiet")
    arguments = ["m/validation.parquet", "--label", "true_label", "--exclude", "row_number", "--out", "m"]
    assert "would be overwritten" in run("fit", *arguments, code=2).stderr


# Figures, after the model


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("no\nink"), 1, "no figures, but the model is saved: RuntimeError: no ink"),
        (KeyboardInterrupt(), 130, "interrupted while drawing figures; the model is saved in m/"),
    ],
    ids=["error", "Ctrl-C"],
)
def test_figures_that_fail_leave_the_model(tmp_path, monkeypatch, error, code, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("xent.report.figures.loss_curve", fail)
    flowers(tmp_path / "f.csv")
    done = run("fit", "f.csv", "--label", "kind", "--exclude", "id", "--out", "m", code=code)
    assert done.stderr == f"xent: {said}\n"
    assert model_file.load(tmp_path / "m" / "model.safetensors").classes.tolist() == ["iris", "rose", "tulip"]


def test_control_characters_are_shown_as_escapes(tmp_path):
    text = "u,v,\x1b[1mname,kind\n" + "1,2,p,$a_$\n1,2,q,\x1b[31mb\n" * 10
    (tmp_path / "f.csv").write_text(text)
    done = run("fit", "f.csv", "--label", "kind", "--out", "m")
    assert "\x1b" not in done.output
    assert r"\x1b[31mb" in done.stdout
    assert r"not used: \x1b[1mname (text)" in done.stdout


# Processes: extras that are missing, terminals, Ctrl-C


def process(*arguments: str, without: tuple[str, ...] = (), **options) -> subprocess.CompletedProcess:
    hidden = f"import sys; sys.modules.update(dict.fromkeys({without!r}))"
    code = f"{hidden}; from xent.cli.commands import cli; cli()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, **options
    )


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("sklearn", "scikit-learn is not installed; it comes with: pip install 'xent[probe]'"),
        ("pyarrow", "pyarrow is not installed; it comes with: pip install 'xent[probe]'"),
        ("safetensors", "safetensors is not installed; it comes with: pip install 'xent[probe]'"),
    ],
)
def test_a_missing_extra_is_one_line(tmp_path, package, said):
    flowers(tmp_path / "f.csv")
    done = process("fit", "f.csv", "--label", "kind", "--exclude", "id", without=(package,))
    assert done.returncode == 1
    assert done.stderr == f"xent: {said}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["f.csv"]


def test_without_matplotlib_there_are_no_figures(tmp_path):
    flowers(tmp_path / "f.csv")
    done = process(
        "fit", "f.csv", "--label", "kind", "--exclude", "id", "--out", "m", without=("matplotlib",)
    )
    assert done.returncode == 0
    assert (
        done.stderr
        == "xent: no figures: matplotlib is not installed; it comes with: pip install 'xent[report]'\n"
    )
    assert not list(tmp_path.glob("m/*.png"))


def test_a_closed_pipe_is_no_failure(tmp_path):
    flowers(tmp_path / "f.csv")
    read, write = os.pipe()
    os.close(read)
    fit = ["fit", "f.csv", "--label", "kind", "--exclude", "id", "--out", "m"]
    command = [sys.executable, "-m", "xent", *fit]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "m" / "confusion.png").exists()


def test_ctrl_c_while_importing_is_one_line(monkeypatch, capsys):
    class Importing(types.ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "xent.cli.commands", Importing("xent.cli.commands"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "xent: interrupted\n"


def test_importing_the_package_imports_no_extra():
    code = (
        "import sys, xent, xent.linear_model; "
        "extras = {'sklearn', 'scipy', 'pyarrow', 'safetensors', 'click', 'rich', 'matplotlib'}; "
        "print(extras & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_ctrl_c_saves_the_best_model_so_far(tmp_path):
    rng = np.random.default_rng(0)
    # features that are nearly one feature, and labels that the rest of them separates: without a penalty
    # there is no end to it, so the signal comes in the middle
    rest = rng.normal(size=(20_000, 100))
    np.save(tmp_path / "X.npy", rng.normal(size=(20_000, 1)) + 0.01 * rest)
    np.save(tmp_path / "y.npy", (rest @ rng.normal(size=(100, 20))).argmax(axis=1))
    command = [
        "fit",
        "X.npy",
        "--label",
        "y.npy",
        "--l2",
        "0",
        "--tol",
        "0",
        "--max-iter",
        "5000",
        "--out",
        "m",
    ]
    ours, theirs = pty.openpty()  # a terminal: the progress there says that iterations have begun
    fit = subprocess.Popen(
        [sys.executable, "-m", "xent", *command],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        # a shell without job control starts what it puts in the background deaf to it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    seen = b""
    deadline = time.monotonic() + 60
    while not re.search(rb"iteration [1-9]", seen):
        assert time.monotonic() < deadline, seen[-500:]
        seen += os.read(ours, 4096)
    fit.send_signal(signal.SIGINT)
    while True:
        try:
            more = os.read(ours, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not more:
            break
        seen += more
    out = fit.communicate(timeout=60)[0].decode()
    os.close(ours)
    assert fit.returncode == 130
    assert b"interrupted: saving the best model so far, of iteration" in seen
    assert b"Traceback" not in seen
    assert "interrupted after" in out
    model = model_file.load(tmp_path / "m" / "model.safetensors")
    assert np.abs(model.weight).max() > 0
    assert not list(tmp_path.glob("m/.*"))  # nothing half-written


def test_an_output_that_is_a_directory_is_refused_before_the_work(tmp_path):
    (tmp_path / "out.csv").mkdir()
    found = run("predict", "m.safetensors", "a.csv", "-o", tmp_path / "out.csv", code=2)
    assert found.exit_code == 2
    assert "it is a directory; name a file" in found.stderr


# A path of strengths


def test_a_path_of_strengths_is_judged_on_the_validation_rows(tmp_path):
    flowers(tmp_path / "f.csv")
    options = ("f.csv", "--label", "kind", "--exclude", "id", "--json")
    said = json.loads(run("fit", *options, "--l2-path", "1e2:1e-2:5", "--out", "m").stdout)
    path = said["strengths"]
    np.testing.assert_allclose(path["l2"], [100, 10, 1, 0.1, 0.01])
    assert path["chosen"] == said["settings"]["l2"] == path["l2"][int(np.argmin(path["validation_loss"]))]
    for l2, training, loss, accuracy in zip(
        *(path[k] for k in ("l2", "training_loss", "validation_loss", "validation_accuracy")), strict=True
    ):
        alone = json.loads(run("fit", *options, "--l2", l2, "--out", "a").stdout)
        assert alone["strengths"] is None
        assert alone["training"]["loss"] == pytest.approx(training, rel=5e-3)
        assert alone["validation"]["loss"] == pytest.approx(loss, rel=5e-3)
        assert alone["validation"]["accuracy"] == pytest.approx(accuracy, abs=0.02)
    assert (tmp_path / "m" / "strength.png").exists()
    # the model in the file has seen all rows, the predictions of the validation rows are another's
    on_all = json.loads(
        run("fit", *options, "--l2", path["chosen"], "--validation", 0, "--out", "all").stdout
    )
    assert on_all["settings"]["validation"] == 0
    ours, right = (model_file.load(tmp_path / name / "model.safetensors") for name in ("m", "all"))
    np.testing.assert_allclose(ours.weight, right.weight, atol=0.05)
    text = run("fit", *options[:-1], "--l2", "auto", "--out", "m").stdout
    assert "is the best of 45 on the validation rows" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--l2-path", "1:2"], "is no START:STOP:COUNT, such as 1e-5:1e6:45"),
        (["--l2-path", "a:b:c"], "is no START:STOP:COUNT"),
        (["--l2-path", "0:1:3"], "must be positive and finite"),
        (["--l2-path", "1:inf:3"], "must be positive and finite"),
        (["--l2-path", "1:2:1"], "1 strengths are no path"),
        (["--l2-path", "1:2:3", "--validation", 0], "judged on validation rows; give --validation a share"),
        (["--l2", "automatic"], "'automatic' is not a valid strength"),
        (["--l2", "-1"], "-1.0 is not in the range"),
        (["--device", "meta"], "meta tensors hold no numbers"),
        (["--device", "nowhere"], "'nowhere'"),
    ],
)
def test_a_path_or_device_that_is_none_is_one_line(tmp_path, options, message):
    flowers(tmp_path / "f.csv")
    done = run("fit", "f.csv", "--label", "kind", *options, code=2)
    assert message in done.stderr
    assert not (tmp_path / "xent-model").exists()


def test_verbose_says_what_was_chosen_and_why(tmp_path):
    flowers(tmp_path / "f.csv")
    done = run("fit", "f.csv", "--label", "kind", "--exclude", "id", "-v")
    assert "solver lbfgs: first-order passes, features decorrelated" in done.stderr
    assert "1 worker thread: the problem is small" in done.stderr
