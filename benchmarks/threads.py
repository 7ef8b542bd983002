"""A fit while NumPy's BLAS has its own threads, and while it is held to one, as `SoftmaxRegression` does.

    python benchmarks/threads.py [--shape 20000,256,100] [--rounds 3] [--busy]

float32, C = 1, tol 1e-4. The two take turns in every round; medians in seconds, and the ratio. With `--busy`
another process keeps one core busy meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
import warnings
from unittest import mock

import numpy as np
import torch

import xent
from xent.linear_model import descent

SHAPES = ["20000,256,10", "20000,256,100"]


def seconds(X: np.ndarray, y: np.ndarray, *, held: bool) -> float:
    way = contextlib.nullcontext()
    if not held:
        way = mock.patch.object(descent, "threadpool_limits", return_value=contextlib.nullcontext())
    with way:
        start = time.perf_counter()
        xent.SoftmaxRegression(C=1.0, tol=1e-4).fit(X, y)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", action="append", help="rows,features,classes; may be repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    beside = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if arguments.busy else None
    print(f"{torch.get_num_threads()} threads of torch, {'one core kept busy' if beside else 'alone'}")
    print(f"{'rows, features, classes':28}{'free':>9}{'held':>9}{'ratio':>8}")
    try:
        for shape in arguments.shape or SHAPES:
            n, d, c = map(int, shape.split(","))
            rng = np.random.default_rng(0)
            X, W = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(c, d))
            y = (0.3 * X @ W.T + rng.gumbel(size=(n, c))).argmax(1)
            seconds(X, y, held=True)  # a warm-up
            rounds = [[seconds(X, y, held=held) for held in (False, True)] for _ in range(arguments.rounds)]
            free, held = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(f"{shape:28}{free:9.3f}{held:9.3f}{held / free:8.2f}", flush=True)
    finally:
        if beside is not None:
            beside.kill()


if __name__ == "__main__":
    main()
