"""Checkpoints of ``xent fit``: a killed fit goes on, a damaged file is named, another fit is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from xent.cli import checkpoints
from xent.cli.commands import cli

KILLED = """
import os, signal, sys
from xent.cli import checkpoints, solve_job, strength_job
from xent.cli.commands import cli

checkpoints.PERIOD = 0.0
left = int(sys.argv[1])
keep = checkpoints.Checkpoints.keep

def killed(self, *state):
    global left
    keep(self, *state)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints.Checkpoints.keep = killed
cli(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("checkpoints")
    rng = np.random.default_rng(0)
    X, W = rng.normal(size=(600, 12)), rng.normal(size=(5, 12))
    y = (X @ W.T + rng.gumbel(size=(600, 5))).argmax(1)
    np.savez(made / "a.npz", X=X, y=y)
    np.savez(made / "fewer.npz", X=X[:-1], y=y[:-1])
    other = X.copy()
    other[300, 5] = np.nextafter(other[300, 5], 9)
    np.savez(made / "other.npz", X=other, y=y)
    np.savez(made / "labels.npz", X=X, y=np.roll(y, 1))
    return made


def fit(folder, *options, data="a.npz", out="m"):
    arguments = ["fit", folder / data, "--label", "y", "--out", folder / out, *options]
    return CliRunner().invoke(cli, [str(each) for each in arguments])


def summary(folder, out):
    return json.loads((folder / out / "summary.json").read_text())


def kill(folder, after, kept, *options):
    """Run a fit in a process of its own, which is killed once as many states are kept."""
    arguments = ["fit", folder / "a.npz", "--label", "y", "--out", folder / "none", "--checkpoint", kept]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(after), *map(str, arguments), *options], capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "none").exists()


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
def test_a_killed_fit_goes_on(folder, tmp_path, solver):
    options = ["--solver", solver, "--tol", "1e-8"]
    assert fit(folder, *options, out=solver).exit_code == 0
    whole = summary(folder, solver)
    kill(folder, 4, tmp_path, *options)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["checkpoint-000003.safetensors", "checkpoint-000004.safetensors"]
    done = fit(folder, *options, "--checkpoint", tmp_path, "--resume", out="on")
    assert done.exit_code == 0, done.output
    assert f"going on from {tmp_path}/checkpoint-000004.safetensors" in done.stderr
    found = summary(folder, "on")
    assert found["converged"]
    assert found["iterations"] > 4
    assert found["training"]["loss"] == pytest.approx(whole["training"]["loss"], rel=1e-6)
    # a fit that has ended is not done again
    again = fit(folder, *options, "--checkpoint", tmp_path, "--resume", out="again")
    assert again.exit_code == 0
    for name in ("model.safetensors", "summary.json"):
        assert (folder / "again" / name).read_bytes() == (folder / "on" / name).read_bytes()


@pytest.mark.parametrize("after", [3, 25])
def test_a_killed_path_goes_on(folder, tmp_path, after):
    """Within a strength, between two of them, and in the fit at the best."""
    options = ["--l2-path", "1e-3:1e3:7", "--tol", "1e-7"]
    assert fit(folder, *options, out="path").exit_code == 0
    kill(folder, after, tmp_path, *options)
    done = fit(folder, *options, "--checkpoint", tmp_path, "--resume", out="on")
    assert done.exit_code == 0, done.output
    whole, found = summary(folder, "path"), summary(folder, "on")
    assert found["settings"] == whole["settings"]
    for name in ("l2", "training_loss", "validation_loss", "validation_accuracy"):
        np.testing.assert_allclose(found["strengths"][name], whole["strengths"][name], rtol=1e-5)
    assert found["training"]["loss"] == pytest.approx(whole["training"]["loss"], rel=1e-5)


def test_a_state_is_kept_before_more_than_the_period_could_be_lost(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    written = []
    monkeypatch.setattr(checkpoints, "_write", lambda path, *_: written.append(now[0]))
    kept = checkpoints.Checkpoints(tmp_path, False, print)
    kept.open({})
    for took in [1.0] * 25 + [4.0, 4.0, 4.0] + [60.0, 60.0, 1.0]:
        now[0] += took
        kept.keep("fit", lambda: checkpoints.Saved({}, {}), False)
    assert written == [9.0, 18.0, 29.0, 37.0, 97.0, 157.0]


def test_a_fit_that_ended_for_want_of_iterations_goes_on(folder, tmp_path):
    few = fit(folder, "--checkpoint", tmp_path, "--max-iter", 2, out="few")
    assert "not converged after 2 iterations" in few.stdout
    more = fit(folder, "--checkpoint", tmp_path, "--max-iter", 500, "--resume", out="more")
    assert "\nconverged after" in more.stdout, more.output
    assert summary(folder, "more")["iterations"] > 2


DAMAGE = {
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a bit": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "a digit of the text": lambda data: data.replace(b'seconds\\": 0', b'seconds\\": 1', 1),
    "something else": lambda data: b"PK\3\4" + data,
    "a header that claims much": lambda data: b"\xff" * 8 + data[8:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(folder, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(checkpoints, "PERIOD", 0.0)
    assert fit(folder, "--checkpoint", tmp_path, "--tol", "1e-6").exit_code == 0
    first, last = sorted(tmp_path.iterdir())
    data = last.read_bytes()
    assert DAMAGE[damage](data) != data
    last.write_bytes(DAMAGE[damage](data))
    done = fit(folder, "--checkpoint", tmp_path, "--tol", "1e-6", "--resume")
    assert done.exit_code == 0, done.output
    assert f"xent: {last} is damaged and not used: {last.name}: " in done.stderr
    assert f"xent: going on from {first}" in done.stderr
    for path in sorted(tmp_path.iterdir()):
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    done = fit(folder, "--checkpoint", tmp_path, "--tol", "1e-6", "--resume")
    assert done.exit_code == 2
    assert f"{tmp_path}: no checkpoint in it can be read" in done.stderr.splitlines()[-1]


OTHERS = {
    "rows was 600 and is 599": {"data": "fewer.npz"},
    "the features hold other values": {"data": "other.npz"},
    "the labels hold other values": {"data": "labels.npz"},
    "its features are others, 'x3' for one": {"options": ["--exclude", "x3"]},
    "--l2 was 1.0 and is 2.0": {"options": ["--l2", 2]},
    "--seed was 0 and is 1": {"options": ["--seed", 1]},
    "--solver was auto and is newton-cg": {"options": ["--solver", "newton-cg"]},
    "--standardize was True and is False": {"options": ["--no-standardize"]},
}


@pytest.mark.parametrize("difference", OTHERS)
def test_another_fit_is_refused_by_name(folder, tmp_path, difference):
    assert fit(folder, "--checkpoint", tmp_path).exit_code == 0
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    data, options = OTHERS[difference].get("data", "a.npz"), OTHERS[difference].get("options", [])
    done = fit(folder, "--checkpoint", tmp_path, "--resume", *options, data=data, out="refused")
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if "another fit" in line]
    assert line.endswith(f"is a checkpoint of another fit: {difference}; name another folder"), line
    assert not (folder / "refused").exists()
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


def test_a_folder_of_another_fit_is_not_written_to(folder, tmp_path):
    assert fit(folder, "--checkpoint", tmp_path).exit_code == 0
    done = fit(folder, "--checkpoint", tmp_path)
    assert done.exit_code == 2
    assert "holds checkpoints of an earlier fit; go on with it by --resume" in done.stderr
    done = fit(folder, "--resume")
    assert done.exit_code == 2
    assert "name its folder with --checkpoint" in done.stderr
    (tmp_path / "file").touch()
    done = fit(folder, "--checkpoint", tmp_path / "file")
    assert done.exit_code == 2
    assert "file, not a directory" in done.stderr


def test_the_first_fit_may_be_told_to_resume(folder, tmp_path):
    (tmp_path / ".checkpoint-000001-x.safetensors").touch()  # of a process that was killed as it wrote
    done = fit(folder, "--checkpoint", tmp_path, "--resume")
    assert done.exit_code == 0
    assert f"no checkpoint in {tmp_path} yet: the fit begins" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001.safetensors"]
