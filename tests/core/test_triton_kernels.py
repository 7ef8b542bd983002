"""The kernels of Triton compiled for three generations of GPUs, without one: memory, registers, no spills."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="interpreted kernels are not compiled"
)

GENERATIONS = (80, 90, 100)  # A100, H100, B200
NUMBERS = ("inner", "softcap", "number", "kept", "uniform")
WHOLE = {
    "start": "i32",
    "classes": "i32",
    "first": "i32",
    "own_classes": "i32",
    "u_stride": "i64",
    "q_stride": "i64",
}
OPTIONS = ("CAPPED", "DIVIDES", "LOG_Q", "TARGET", "WEIGHTED", "ENTROPY")
SETS = {
    "none": (False, 0, False, 0, False, False),
    "smoothed": (False, 0, False, 1, True, False),
    "softcap and temperatures": (True, 2, False, 2, False, False),
    "probabilities": (False, 1, False, 3, False, False),
    "everything": (True, 1, True, 3, True, True),
}


def compiled(name, generation, chosen, u="fp32", factor="bf16", block=2048, **more):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from xent._core.triton import body, kernels

    kernel = getattr(kernels, name)
    fixed = dict(zip(OPTIONS, SETS[chosen], strict=True)) | more | {"BLOCK": block}
    types = {"u_ptr": f"*{u}", "factor_ptr": f"*{factor}", "own_ptr": "*i64", "k_ptr": "*i64", **WHOLE}
    types |= dict.fromkeys(NUMBERS, "fp32") | dict.fromkeys(fixed, "constexpr")
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=fixed),
        target=GPUTarget("cuda", generation, 32),
        options={"num_warps": body.WARPS},
    )


@functools.cache
def reader() -> Path:
    import triton.backends.nvidia

    return Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


def usage(kernel, folder) -> dict[str, int]:
    """Return registers, bytes of the stack and so on, as `cuobjdump` reads them from the machine code."""
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    said = subprocess.run(
        [reader(), "--dump-resource-usage", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", said)}


GRADIENT = {"WRITES": True, "FACTOR": True, "OF_Q": False}


@pytest.mark.parametrize("chosen", SETS)
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    ("name", "more"), [("statistics", {}), ("gradient", GRADIENT)], ids=["statistics", "gradient"]
)
def test_every_set_of_options_fits_a_multiprocessor(name, more, generation, chosen, tmp_path):
    for u, factor in itertools.product(("fp32", "bf16", "fp16"), ("bf16", "fp16") if more else ("bf16",)):
        kernel = compiled(name, generation, chosen, u, factor, **more)
        assert kernel.metadata.shared <= 16 << 10, (u, factor)
        found = usage(kernel, tmp_path)
        # 65,536 registers serve two programs of 256 threads at 128 a thread
        assert found["REG"] <= 128, (u, factor, found)
        assert found["STACK"] == found["LOCAL"] == 0, (u, factor, found)  # nothing is spilled


@pytest.mark.parametrize("generation", GENERATIONS)
def test_gradients_of_probabilities(generation, tmp_path):
    kernel = compiled("gradient", generation, "probabilities", WRITES=True, FACTOR=False, OF_Q=True)
    found = usage(kernel, tmp_path)
    assert found["STACK"] == found["LOCAL"] == 0
    assert found["REG"] <= 128


def test_a_spill_would_be_seen(tmp_path):
    """Sixteen thousand classes a program of 256 threads do not fit its registers."""
    kernel = compiled("statistics", 90, "everything", block=1 << 14)
    found = usage(kernel, tmp_path)
    assert found["STACK"] + found["LOCAL"] > 0 or found["REG"] > 128
