"""sinkhorn.assign beside POT's log-domain solver, in one run, interleaved, under equal stopping rules.

    python benchmarks/sinkhorn.py [--rounds 3] [--iterations 20] [--error 1e-4] [--save FILE]

Scores are N(0, 1), marginals uniform. POT runs on the same torch tensors (`ot.bregman.sinkhorn_log`), once
for a number of iterations and once until the marginal error is reached: it stops by the norm of its columns'
errors, which is set so that their sum is within ours. Where it is not there after `--limit` iterations it
stops, and its time is that of getting as far as shown. Printed are the fastest round and the median, the
ratios to xent's within a round (median and spread), and of each plan the error of its sums in float64 and its
distance from the plan that has converged in float64.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date

import ot
import torch
from torch import Tensor

import xent

CASES = [  # rows, columns, epsilon, type
    (4096, 256, 0.05, torch.float32),
    (4096, 256, 0.02, torch.float32),
    (4096, 256, 0.02, torch.float64),
    (16384, 3000, 0.05, torch.float32),
]


def pot(scores: Tensor, epsilon: float, iterations: int, error: float | None) -> Tensor:
    n, k = scores.shape
    row, column = scores.new_ones(n), scores.new_full((k,), n / k)
    stop = 0.0 if error is None else error * n / k**0.5
    return ot.bregman.sinkhorn_log(row, column, -scores, epsilon, numItermax=iterations, stopThr=stop)


def ours(scores: Tensor, epsilon: float, iterations: int, error: float | None) -> Tensor:
    return xent.sinkhorn.assign(scores, epsilon=epsilon, max_iterations=iterations, tolerance=error).plan


FORMS: dict[str, Callable[..., Tensor]] = {"xent": ours, "POT": pot}


def measure(
    case: tuple[int, int, float, torch.dtype], iterations: int, error: float | None, rounds: int
) -> dict[str, object]:
    n, k, epsilon, dtype = case
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(n, k, generator=generator, dtype=torch.float64).to(dtype)
    right = xent.sinkhorn.assign(scores.double(), epsilon=epsilon, tolerance=1e-12).plan
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    found = {}
    for round_ in range(rounds + 1):
        for name, form in FORMS.items():
            if round_ == 0:  # warm, and not for long
                form(scores, epsilon, 3, None)
                continue
            start = time.perf_counter()
            plan = form(scores, epsilon, iterations, error)
            seconds[name].append(time.perf_counter() - start)
            off = float((plan.sum(0, dtype=torch.float64) - n / k).abs().sum()) / n
            found[name] = {"error": off, "distance": float((plan - right).abs().max())}
    return {"case": [n, k, epsilon, str(dtype)], "error": error, "seconds": seconds, "plans": found}


def table(result: dict[str, object], rule: str) -> str:
    n, k, epsilon, dtype = result["case"]
    lines = [f"\n{n} x {k}, epsilon {epsilon}, {dtype.removeprefix('torch.')}, {rule}"]
    lines.append(
        f"{'':6}{'fastest':>10}{'median':>10}{'ratio':>8}{'spread':>18}{'sums off':>10}{'plan off':>10}"
    )
    own = result["seconds"]["xent"]
    for name, seconds in result["seconds"].items():
        ratios = [a / b for a, b in zip(seconds, own, strict=True)]
        spread = f"({min(ratios):.2f}, {max(ratios):.2f})"
        plan = result["plans"][name]
        lines.append(
            f"{name:6}{min(seconds):9.3f}s{statistics.median(seconds):9.3f}s{statistics.median(ratios):8.2f}"
            f"{spread:>18}{plan['error']:10.1e}{plan['distance']:10.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--error", type=float, default=1e-4)
    parser.add_argument("--limit", type=int, default=2000, help="iterations on the way to the error")
    parser.add_argument("--cases", type=int, nargs="*", help="which of the cases, from 0")
    parser.add_argument("--save", help="append one JSON line a measurement")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    machine = {
        "date": str(date.today()),
        "machine": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "POT": ot.__version__,
        "xent": xent.__version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for number, case in enumerate(CASES):
        if options.cases is not None and number not in options.cases:
            continue
        for rule, iterations, error in (
            (f"{options.iterations} iterations", options.iterations, None),
            (f"to an error of {options.error:.0e}", options.limit, options.error),
        ):
            result = measure(case, iterations, error, options.rounds)
            print(table(result, rule), flush=True)
            if options.save:
                with open(options.save, "a") as file:
                    file.write(json.dumps({**machine, "rule": rule, **result}) + "\n")


if __name__ == "__main__":
    main()
