"""The costs of a sweep: matrix products, allocations, settings."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import xent
from xent._core import matmul, ops

N, D, C = 600, 8, 300


@pytest.fixture
def products(monkeypatch):
    """Multiply-adds of every matrix product, over N·D·C."""
    done = []
    plain = ops.multiply_

    def counting(out, a, b, *, accumulate):
        done.append(a.shape[0] * a.shape[1] * b.shape[1])
        plain(out, a, b, accumulate=accumulate)

    monkeypatch.setattr(ops, "multiply_", counting)
    return lambda: sum(done) / (N * D * C)


def tensors(x_grad=True, w_grad=True):
    x, w = torch.randn(N, D, requires_grad=x_grad), torch.randn(C, D, requires_grad=w_grad)
    return x, w, torch.randint(C, (N,))


HOLDS_A_CHUNK = 128 * C * 4
HOLDS_FEWER = 127 * C * 4 - C


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("budget", "count"), [(None, 3), (HOLDS_A_CHUNK, 3), (HOLDS_FEWER, 4)])
def test_three_products_where_the_budget_holds_128_rows_else_four(products, reduction, budget, count):
    x, w, target = tensors()
    xent.linear_cross_entropy(x, w, target, reduction=reduction, memory_budget=budget).backward()
    assert products() == count


def test_unreduced_recomputes(products):
    x, w, target = tensors()
    xent.linear_cross_entropy(x, w, target, reduction="none").sum().backward()
    assert products() == 4


def test_one_product_without_gradients(products):
    x, w, target = tensors()
    with torch.no_grad():
        xent.linear_cross_entropy(x, w, target)
    assert products() == 1


@pytest.mark.parametrize("which", ["features", "weight"])
def test_a_frozen_factor_costs_nothing(products, which):
    x, w, target = tensors(x_grad=which != "features", w_grad=which != "weight")
    xent.linear_cross_entropy(x, w, target).backward()
    assert products() == 2


def test_ignored_rows_cost_no_products(products):
    x, w, target = tensors()
    target[: N // 2] = -100
    xent.linear_cross_entropy(x, w, target).backward()
    assert products() == 1.5


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes alive at once, apart from tensors given, gradients, and what is O(N)."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.given = {t.untyped_storage().data_ptr() for t in given}
        self.seen: list[tuple[weakref.ref, int, int]] = []
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage.data_ptr() in self.given or storage.nbytes() <= 8 * N:
                    continue
                if t.dim() == 2 and storage.nbytes() in {N * D * 4, C * D * 4}:
                    continue
                self.seen.append((weakref.ref(t), storage.data_ptr(), storage.nbytes()))
        self.seen = [entry for entry in self.seen if entry[0]() is not None]
        self.peak = max(self.peak, sum({ptr: size for _, ptr, size in self.seen}.values()))
        return out


@pytest.mark.parametrize("budget", [HOLDS_A_CHUNK, HOLDS_A_CHUNK // 2, 40_000])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"softcap": 5.0}, {"reduction": "none"}, {"z_loss": 0.1, "softcap": 3.0}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["index", "probabilities", "half", "half products"])
def test_a_sweep_stays_within_its_budget(budget, options, kind):
    """Everything alive at once in forward and backward."""
    x, w, target = tensors()
    if kind == "probabilities":
        target = torch.rand(N, C)
    if kind == "half":
        x, w = (t.detach().bfloat16().requires_grad_() for t in (x, w))
    if kind == "half products":
        options = options | {"product_dtype": torch.bfloat16}
    matmul._allowed()  # the probe of this process is no part of a sweep
    with LiveBytes(x, w, target) as live:
        xent.linear_cross_entropy(x, w, target, memory_budget=budget, **options).sum().backward()
    assert budget / 8 < live.peak <= budget


@pytest.mark.parametrize("budget", [HOLDS_A_CHUNK, 40_000])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_a_hessian_product_stays_within_its_budget(budget, options, kind):
    x, w, target = tensors(x_grad=False)
    if kind == "probabilities":
        target = torch.rand(N, C)
    v = torch.randn(C, D)
    matmul._allowed()
    with LiveBytes(x, w, target, v) as live:
        loss = xent.linear_cross_entropy(x, w, target, memory_budget=budget, **options)
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        torch.autograd.grad(g, w, v)
    assert budget / 8 < live.peak <= budget


def test_a_hessian_product_of_the_weight_costs_three_products(products):
    """Beside those of loss and gradient (of the weight: two), where a chunk's tiles fit the budget."""
    x, w, target = tensors(x_grad=False)
    loss = xent.linear_cross_entropy(x, w, target)
    (g,) = torch.autograd.grad(loss, w, create_graph=True)
    assert products() == 2
    torch.autograd.grad(g, w, torch.randn(C, D))
    assert products() == 5


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8192, 256, 65536), (2048, 256, 200003)])
def test_peak_memory_of_a_process(shape):
    """Forward + backward as a whole process: inputs + gradients + 96 MiB at most."""
    n, d, c = shape
    code = f"""
        import re, torch, xent
        x, w = torch.randn({n}, {d}, requires_grad=True), torch.randn({c}, {d}, requires_grad=True)
        t = torch.randint({c}, ({n},))
        small = torch.randn(9, 4, requires_grad=True)
        xent.linear_cross_entropy(small, small, torch.arange(9)).backward()
        def status(name): return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
        open("/proc/self/clear_refs", "w").write("5")  # the peak; getrusage's starts from the parent's
        before = status("VmRSS")
        xent.linear_cross_entropy(x, w, t).backward()
        print((status("VmHWM") - before) * 1024 - 4 * {(n + c) * d})
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) < 96 * 2**20
