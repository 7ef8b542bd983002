"""Forward + backward of a linear head: xent beside its peers, in one run, interleaved.

    python benchmarks/head.py [--rounds 7] [--shapes N,D,C ...] [--jax PYTHON] [--save FILE]
    python benchmarks/head.py --device cuda --dtype bfloat16

On CUDA the shapes are those of language models; beside xent's default run every option at once, a budget of
4 GiB, torch's tiles in the place of Triton's kernels, the three products alone in the same chunks, and Liger,
Cut Cross-Entropy and QuACK where they are installed. Gradients are held against float64 on 256 rows.

Every round runs every form once, in turn, so that a machine whose speed drifts slows all of them alike; what
is printed are medians over the rounds and their ratios to xent's. The limit is the machine's own: 6·N·D·C
operations at the best rate that its matrix product reached in this run. JAX runs in a process of its own (an
interpreter that has jax and optax, ``--jax``), asked round by round. Memory is the peak of one forward and
backward beyond inputs and gradients: on a CPU that of a process of its own (see memory.py), on CUDA the
allocator's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial

import torch
import torch.nn.functional as F

import memory
import xent
from xent._core import matmul
from xent._core.logits import LinearHead
from xent._core.plan import default_budget
from xent._core.problem import Problem
from xent._core.selection import Selection
from xent._core.targets import no_targets

SHAPES = [
    (2048, 768, 32768),
    (1024, 256, 32768),
    (4096, 256, 10000),
    (8192, 512, 1000),
    (512, 2048, 128256),
    (64, 512, 1000000),
    (1024, 128, 100),
    (256, 64, 10),
]
CUDA_SHAPES = [(8192, 2048, 128256), (4096, 4096, 128256), (16384, 2048, 248320), (8192, 2304, 256000)]
EVERY = {"label_smoothing": 0.1, "softcap": 30.0, "z_loss": 1e-4, "temperature": 0.9}
NOT_RUN = {
    "Liger, Cut Cross-Entropy, QuACK": "their kernels need CUDA",
    "cut-cross-entropy, impl='torch_compile'": "the package needs Triton to be imported",
}

JAX_WORKER = """
import json, sys, time
import jax, jax.numpy as jnp, optax
n, d, c = json.loads(sys.stdin.readline())
k = jax.random.split(jax.random.PRNGKey(0), 3)
x, w = jax.random.normal(k[0], (n, d)), jax.random.normal(k[1], (c, d)) * 0.02
t = jax.random.randint(k[2], (n,), 0, c)
def loss(x, w): return optax.softmax_cross_entropy_with_integer_labels(x @ w.T, t).mean()
both, forward = jax.jit(jax.grad(loss, (0, 1))), jax.jit(loss)
for line in sys.stdin:
    f = both if line.strip() == "both" else forward
    start = time.perf_counter()
    jax.block_until_ready(f(x, w))
    print(time.perf_counter() - start, flush=True)
"""


def timed(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Jax:
    def __init__(self, python: str, shape: tuple[int, int, int]) -> None:
        self.process = subprocess.Popen(
            [python, "-c", JAX_WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._say(json.dumps(shape))

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def __call__(self, what: str) -> float:
        self._say(what)
        assert self.process.stdout is not None
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()


def forms(
    shape: tuple[int, int, int], device: str, dtype: torch.dtype, jax: Jax | None
) -> dict[str, tuple[Callable[[], float], Callable[[], float]]]:
    """Name -> (seconds of forward + backward, seconds of forward only)."""
    n, d, c = shape
    torch.manual_seed(0)
    x = torch.randn(n, d, device=device).to(dtype).requires_grad_()
    w = (torch.randn(c, d, device=device) * 0.02).to(dtype).requires_grad_()
    t = torch.randint(c, (n,), device=device)

    def form(f: Callable[..., torch.Tensor]) -> tuple[Callable[[], float], Callable[[], float]]:
        def both() -> float:
            return timed(lambda: torch.autograd.grad(f(x, w, t), (x, w)))

        def forward() -> float:
            with torch.no_grad():
                return timed(lambda: f(x, w, t))

        return both, forward

    def chunked(rows: int | None) -> Callable[..., torch.Tensor]:
        options = torch.nn.LinearCrossEntropyOptions(**({} if rows is None else {"batch_chunk_size": rows}))
        return lambda x, w, t: F.linear_cross_entropy(x, w, t, options=options)

    def unfused(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, w), t)

    every = {"xent": form(xent.linear_cross_entropy)}
    if device != "cpu":
        weight = torch.rand(c, device=device) + 0.5
        options = partial(xent.linear_cross_entropy, weight=weight, **EVERY)
        every["xent, every option"] = form(options)
        every["xent, every option, 4 GiB"] = form(partial(options, memory_budget=4 << 30))
        every["xent, torch's tiles"] = form(without_triton(xent.linear_cross_entropy))
        every["the three products"] = products(x.detach(), w.detach())
        every |= {name: form(f) for name, f in peers().items()}
    if device == "cpu":
        every["xent, bfloat16 products"] = form(
            partial(xent.linear_cross_entropy, product_dtype=torch.bfloat16)
        )
    every["torch, eager"] = form(unfused)
    if n * c <= 1 << 27 or device != "cpu":  # beyond it Inductor's logits and their gradient are gigabytes
        every["torch, compiled"] = form(torch.compile(unfused))
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # since torch 2.13
        every["torch fused, default"] = form(chunked(None))
        for rows in (256, 512, 1024):
            if rows <= n:
                every[f"torch fused, {rows} rows"] = form(chunked(rows))
    if jax is not None:
        every["jax, jit"] = (lambda: jax("both"), lambda: jax("forward"))
    return every


def without_triton(f: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a loss that torch's tiles compute; its gradient is formed in the forward pass."""

    def tiles(*given: torch.Tensor) -> torch.Tensor:
        os.environ["XENT_TRITON"] = "0"
        try:
            return f(*given)
        finally:
            del os.environ["XENT_TRITON"]

    return tiles


def products(x: torch.Tensor, w: torch.Tensor) -> tuple[Callable[[], float], Callable[[], float]]:
    """The products of a head alone, in the chunks of the default budget: no kernel can be faster."""
    (n, d), c = x.shape, len(w)
    plan = Problem(LinearHead(x, w, None, product_dtype=x.dtype), no_targets(c, Selection(n)))
    rows = replace(plan, budget=default_budget(x.device, c)).plan(resident=True).row_chunk
    z = torch.empty(rows, c, dtype=torch.float32, device=x.device)
    g = torch.randn(rows, c, device=x.device).to(x.dtype)
    dx, dw = torch.empty_like(x), torch.zeros(c, d, dtype=torch.float32, device=x.device)

    def run(backward: bool) -> None:
        for start in range(0, n, rows):
            part = x[start : start + rows]
            matmul.multiply_(z[: len(part)], part, w.t(), accumulate=False)
            if backward:
                torch.mm(g[: len(part)], w, out=dx[start : start + rows])
                matmul.multiply_(dw, g[: len(part)].t(), part, accumulate=True)

    return lambda: timed(lambda: run(True)), lambda: timed(lambda: run(False))


def peers() -> dict[str, Callable[..., torch.Tensor]]:
    """Losses of libraries that are installed, of features, classifier and labels."""
    found: dict[str, Callable[..., torch.Tensor]] = {}
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda x, w, t: liger(w, x, t)
    with contextlib.suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy

        found["Cut Cross-Entropy"] = linear_cross_entropy
    with contextlib.suppress(ImportError):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        found["QuACK"] = chunked_linear_cross_entropy
    return found


def best_rate(device: str, dtype: torch.dtype, rounds: int = 5) -> float:
    """The best product of a few shapes, in operations a second, by either of torch's CPU kernels."""
    best = 0.0
    shapes = ((512, 768, 4096), (1024, 1024, 1024), (2048, 768, 2048), (1024, 256, 4096))
    for m, k, n in shapes if device == "cpu" else ((8192, 8192, 8192), (8192, 2048, 16384)):
        a, b = (torch.randn(*s, device=device).to(dtype) for s in ((m, k), (n, k)))
        out = torch.empty(m, n, device=device, dtype=dtype)
        for size in (0, 1 << 62):
            multiply = partial(torch.mm, a, b.t(), out=out)
            with matmul.fast_products(a.device, a.dtype, size):
                multiply()
                seconds = min(timed(multiply) for _ in range(rounds))
            best = max(best, 2 * m * k * n / seconds)
    return best


def error_of_half_products(shape: tuple[int, int, int]) -> dict[str, float]:
    """Return the relative errors of loss and gradients' norms that bfloat16 factors bring."""
    n, d, c = shape
    torch.manual_seed(0)
    x, w = torch.randn(n, d, requires_grad=True), (torch.randn(c, d) * 0.02).requires_grad_()
    t = torch.randint(c, (n,))
    found = []
    for product_dtype in (None, torch.bfloat16):
        loss = xent.linear_cross_entropy(x, w, t, product_dtype=product_dtype)
        found.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
    names = ("loss", "input gradient", "weight gradient")
    return {name: ((b - a).norm() / a.norm()).item() for name, a, b in zip(names, *found, strict=True)}


def errors_against_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, float]:
    """Return the relative errors of the gradients on 256 rows, of xent and of what is installed."""
    n, d, c = shape
    torch.manual_seed(0)
    x = torch.randn(min(n, 256), d, device="cuda").to(dtype).requires_grad_()
    w = (torch.randn(c, d, device="cuda") * 0.02).to(dtype).requires_grad_()
    t = torch.randint(c, (len(x),), device="cuda")
    wide = [v.detach().double().requires_grad_() for v in (x, w)]
    exact = torch.autograd.grad(F.cross_entropy(wide[0] @ wide[1].T, t), wide)
    losses = {"xent": xent.linear_cross_entropy, "torch, eager": lambda x, w, t: F.cross_entropy(x @ w.T, t)}
    found = {}
    for name, loss in (losses | peers()).items():
        gradients = torch.autograd.grad(loss(x, w, t), (x, w))
        apart = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(gradients, exact, strict=True)]
        found |= {f"{name}, {leaf}": error for leaf, error in zip(("dx", "dw"), apart, strict=True)}
    return found


def extra_memory(
    shape: tuple[int, int, int], device: str, dtype: torch.dtype, every: dict
) -> dict[str, float | None]:
    """MiB beyond inputs and gradients at the peak of one forward + backward."""
    if device == "cpu":
        size, kind = ",".join(map(str, shape)), str(dtype).removeprefix("torch.")
        rows = {name: memory.once(form, size, kind) for name, form in memory.FORMS.items()}
        return {name: row["extra"] / 2**20 if "extra" in row else None for name, row in rows.items()}
    n, d, c = shape
    gradients = (n * d + c * d) * dtype.itemsize
    found: dict[str, float | None] = {}
    for name, (both, _) in every.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            both()
            found[name] = (torch.cuda.max_memory_allocated() - before - gradients) / 2**20
        except torch.cuda.OutOfMemoryError:
            found[name] = None
    return found


def measure(shape: tuple[int, int, int], options: argparse.Namespace) -> dict[str, object]:
    n, d, c = shape
    rounds, device, dtype = options.rounds, options.device, getattr(torch, options.dtype)
    jax = Jax(options.jax, shape) if options.jax else None
    every = forms(shape, device, dtype, jax)
    extra = extra_memory(shape, device, dtype, every) if options.memory else {}
    every = {name: form for name, form in every.items() if extra.get(name, 0.0) is not None}
    both: dict[str, list[float]] = {name: [] for name in every}
    forward: dict[str, list[float]] = {name: [] for name in every}
    rates = []
    repeats = max(1, min(50, int(2e9 / (6 * n * d * c + 1))))
    for round_ in range(rounds + 1):
        rates.append(best_rate(device, dtype))
        for name, (f, g) in every.items():
            a = statistics.median(f() for _ in range(repeats))
            b = statistics.median(g() for _ in range(repeats))
            if round_:  # the first is a warm-up
                both[name].append(a)
                forward[name].append(b)
    if jax is not None:
        jax.close()
    rate = max(rates)
    return {
        "shape": shape,
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "dtype": options.dtype,
        "memory_mib": extra,
        "error_of_bfloat16_products": error_of_half_products(shape) if device == "cpu" else {},
        "errors": {} if device == "cpu" else errors_against_float64(shape, dtype),
        "limit": 6 * n * d * c / rate,
        "rate": rate,
        "both": {name: sorted(v) for name, v in both.items()},
        "forward": {name: sorted(v) for name, v in forward.items()},
    }


def show(row: dict) -> None:
    n, d, c = row["shape"]
    limit, rate = 1e3 * row["limit"], row["rate"] / 1e9
    ours, forward = (statistics.median(row[what]["xent"]) for what in ("both", "forward"))
    print(f"\nN {n}, D {d}, C {c}: the products alone {limit:.1f} ms at {rate:.0f} GFLOP/s")
    print(f"  {'ms':24} {'forward+backward':>17} {'spread':>15} {'÷ xent':>7} {'forward':>9} {'÷ xent':>7}")
    for name, seconds in row["both"].items():
        median, only = statistics.median(seconds), statistics.median(row["forward"][name])
        spread = f"{1e3 * seconds[0]:.1f}–{1e3 * seconds[-1]:.1f}"
        of = f"{1e3 * median:17.2f} {spread:>15} {median / ours:7.2f}"
        print(f"  {name:24} {of} {1e3 * only:9.2f} {only / forward:7.2f}")
    for name, mib in row["memory_mib"].items():
        print(f"  {name:34} {'out of memory' if mib is None else f'{mib:9.1f} MiB'}")
    errors = ", ".join(f"{name} {e:.1e}" for name, e in row["error_of_bfloat16_products"].items())
    if errors:
        print(f"  bfloat16 products err by, relative: {errors}")
    for name, error in row["errors"].items():
        print(f"  {name:34} {error:9.2e} of float64")
    print(f"  {limit / 10 / ours:.0f} % of the limit; forward + backward is {ours / forward:.2f} forwards")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", nargs="*", help="N,D,C ...")
    parser.add_argument("--jax", metavar="PYTHON", help="an interpreter that has jax and optax")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure memory")
    parser.add_argument("--save", metavar="FILE", help="append the raw rows, one JSON object a line")
    options = parser.parse_args()
    usual = SHAPES if options.device == "cpu" else CUDA_SHAPES
    shapes = [tuple(map(int, s.split(","))) for s in options.shapes] if options.shapes else usual
    about = {
        "date": str(date.today()),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "xent": xent.__version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    for backend in xent.backends():
        print(f"{backend.name}: {backend.missing or 'serves ' + backend.serves}")
    for peer, why in NOT_RUN.items() if options.device == "cpu" else ():
        print(f"not run: {peer}: {why}")
    for shape in shapes:
        row = measure(shape, options)
        show(row)
        sys.stdout.flush()
        if options.save:
            with open(options.save, "a") as file:
                file.write(json.dumps(about | row) + "\n")


if __name__ == "__main__":
    main()
