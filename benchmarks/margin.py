"""Margin heads beside pytorch-metric-learning's: the same values and gradients, and what they cost.

    pip install -c constraints.txt '.[all]' --group peers
    python benchmarks/margin.py [--rows 512] [--features 256] [--classes 50000] [--rounds 7]

Both hold the same class vectors. Values agree to float64 rounding before anything is timed; then the two
take turns, forward and backward in float32; medians, their spread and ratio. The peer makes five tensors of
rows × classes, xent none.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from pytorch_metric_learning import losses

import xent


def heads(
    features: int, classes: int, dtype: torch.dtype
) -> dict[str, tuple[torch.nn.Module, torch.nn.Module]]:
    """(ours, theirs) of one set of class vectors."""
    size = {"num_classes": classes, "embedding_size": features}
    pairs = {
        "CosFace": (xent.Margin(cosine=0.35), 64.0, losses.CosFaceLoss(**size, margin=0.35, scale=64)),
        "ArcFace": (
            xent.Margin(angle=math.radians(28.6)),
            64.0,
            losses.ArcFaceLoss(**size, margin=28.6, scale=64),
        ),
        "NormalizedSoftmax": (xent.Margin(), 20.0, losses.NormalizedSoftmaxLoss(**size, temperature=0.05)),
    }
    made = {}
    for name, (margin, scale, theirs) in pairs.items():
        ours = xent.nn.MarginLoss(features, classes, margin=margin, scale=scale, dtype=dtype)
        theirs = theirs.to(dtype)
        with torch.no_grad():
            theirs.W.copy_(ours.class_weight.t())
        made[name] = ours, theirs
    return made


def gradients(
    head: torch.nn.Module, x: torch.Tensor, y: torch.Tensor
) -> tuple[float, torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    loss = head(x, y)
    (weight,) = head.parameters()
    dx, dw = torch.autograd.grad(loss, (x, weight))
    return loss.item(), dx, dw if isinstance(head, xent.nn.MarginLoss) else dw.t()


def furthest(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--classes", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    # the peer takes features of length 1 for NormalizedSoftmax, and scales the others itself
    x = torch.nn.functional.normalize(torch.randn(64, 32, dtype=torch.float64), dim=1)
    y = torch.randint(1000, (64,))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("float64, 64 × 32 features, 1000 classes: relative differences")
    print(f"{'':20}{'loss':>16}{'difference':>12}{'in dx':>10}{'in dW':>10}")
    for name, (ours, theirs) in heads(32, 1000, torch.float64).items():
        a, b = gradients(ours, x, y), gradients(theirs, x, y)
        apart = abs(a[0] / b[0] - 1), furthest(a[1], b[1]), furthest(a[2], b[2])
        print(f"{name:20}{a[0]:16.10f}{apart[0]:12.1e}{apart[1]:10.1e}{apart[2]:10.1e}")

    n, d, c = arguments.rows, arguments.features, arguments.classes
    x = torch.nn.functional.normalize(torch.randn(n, d), dim=1)
    y = torch.randint(c, (n,))
    print(f"\nfloat32, {n} × {d} features, {c} classes, forward and backward: milliseconds, median (spread)")
    print(f"{'':20}{'xent':>20}{'peer':>20}{'peer ÷ xent':>14}")
    for name, pair in heads(d, c, torch.float32).items():
        times: list[list[float]] = [[], []]
        for _ in range(arguments.rounds + 1):
            for head, taken in zip(pair, times, strict=True):
                start = time.perf_counter()
                gradients(head, x, y)
                taken.append(1e3 * (time.perf_counter() - start))
        shown = [f"{statistics.median(t[1:]):.0f} ({min(t[1:]):.0f}–{max(t[1:]):.0f})" for t in times]
        ratio = statistics.median(times[1][1:]) / statistics.median(times[0][1:])
        print(f"{name:20}{shown[0]:>20}{shown[1]:>20}{ratio:14.2f}")


if __name__ == "__main__":
    main()
