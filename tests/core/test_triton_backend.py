"""When the kernels of Triton serve, and what is said when they do not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

import xent
from xent._core.selection import Selection
from xent._core.triton.backend import Triton

INTERPRETED = """
import warnings
import torch, xent
from xent._core import backends
from xent._core.tiles import sweep
from xent._core.triton import backend, body, kernels

(own,) = (b for b in backends.registered() if b.name == "triton")
z, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
backends._backends[:] = [b for b in backends._backends if b.name != "one_tile"]
expected = torch.nn.functional.cross_entropy(z, y)
"""


def in_the_interpreter(code: str, **variables: str) -> str:
    """Run code in a process whose kernels are interpreted; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", INTERPRETED + code],
        env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PATH": "", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def of(name: str):
    return next(info for info in xent.backends() if info.name == name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_tiles_serve():
    assert of("triton").missing == "there is no CUDA device"
    assert "2,048 rows" in of("triton").memory
    assert "64 MiB" in of("tiles").memory


def test_it_is_turned_off_by_a_variable(monkeypatch):
    monkeypatch.setenv("XENT_TRITON", "0")
    assert of("triton").missing == "XENT_TRITON=0 turns it off"


def test_without_triton_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert of("triton").missing == "triton is not installed: pip install 'xent[cuda]'"


def test_it_serves_in_the_interpreter():
    pytest.importorskip("triton")
    said = in_the_interpreter("""
print(own.missing(), torch.allclose(xent.cross_entropy(z, y), expected), own._tried)
print(own.supports(backend._trial_problem(torch.device("cpu"), torch.float64)))
""")
    assert said.splitlines() == [
        "None True {device(type='cpu'): None}",
        "the logits are computed in torch.float64",
    ]


def test_kernels_that_are_wrong_stay_off_with_a_warning():
    pytest.importorskip("triton")
    said = in_the_interpreter("""
right = body.TritonBody.summarise
def wrong(self, *given):
    part, tile = right(self, *given)
    return part.merge(part), tile
body.TritonBody.summarise = wrong
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        assert torch.allclose(xent.cross_entropy(z, y), expected)
(said,) = {str(w.message) for w in seen if issubclass(w.category, UserWarning)}
print(said)
print(own.missing())
""")
    warned, missing = said.splitlines()
    assert warned == f"xent computes without Triton on cpu: {missing}"
    assert "on a random head loss is" in missing
    assert "by the tiles" in missing


def test_kernels_that_do_not_run_stay_off_with_a_warning():
    pytest.importorskip("triton")
    said = in_the_interpreter("""
def broken(self, *given):
    raise RuntimeError("PTX was compiled with an unsupported toolchain")
body.TritonBody.summarise = broken
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert torch.allclose(xent.cross_entropy(z, y), expected)
print(own.missing())
""")
    assert "do not run (RuntimeError: PTX was compiled with an unsupported toolchain)" in said
    assert "XENT_TRITON=0" in said


def test_rows_are_masked_where_data_may_not_decide(monkeypatch):
    """As on a CUDA device: nothing looks at the targets, and a row that is ignored may hold anything."""
    monkeypatch.setattr(Selection, "masked_on", {"cpu"})
    x = torch.randn(6, 4)
    x[2] = torch.nan
    x.requires_grad_()
    w, y = torch.randn(5, 4, requires_grad=True), torch.tensor([0, 1, -100, 3, 4, 0])
    kept = [0, 1, 3, 4, 5]
    found = torch.autograd.grad(xent.linear_cross_entropy(x, w, y), (x, w))
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(x[kept] @ w.T, y[kept]), (x, w), allow_unused=True
    )
    torch.testing.assert_close(found[1], expected[1])
    torch.testing.assert_close(found[0][kept], expected[0][kept])
    assert (found[0][2] == 0).all()


def test_a_capture_is_no_time_to_try(monkeypatch):
    backend = Triton()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "have not been tried" in backend._reason(torch.device("cuda"))
    assert backend._tried == {}
