"""fit and predict on real processes: the same as one process's, and how they fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import csv, parquet

from processes.runs import Runs, alone, files, rows
from xent._processes.group import ALONE, Share
from xent._processes.start import join, started
from xent.cli.commands import cli
from xent.data import model_file
from xent.errors import BadInput


def same_fit(folder: Path, of_ranks: str, of_one: str, said: dict, expected: dict, rtol: float) -> None:
    for part in ("training", "validation"):
        if expected[part] is None:
            assert said[part] is None
            continue
        assert said[part]["rows"] == expected[part]["rows"]
        for number in ("loss", "label_entropy", "accuracy"):
            np.testing.assert_allclose(said[part][number], expected[part][number], rtol=rtol)
    assert said["most_confused"] == expected["most_confused"]
    if said["settings"]["solver"] == "newton-cg":  # whatever Hessian gets there, one's own takes longer
        assert abs(said["iterations"] - expected["iterations"]) <= 1
    one, many = (model_file.load(folder / name / "model.safetensors") for name in (of_one, of_ranks))
    assert many.classes.tolist() == one.classes.tolist()
    assert many.settings == one.settings
    assert many.weight.dtype == one.weight.dtype
    for name in ("mean", "scale"):
        np.testing.assert_allclose(getattr(many, name), getattr(one, name), rtol=rtol, atol=rtol)
    for name in ("weight", "bias"):
        np.testing.assert_allclose(getattr(many, name), getattr(one, name), rtol=0, atol=np.sqrt(rtol) / 10)
    there = (folder / of_one / "validation.parquet").exists()
    assert (folder / of_ranks / "validation.parquet").exists() == there
    if there:
        same_predictions(*(folder / name / "validation.parquet" for name in (of_ranks, of_one)), rtol)


def same_predictions(many: Path, one: Path, rtol: float) -> None:
    read = csv.read_csv if one.suffix == ".csv" else parquet.read_table
    a, b = read(many), read(one)
    assert a.schema.equals(b.schema)
    for name in b.column_names:
        if pa.types.is_floating(b.schema.field(name).type):
            np.testing.assert_allclose(a.column(name), b.column(name), rtol=0, atol=np.sqrt(rtol))
        else:
            assert a.column(name).to_pylist() == b.column(name).to_pylist()


GRADIENT = ("--stopping", "gradient")

FITS = {  # name: arguments, the tolerance of the objective
    "lbfgs": (["a.parquet", "--label", "kind", "--tol", 1e-10, *GRADIENT], 1e-9),
    "newton": (["a.csv", "--label", "kind", "--solver", "newton-cg", "--tol", 1e-10, *GRADIENT], 1e-9),
    "float32": (["X.npy", "--label", "y.npy", "--l2", 3, "--tol", 1e-10], 1e-5),
    "fewer rows than ranks": (
        ["few.npz", "--label", "y", "--validation", 0, "--tol", 1e-10, *GRADIENT],
        1e-9,
    ),
    "a share without validation rows": (
        ["dozen.parquet", "--label", "kind", "--seed", 7, "--tol", 1e-10, *GRADIENT],
        1e-9,
    ),
    "classes spread": (
        ["a.parquet", "--label", "kind", "--class-parallel", 3, "--tol", 1e-10, *GRADIENT],
        1e-9,
    ),
    "raw": (
        ["a.parquet", "--label", "kind", "--no-standardize", "--seed", 5, "--tol", 1e-10, *GRADIENT],
        1e-9,
    ),
}


def in_one_piece(arguments: list) -> list:
    """The same without the option that one process does not take."""
    if "--class-parallel" not in arguments:
        return arguments
    at = arguments.index("--class-parallel")
    return arguments[:at] + arguments[at + 2 :]


def three_ranks(folder: Path) -> Runs:
    """Fits, predictions, bad input, and a rank that is killed."""
    files(folder)
    runs = Runs(3, folder)
    for name, (arguments, _) in FITS.items():
        runs.add(name, "fit", *arguments, "--json", "--out", f"3 {name}")
    model = "3 lbfgs/model.safetensors"
    runs.add("predict", "predict", model, "a.parquet", "-o", "3.parquet", "--json")
    runs.add("predict new", "predict", model, "new.parquet", "-o", "3.csv")
    runs.add("nan", "fit", "nan.parquet", "--label", "kind", "--out", "bad")
    runs.add("blank", "fit", "blank.csv", "--label", "kind", "--out", "bad")
    runs.add("no such file", "fit", "none.csv", "--label", "kind", "--out", "bad")
    runs.add("one class", "fit", "one.csv", "--label", "kind", "--out", "bad")
    spread = ["--class-parallel", 3, "--out", "bad"]
    runs.add("few classes", "fit", "few.npz", "--label", "y", "--validation", 0, *spread)
    runs.add("newton spread", "fit", "a.csv", "--label", "kind", "--solver", "newton-cg", *spread)
    endless = ["fit", "a.parquet", "--label", "kind", "--solver", "endless", "--tol", 0]
    other = [str(a) for a in ["fit", "a.parquet", "--label", "kind", "--l2", 2]]
    runs.add("fails", "fit", "a.parquet", "--label", "kind", "--out", "bad", fail=[1, 5])
    runs.add("mixed", *endless, "--out", "bad", other=[1, other])
    runs.add("killed", *endless, "--out", "bad", touch="iterates")
    with runs:
        runs.start()
        runs.wait_for("iterates")
        runs.processes[2].kill()
        runs.end()
    return runs


def test_three_ranks(tmp_path, monkeypatch):
    """One test, so that no two workers start the runs."""
    runs = three_ranks(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("xent.cli.fit_job.draw", lambda *_: [])
    for name in FITS:
        they_fit_what_one_process_does(runs, name)
    shares_are_as_odd_as_they_are_meant()
    they_predict_what_one_process_does(runs)
    for name, message in BAD.items():
        what_is_bad_on_one_rank_is_said_on_all(runs, name, message)
    an_error_of_ours_on_one_rank_is_told_by_the_others(runs)
    a_killed_rank_ends_the_others(runs)


def they_fit_what_one_process_does(runs: Runs, name: str) -> None:
    arguments, rtol = FITS[name]
    first, *others = runs.of(name)
    assert [rank["code"] for rank in (first, *others)] == [0, 0, 0], (first, *others)
    assert [rank["out"] + rank["err"] for rank in others] == ["", ""]  # rank 0 speaks
    expected = json.loads(alone("fit", *in_one_piece(arguments), "--json", "--out", f"1 {name}").stdout)
    same_fit(runs.folder, f"3 {name}", f"1 {name}", json.loads(first["out"]), expected, rtol)
    assert sorted(os.listdir(f"3 {name}")) == sorted(os.listdir(f"1 {name}"))


def shares_are_as_odd_as_they_are_meant() -> None:
    """The two jobs above that are about odd shares are about these."""
    held = parquet.read_table("3 a share without validation rows/validation.parquet")
    assert set((held.column("row_number").to_numpy() - 1) // 4) == {1}
    assert [Share(i, 3).of(2) for i in range(3)] == [slice(0, 0), slice(0, 1), slice(1, 2)]


def they_predict_what_one_process_does(runs: Runs) -> None:
    first, *others = runs.of("predict")
    assert [rank["out"] + rank["err"] for rank in others] == ["", ""]
    model = "3 lbfgs/model.safetensors"
    said = alone("predict", model, "a.parquet", "-o", "1.parquet", "--json").stdout
    said, expected = json.loads(first["out"]), json.loads(said)
    assert (said.pop("file"), expected.pop("file")) == ("3.parquet", "1.parquet")
    found, right = said.pop("evaluation"), expected.pop("evaluation")
    assert found.pop("label_entropy") is right.pop("label_entropy") is None
    assert found == pytest.approx(right, rel=1e-12)
    assert said == expected
    same_predictions(Path("3.parquet"), Path("1.parquet"), 1e-20)
    assert runs.of("predict new")[0]["out"] == "500 rows, 4 classes: 3.csv\n"
    alone("predict", model, "new.parquet", "-o", "1.csv")
    same_predictions(Path("3.csv"), Path("1.csv"), 1e-20)


BAD = {  # job: how its one line begins
    "nan": "rank 2: nan.parquet: row 481, column 'x3' holds nan where a finite number is needed",
    "blank": "rank 1: blank.csv: row 250 has no label in column 'kind'",
    "no such file": "none.csv: no such file",
    "one class": "one.csv: every label in 'kind' is 'a'; a classifier needs two classes",
    "few classes": "--class-parallel 3 is more than the 2 classes; use fewer slices",
    "newton spread": "--class-parallel does not go with --solver newton-cg; fit with --solver lbfgs",
    "mixed": "rank 1 has another command line than rank 0: start all ranks with one command",
}


def what_is_bad_on_one_rank_is_said_on_all(runs: Runs, name: str, message: str) -> None:
    said = runs.of(name)
    assert [rank["code"] for rank in said] == [2, 2, 2], said
    assert len({rank["err"] for rank in said}) == 1
    assert said[0]["err"].startswith(f"xent: {message}")
    assert said[0]["err"].count("\n") == 1
    assert not Path("bad").exists()
    if name in ("nan", "blank", "no such file", "one class"):  # one process says the same, but for the rank
        whole = alone(*runs.jobs[name]["arguments"], code=2).stderr
        assert said[0]["err"].endswith(whole.removeprefix("xent: "))


def an_error_of_ours_on_one_rank_is_told_by_the_others(runs: Runs) -> None:
    first, failed, last = runs.of("fails")
    for rank in (first, last):
        assert (rank["code"], rank["err"]) == (1, "xent: rank 1: ZeroDivisionError: division by zero\n"), rank
    assert (failed["code"], failed["raised"]) == (1, "ZeroDivisionError('division by zero')")
    assert not (runs.folder / "bad").exists()


def a_killed_rank_ends_the_others(runs: Runs) -> None:
    left = runs.of("killed")
    assert len(left) == 2
    assert runs.processes[2].returncode == -signal.SIGKILL
    for rank, said in enumerate(left):
        assert (said["code"], said["out"]) == (1, ""), said
        assert said["err"] == (
            f"xent: rank {rank}: another rank has ended, or has not answered for 300 s (--timeout); "
            "nothing is half-written\n"
        )
    assert not (runs.folder / "bad").exists()
    assert not [name for name in os.listdir(runs.folder) if name.startswith(".")]


TWO = ["fit", "dozen.parquet", "--label", "kind", "--validation", 0, "--tol", 1e-10, *GRADIENT, "--json"]


PARTS = ["fit", "parts", "--label", "kind", "--tol", 1e-10, *GRADIENT, "--json"]
KEPT = ["fit", "a.parquet", "--label", "kind", "--checkpoint", "c", "--json"]


def two_ranks(folder: Path) -> Runs:
    """Two classes, Ctrl-C, SIGTERM, a row without probabilities, one that dies while these are written."""
    files(folder)
    runs = Runs(2, folder)
    runs.add("spread", *TWO, "--class-parallel", 2, "--out", "two")
    runs.add("parts", *PARTS, "--out", "of-parts")
    runs.add("kept", *KEPT, "--max-iter", 3, "--out", "begun")
    fit = ["fit", "small.parquet", "--label", "kind", "--solver", "endless", "--tol", 0]
    runs.add("ctrl-c", *fit, "--out", "m", touch="iterates")
    runs.add("terminated", *fit, "--out", "t", touch="iterates too")
    model = "m/model.safetensors"
    runs.add("large", "predict", model, "large.parquet", "-o", "p.csv")
    runs.add(
        "dies", "predict", model, "new.parquet", "-o", "p.csv", "--timeout", 30, die=[1, 3, signal.SIGKILL]
    )
    x, y = rows(500, 4)
    small = {f"x{j}": x[:, j] / 1000 for j in range(5)}
    parquet.write_table(pa.table({**small, "kind": y}), folder / "small.parquet")
    (folder / "parts").mkdir()
    table = parquet.read_table(folder / "a.parquet")
    for i, (first, last) in enumerate(((0, 100), (100, 301), (301, 500))):
        parquet.write_table(table.slice(first, last - first), folder / "parts" / f"{i}.parquet")
    x[300] = 1e308  # over a deviation of a thousandth: infinite
    parquet.write_table(pa.table({f"x{j}": x[:, j] for j in range(5)}), folder / "large.parquet")
    with runs:
        runs.start()
        runs.wait_for("iterates")
        for process in runs.processes:
            process.send_signal(signal.SIGINT)
        runs.wait_for("iterates too")
        runs.processes[0].terminate()
        runs.end()
    return runs


def test_two_ranks(tmp_path, monkeypatch):
    runs = two_ranks(tmp_path)
    monkeypatch.chdir(tmp_path)
    classes_on_ranks_of_their_own(runs)
    a_folder_is_shared(runs)
    a_checkpoint_of_two_ranks_is_one_of_one(runs)
    ctrl_c_saves_the_model_and_ends_all_ranks(runs)
    sigterm_on_one_rank_ends_all(runs)
    a_row_that_cannot_be_predicted_leaves_no_file(runs)
    a_rank_that_dies_while_predictions_are_written_leaves_no_file(runs)


def classes_on_ranks_of_their_own(runs: Runs) -> None:
    first, _ = runs.of("spread")
    assert first["code"] == 0, first
    expected = json.loads(alone(*TWO, "--out", "one").stdout)
    same_fit(runs.folder, "two", "one", json.loads(first["out"]), expected, 1e-9)


def a_folder_is_shared(runs: Runs) -> None:
    first, _ = runs.of("parts")
    assert first["code"] == 0, first
    expected = json.loads(alone(*PARTS, "--out", "whole").stdout)
    same_fit(runs.folder, "of-parts", "whole", json.loads(first["out"]), expected, 1e-9)
    whole = json.loads(alone("fit", "a.parquet", *PARTS[2:], "--out", "file").stdout)
    same_fit(runs.folder, "whole", "file", expected, whole, 1e-9)


def a_checkpoint_of_two_ranks_is_one_of_one(runs: Runs) -> None:
    first, _ = runs.of("kept")
    assert (first["code"], json.loads(first["out"])["iterations"]) == (0, 3), first
    done = alone(*KEPT, "--resume", "--out", "ended")
    assert "going on from c/checkpoint-000001.safetensors" in done.stderr
    assert json.loads(done.stdout)["converged"]
    assert json.loads(done.stdout)["iterations"] > 3


def ctrl_c_saves_the_model_and_ends_all_ranks(runs: Runs) -> None:
    first, other = runs.of("ctrl-c")
    assert (first["code"], other["code"], other["out"], other["err"]) == (130, 130, "", "")
    assert "xent: interrupted: saving the best model so far, of iteration" in first["err"]
    about = json.loads((runs.folder / "m" / "summary.json").read_text())
    assert about["interrupted"]
    assert about["training"]["loss"] < about["training"]["label_entropy"]


def sigterm_on_one_rank_ends_all(runs: Runs) -> None:
    first, other = runs.of("terminated")
    assert (first["code"], other["code"]) == (143, 1), (first, other)
    assert first["err"].startswith("xent: ended by SIGTERM")
    assert other["err"].startswith("xent: rank 1: another rank has ended")
    assert not (runs.folder / "t").exists()


def a_row_that_cannot_be_predicted_leaves_no_file(runs: Runs) -> None:
    said = runs.of("large")
    assert [rank["code"] for rank in said] == [2, 2], said
    for rank in said:
        assert rank["err"].startswith("xent: rank 1: large.parquet: row 301 has no probabilities")
    assert not (runs.folder / "p.csv").exists()


def a_rank_that_dies_while_predictions_are_written_leaves_no_file(runs: Runs) -> None:
    (left,) = runs.of("dies")
    assert runs.processes[1].returncode == -signal.SIGKILL
    assert left["code"] == 1, left
    assert "xent: rank 0: another rank has ended, or has not answered for 30 s (--timeout)" in left["err"]
    assert not [name for name in os.listdir(runs.folder) if name.startswith((".", "p."))]


def test_a_rank_that_does_not_answer_is_given_up(tmp_path):
    files(tmp_path)
    runs = Runs(2, tmp_path)
    endless = ["--solver", "endless", "--tol", 0, "--out", "m"]
    runs.add("hangs", "fit", "a.parquet", "--label", "kind", *endless, "--timeout", 2, touch="iterates")
    with runs:
        runs.start()
        runs.wait_for("iterates")
        runs.processes[1].send_signal(signal.SIGSTOP)
        runs.processes[0].communicate(timeout=60)
    (said,) = runs.of_rank(0)
    assert said["code"] == 1
    assert "xent: rank 0: another rank has ended, or has not answered for 2 s (--timeout)" in said["err"]
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_sigterm_while_waiting_leaves_no_file(tmp_path):
    """Python runs no handler inside a collective; torchrun kills 30 seconds after SIGTERM."""
    files(tmp_path)
    alone("fit", tmp_path / "a.parquet", "--label", "kind", "--out", tmp_path / "m", "--quiet")
    runs = Runs(2, tmp_path)
    runs.add(
        "hangs", "predict", "m/model.safetensors", "new.parquet", "-o", "p.csv", die=[1, 3, signal.SIGSTOP]
    )
    with runs:
        runs.start()
        deadline = time.monotonic() + 60
        while not any(name.startswith(".p-") for name in os.listdir(tmp_path)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(1)  # until it waits
        runs.processes[0].terminate()
        runs.processes[0].wait(timeout=15)
    assert runs.processes[0].returncode == 143
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".", "p."))]


def test_the_timeout_may_come_from_the_environment():
    said = CliRunner().invoke(cli, ["fit", "a.csv"], env={"XENT_TIMEOUT": "soon"})
    assert said.exit_code == 2
    assert "Invalid value for '--timeout'" in said.stderr


def test_torchrun_itself(tmp_path):
    """The command as a person types it, through the launcher."""
    files(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "xent", "fit", "few.npz", "--label", "y", "--validation", "0", "--out", "m"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("few.npz: 2 classes, 5 features") == 1
    assert {*os.listdir(tmp_path / "m")} == {
        "confusion.png",
        "loss.png",
        "reliability.png",
        "model.safetensors",
        "summary.json",
    }


def test_ranks_are_told_by_their_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert started() is None
    with join() as ranks:
        assert ranks is ALONE
    with pytest.raises(BadInput, match="--class-parallel 2 does not divide the 1 process; start them with"):
        join(slices=2).__enter__()
    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert started() == (1, 2)
    with pytest.raises(BadInput, match="--class-parallel 3 does not divide the 2 ranks"):
        join(slices=3).__enter__()
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(BadInput, match="RANK=2 is not below WORLD_SIZE=2"):
        started()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(BadInput, match="whole numbers, as torchrun sets them; got 'first', '2' and '1'"):
        started()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert started() is None


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_number_of_ranks_any_format_either_solver(tmp_path, monkeypatch, ranks):
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    x, y = rows(500, 4)
    np.save("Y.npy", x)
    np.savez("a.npz", X=x, y=y)
    np.savez("two.npz", X=x, y=y > 1)
    sources = [  # file, label, classes
        ("a.parquet", "kind", 4),
        ("a.csv", "kind", 4),
        ("Y.npy", "y.npy", 4),
        ("a.npz", "y", 4),
        ("two.npz", "y", 2),
        ("few.npz", "y", 2),
        ("dozen.parquet", "kind", 2),
    ]
    spread = [(solver, k) for solver in ("lbfgs", "newton-cg") for k in (1, 2, 4) if not ranks % k]
    runs, fits = Runs(ranks, tmp_path), {}
    for source, label, classes in sources:
        for solver, slices in spread:
            if slices == 1 or (solver == "lbfgs" and slices <= classes):
                out = f"{source} {solver} {slices}"
                fits[out] = [
                    source,
                    "--label",
                    label,
                    "--solver",
                    solver,
                    "--tol",
                    1e-10,
                    *GRADIENT,
                    "--json",
                ]
                fits[out] += ["--validation", 0] * (source == "few.npz") + ["--class-parallel", slices]
                runs.add(out, "fit", *fits[out], "--out", out)
    with runs:
        runs.start()
        runs.end(400)
    for out, arguments in fits.items():
        said = runs.of(out)
        assert [rank["code"] for rank in said] == [0] * ranks, (arguments, said)
        expected = json.loads(alone("fit", *in_one_piece(arguments), "--out", "one" + out).stdout)
        same_fit(tmp_path, out, "one" + out, json.loads(said[0]["out"]), expected, 1e-9)
