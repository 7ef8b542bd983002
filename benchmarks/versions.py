"""Two versions of xent beside each other: what one call of each kind takes, and the memory it needs.

    git worktree add /tmp/before HEAD~100
    python benchmarks/versions.py /tmp/before . [--rounds 7] [--only head] [--busy]

Each version, a checkout, is a process of its own, which makes the same tensors and runs a call when it is its
turn; the other waits meanwhile. Printed are the medians of the rounds in milliseconds and the ratio of the
second to the first. The last columns are what the resident set reached in the first call of a process, beyond
the inputs, in MiB (Linux). A call that a version lacks is left blank.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

Call = Callable[[], object]


def calls() -> dict[str, Callable[[], Call]]:
    """Return, by name, what makes the inputs and returns the call."""
    import torch

    import xent

    def head(n: int, d: int, c: int, **options: object) -> Callable[[], Call]:
        def make() -> Call:
            x, w = torch.randn(n, d, requires_grad=True), torch.randn(c, d, requires_grad=True)
            y = torch.randint(c, (n,))
            return lambda: backward(xent.linear_cross_entropy(x, w / d**0.5, y, **options))

        return make

    def logits(n: int, c: int, **options: object) -> Callable[[], Call]:
        def make() -> Call:
            z, y = torch.randn(n, c, requires_grad=True), torch.randint(c, (n,))
            return lambda: backward(xent.cross_entropy(z, y, **options))

        return make

    def backward(loss: torch.Tensor) -> None:
        loss.sum().backward()

    def soft() -> Call:
        z, t = torch.randn(4096, 1000, requires_grad=True), torch.randn(4096, 1000).softmax(1)
        return lambda: backward(xent.cross_entropy(z, t))

    def binary() -> Call:
        z, y = torch.randn(1_000_000, requires_grad=True), torch.rand(1_000_000).round()
        return lambda: backward(xent.binary_cross_entropy_with_logits(z, y))

    def divergence() -> Call:
        x, t = torch.randn(1024, 256, requires_grad=True), torch.randn(1024, 256)
        w, v = torch.randn(8192, 256, requires_grad=True), torch.randn(8192, 256)
        return lambda: backward(xent.linear_kl_divergence(student=(x, w / 16), teacher=(t, v / 16)))

    def second() -> Call:
        z, y = torch.randn(512, 1000, requires_grad=True), torch.randint(1000, (512,))
        v = torch.randn(512, 1000)

        def product() -> None:
            (g,) = torch.autograd.grad(xent.cross_entropy(z, y), z, create_graph=True)
            torch.autograd.grad(g, z, v)

        return product

    def hessian() -> Call:
        x, w, y = torch.randn(1024, 256), torch.randn(4096, 256) / 16, torch.randint(4096, (1024,))
        operator, v = xent.curvature.HeadHessian(x, w, y), torch.randn(4096, 256)
        return lambda: operator @ v

    def bounds() -> Call:
        z, y = torch.randn(2048, 2048), torch.randint(2048, (2048,))
        return lambda: xent.triplets.bounds(z, y)

    def assignment() -> Call:
        scores = torch.randn(4096, 256, dtype=torch.float64)
        return lambda: xent.sinkhorn.assign(scores, epsilon=0.1)

    def log_loss() -> Call:
        p, y = torch.randn(200_000, 20, dtype=torch.float64).softmax(1).numpy(), torch.randint(20, (200_000,))
        return lambda: xent.metrics.log_loss(y.numpy(), p)

    def fit() -> Call:
        x, y = torch.randn(5000, 64), torch.randint(10, (5000,))
        return lambda: xent.SoftmaxRegression().fit(x.numpy(), y.numpy())

    return {
        "head (2048, 64) x 5000": head(2048, 64, 5000),
        "head (1024, 256) x 32768": head(1024, 256, 32768),
        "head, label smoothing": head(2048, 64, 5000, label_smoothing=0.1),
        "head, reduction none": head(2048, 64, 5000, reduction="none"),
        "head, z-loss": head(2048, 64, 5000, z_loss=1e-4),
        "head, softcap": head(2048, 64, 5000, softcap=30.0),
        "head, margin": head(2048, 64, 5000, margin=0.2, normalize=True, temperature=0.05),
        "logits (64, 10)": logits(64, 10),
        "logits (64, 10), class weights": logits(64, 10, weight=torch.rand(10)),
        "logits (64, 10), reduction none": logits(64, 10, reduction="none"),
        "logits (4096, 1000)": logits(4096, 1000),
        "logits (4096, 1000), smoothing": logits(4096, 1000, label_smoothing=0.1),
        "logits (4096, 1000), probabilities": soft,
        "logits (2048, 32768)": logits(2048, 32768),
        "binary, 1e6": binary,
        "KL of two heads (1024, 256) x 8192": divergence,
        "double backward (512, 1000)": second,
        "Hessian product (1024, 256) x 4096": hessian,
        "triplet bounds (2048, 2048)": bounds,
        "Sinkhorn assignment (4096, 256)": assignment,
        "log_loss (200000, 20)": log_loss,
        "fit (5000, 64) x 10": fit,
    }


def serve() -> None:
    """Answer each line of the standard input, the name of a call, by its seconds and its memory."""
    import torch

    torch.manual_seed(0)
    known, name, call = calls(), "", None
    for line in sys.stdin:
        wanted = line.strip()
        if wanted != name:
            name, call = wanted, None  # the tensors of the last call go first
            torch.manual_seed(0)
            call = known[name]()
            inputs = resident("VmRSS")
            try:
                call()
            except (AttributeError, TypeError) as error:
                print(f"lacks {error}", flush=True)
                continue
            print(resident("VmHWM") - inputs, flush=True)
        assert call is not None
        repeats, start = 0, time.perf_counter()
        while repeats == 0 or time.perf_counter() - start < 0.02:
            call()
            repeats += 1
        print((time.perf_counter() - start) / repeats, flush=True)


def resident(field: str) -> float:
    """Return the resident set's size or high-water mark, in MiB; nan where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    sizes = [int(line.split()[1]) / 1024 for line in lines if line.startswith(field)]
    return sizes[0] if sizes else float("nan")


class Version:
    """A process that runs the calls of a checkout."""

    def __init__(self, tree: str) -> None:
        source = str((Path(tree) / "src").resolve())
        command = [sys.executable, __file__, "--serve"]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": source},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, name: str) -> None:
        assert self.process.stdin is not None
        print(name, file=self.process.stdin, flush=True)

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("trees", nargs="*", metavar="CHECKOUT", help="the two versions")
    parser.add_argument("--rounds", type=int, default=7, help="of each call (%(default)s)")
    parser.add_argument("--only", default="", help="calls whose name begins so")
    parser.add_argument("--busy", action="store_true", help="beside a process that keeps one core busy")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    if len(arguments.trees) != 2:
        parser.error("name two checkouts")
    names = [name for name in calls() if name.startswith(arguments.only)]
    beside = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if arguments.busy else None
    print(f"{'':38}{'first':>10}{'second':>10}{'ratio':>8}{'MiB':>10}{'MiB':>8}", flush=True)
    try:
        for name in names:
            # of processes of their own, so that a call's high-water mark is its own
            versions = [Version(tree) for tree in arguments.trees]
            first = []
            for version in versions:
                version.ask(name)
                first.append(version.answer())
            if any(answer.startswith("lacks") for answer in first):
                print(f"{name:38}" + "".join(f"{'':10}" for _ in versions), " ", *first, flush=True)
                continue
            for version in versions:
                version.answer()
            times: list[list[float]] = [[], []]
            for _ in range(arguments.rounds):
                for version, seen in zip(versions, times, strict=True):
                    version.ask(name)
                    seen.append(float(version.answer()) * 1e3)
            a, b = map(statistics.median, times)
            memory = "".join(
                f"{float(answer):>{width}.0f}" for answer, width in zip(first, (10, 8), strict=True)
            )
            print(f"{name:38}{a:10.3f}{b:10.3f}{b / a:8.2f}{memory}", flush=True)
            for version in versions:
                version.process.kill()
    finally:
        if beside is not None:
            beside.kill()


if __name__ == "__main__":
    main()
