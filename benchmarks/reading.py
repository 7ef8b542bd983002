"""Reading a Parquet file of embeddings beside pyarrow's own read of it, in seconds and in memory.

    python benchmarks/reading.py [--shape 200000,768] [--rounds 7] [--busy]

The file has one column of lists of float16 and a label, in four forms: `list` and `fixed` with groups of
20,000 rows, `one group` of all rows, and `uncompressed`, which is little more than a copy. xent's rate is
that of `read_table`, which also checks that every number is finite and numbers the labels; pyarrow's is that
of `pyarrow.parquet.read_table` with as many threads. Each takes its turn in every round; medians, and the
ratio pyarrow ÷ xent. `memory` is what a process that reads the file holds at most, beyond its libraries, as a
multiple of the features. `pass` is one more time through the rows, decoded anew, as a fit does it with files
that do not fit into memory. With `--busy` another process keeps one core busy.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

import xent.data.parquet as parquet_files
from xent.data import Wanted, read_table

MEMORY = """
import sys, torch, pyarrow.parquet
from pathlib import Path
from xent.data import Wanted, read_table
def held(what):
    return int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0]) << 10
before = held("VmRSS")
if sys.argv[2] == "xent":
    table = read_table(Path(sys.argv[1]), Wanted("y"))
else:
    table = pyarrow.parquet.read_table(sys.argv[1])
print(held("VmHWM") - before)
"""


def write(folder: Path, n: int, d: int) -> dict[str, Path]:
    """Write the files; return their paths by name."""
    rng = np.random.default_rng(0)
    numbers = pa.array(rng.standard_normal((n, d), dtype=np.float32).astype(np.float16).ravel())
    labels = pa.array(rng.integers(10, size=n).astype(str))
    lists = pa.LargeListArray.from_arrays(np.arange(0, n * d + 1, d), numbers)
    fixed = pa.FixedSizeListArray.from_arrays(numbers, d)
    forms: dict[str, tuple[pa.Array, dict[str, object]]] = {
        "list": (lists, {"row_group_size": 20_000}),
        "fixed": (fixed, {"row_group_size": 20_000}),
        "one group": (lists, {}),
        "uncompressed": (lists, {"compression": "none", "use_dictionary": False}),
    }
    for name, (column, how) in forms.items():
        parquet.write_table(pa.table({"emb": column, "y": labels}), folder / f"{name}.parquet", **how)
    return {name: folder / f"{name}.parquet" for name in forms}


def seconds(run: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def one_pass(file: Path) -> Callable[[], object]:
    """Return a call that goes once through the rows of a file, of which none are kept."""
    kept, parquet_files.IN_MEMORY = parquet_files.IN_MEMORY, 0
    source = read_table(file, Wanted("y")).rows
    parquet_files.IN_MEMORY = kept
    return lambda: [len(batch) for _, batch in source.batches()]


def memory(file: Path, who: str) -> int:
    """Return the bytes that a process holds at most to read a file."""
    return int(subprocess.check_output([sys.executable, "-c", MEMORY, str(file), who]))


def main() -> None:
    """Print what reading each file takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="200000,768")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy", action="store_true", help="keep one core busy meanwhile")
    options = parser.parse_args()
    n, d = map(int, options.shape.split(","))
    pa.set_cpu_count(torch.get_num_threads())
    beside = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if options.busy else None
    print(f"({n}, {d}) float16, {pa.cpu_count()} threads, {'one core kept busy' if beside else 'alone'}\n")
    print(f"{'file':14}{'pyarrow':>9}{'xent':>8}{'pass':>8}{'ratio':>8}{'memory':>9}{'pyarrow’s':>11}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, file in write(Path(folder), n, d).items():
                ways: list[Callable[[], object]] = [
                    lambda file=file: parquet.read_table(file),
                    lambda file=file: read_table(file, Wanted("y")),
                    one_pass(file),
                ]
                taken = [[seconds(way) for way in ways] for _ in range(options.rounds)]
                theirs, ours, again = (statistics.median(column) for column in zip(*taken, strict=True))
                held = [memory(file, who) / (2 * n * d) for who in ("xent", "pyarrow")]
                times = f"{name:14}{theirs:9.2f}{ours:8.2f}{again:8.2f}{theirs / ours:8.2f}"
                print(f"{times}{held[0]:9.2f}{held[1]:11.2f}", flush=True)
    finally:
        if beside is not None:
            beside.kill()


if __name__ == "__main__":
    main()
