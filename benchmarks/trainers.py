"""Time log-probabilities and divergences of language-model heads: xent beside the forms that trainers use.

    python benchmarks/trainers.py [--rounds 5] [--shapes N,D,C ...] [--busy] [--no-memory]

Log-probability of the chosen token and entropy of each row, forward and backward:

    xent                  linear_log_prob(..., return_entropy=True)
    256 rows              logits of 256 rows at a time in float32, recomputed in backward (checkpointed)
    unfused               all logits: gather and logsumexp, entropy from the softmax

Divergences of a student from a frozen teacher of the same width, forward and backward: KL, reverse KL and
Jensen–Shannon at β = ½ of xent, beside the last of them from chunks of 256 rows. Every round runs every form
once, in turn; what is printed are medians, their ratio to xent's, and the share of the limit: the operations
of four products at the best rate that a product reached in this run. Memory is the peak of a process of its
own beyond inputs and gradients. With ``--busy`` another process keeps a core busy.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import date

import torch
import torch.utils.checkpoint

import xent
from head import best_rate, timed

SHAPES = [(2048, 768, 50257), (1024, 1024, 151936)]
ROWS = 256

MEMORY = """
import json, re, sys, torch
sys.path.insert(0, "benchmarks")
import trainers
def status(name): return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
task, form, shape = json.loads(sys.argv[1])
run, leaves = trainers.forms(task, (64, 32, 500))[form]
run()
run, leaves = trainers.forms(task, tuple(shape))[form]
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
run()
print(status("VmHWM") - before - sum(t.grad.nbytes for t in leaves))
"""

Form = tuple[Callable[[], object], list[torch.Tensor]]


def chunked(rows: Callable[..., torch.Tensor], *features: torch.Tensor) -> torch.Tensor:
    """Return a function of rows, some at a time, which are computed again in backward."""
    parts = zip(*(t.split(ROWS) for t in features), strict=True)
    return torch.cat([torch.utils.checkpoint.checkpoint(rows, *part, use_reentrant=False) for part in parts])


def forms(task: str, shape: tuple[int, int, int]) -> dict[str, Form]:
    """Return each form of a task: a forward and backward, and the leaves that have gradients."""
    n, d, c = shape
    torch.manual_seed(0)
    x = torch.randn(n, d, requires_grad=True)
    w = (torch.randn(c, d) / d**0.5).requires_grad_()
    tokens = torch.randint(c, (n,))
    upstream = torch.randn(n)
    leaves = [x, w]

    def run(loss: Callable[[], torch.Tensor]) -> Form:
        def both() -> None:
            x.grad = w.grad = None
            loss().backward()

        return both, leaves

    if task == "log-prob":

        def fused() -> torch.Tensor:
            found = xent.linear_log_prob(x, w, tokens, return_entropy=True)
            return (upstream * found.log_prob).sum() + 0.01 * found.entropy.sum()

        def some(x: torch.Tensor, y: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            log_p = (x @ w.t()).float().log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            return up * log_p.gather(1, y[:, None])[:, 0] + 0.01 * entropy

        def unfused() -> torch.Tensor:
            z = x @ w.t()
            log_p = z.gather(1, tokens[:, None])[:, 0] - z.logsumexp(1)
            entropy = z.logsumexp(1) - (z.softmax(1) * z).sum(1)
            return (upstream * log_p).sum() + 0.01 * entropy.sum()

        return {
            "xent": run(fused),
            "256 rows": run(lambda: chunked(some, x, tokens, upstream).sum()),
            "unfused": run(unfused),
        }
    y, v = torch.randn(n, d), torch.randn(c, d) / d**0.5

    def js(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        log_p, log_t = (x @ w.t()).log_softmax(-1), (y @ v.t()).log_softmax(-1)
        log_m = torch.logaddexp(log_p, log_t) - torch.tensor(2.0).log()
        return 0.5 * ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_t.exp() * (log_t - log_m)).sum(-1))

    pair = {"student": (x, w), "teacher": (y, v)}
    return {
        "xent js": run(lambda: xent.linear_js_divergence(**pair)),
        "xent kl": run(lambda: xent.linear_kl_divergence(**pair)),
        "xent reverse": run(lambda: xent.linear_kl_divergence(**pair, direction="reverse")),
        "js, 256 rows": run(lambda: chunked(js, x, y).mean()),
    }


def memory(task: str, form: str, shape: tuple[int, int, int]) -> float | None:
    """Return the MiB that a process needs at its peak beyond inputs and gradients."""
    given = json.dumps([task, form, shape])
    done = subprocess.run([sys.executable, "-c", MEMORY, given], capture_output=True, text=True)
    return int(done.stdout) / 2**20 if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=[",".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    options = parser.parse_args()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if options.busy else None
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {date.today()}")
    print("beside a busy core" if options.busy else "alone")
    try:
        for text in options.shapes:
            shape = tuple(int(size) for size in text.split(","))
            for task in ("log-prob", "divergences"):
                measure(task, shape, options)
    finally:
        if busy is not None:
            busy.kill()


def measure(task: str, shape: tuple[int, int, int], options: argparse.Namespace) -> None:
    """Time a task's forms in turn, and print them."""
    n, d, c = shape
    every = forms(task, shape)
    seconds: dict[str, list[float]] = {name: [] for name in every}
    rate = 0.0
    for number in range(options.rounds + 1):
        rate = max(rate, best_rate("cpu", torch.float32, 2))
        for name, (run, _) in every.items():
            took = timed(run)
            if number:  # the first is a warm-up
                seconds[name].append(took)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    first = next(iter(medians))
    limit = 4 * 2 * n * d * c / rate
    print(f"\n{task}, N, D, C = {n}, {d}, {c}; four products at the best rate: {limit:.2f} s")
    for name, median in medians.items():
        held = memory(task, name, shape) if options.memory else None
        said = "" if held is None else f"{held:8.0f} MiB"
        ratio, share = median / medians[first], limit / median
        print(f"{name:16} {median:7.2f} s   ÷ {first} {ratio:5.2f}   limit {share:5.2f}{said}")


if __name__ == "__main__":
    main()
