"""Predictions in a file read back as the numbers that were written, and count as probabilities."""

from __future__ import annotations

import csv as plain_csv

import numpy as np
import pandas as pd
import pytest
from pyarrow import csv, parquet

from xent import metrics
from xent.cli import fit_job as job
from xent.cli.solve_job import Settings
from xent.data import Table
from xent.report.predictions import write_predictions


def table(dtype, classes, rows=120):
    rng = np.random.default_rng(0)
    codes = np.arange(rows) % classes
    x = (rng.normal(size=(rows, 4)) + 3 * rng.normal(size=(classes, 4))[codes]).astype(dtype)
    return Table("rows.npy", x, tuple("abcd"), "kind", codes, np.array([f"c{c:03}" for c in range(classes)]))


def by_python(path):
    with open(path, newline="") as file:
        names, *rows = plain_csv.reader(file)
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


READERS = {
    ".csv": {
        "Python": lambda path, name: np.array([float(cell) for cell in by_python(path)[name]]),
        "Arrow": lambda path, name: csv.read_csv(path)[name].to_numpy(),
        "pandas": lambda path, name: pd.read_csv(path)[name].to_numpy(),
    },
    ".parquet": {
        "Arrow": lambda path, name: parquet.read_table(path)[name].to_numpy(),
        "pandas": lambda path, name: pd.read_parquet(path)[name].to_numpy(),
    },
}


@pytest.mark.parametrize("classes", [2, 3, 30])
@pytest.mark.parametrize("other", [False, True], ids=["as fitted", "features of the other type"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("suffix", READERS)
def test_what_was_written_is_read_back(tmp_path, suffix, dtype, other, classes):
    t = table(dtype, classes)
    model = job.fit(t, Settings(validation=0)).model
    assert model.weight.dtype == dtype
    if other:
        t = table({"float32": "float64", "float64": "float32"}[dtype], classes)
    path = tmp_path / f"p{suffix}"
    write_predictions(model, t, path)
    written = np.exp(model.log_proba(t.features)).astype(dtype)
    for read in READERS[suffix].values():
        p = np.stack([read(path, name) for name in model.classes], axis=1)
        assert p.dtype == (np.float64 if suffix == ".csv" else dtype)
        np.testing.assert_array_equal(p, written)
        np.testing.assert_array_equal(p.astype(dtype), written)
        assert metrics.log_loss(t.codes, p) == pytest.approx(metrics.log_loss(t.codes, written), rel=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_validation_rows_count_too(tmp_path, dtype):
    t = table(dtype, 3)
    fitted = job.fit(t, Settings())
    job.write(fitted, t, tmp_path)
    read = pd.read_parquet(tmp_path / "validation.parquet")
    p = read[list(fitted.model.classes)]
    assert metrics.log_loss(read["true_label"], p) == pytest.approx(fitted.validation.loss, rel=1e-6)
    assert metrics.log_loss(read["true_label"], p.astype(float)) == pytest.approx(
        fitted.validation.loss, rel=1e-6
    )
