"""Rows a batch at a time: what of a mapped file is copied, and that it changes no result."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from sklearn.datasets import load_digits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xent import SoftmaxRegression
from xent.data import rows as row_sources
from xent.data.rows import (
    ArrayRows,
    ConcatenatedRows,
    MappedRows,
    SelectedRows,
    StandardisedRows,
    row_source,
    steps,
)
from xent.linear_model import hessian
from xent.linear_model.labelled_rows import LabelledRows

SOLVERS = ["lbfgs", "newton-cg"]


def mapped(path, array):
    np.save(path, array)
    return np.load(path, mmap_mode="r")


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(row_sources, "BATCH", 1000)
    monkeypatch.setattr(row_sources, "BLOCK", 300)


def read(source):
    """Return all rows of a source, and how many there are in each batch."""
    parts = list(source.batches())
    assert [here.start for here, _ in parts] == [0, *(here.stop for here, _ in parts[:-1])]
    assert parts[-1][0].stop == source.shape[0]
    return torch.cat([x[:] for _, x in parts]).numpy(), [len(x) for _, x in parts]


def test_batches_of_a_mapped_file_are_views_of_it(tmp_path, small_chunks):
    X = mapped(tmp_path / "X.npy", np.arange(12_000, dtype=np.float32).reshape(-1, 8))
    found, sizes = read(row_source(X))
    assert sizes == [125] * 12
    np.testing.assert_array_equal(found, X)
    chunks = [x for x, _, _ in LabelledRows(row_source(X), np.zeros(1500, int)).chunks()]
    assert chunks[3][:].data_ptr() == X[375:].ctypes.data


def test_an_array_in_memory_is_one_batch_and_no_copy(small_chunks):
    X = np.arange(12_000, dtype=np.float32).reshape(-1, 8)
    ((rows, x),) = row_source(X).batches()
    assert rows == slice(0, 1500)
    assert np.shares_memory(x[:].numpy(), X)
    ((rows, x),) = row_source(X[:0]).batches()
    assert x[:].shape == (0, 8)


@pytest.mark.parametrize("kind", ["in memory", "mapped", "columns of a mapped file", "several"])
def test_rows_at_positions(tmp_path, small_chunks, kind):
    """A split copies no rows: positions of positions are gathered from the first source."""
    X = np.random.default_rng(0).normal(size=(1500, 8)).astype(np.float32)
    source, expected = ArrayRows(X), X
    if kind == "mapped":
        source = MappedRows(mapped(tmp_path / "X.npy", X))
    if kind == "columns of a mapped file":
        source, expected = MappedRows(mapped(tmp_path / "X.npy", X), [6, 0]), X[:, [6, 0]]
    if kind == "several":
        halves = ArrayRows(X[:700].astype(np.float16)), MappedRows(mapped(tmp_path / "X.npy", X[700:]))
        source, expected = ConcatenatedRows(halves), np.concatenate([X[:700].astype(np.float16), X[700:]])
    np.testing.assert_array_equal(read(source)[0], expected)
    some = np.flatnonzero(np.arange(1500) % 7 > 2)
    once = SelectedRows(source, some)
    np.testing.assert_array_equal(read(once)[0], expected[some])
    twice = SelectedRows(once, np.array([0, 3, 3, 500, 601]))  # a row may be there twice
    np.testing.assert_array_equal(read(twice)[0], expected[some[[0, 3, 3, 500, 601]]])
    none = SelectedRows(source, np.empty(0, np.int64))
    assert read(none)[0].shape == (0, expected.shape[1])
    equal = list(steps(once, 100))
    assert [len(x) for _, x in equal] == [100] * 8 + [len(some) - 800]
    np.testing.assert_array_equal(torch.cat([x for _, x in equal]), expected[some])


LAYOUTS = {
    "float64": lambda X: X,
    "float32": lambda X: X.astype(np.float32),
    "float16": lambda X: X.astype(np.float16),
    "whole numbers": lambda X: X.astype(np.uint8),
    "columns first": np.asfortranarray,
    "big-endian": lambda X: X.astype(">f8"),
}


@pytest.mark.parametrize("of_file", [lambda X: X, lambda X: X[::2, 3:40]], ids=["whole", "a view"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_of_any_type_and_layout(tmp_path, small_chunks, layout, of_file):
    X, _ = load_digits(return_X_y=True)
    X = LAYOUTS[layout](X)
    source = row_source(of_file(mapped(tmp_path / "X.npy", X)))
    assert isinstance(source, MappedRows)
    wide = np.float32 if layout in ("float32", "float16") else np.float64
    assert source.dtype == wide
    found, sizes = read(source)
    assert len(sizes) > 10
    assert found.dtype == (np.float16 if layout == "float16" else wide)
    np.testing.assert_array_equal(found, of_file(X))
    mean, scale = np.full(source.shape[1], 3.0), np.full(source.shape[1], 7.0)
    found, sizes = read(StandardisedRows(source, mean, scale))
    assert len(sizes) > 10
    assert found.dtype == wide
    np.testing.assert_allclose(found, ((of_file(X) - mean) / scale).astype(wide), rtol=1e-6)


@pytest.mark.parametrize("kind", ["hard", "soft", "weighted", "two"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_fit_from_a_mapped_file_is_that_of_the_array(tmp_path, monkeypatch, solver, kind):
    monkeypatch.setattr(row_sources, "BATCH", 1 << 14)  # 256 rows
    X, y = load_digits(n_class=2 if kind == "two" else 4, return_X_y=True)
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 3, len(X)) if kind == "weighted" else None
    if kind == "soft":
        y = rng.dirichlet(np.ones(4), len(X)) * np.linspace(0, 2, len(X))[:, None]
    options = {"solver": solver, "tol": 1e-8 if solver == "newton-cg" else 1e-6, "C": 0.1}
    whole = SoftmaxRegression(**options).fit(X, y, weight)
    chunked = SoftmaxRegression(**options).fit(mapped(tmp_path / "X.npy", X), y, weight)
    assert whole.converged_
    assert chunked.converged_
    np.testing.assert_allclose(chunked.coef_, whole.coef_, atol=1e-4 if solver == "lbfgs" else 1e-6)
    assert chunked.loss_curve_[-1] == pytest.approx(whole.loss_curve_[-1], rel=1e-8)
    np.testing.assert_allclose(chunked.predict_proba(X), whole.predict_proba(X), atol=1e-4)


def test_what_a_mapped_file_holds_is_checked(tmp_path, small_chunks):
    X, y = load_digits(return_X_y=True)
    X[1500, 3] = np.nan
    with pytest.raises(ValueError, match="Input X contains NaN"):
        SoftmaxRegression().fit(mapped(tmp_path / "X.npy", X), y)
    with pytest.raises(ValueError, match="y has 5 rows and X has 1797"):
        SoftmaxRegression().fit(mapped(tmp_path / "Y.npy", np.ones_like(X)), y[:5])
    model = SoftmaxRegression(max_iter=1, tol=1).fit(mapped(tmp_path / "Z.npy", np.ones_like(X)), y)
    assert model.n_features_in_ == 64


class Largest(TorchDispatchMode):
    """The largest tensor that an operation makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        found = func(*args, **kwargs)
        for t in tree_leaves(found):
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize(
    ("solver", "dtype"), [*((solver, np.float16) for solver in SOLVERS), ("lbfgs", np.float32)]
)
def test_nothing_of_the_size_of_a_mapped_file_is_made(tmp_path, monkeypatch, solver, dtype):
    """NumPy's memory is counted at its peak, torch's by its largest tensor."""
    monkeypatch.setattr(row_sources, "BATCH", 1 << 16)
    monkeypatch.setattr(row_sources, "BLOCK", 1 << 16)
    monkeypatch.setattr(hessian, "KEPT", 1 << 20)
    rng = np.random.default_rng(0)
    y = np.arange(20_000) % 3
    X = mapped(tmp_path / "X.npy", (rng.normal(size=(20_000, 128)) + np.eye(128)[y]).astype(dtype))
    model = SoftmaxRegression(solver=solver, max_iter=2, tol=0.0)
    with pytest.warns(match="max_iter is reached"), Largest():
        model.fit(X[::100], y[::100])  # imports are not to be counted
    tracemalloc.start()
    with pytest.warns(match="max_iter is reached"), Largest() as made:
        model.fit(X, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert model.n_iter_ == 2
    # targets and masses are three numbers a row
    assert peak < X.nbytes / 2
    assert made.bytes < X.nbytes / 3


RESIDENT = """
import re, sys, threading, time, warnings
import numpy as np

def anonymous():  # bytes
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

def watch():
    while True:
        seen.append(anonymous())
        time.sleep(0.005)

seen = []
threading.Thread(target=watch, daemon=True).start()
warnings.simplefilter("ignore")
if sys.argv[1] == "fit":
    from xent.cli.commands import cli

    cli(sys.argv[1:], standalone_mode=False)
else:
    from xent import SoftmaxRegression

    solver, max_iter, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    X = np.load(path, mmap_mode="r")
    model = SoftmaxRegression(solver=solver, max_iter=max_iter, tol=0.0).fit(X, np.arange(len(X)) % 10)
    assert model.n_iter_ == max_iter
    assert model.loss_curve_[-1] < 1.8 < np.log(10)
print(len(seen), max(seen))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with 1.5 GB of features as one .npy file and as Parquet files of some row groups."""
    folder = tmp_path_factory.mktemp("large")
    rows, columns, part = 3_000_000, 128, 100_000
    X = np.lib.format.open_memmap(folder / "X.npy", "w+", np.float32, (rows, columns))
    y = np.arange(rows) % 10
    np.save(folder / "y.npy", y)
    (folder / "parts").mkdir()
    rng = np.random.default_rng(0)
    for file in range(6):
        path, names = folder / "parts" / f"{file}.parquet", [f"x{j}" for j in range(columns)]
        schema = pa.schema([(name, pa.float32()) for name in names] + [("y", pa.int64())])
        with parquet.ParquetWriter(path, schema, compression="none") as written:
            for start in range(file * rows // 6, (file + 1) * rows // 6, part):
                x, here = rng.standard_normal((part, columns), dtype=np.float32), slice(start, start + part)
                x[np.arange(part), y[here]] += 2
                X[here] = x
                written.write_table(pa.table([*x.T, y[here]], schema))
    X.flush()
    del X
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
@pytest.mark.parametrize(
    "arguments",
    [
        ["lbfgs", 3, "X.npy"],
        ["newton-cg", 1, "X.npy"],
        ["fit", "X.npy", "--label", "y.npy", "--max-iter", 3, "--quiet"],
        ["fit", "X.npy", "--label", "y.npy", "--max-iter", 1, "--quiet", "--solver", "newton-cg"],
        ["fit", "parts", "--label", "y", "--max-iter", 3, "--quiet"],
    ],
    ids=lambda arguments: " ".join(map(str, arguments[:2])),
)
def test_files_larger_than_the_memory_that_a_fit_takes(large, arguments):
    """RssAnon is the memory of a process that no file stands behind.

    newton-cg's blocks of 16 MB leave holes in glibc's heap: runs of the same fit end between 1.0 and 1.5 GB.
    """
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=large,
    )
    assert done.returncode == 0, done.stderr
    samples, most = map(int, done.stdout.split())
    assert samples > 100
    assert (large / "X.npy").stat().st_size > 1.5e9
    assert most < (1.8e9 if "newton-cg" in arguments else 1e9), f"{most / 1e9:.2f} GB"
