"""The kernels on a device: nothing waits for it, and calls are captured in a graph and compiled."""

from __future__ import annotations

import pytest
import torch

import xent

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

OPTIONS = [
    {},
    {"label_smoothing": 0.1, "softcap": 30.0, "z_loss": 1e-4},
    {"reduction": "sum", "temperature": 0.7},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "every", "sum"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def head(dtype=torch.bfloat16, n=300, d=64, c=5003):
    torch.manual_seed(0)
    x = torch.randn(n, d, device="cuda").to(dtype).requires_grad_()
    w = (0.1 * torch.randn(c, d, device="cuda")).to(dtype).requires_grad_()
    y = torch.randint(c, (n,), device="cuda")
    y[::7] = -100
    return x, w, y


def step(x, w, y, **options):
    loss = xent.linear_cross_entropy(x, w, y, **options)
    return loss, *torch.autograd.grad(loss, (x, w))


@options
@dtypes
def test_the_kernels_are_the_tiles(monkeypatch, dtype, options):
    given = head(dtype)
    found = step(*given, **options)
    assert next(b for b in xent.backends() if b.name == "triton").missing is None
    monkeypatch.setenv("XENT_TRITON", "0")
    for one, other in zip(found, step(*given, **options), strict=True):
        torch.testing.assert_close(one, other)


@options
def test_nothing_waits_for_the_device(options):
    given = head()
    step(*given, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*given, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@options
def test_a_call_is_captured_in_a_graph(options):
    x, w, y = head()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(x, w, y, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(x, w, y, **options)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for one, other in zip(found, step(x, w, y, **options), strict=True):
        torch.testing.assert_close(one, other)


@options
def test_a_compiled_call_is_the_same(options):
    given = head()
    compiled = torch.compile(lambda *g: xent.linear_cross_entropy(*g, **options), fullgraph=True)
    loss = compiled(*given)
    found = (loss, *torch.autograd.grad(loss, given[:2]))
    for one, other in zip(found, step(*given, **options), strict=True):
        torch.testing.assert_close(one, other)


def test_memory_stays_within_the_budget():
    x, w, y = head(n=4096, d=256, c=50_257)
    budget = 128 << 20
    step(x, w, y, memory_budget=budget)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(x, w, y, memory_budget=budget)
    gradients = x.nbytes + w.nbytes
    accumulator, masked = 2 * w.nbytes, 3 * x.nbytes  # float32 beside a half gradient; features without rows
    assert torch.cuda.max_memory_allocated() - before <= budget + gradients + accumulator + masked + (8 << 20)
