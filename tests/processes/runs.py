"""Processes that share jobs, what they said, and files for them to read."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from click.testing import CliRunner
from pyarrow import csv, parquet

from xent.cli.commands import cli

WORKER = Path(__file__).with_name("one_rank.py")


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Runs:
    """R processes that run the same jobs, one after the other; jobs are added before ``start``.

    None of them outlives a ``with`` of it.
    """

    def __init__(self, ranks: int, folder: Path) -> None:
        self.ranks, self.folder, self.jobs = ranks, folder, {}

    def add(self, name: str, *arguments: object, **happening: object) -> None:
        self.jobs[name] = {"arguments": [str(a) for a in arguments], "port": port(), **happening}

    def start(self) -> None:
        (self.folder / "jobs").write_text("\n".join(map(json.dumps, self.jobs.values())))
        about = {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(self.folder / "jobs")],
                cwd=self.folder,
                env={**os.environ, **about, "RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(self.ranks)
        ]

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            with contextlib.suppress(ValueError):  # closed, as it has been read to its end
                process.communicate()

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 120
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline
            assert self.processes[0].poll() is None
            time.sleep(0.02)

    def end(self, timeout: float = 60) -> None:
        """Read what each job said on each rank, ranks that were killed less; one that hangs is an error."""
        for process in self.processes:
            process.communicate(timeout=timeout)
        self.said = [self.of_rank(rank) for rank in range(self.ranks)]

    def of_rank(self, rank: int) -> list[dict]:
        """What the jobs said on a rank so far."""
        return [json.loads(line) for line in (self.folder / f"jobs.{rank}").read_text().splitlines()]

    def of(self, name: str) -> list[dict]:
        """What a job said on each rank that lived to its end: code, out, err, raised."""
        at = list(self.jobs).index(name)
        return [said[at] for said in self.said if at < len(said)]


def alone(*arguments: object, code: int = 0):
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def rows(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes that overlap, in the order of the file: what one rank sees is not what another does."""
    rng = np.random.default_rng(seed)
    y = np.sort(rng.integers(classes, size=count))
    return rng.normal(size=(count, 5)) + rng.normal(size=(classes, 5))[y], y


def files(folder: Path) -> None:
    x, y = rows(500, 4)
    columns = {f"x{j}": x[:, j] for j in range(5)}
    arrow = pa.table({**columns, "kind": [f"kind {c}" for c in y]})
    with parquet.ParquetWriter(folder / "a.parquet", arrow.schema) as writer:
        for first, last in ((0, 1), (1, 301), (301, 308), (308, 500)):  # row groups, uneven
            writer.write_table(arrow.slice(first, last - first))
    csv.write_csv(arrow, folder / "a.csv")
    np.save(folder / "X.npy", x.astype(np.float32))
    np.save(folder / "y.npy", y)
    few, two = rows(2, 2)[0], np.array([False, True])
    np.savez(folder / "few.npz", X=few, y=two)
    parquet.write_table(pa.table({**columns, "kind": y}).slice(109, 12), folder / "dozen.parquet")
    bad = x.copy()
    bad[[480, 490], 3] = np.nan
    parquet.write_table(
        pa.table({f"x{j}": bad[:, j] for j in range(5)} | {"kind": y}), folder / "nan.parquet"
    )
    lines = (folder / "a.csv").read_text().splitlines()
    lines[250] = lines[250].rpartition(",")[0] + ",\n"
    (folder / "blank.csv").write_text("\n".join(line.strip() for line in lines) + "\n")
    (folder / "one.csv").write_text("u,kind\n1,a\n2,a\n")
    parquet.write_table(arrow.drop_columns("kind"), folder / "new.parquet")
