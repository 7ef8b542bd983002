"""Time log-probabilities and divergences of language-model heads: xent beside the forms that trainers use.

    python benchmarks/trainers.py [--rounds 5] [--shapes N,D,C ...] [--tasks ...] [--device cpu|cuda]
                                  [--busy] [--no-memory]

Log-probability of the chosen token and entropy of each row, forward and backward:

    xent                  linear_log_prob(..., return_entropy=True)
    TRL                   ChunkedLogProbFunction of TRL, with the entropy
    256 rows              logits of 256 rows at a time in float32, recomputed in backward (checkpointed)
    unfused               all logits: gather and logsumexp, entropy from the softmax

Divergences of a student from a frozen teacher of the same width, forward and backward: KL, reverse KL and
Jensen–Shannon at β = ½ of xent, beside ChunkedDivergenceFunction of TRL and chunks of 256 rows. Adapted:
cross-entropy of a frozen head with a low-rank term of rank 16, beside the same from logits and beside xent
without the term.

Every round runs every form once, in turn. Printed are medians, their ratio to xent's, and the share of the
limit: the operations of four products, of a frozen head two, at the best rate that a product reached in this
run. Memory is the peak of a process of its own beyond inputs and gradients. With ``--busy`` another process
keeps a core busy.
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
from trl.kernels import chunked_divergence, chunked_logprob

import xent
from head import best_rate, timed

SHAPES = [(2048, 768, 50257), (1024, 1024, 151936)]
TASKS = ["log-prob", "divergences", "adapted"]
ROWS = 256
RANK = 16

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

MEMORY_OF_DEVICE = """
import json, sys, torch
sys.path.insert(0, "benchmarks")
import trainers
task, form, shape = json.loads(sys.argv[1])
run, leaves = trainers.forms(task, tuple(shape), "cuda")[form]
torch.cuda.reset_peak_memory_stats()
before = torch.cuda.memory_allocated()
run()
print(torch.cuda.max_memory_allocated() - before - sum(t.grad.nbytes for t in leaves))
"""

Form = tuple[Callable[[], object], list[torch.Tensor]]


def chunked(rows: Callable[..., torch.Tensor], *features: torch.Tensor) -> torch.Tensor:
    """Return a function of rows, some at a time, which are computed again in backward."""
    parts = zip(*(t.split(ROWS) for t in features), strict=True)
    return torch.cat([torch.utils.checkpoint.checkpoint(rows, *part, use_reentrant=False) for part in parts])


def forms(task: str, shape: tuple[int, int, int], device: str = "cpu") -> dict[str, Form]:
    """Return each form of a task: a forward and backward, and the leaves that have gradients."""
    with torch.device(device):
        return _forms(task, *shape)


def _forms(task: str, n: int, d: int, c: int) -> dict[str, Form]:
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

    if task == "adapted":
        frozen, target = w.detach(), tokens
        down, up = torch.randn(RANK, d, requires_grad=True), torch.zeros(c, RANK, requires_grad=True)
        leaves = [x, down, up]

        def logits() -> torch.Tensor:
            return x @ frozen.t() + 2.0 * (x @ down.t()) @ up.t()

        def adapted(loss: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Form:
            def both() -> None:
                x.grad = down.grad = up.grad = None
                loss().backward()

            return both, leaves

        head = xent.LowRank(frozen, down, up, 2.0)
        return {
            "xent": adapted(lambda: xent.linear_cross_entropy(x, head, target), leaves),
            "xent, frozen": adapted(lambda: xent.linear_cross_entropy(x, frozen, target), [x]),
            "unfused": adapted(lambda: torch.nn.functional.cross_entropy(logits(), target), leaves),
        }
    if task == "log-prob":

        def theirs() -> torch.Tensor:
            log_p, entropy, *_ = chunked_logprob.ChunkedLogProbFunction.apply(
                x, w, None, tokens, 1.0, 32768, None, 1.0, ("entropy",)
            )
            return (upstream * log_p).sum() + 0.01 * entropy.sum()

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
            "TRL": run(theirs),
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
        "TRL js": run(lambda: their_divergence(x, w, y, v, 0.5)),
        "TRL kl": run(lambda: their_divergence(x, w, y, v, 0.0)),
        "js, 256 rows": run(lambda: chunked(js, x, y).mean()),
    }


def their_divergence(
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, v: torch.Tensor, beta: float
) -> torch.Tensor:
    found: torch.Tensor = chunked_divergence.ChunkedDivergenceFunction.apply(x, w, None, y, v, None, beta)[0]
    return found.mean()


def memory(task: str, form: str, shape: tuple[int, int, int], device: str) -> float | None:
    """Return the MiB that a process needs at its peak beyond inputs and gradients."""
    given = json.dumps([task, form, shape])
    script = MEMORY if device == "cpu" else MEMORY_OF_DEVICE
    done = subprocess.run([sys.executable, "-c", script, given], capture_output=True, text=True)
    return int(done.stdout) / 2**20 if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=[",".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    options = parser.parse_args()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if options.busy else None
    threads = f"{torch.get_num_threads()} threads"
    of_device = threads if options.device == "cpu" else torch.cuda.get_device_name()
    print(f"{platform.processor() or platform.machine()}, {of_device}, {date.today()}")
    print("beside a busy core" if options.busy else "alone")
    try:
        for text in options.shapes:
            shape = tuple(int(size) for size in text.split(","))
            for task in options.tasks:
                measure(task, shape, options)
    finally:
        if busy is not None:
            busy.kill()


def measure(task: str, shape: tuple[int, int, int], options: argparse.Namespace) -> None:
    """Time a task's forms in turn, and print them."""
    n, d, c = shape
    every = forms(task, shape, options.device)
    seconds: dict[str, list[float]] = {name: [] for name in every}
    rate = 0.0
    for number in range(options.rounds + 1):
        rate = max(rate, best_rate(options.device, torch.float32, 2))
        for name, (run, _) in every.items():
            took = timed(run)
            if number:  # the first is a warm-up
                seconds[name].append(took)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    first = next(iter(medians))
    products = 2 if task == "adapted" else 4
    limit = products * 2 * n * d * c / rate
    print(f"\n{task}, N, D, C = {n}, {d}, {c}; {products} products at the best rate: {limit:.2f} s")
    for name, median in medians.items():
        held = memory(task, name, shape, options.device) if options.memory else None
        said = "" if held is None else f"{held:8.0f} MiB"
        ratio, share = median / medians[first], limit / median
        print(f"{name:16} {median:7.2f} s   ÷ {first} {ratio:5.2f}   limit {share:5.2f}{said}")


if __name__ == "__main__":
    main()
