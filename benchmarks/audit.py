"""Time the audit: from Parquet beside scikit-learn's log_loss in memory, from a head beside its loss.

    python benchmarks/audit.py [--rounds 5] [--tasks files head linear suspects] [--busy]

files   1e5 × 1000 and 1e6 × 10 float32 probabilities. ``audit`` reads a Parquet file (twice where it is
        too large to be kept) and measures all; ``log_loss`` is scikit-learn's, on arrays in memory.
head    features N × 512 and a head of 50,000 classes, N by ``--rows``: one sweep and two beside the
        forward pass of ``linear_cross_entropy``.
linear  1e6 × 10 again and again, up to ``--most`` rows: time a row, and the peak of memory beyond the
        interpreter's.

suspects  the digits with 5 % of the labels flipped, six draws, out-of-fold predictions of a logistic
        regression: precision and recall of the audit's suspects, of cleanlab's, and of as many rows by
        other orders.

Every round runs every form once, in turn; printed are medians and ratios. With ``--busy`` another process
keeps a core busy.
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from sklearn.metrics import log_loss

import xent
from xent._processes.group import ALONE
from xent.auditing.files import Columns, Files
from xent.cli import audit_job

SIZES = [(100_000, 1000), (1_000_000, 10)]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--tasks", nargs="+", default=["files", "head", "linear"])
    options.add_argument("--rows", type=int, default=8192, help="rows of the head's task")
    options.add_argument("--most", type=int, default=30_000_000, help="rows of the linear task")
    options.add_argument("--busy", action="store_true")
    given = options.parse_args()
    print(f"{date.today()}, {_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if given.busy else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            if "files" in given.tasks:
                for shape in SIZES:
                    files(Path(folder), *shape, given.rounds)
            if "head" in given.tasks:
                head(given.rows, 512, 50_000, given.rounds)
            if "suspects" in given.tasks:
                suspects()
            if "linear" in given.tasks:
                linear(Path(folder), given.most)
    finally:
        if busy is not None:
            busy.kill()


def files(folder: Path, rows: int, classes: int, rounds: int) -> None:
    y, p = problem(rows, classes)
    names = [f"p_{c}" for c in range(classes)]
    path = folder / f"{classes}.parquet"
    table = pa.table({**{name: p[:, c] for c, name in enumerate(names)}, "label": y})
    parquet.write_table(table, path, use_dictionary=False)
    del table

    def read() -> None:
        for _ in parquet.ParquetFile(path).iter_batches(4096):
            pass

    forms = {
        "log_loss in memory": lambda: log_loss(y, p, labels=np.arange(classes)),
        "audit, two sweeps": lambda: of_file(path, 2),
        "audit, one sweep": lambda: of_file(path, 1),
        "Arrow reads the file": read,
    }
    table_of(f"{rows:,} × {classes:,} float32", forms, rounds, "log_loss in memory")


def of_file(path: Path, sweeps: int) -> None:
    found = Files([path], Columns("label", "probs", prefix="p_"))
    audit_job.run(found, ALONE, sweeps=sweeps, worst=100, quiet=True)


def head(rows: int, features: int, classes: int, rounds: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(rows, features), torch.randn(classes, features) / features**0.5
    y = torch.randint(classes, (rows,))

    def loss() -> None:
        with torch.no_grad():
            xent.linear_cross_entropy(x, w, y)

    def product() -> None:
        for part in x.split(512):
            part @ w.T

    forms = {
        "loss forward": loss,
        "audit, one sweep": lambda: xent.audit(features=x, head=w, target=y, sweeps=1),
        "audit, two sweeps": lambda: xent.audit(features=x, head=w, target=y),
        "the product": product,
    }
    table_of(f"{rows:,} × {features} × {classes:,}", forms, rounds, "loss forward")


def linear(folder: Path, most: int) -> None:
    y, p = problem(1_000_000, 10)
    path = folder / "part.parquet"
    parquet.write_table(pa.table({**{f"p_{c}": p[:, c] for c in range(10)}, "label": y}), path)
    print("\n1e6 × 10 again and again: rows, seconds, ns a row, peak of memory, MiB above the interpreter")
    for times in (1, 3, 10, 30, 100):
        if times * 1_000_000 > most:
            break
        code = f"""
import re, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import audit, torch
from pathlib import Path
from xent.auditing.files import Columns, Files
from xent.cli import audit_job
from xent._processes.group import ALONE
import pyarrow, sklearn
parts = [Path({str(path)!r})] * {times}
peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
before = peak()
start = time.perf_counter()
audit_job.run(Files(parts, Columns("label", "probs", prefix="p_")), ALONE, sweeps=2, worst=100, quiet=True)
print(time.perf_counter() - start, peak() - before)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, kilobytes = map(float, done.stdout.split())
        rows = times * 1_000_000
        print(f"{rows:>12,} {seconds:8.2f} {1e9 * seconds / rows:8.0f} {kilobytes / 1024:8.0f}", flush=True)


def suspects(draws: int = 6) -> None:
    from cleanlab.filter import find_label_issues
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    X, clean = load_digits(return_X_y=True)
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        odd = np.zeros(len(clean), bool)
        odd[rng.permutation(len(clean))[: round(0.05 * len(clean))]] = True
        y = np.where(odd, (clean + rng.integers(1, 10, len(clean))) % 10, clean)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        p = cross_val_predict(model, X, y, cv=5, method="predict_proba")
        result = xent.audit(p, target=y)
        own = p[np.arange(len(y)), y]
        thresholds = np.array([p[y == c, c].mean() for c in range(10)])
        sure = np.where(p >= thresholds, p, -1.0)
        wrong = p.argmax(1) != y

        def first(order: np.ndarray, wrong: np.ndarray = wrong, count: int = result.suspects) -> np.ndarray:
            return np.argsort(np.where(wrong, -order, np.inf), kind="stable")[:count]

        rows = {
            "xent, to the upper end": np.array([row.row - 1 for row in result.suspect_rows]),
            "cleanlab": np.flatnonzero(find_label_issues(y, p)),
            "the confident joint": np.flatnonzero((sure.max(1) > 0) & (sure.argmax(1) != y)),
            "as many, by saving": first(np.log(p.max(1)) - np.log(own)),
            "as many, by difference": first(p.max(1) - own),
            "as many, by own p": first(-own),
        }
        for name, listed in rows.items():
            found.setdefault(name, []).append((odd[listed].mean(), odd[listed].sum() / odd.sum()))
    print(f"\nsuspects of the digits, {draws} draws: precision and recall, least, mean and most")
    for name, pairs in found.items():
        parts = (f"{min(of):.2f} {statistics.mean(of):.2f} {max(of):.2f}" for of in zip(*pairs, strict=True))
        print(f"  {name:24} {'    '.join(parts)}")


def problem(rows: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.standard_normal((rows, classes), dtype=np.float32)) * 2
    y = rng.integers(0, classes, rows)
    most = z.argmax(1).numpy()
    y = np.where(rng.random(rows) < 0.7, most, y)
    return y, z.softmax(1).numpy()


def table_of(title: str, forms: dict[str, Callable[[], object]], rounds: int, unit: str) -> None:
    times: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form()
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in times.items()}
    print(f"\n{title}")
    for name, median in medians.items():
        print(f"  {name:24} {1e3 * median:9.0f} ms {median / medians[unit]:7.2f} × {unit}", flush=True)


def _processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()
