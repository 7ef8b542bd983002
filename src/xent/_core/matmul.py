"""The fastest exact matrix product on this machine: C = A B and C += A B in the accumulation type.

On x86 with AVX-512, torch's float32 `mm` goes to MKL; oneDNN's kernel is faster (on AMD up to twice).
`torch.backends.mkldnn.matmul.fp32_precision = "bf16"` is what routes float32 products to oneDNN. Its
name says that they may be rounded to bfloat16, and where the processor has AMX they are; without AMX
(and without AVX-512 BF16 being used for it) oneDNN computes in full float32. So it is allowed only after
a numerical probe in this process has found the products exact, it is held only while a sweep runs our
own code, and the previous setting comes back on every way out.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 22  # below it oneDNN's setting up costs more (20 µs a call) than its kernel saves

_lock = threading.Lock()
_holders = 0
_previous = "none"
_exact: bool | None = None  # unknown until the first probe


def multiply_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """Compute out = a b or out += a b; a (M, K), b (K, N) of one type, out (M, N) of it or a wider one."""
    if a.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif a.device.type == "cuda":  # accumulated and left in float32
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif accumulate:
        out.add_(torch.mm(a, b))
    else:
        out.copy_(torch.mm(a, b))


@contextmanager
def fast_products(device: torch.device, dtype: torch.dtype, size: int) -> Iterator[None]:
    """Hold the process-wide setting that makes float32 products fastest, where that keeps them exact.

    `size` counts the multiplications of one product: small ones are faster where they are.
    Re-entrant across threads: the first holder sets it, the last one restores what was there.
    ``XENT_ONEDNN=0`` in the environment leaves torch's own choice alone.
    """
    if size < SMALL or device.type != "cpu" or dtype != torch.float32 or not _allowed():
        yield
        return
    global _holders, _previous
    with _lock:
        if _holders == 0:
            _previous = _setting().fp32_precision
            _setting().fp32_precision = "bf16"
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                _setting().fp32_precision = _previous


def _setting() -> Any:
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def _allowed() -> bool:
    global _exact
    if _exact is None:
        with _lock:
            if _exact is None:
                _exact = _routable() and _probe()
    return _exact


def _routable() -> bool:
    if os.environ.get("XENT_ONEDNN", "1") == "0" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    if torch.backends.cpu.get_cpu_capability() not in {"AVX512", "AVX512_VNNI", "AVX512_BF16"}:
        return False
    return not _has_amx()


def _has_amx() -> bool:
    """Return whether AMX may be there, with which oneDNN would round the factors to bfloat16."""
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return True if ask is None else bool(ask())


def _probe() -> bool:
    """Do products in the three layouts of a sweep come out in full float32 under the setting?"""
    generator = torch.Generator("cpu").manual_seed(0)
    previous = _setting().fp32_precision
    _setting().fp32_precision = "bf16"
    try:
        for m, k, n in ((96, 200, 112), (256, 64, 512)):
            kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
            a = torch.randn(m, k, generator=generator, **kind)
            b = torch.randn(k, n, generator=generator, **kind)
            bound = a.abs().double() @ b.abs().double() * torch.finfo(torch.float32).eps
            exact = a.double() @ b.double()
            for left, right in ((a, b), (a, b.t().contiguous().t()), (a.t().contiguous().t(), b)):
                for accumulate in (False, True):
                    out = torch.zeros(m, n, **kind)
                    multiply_(out, left, right, accumulate=accumulate)
                    if not ((out.double() - exact).abs() <= 8 * bound).all():
                        return False
    finally:
        _setting().fp32_precision = previous
    return True
