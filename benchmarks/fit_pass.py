"""One pass of a fit beside the two matrix products in it, on one thread.

    python benchmarks/fit_pass.py [--shape 50000,384,200] [--rounds 9]

A pass is the loss and its gradient over all rows (`linear_model/row_pass.py`); its products are x Wᵀ and
Gᵀ x on the same tiles, and on all rows at once. "gathered" are four fifths of the rows, chosen among all;
"float16" are features stored so. Each takes its turn in every round; medians of the time a row, as ratios to
that of the products on tiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from xent._core.matmul import fast_products
from xent.data.batches import DenseBatch
from xent.linear_model.row_pass import RowPass

SHAPES = ["20000,256,10", "20000,256,100", "50000,384,200", "20000,1024,1000"]


def ways(n: int, d: int, c: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Return what is timed, by name, with its number of rows."""
    torch.manual_seed(0)
    x, W, b = torch.randn(n, d), torch.randn(c, d) / d**0.5, torch.zeros(c)
    y, center, half = torch.randint(c, (n,)), x.mean(0), x.half()
    chosen = torch.randperm(n)[: 4 * n // 5].sort().values
    rows = RowPass(W, b).rows
    z, to_W = torch.empty(rows * c), torch.empty_like(W)

    def on_tiles() -> None:
        to_W.zero_()
        for start in range(0, n, rows):
            part = x[start : start + rows]
            if RowPass(W, b).axis == 0:
                g = torch.mm(W, part.t(), out=z[: len(part) * c].view(c, len(part)))
            else:
                g = torch.mm(part, W.t(), out=z[: len(part) * c].view(len(part), c)).t()
            to_W.addmm_(g, part)

    def at_once() -> None:
        torch.mm(torch.mm(x, W.t()).t(), x)

    return {
        "products on tiles": (n, on_tiles),
        "products at once": (n, at_once),
        "pass": (n, lambda: RowPass(W, b).loss_and_gradient(x, y, None)),
        "centred": (n, lambda: RowPass(W, b, center).loss_and_gradient(x, y, None)),
        "float16": (n, lambda: RowPass(W, b, center).loss_and_gradient(half, y, None)),
        "gathered": (
            len(chosen),
            lambda: RowPass(W, b, center).loss_and_gradient(DenseBatch(x, chosen), y[chosen], None),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", action="append", help="rows,features,classes; may be repeated")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for shape in arguments.shape or SHAPES:
            n, d, c = map(int, shape.split(","))
            times: dict[str, list[float]] = {}
            with fast_products(torch.device("cpu"), torch.float32, n * d * c):
                for _ in range(arguments.rounds + 1):
                    for name, (count, function) in ways(n, d, c).items():
                        start = time.perf_counter()
                        function()
                        times.setdefault(name, []).append((time.perf_counter() - start) / count)
            found = {name: statistics.median(each[1:]) for name, each in times.items()}  # the first warms up
            limit = found["products on tiles"]
            ratios = "  ".join(f"{name} {seconds / limit:.2f}" for name, seconds in found.items())
            print(f"{shape:16} {limit * n:7.4f} s   {ratios}", flush=True)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
