"""Hessian products of a linear head beside torch.func and double backward; medians, one run, interleaved.

    python benchmarks/curvature.py [--shapes 1024,768,32768 8192,512,1000] [--rounds 5]

    pip install -c constraints.txt '.[all]' --group peers

`products alone` is what the matrix products that a Hessian product needs cost by themselves (three). A peer
that is not installed (curvlinops) is left out and said to be.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp

import xent
from xent._core.matmul import fast_products, multiply_

MANY = 16


def ways(n: int, d: int, c: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    x, w, v = torch.randn(n, d), torch.randn(c, d) * 0.02, torch.randn(c, d)
    y = torch.randint(c, (n,))
    several = torch.randn(MANY, c, d)
    operator = xent.curvature.HeadHessian(x, w, y)
    leaf, features = w.clone().requires_grad_(), x.clone().requires_grad_()
    rows = max(1, min(n, (32 << 20) // (4 * c)))
    logits, out = torch.empty(rows, c), torch.zeros(c, d)

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), y)

    def double_backward() -> Tensor:
        (g,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        return torch.autograd.grad(g, leaf, v)[0]

    def three_products() -> None:
        with fast_products(x.device, x.dtype, n * d * c):
            for some in x.split(rows):
                room = logits[: len(some)]
                multiply_(room, some, w.t(), accumulate=False)
                multiply_(room, some, v.t(), accumulate=False)
                multiply_(out, room.t(), some, accumulate=True)

    def forward_backward() -> Tensor:
        return torch.autograd.grad(xent.linear_cross_entropy(features, leaf, y), (features, leaf))[1]

    made: dict[str, Callable[[], object]] = {
        "products alone": three_products,
        "xent, H @ v": lambda: operator @ v,
        f"xent, {MANY} right-hand sides": lambda: operator @ several,
        "xent, diagonal": operator.diagonal,
        "xent, loss and gradients": forward_backward,
        "torch.func, jvp(grad)": lambda: jvp(grad(loss), (w,), (v,))[1],
        "torch, double backward": double_backward,
    }
    if importlib.util.find_spec("curvlinops"):
        from curvlinops import HessianLinearOperator

        layer = torch.nn.Linear(d, c, bias=False)
        layer.weight.data.copy_(w)
        theirs = HessianLinearOperator(
            layer, torch.nn.CrossEntropyLoss(), list(layer.parameters()), [(x, y)], check_deterministic=False
        )
        flat = v.reshape(-1)
        made["curvlinops, H @ v"] = lambda: theirs @ flat
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["1024,768,32768", "8192,512,1000"], help="N,D,C")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, seconds: median (spread)")
    if not importlib.util.find_spec("curvlinops"):
        print("curvlinops is not installed: left out")
    for shape in options.shapes:
        n, d, c = map(int, shape.split(","))
        made = ways(n, d, c)
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for round_ in range(options.rounds + 1):
            for name, way in made.items():
                start = time.perf_counter()
                way()
                if round_:  # the first is a warm-up
                    seconds[name].append(time.perf_counter() - start)
        ours = statistics.median(seconds["xent, H @ v"])
        print(f"\n({n}, {d}, {c})\n{'':30}{'seconds':>24}{'÷ H @ v':>10}")
        for name, values in seconds.items():
            median = statistics.median(values)
            shown = f"{median:.3f} ({min(values):.3f}–{max(values):.3f})"
            print(f"{name:30}{shown:>24}{median / ours:10.2f}")


if __name__ == "__main__":
    main()
