"""Binary cross-entropy and kl_div beside torch's, forward and backward, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/binary.py [--elements 1000000] [--rounds 15]

The two take turns in every round; medians in milliseconds, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
import torch.nn.functional as F

import xent


def seconds(loss, input: torch.Tensor, target: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.autograd.grad(loss(input, target), input)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--elements", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's, about the mean of kl_div
    torch.manual_seed(0)
    logits, target = torch.randn(arguments.elements), torch.rand(arguments.elements)
    problems = {
        "binary_cross_entropy_with_logits": (logits, target.round()),
        "binary_cross_entropy": (logits.sigmoid(), target.round()),
        "kl_div": (F.logsigmoid(logits), target),
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread, {arguments.elements:,} float32\n")
    print(f"{'':34}{'xent':>9}{'torch':>9}{'ratio':>8}")
    for name, (input, target) in problems.items():
        input.requires_grad_()
        times: dict[object, list[float]] = {xent: [], F: []}
        for _ in range(arguments.rounds):
            for library, taken in times.items():
                taken.append(seconds(getattr(library, name), input, target))
        ours, theirs = (1e3 * statistics.median(taken[1:]) for taken in times.values())
        print(f"{name:34}{ours:7.2f}ms{theirs:7.2f}ms{ours / theirs:8.2f}")


if __name__ == "__main__":
    main()
