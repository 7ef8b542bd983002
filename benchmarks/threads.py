"""A fit with worker threads, and with the threads of torch's own products, quiet or beside a busy core.

    python benchmarks/threads.py [--shape 20000,256,100] [--rounds 3] [--busy] [--head]

float32, C = 1, 20 iterations of L-BFGS. Two of the ways hold the BLAS threads of NumPy and SciPy to one;
"free" leaves these alone, with torch's own threads, as a fit did before. The ways take turns in every round;
medians in seconds, and their ratios to the workers'. With `--busy` another process keeps one core busy.

With `--head` it is one forward + backward of `xent.linear_cross_entropy`: by threads that each have a share
of the rows and one thread of torch, whose gradients of the weight are added, and by torch's own threads.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

import xent
from xent.linear_model import softmax_regression
from xent.linear_model.workers import Workers, workers

SHAPES = ["20000,256,10", "20000,256,100", "50000,384,200", "2000,256,8000"]
HEADS = ["512,256,1000", "8192,256,1000", "8192,768,8192", "2048,768,32768"]
WAYS = ("workers", "torch's threads", "free")


@contextlib.contextmanager
def torchs(*shape: int, **_: object) -> Iterator[Workers]:
    """Have torch's own threads, and one of BLAS: what `workers` chooses for very many classes."""
    with workers(shape[0], shape[1], 1 << 20) as chosen:
        yield chosen


@contextlib.contextmanager
def free(*_: object, **__: object) -> Iterator[Workers]:
    yield Workers()


def seconds(X: np.ndarray, y: np.ndarray, way: str) -> float:
    forced = {"workers": contextlib.nullcontext(), "torch's threads": torchs, "free": free}[way]
    if not isinstance(forced, contextlib.nullcontext):
        forced = mock.patch.object(softmax_regression, "workers", forced)
    with forced:
        start = time.perf_counter()
        xent.SoftmaxRegression(tol=0.0, max_iter=20, solver="lbfgs").fit(X, y)
        return time.perf_counter() - start


def head_ways(n: int, d: int, c: int) -> dict[str, Callable[[], None]]:
    """Return a head's forward + backward over shares of the rows by worker threads, and by torch's own."""
    torch.manual_seed(0)
    count = torch.get_num_threads()
    x, y = torch.randn(n, d, requires_grad=True), torch.randint(c, (n,))
    w = (torch.randn(c, d) / d**0.5).requires_grad_()
    controller = ThreadpoolController()

    def part(rows: slice) -> tuple[torch.Tensor, ...]:
        loss = xent.linear_cross_entropy(x[rows], w, y[rows], reduction="sum")
        return torch.autograd.grad(loss, (x, w))

    def shared() -> None:
        with Workers(count).at_work(controller) as at_work:
            cut = [slice(i * n // count, (i + 1) * n // count) for i in range(count)]
            found = list(at_work.map(part, cut))
        for _, to_w in found[1:]:
            found[0][1].add_(to_w)

    return {"workers": shared, "torch's threads": lambda: void(part(slice(0, n)))}


def void(_: object) -> None:
    """Discard a result."""


def heads(shapes: list[str], rounds: int) -> None:
    print(f"{'rows, features, classes':28}{'workers':>17}{'torch threads':>17}   ratio")
    for shape in shapes:
        n, d, c = map(int, shape.split(","))
        times: dict[str, list[float]] = {}
        made = head_ways(n, d, c)
        for _ in range(rounds + 1):
            for way, function in made.items():
                start = time.perf_counter()
                function()
                times.setdefault(way, []).append(time.perf_counter() - start)
        medians = [statistics.median(each[1:]) for each in times.values()]  # the first is a warm-up
        columns = "".join(f"{value:17.4f}" for value in medians)
        print(f"{shape:28}{columns}   {medians[1] / medians[0]:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", action="append", help="rows,features,classes; may be repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--head", action="store_true", help="one call of the fused head, and no fit")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    beside = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if arguments.busy else None
    print(f"{torch.get_num_threads()} threads of torch, {'one core kept busy' if beside else 'alone'}")
    try:
        if arguments.head:
            heads(arguments.shape or HEADS, arguments.rounds)
            return
        print(f"{'rows, features, classes':28}" + "".join(f"{way:>17}" for way in WAYS) + "   ratios")
        for shape in arguments.shape or SHAPES:
            n, d, c = map(int, shape.split(","))
            rng = np.random.default_rng(0)
            y = rng.integers(c, size=n)
            X = (rng.normal(size=(c, d)) * 6 / np.sqrt(2 * d))[y].astype(np.float32)
            X += rng.normal(size=(n, d)).astype(np.float32)
            seconds(X, y, WAYS[0])  # a warm-up
            rounds = [[seconds(X, y, way) for way in WAYS] for _ in range(arguments.rounds)]
            medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
            ratios = "  ".join(f"{other / medians[0]:.2f}" for other in medians[1:])
            print(f"{shape:28}" + "".join(f"{value:17.3f}" for value in medians) + f"   {ratios}", flush=True)
    finally:
        if beside is not None:
            beside.kill()


if __name__ == "__main__":
    main()
