"""Bounds and attribution of a linear head beside one loss without gradients, interleaved.

    python benchmarks/triplets.py [--shapes 2048,768,32768 ...] [--rounds 9] [--spread 0.02]

Every round runs every form once, in turn. Medians in milliseconds, their ratio to the loss's, and the
quartiles of the ratio within a round, which a machine whose speed drifts leaves alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import xent
from xent import triplets


def measure(shape: tuple[int, int, int], rounds: int, spread: float) -> None:
    n, d, c = shape
    torch.manual_seed(0)
    x, w, y = torch.randn(n, d), torch.randn(c, d) * spread, torch.randint(c, (n,))
    forms: dict[str, Callable[[], object]] = {
        "linear_cross_entropy": lambda: xent.linear_cross_entropy(x, w, y),
        "linear_bounds": lambda: triplets.linear_bounds(x, w, y),
        "linear_attribution, top_k=5": lambda: triplets.linear_attribution(x, w, y, 5),
        "linear_top_k, k=5": lambda: xent.linear_top_k(x, w, 5),
    }
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for round_ in range(rounds + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            if round_:  # the first is a warm-up
                taken[name].append(1e3 * (time.perf_counter() - start))
    loss = taken["linear_cross_entropy"]
    print(f"\nN {n}, D {d}, C {c}")
    print(f"  {'':28}{'ms':>9} {'spread':>15} {'÷ loss':>8} {'quartiles':>12}")
    for name, values in taken.items():
        ratios = [value / one for value, one in zip(values, loss, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        of = f"{statistics.median(values):9.1f} {min(values):7.1f}–{max(values):.1f}"
        print(f"  {name:28}{of} {middle:8.2f} {low:6.2f}–{high:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=["2048,768,32768"], help="N,D,C ...")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--spread", type=float, default=0.02, help="of the weights: larger ones are surer")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with torch.no_grad():
        for shape in options.shapes:
            n, d, c = map(int, shape.split(","))
            measure((n, d, c), options.rounds, options.spread)


if __name__ == "__main__":
    main()
