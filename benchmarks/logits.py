"""Losses of logits beside torch's, forward and backward on a CPU.

    python benchmarks/logits.py [--busy] [--shape 64,10] [--rounds 40]

The two take turns in every round; medians, their ratio, and the limit that the project sets itself. With
`--busy` another process keeps one core busy meanwhile. Sample weights and z-loss, which torch's function has
not, are compared with a composition of torch's functions; the last column is the ratio to torch's loss
without them, which takes turns with the two. A full run takes less than two minutes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import xent

SHAPES = {(64, 10): 4.0, (4096, 1000): 1.2, (2048, 32768): 1.0}
"""Rows and classes, and the limit of the ratio."""
ROUNDS = {(64, 10): 400, (4096, 1000): 20, (2048, 32768): 5}
ELEMENTS, BINARY_LIMIT = 1_000_000, 1.3

Loss = Callable[[Tensor], Tensor]


def pairs(rows: int, classes: int) -> dict[str, tuple[Loss, ...]]:
    """Return, by option, torch's loss and ours, and torch's plain loss where the first is a composition."""
    y, w, s = torch.randint(classes, (rows,)), torch.rand(classes) + 0.5, torch.rand(rows) + 0.5

    def both(**options: object) -> tuple[Loss, ...]:
        return (
            lambda z: F.cross_entropy(z, y, **options),
            lambda z: xent.cross_entropy(z, y, **options),
        )

    def plain(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y)

    return {
        "plain": both(),
        "label smoothing": both(label_smoothing=0.1),
        "reduction none": both(reduction="none"),
        "class weights": both(weight=w),
        "sample weights": (
            lambda z: (F.cross_entropy(z, y, reduction="none") * s).sum() / s.sum(),
            lambda z: xent.cross_entropy(z, y, sample_weight=s),
            plain,
        ),
        "z-loss": (
            lambda z: F.cross_entropy(z, y) + 1e-3 * z.logsumexp(1).square().mean(),
            lambda z: xent.cross_entropy(z, y, z_loss=1e-3),
            plain,
        ),
    }


def binary_pairs(elements: int) -> dict[str, tuple[Loss, ...]]:
    """Return, by option, torch's binary cross-entropy of logits and ours."""
    y, w = torch.rand(elements).round(), torch.rand(elements) + 0.5

    def both(**options: object) -> tuple[Loss, ...]:
        return (
            lambda z: F.binary_cross_entropy_with_logits(z, y, **options),
            lambda z: xent.binary_cross_entropy_with_logits(z, y, **options),
        )

    return {
        "plain": both(),
        "reduction sum": both(reduction="sum"),
        "reduction none": both(reduction="none"),
        "pos_weight": both(pos_weight=torch.tensor(3.0)),
        "weight": both(weight=w),
    }


def seconds(loss: Loss, leaf: Tensor) -> float:
    leaf.grad = None
    start = time.perf_counter()
    loss(leaf).sum().backward()
    return time.perf_counter() - start


def compare(name: str, losses: tuple[Loss, ...], leaf: Tensor, rounds: int, limit: float) -> None:
    """Print a line of torch's loss, ours, and torch's plain loss where there is one."""
    for loss in losses:
        seconds(loss, leaf)
    times = [[seconds(loss, leaf) for loss in losses] for _ in range(rounds)]
    a, b, *plain = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    to_plain = "".join(f"{b / c:10.2f}" for c in plain)
    print(f"{name:44} {a:10.3f} {b:10.3f} {b / a:7.2f} {limit:7.1f}{to_plain}", flush=True)


def spin() -> None:
    while True:
        pass


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--busy", action="store_true", help="beside a process that keeps one core busy")
    parser.add_argument("--shape", action="append", help="rows,classes; may be repeated (all)")
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="of the binary loss (%(default)s)")
    parser.add_argument("--rounds", type=int, help="of each pair (by size)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shapes = [tuple(map(int, shape.split(","))) for shape in arguments.shape or ()] or list(SHAPES)
    beside = multiprocessing.Process(target=spin, daemon=True)
    if arguments.busy:
        beside.start()
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'one core kept busy' if arguments.busy else 'alone'}; milliseconds\n")
    print(f"{'':44} {'torch':>10} {'xent':>10} {'ratio':>7} {'limit':>7}{'to plain':>10}")
    for rows, classes in shapes:
        leaf = torch.randn(rows, classes, requires_grad=True)
        rounds = arguments.rounds or ROUNDS.get((rows, classes), 10)
        for name, losses in pairs(rows, classes).items():
            limit = SHAPES.get((rows, classes), 1.0)
            compare(f"({rows}, {classes}) {name}", losses, leaf, rounds, limit)
    leaf = torch.randn(arguments.elements, requires_grad=True)
    for name, losses in binary_pairs(arguments.elements).items():
        label = f"binary with logits, {arguments.elements:,}, {name}"
        compare(label, losses, leaf, arguments.rounds or 15, BINARY_LIMIT)


if __name__ == "__main__":
    main()
