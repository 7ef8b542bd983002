"""log_loss: xent beside scikit-learn and a validated gather, in one run, interleaved.

    python benchmarks/metrics.py [--rounds 7] [--save FILE]

The gather is what one writes by hand with torch: the range and the row sums checked, p[y] gathered, the mean
of its logarithms. It trusts its labels to be columns; xent and scikit-learn find out. Every round runs every
form in turn (several calls of the short ones, whose median is taken). Printed are the fastest round and the
median, ratios to xent's time (of the fastest rounds, and within a round: median and spread), and what the
resident set reached beyond the inputs in one call, in a process of its own. Other work on the cores shows in
the spread: threads that wait for each other wait for it. Linux only.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date

import numpy as np
import sklearn
import torch
from sklearn.metrics import log_loss

import xent

CASES = [  # rows, columns, type of the probabilities, type of the labels
    (1_000_000, 10, "float64", "int64"),
    (100_000, 1000, "float64", "int64"),
    (1_000_000, 10, "float32", "int64"),
    (100_000, 1000, "float32", "int64"),
    (1_000_000, 10, "float64", "str"),
    (100_000, 1000, "float64", "str"),
]


def gather(y: np.ndarray, p: np.ndarray) -> float:
    """The mean of −log p[y] after a check of p."""
    index, probability = torch.from_numpy(y), torch.from_numpy(p)
    low, high = probability.aminmax()
    sums = probability.sum(1)
    tolerance = torch.finfo(probability.dtype).eps ** 0.5
    if not (low >= 0 and high <= 1 and torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=tolerance)):
        raise ValueError("these are no probabilities")
    return -probability.gather(1, index[:, None]).double().log().mean().item()


FORMS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "xent": xent.metrics.log_loss,
    "validated gather": gather,
    "scikit-learn": log_loss,
}


def inputs(n: int, c: int, dtype: str, labels: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    p = rng.random((n, c), dtype=np.float64)
    p /= p.sum(1, keepdims=True)
    y = rng.integers(c, size=n)
    y[:c] = np.arange(c)
    names = np.array([f"class {k:04d}" for k in range(c)], dtype=object)
    return (y if labels == "int64" else names[y]), p.astype(dtype, copy=False)


def timed(f: Callable[[], float]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def forms(labels: str) -> list[str]:
    return [name for name in FORMS if labels == "int64" or name != "validated gather"]


def measure(case: tuple[int, int, str, str], rounds: int) -> dict[str, object]:
    y, p = inputs(*case)
    seconds: dict[str, list[float]] = {name: [] for name in forms(case[3])}
    for round_ in range(rounds + 1):
        for name, every in seconds.items():
            calls = 1 if name == "scikit-learn" else 5
            one = statistics.median(timed(lambda f=FORMS[name]: f(y, p)) for _ in range(calls))
            if round_:  # the first is a warm-up
                every.append(one)
    values = {name: FORMS[name](y[:1000], p[:1000]) for name in seconds} if case[1] == 10 else {}
    assert not values or max(values.values()) - min(values.values()) < 1e-6, values
    memory = {name: peak(name, case) for name in seconds}
    return {"case": case, "seconds": seconds, "memory": memory}


def peak(name: str, case: tuple[int, int, str, str]) -> int:
    """Bytes of the resident set's high-water mark beyond what was there before the call."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--peak", json.dumps([name, *case])],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def peak_here(name: str, *case: int | str) -> int:
    FORMS[name](*inputs(70_000, 3, *case[2:]))  # warm
    y, p = inputs(*case)
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")  # the high-water mark starts again from what is held now
    with open("/proc/self/statm") as pages:
        before = int(pages.read().split()[1]) * resource.getpagesize()
    FORMS[name](y, p)
    with open("/proc/self/status") as status:
        high = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return high - before


def table(result: dict[str, object]) -> str:
    n, c, dtype, labels = result["case"]
    lines = [f"\n{n} x {c}, {dtype}, labels {labels}"]
    lines.append(f"{'':17} {'fastest':>9} {'ratio':>6} {'median':>10} {'ratio':>6} {'spread':>15} {'MiB':>7}")
    own = result["seconds"]["xent"]
    for name, seconds in result["seconds"].items():
        ratios = [a / b for a, b in zip(seconds, own, strict=True)]
        spread = f"({min(ratios):.2f}, {max(ratios):.2f})"
        fastest = f"{1e3 * min(seconds):7.1f}ms {min(seconds) / min(own):6.2f}"
        median = f"{1e3 * statistics.median(seconds):8.1f}ms {statistics.median(ratios):6.2f}"
        lines.append(f"{name:17} {fastest} {median} {spread:>15} {result['memory'][name] / 2**20:7.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", help="append one JSON line a case")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_here(*json.loads(options.peak)))
        return
    machine = {
        "date": str(date.today()),
        "machine": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "xent": xent.__version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for case in CASES:
        result = measure(case, options.rounds)
        print(table(result), flush=True)
        if options.save:
            with open(options.save, "a") as file:
                file.write(json.dumps({**machine, **result}) + "\n")


if __name__ == "__main__":
    main()
