"""Time until a fit is within 1e-4 and 1e-6 of the minimum: xent beside scikit-learn's and torch's solvers.

    python benchmarks/fit.py [--problem NAME ...] [--rounds 3] [--limit 60] [--busy] [--save FILE]

C = 1, float32 features (digits: float64), an intercept. Every round runs every way in turn. Those that tell
where they are (xent by its callback, torch between steps) are timed in one run. scikit-learn's do not: they
are run with more and more iterations, and the shortest run that ends within the target counts; each with one
and with all BLAS threads, of which the faster counts. F* is the least objective that any run has reached,
xent's at a tol of 1e-9 among them. The limit is that of the products alone: passes × the time of their two.

With --device the features are a tensor there, for xent and torch; xent on the CPU stands beside them.
With --busy another process keeps one core busy. Objectives are computed in float64, apart from all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import tokenize
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import logsumexp
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

import xent
from xent._core.matmul import fast_products
from xent.linear_model.objective import Objective

TARGETS = (1e-4, 1e-6)
Data = tuple[np.ndarray, np.ndarray]
Trace = list[tuple[float, float]]  # seconds, relative distance from the minimum is made of the objective


def clusters(n: int, d: int, c: int, seed: int = 0, share: np.ndarray | None = None) -> Data:
    """Gaussian classes 6 deviations apart: what an embedding of classes that can be told looks like."""
    rng = np.random.default_rng(seed)
    y = rng.choice(c, n, p=None if share is None else share / share.sum())
    centers = rng.normal(size=(c, d)) * (6 / np.sqrt(2 * d))
    return (centers[y] + rng.normal(size=(n, d))).astype(np.float32), y


def planted(n: int, d: int, c: int) -> Data:
    """Labels drawn from a softmax model, logits of deviation 4.8: parameters as many as rows, hard to fit."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, d)).astype(np.float32)
    z = 4.8 / np.sqrt(d) * (X @ rng.normal(size=(c, d)).astype(np.float32).T)
    return X, (z + rng.gumbel(size=z.shape)).argmax(1)


def power_law() -> Data:
    """Clusters in features whose covariance has eigenvalues from 1 to 1e-4, in a random basis."""
    X, y = clusters(20000, 256, 100)
    rng = np.random.default_rng(1)
    basis, _ = np.linalg.qr(rng.normal(size=(256, 256)))
    return ((X * np.arange(1, 257) ** (-2 / np.log10(256))) @ basis).astype(np.float32), y


def digits() -> Data:
    """In float64: of float32 scikit-learn's solvers do not come within 1e-4."""
    X, y = load_digits(return_X_y=True)
    return X, y


def next_token(n: int = 50000, c: int = 500, d: int = 64) -> Data:
    """The next token of Python's standard library, of the 500 most frequent, from the four before it."""
    rng = np.random.default_rng(0)
    vocabulary: dict[str, int] = {}
    found: list[int] = []
    for path in sorted(Path(statistics.__file__).parent.glob("*.py")):
        with tokenize.open(path) as file:
            words = [t.string for t in tokenize.generate_tokens(file.readline) if t.string.strip()]
        found += [vocabulary.setdefault(word, len(vocabulary)) for word in words]
        if len(found) > 10 * n:
            break
    codes = np.array(found)
    vectors = rng.normal(size=(len(vocabulary), d)).astype(np.float32)
    kept = np.argsort(-np.bincount(codes))[:c]
    place = np.full(len(vocabulary), -1)
    place[kept] = np.arange(c)
    at = np.flatnonzero(place[codes[4:]] >= 0)
    at = np.sort(rng.choice(at, min(n, len(at)), replace=False))
    X = np.concatenate([vectors[codes[at + i]] for i in range(4)], axis=1)
    return X, np.unique(place[codes[at + 4]], return_inverse=True)[1]


PROBLEMS: dict[str, Callable[[], Data]] = {
    "20000 x 256, 10 classes": lambda: clusters(20000, 256, 10),
    "20000 x 256, 100 classes": lambda: clusters(20000, 256, 100),
    "50000 x 384, 200 classes": lambda: clusters(50000, 384, 200),
    "20000 x 1024, 1000 classes": lambda: clusters(20000, 1024, 1000),
    "200000 x 128, 50 classes": lambda: clusters(200000, 128, 50),
    "planted, 20000 x 256, 10": lambda: planted(20000, 256, 10),
    "planted, 20000 x 256, 100": lambda: planted(20000, 256, 100),
    "power law, 20000 x 256, 100": power_law,
    "imbalanced, 20000 x 256, 100": lambda: clusters(20000, 256, 100, share=1 / np.arange(1.0, 101)),
    "digits": digits,
    "next token": next_token,
}


class Run(NamedTuple):
    trace: Trace  # (seconds, objective), as they came
    passes: int = 0  # evaluations of the objective, where they are counted


def objective(X: np.ndarray, y: np.ndarray, W: np.ndarray, b: np.ndarray) -> float:
    """Return the mean loss + ‖W‖²/2N in float64."""
    total, W = 0.0, W.astype(np.float64)
    for start in range(0, len(X), 4096):
        z = X[start : start + 4096] @ W.T + b
        z = np.concatenate([np.zeros_like(z), z], axis=1) if z.shape[1] == 1 else z
        total += float((logsumexp(z, axis=1) - z[np.arange(len(z)), y[start : start + 4096]]).sum())
    return (total + 0.5 * float(np.vdot(W, W))) / len(X)


def of_xent(X: np.ndarray, y: np.ndarray, limit: float, tol: float = 1e-7, device: str = "cpu") -> Run:
    features = X if device == "cpu" else torch.from_numpy(X).to(device)
    trace: Trace = []
    passes = 0
    evaluate = Objective._loss_and_gradient

    def counted(self: Objective, model: np.ndarray) -> np.ndarray:
        nonlocal passes
        passes += 1
        return evaluate(self, model)

    def look(now: xent.linear_model.descent.Progress) -> None:  # type: ignore[name-defined]
        trace.append((time.perf_counter() - start, now.objective))
        if trace[-1][0] > limit:
            raise StopIteration

    Objective._loss_and_gradient = counted  # type: ignore[method-assign]
    try:
        start = time.perf_counter()
        xent.SoftmaxRegression(tol=tol, solver="lbfgs").fit(features, y, callback=look)
    finally:
        Objective._loss_and_gradient = evaluate  # type: ignore[method-assign]
    return Run(trace, passes)


def of_torch(X: np.ndarray, y: np.ndarray, limit: float, device: str = "cpu") -> Run:
    """torch.optim.LBFGS on linear and cross_entropy, as its documentation writes it."""
    x, t, classes = torch.from_numpy(X).to(device), torch.from_numpy(y).to(device), int(y.max()) + 1
    W = torch.zeros(classes, X.shape[1], requires_grad=True, device=device, dtype=x.dtype)
    b = torch.zeros(classes, requires_grad=True, device=device, dtype=x.dtype)
    solver = torch.optim.LBFGS(
        [W, b], history_size=10, max_iter=1, line_search_fn="strong_wolfe", tolerance_change=0
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, W, b), t)
        loss = loss + W.square().sum() / (2 * len(x))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    trace: Trace = []
    start = time.perf_counter()
    for _ in range(2000):
        loss = solver.step(closure)
        trace.append((time.perf_counter() - start, float(loss)))  # of before the step
        if trace[-1][0] > limit or (len(trace) > 30 and trace[-30][1] - trace[-1][1] < 1e-9 * trace[-1][1]):
            break
    return Run(trace)


def of_scikit_learn(solver: str, steps: list[int]) -> Callable[[np.ndarray, np.ndarray, float], Run]:
    def run(X: np.ndarray, y: np.ndarray, limit: float) -> Run:
        trace: Trace = []
        begun = time.perf_counter()
        for step in steps:
            model = LogisticRegression(solver=solver, max_iter=step, tol=1e-10)
            start = time.perf_counter()
            model.fit(X, y)
            taken = time.perf_counter() - start
            trace.append((taken, objective(X, y, model.coef_, model.intercept_)))
            flat = len(trace) > 1 and trace[-2][1] - trace[-1][1] < 1e-8 * trace[-1][1]
            if flat or time.perf_counter() - begun > limit or model.n_iter_[0] < step:
                break
        return Run(trace)

    return run


def ways(X: np.ndarray, y: np.ndarray, device: str) -> dict[str, tuple[Callable[..., Run], int]]:
    """Return what is timed, by name, with its number of threads."""
    every = torch.get_num_threads()
    found: dict[str, tuple[Callable[..., Run], int]] = {"xent": (partial(of_xent, device=device), every)}
    if device != "cpu":
        return found | {"torch": (partial(of_torch, device=device), every), "xent, CPU": (of_xent, every)}
    for threads in sorted({1, every}):
        of = f", {threads} thread{'s' * (threads > 1)}"
        found["lbfgs" + of] = (of_scikit_learn("lbfgs", [10, 20, 30, 45, 65, 100, 150, 250, 500]), threads)
        found["newton-cg" + of] = (of_scikit_learn("newton-cg", [4, 6, 7, 8, 10, 12, 15, 20]), threads)
        if (X.shape[1] * (y.max() + 1)) <= 3000:
            found["newton-cholesky" + of] = (of_scikit_learn("newton-cholesky", [3, 5, 7, 9, 12]), threads)
        found["torch" + of] = (of_torch, threads)
    found["saga"] = (of_scikit_learn("saga", [5, 10, 20, 40, 80, 160]), 1)
    return found


def first_within(trace: Trace, best: float, target: float) -> float:
    within = [seconds for seconds, value in trace if value - best <= target * best]
    return min(within) if within else np.inf


def products(X: np.ndarray, classes: int) -> float:
    """Return the seconds of the two products of a pass on all threads."""
    x, w = torch.from_numpy(X), torch.randn(classes, X.shape[1], dtype=torch.from_numpy(X).dtype)
    z, to_w = x.new_empty(len(X), classes), torch.empty_like(w)
    with fast_products(x.device, x.dtype, x.numel() * classes):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(x, w.t(), out=z)
            torch.mm(z.t(), x, out=to_w)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(name: str, options: argparse.Namespace) -> dict[str, object]:
    X, y = PROBLEMS[name]()
    runs: dict[str, list[Run]] = {}
    with threadpool_limits(1, user_api="blas"):  # whose threads spin beside torch's
        alone = products(X, int(y.max()) + 1)
    best = of_xent(X, y, options.limit, tol=1e-9).trace[-1][1]
    for _ in range(options.rounds):
        for way, (function, threads) in ways(X, y, options.device).items():
            if options.way and way.split(",")[0] not in options.way:
                continue
            if way in runs and not np.isfinite(first_within(runs[way][0].trace, best, TARGETS[0])):
                continue  # once is enough to see that it does not arrive
            with threadpool_limits(threads):
                runs.setdefault(way, []).append(function(X, y, options.limit))
            best = min(best, min(value for _, value in runs[way][-1].trace))
    row: dict[str, object] = {"problem": name, "minimum": best}
    seconds = {
        way: [statistics.median(first_within(r.trace, best, t) for r in several) for t in TARGETS]
        for way, several in runs.items()
    }
    row |= {"seconds": seconds, "passes": runs["xent"][0].passes, "products": alone}
    ours = seconds["xent"]
    print(f"\n{name}: F* = {best:.6g}, {runs['xent'][0].passes} passes, products {alone:.4f} s a pass")
    print(f"  {'':28}{'1e-4':>10}{'1e-6':>10}   times xent's")
    for way, times in seconds.items():
        ratios = [f"{theirs / own:.1f}" for theirs, own in zip(times, ours, strict=True)]
        print(f"  {way:28}{times[0]:10.3f}{times[1]:10.3f}   {'  '.join(ratios)}", flush=True)
    if options.device != "cpu":
        return row
    peers = [times for way, times in seconds.items() if way.split(",")[0] not in ("xent", "torch")]
    row["ratio"] = [min(t[i] for t in peers) / ours[i] for i in range(len(TARGETS))]
    print(f"  scikit-learn's fastest ÷ xent: {row['ratio'][0]:.1f}, {row['ratio'][1]:.1f}")  # type: ignore[index]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problem", action="append", choices=PROBLEMS)
    parser.add_argument("--way", action="append", help="xent, lbfgs, newton-cg, ...: these alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=1200, help="seconds after which a way is cut")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--busy", action="store_true", help="keep one core busy meanwhile")
    parser.add_argument("--save", metavar="FILE", help="append the rows, one JSON object a line")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    beside = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if options.busy else None
    about = {
        "device": options.device if options.device == "cpu" else torch.cuda.get_device_name(),
        "busy": options.busy,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    try:
        for name in options.problem or PROBLEMS:
            row = measure(name, options)
            if options.save:
                with open(options.save, "a") as file:
                    file.write(json.dumps(about | row) + "\n")
    finally:
        if beside is not None:
            beside.kill()


if __name__ == "__main__":
    main()
