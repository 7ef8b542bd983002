"""The process-wide setting behind fast products: exact, held only while needed, restored on every way out."""

from __future__ import annotations

import threading

import pytest
import torch

import xent
from xent._core import matmul

CPU = torch.device("cpu")
LARGE = 1 << 30


def setting():
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def allowed(monkeypatch):
    """As on a machine where the probe passed, whatever this one is."""
    monkeypatch.setattr(matmul, "_exact", True)


def test_products_are_exact_in_every_layout():
    """Componentwise within the rounding of a float32 product of K terms."""
    generator = torch.Generator().manual_seed(1)
    with matmul.fast_products(CPU, torch.float32, LARGE):
        for _ in range(30):
            m, k, n = (int(torch.randint(1, 300, (), generator=generator)) for _ in range(3))
            a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
            bound = 8 * torch.finfo(torch.float32).eps * (a.abs().double() @ b.abs().double())
            exact = a.double() @ b.double()
            for left, right in ((a, b), (a, b.t().contiguous().t()), (a.t().contiguous().t(), b)):
                out = torch.full((m, n), torch.nan)
                matmul.multiply_(out, left, right, accumulate=False)
                assert ((out.double() - exact).abs() <= bound).all()
                matmul.multiply_(out, left, right, accumulate=True)
                assert ((out.double() - 2 * exact).abs() <= 2 * bound).all()


def test_setting_is_restored(allowed):
    before = setting()
    with matmul.fast_products(CPU, torch.float32, LARGE):
        assert setting() == "bf16"
        with matmul.fast_products(CPU, torch.float32, LARGE):
            assert setting() == "bf16"
        assert setting() == "bf16"
    assert setting() == before


def test_setting_is_restored_on_exceptions(allowed):
    before = setting()
    with pytest.raises(KeyboardInterrupt), matmul.fast_products(CPU, torch.float32, LARGE):
        raise KeyboardInterrupt
    assert setting() == before


def test_a_callers_own_setting_comes_back(allowed):
    before = setting()
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    try:
        xent.linear_cross_entropy(torch.randn(300, 128), torch.randn(200, 128), torch.randint(200, (300,)))
        assert setting() == "ieee"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_overlapping_threads_restore_once(allowed):
    """The first holder sets, the last one restores, in whatever order they leave."""
    before = setting()
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with matmul.fast_products(CPU, torch.float32, LARGE):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    with matmul.fast_products(CPU, torch.float32, LARGE):
        thread.start()
        assert inside.wait(10)
    assert setting() == "bf16", "another thread still multiplies"
    leave.set()
    thread.join(10)
    assert setting() == before


@pytest.mark.parametrize("dtype", [torch.float64])
def test_other_types_leave_the_setting_alone(allowed, dtype):
    with matmul.fast_products(CPU, dtype, LARGE):
        assert setting() == "none"


def test_small_products_leave_the_setting_alone(allowed):
    with matmul.fast_products(CPU, torch.float32, matmul.SMALL - 1):
        assert setting() == "none"


def test_an_inexact_machine_is_found_out(monkeypatch):
    """With products rounded to bfloat16, as on AMX hardware, the probe says no and nothing is set."""

    def rounded(out, a, b, *, accumulate):
        product = (a.bfloat16() @ b.bfloat16()).float()
        out.copy_(out + product if accumulate else product)

    monkeypatch.setattr(matmul, "multiply_", rounded)
    assert not matmul._probe()
    monkeypatch.undo()
    assert matmul._probe() or not matmul._routable()
    monkeypatch.setattr(matmul, "_exact", False)
    with matmul.fast_products(CPU, torch.float32, LARGE):
        assert setting() == "none"


def test_the_environment_can_say_no(monkeypatch):
    monkeypatch.setenv("XENT_ONEDNN", "0")
    assert not matmul._routable()
