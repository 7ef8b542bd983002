"""A Hessian product of a head's weight, four ways, in one run, interleaved; medians in seconds.

python benchmarks/second_order.py [--shape 1024,768,32768] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp

import xent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="1024,768,32768", help="N,D,C")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    n, d, c = map(int, options.shape.split(","))
    torch.manual_seed(0)
    x, w, v = torch.randn(n, d), torch.randn(c, d) * 0.02, torch.randn(c, d)
    t = torch.randint(c, (n,))

    def forward_over_reverse(loss: Callable[[Tensor], Tensor]) -> Tensor:
        return jvp(grad(loss), (w,), (v,))[1]

    def double_backward(loss: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = w.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        return torch.autograd.grad(g, leaf, v)[0]

    losses = {
        "xent": lambda w: xent.linear_cross_entropy(x, w, t),
        "torch": lambda w: F.cross_entropy(F.linear(x, w), t),
    }
    ways = {"jvp(grad)": forward_over_reverse, "double backward": double_backward}
    seconds: dict[str, list[float]] = {f"{name}, {way}": [] for name in losses for way in ways}
    for round_ in range(options.rounds + 1):
        for name, loss in losses.items():
            for way, product in ways.items():
                start = time.perf_counter()
                product(loss)
                if round_:  # the first is a warm-up
                    seconds[f"{name}, {way}"].append(time.perf_counter() - start)
    for form, values in seconds.items():
        print(f"{form:24} {statistics.median(values):6.2f}  ({min(values):.2f}–{max(values):.2f})")


if __name__ == "__main__":
    main()
