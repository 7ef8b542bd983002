"""An audit on real processes: the measures are those of one process, and a fault ends all ranks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pytest
from pyarrow import parquet

from processes.runs import Runs, alone, rows

OPTIONS = ("--kind", "probs", "--label", "label", "--classes", "a,b,c", "--json")


def files(folder: Path) -> None:
    rng = np.random.default_rng(0)
    z = 2 * rng.standard_normal((5000, 3))
    y = (z + rng.gumbel(size=z.shape)).argmax(1)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    table = pandas.DataFrame(p, columns=list("abc"))
    table["label"] = np.array(list("abc"))[y]
    table.to_parquet(folder / "groups.parquet", row_group_size=700)
    (folder / "parts").mkdir()
    for i, (first, last) in enumerate(((0, 2000), (2000, 2001), (2001, 5000))):
        table[first:last].to_parquet(folder / "parts" / f"{i}.parquet")
    table.to_csv(folder / "rows.csv", index=False)
    table.loc[[10, 4000], "b"] = 3.0
    table.to_parquet(folder / "bad.parquet", row_group_size=700)
    x, y = rows(500, 4)
    columns = {f"x{j}": x[:, j] for j in range(5)}
    parquet.write_table(pa.table({**columns, "kind": y}), folder / "a.parquet", row_group_size=90)


def test_two_ranks(tmp_path, monkeypatch):
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    alone("fit", "a.parquet", "--label", "kind", "--out", "m", "--quiet")
    runs = Runs(2, tmp_path)
    jobs = {name: ("audit", name, *OPTIONS) for name in ("groups.parquet", "parts", "rows.csv")}
    jobs["model"] = ("audit", "--model", "m/model.safetensors", "a.parquet", "--json")
    for name, arguments in jobs.items():
        runs.add(name, *arguments)
    runs.add("bad", "audit", "bad.parquet", *OPTIONS)
    runs.add("rows", "audit", "groups.parquet", *OPTIONS, "--rows", "r.parquet")
    runs.add(
        "dies",
        "audit",
        "groups.parquet",
        *OPTIONS,
        "--html",
        "p.html",
        "--timeout",
        30,
        die=[1, 2, signal.SIGKILL],
    )
    with runs:
        runs.start()
        runs.end()
    for name, arguments in jobs.items():
        first, other = runs.of(name)
        assert (first["code"], other["code"], other["out"]) == (0, 0, ""), (first, other)
        said, expected = json.loads(first["out"]), json.loads(alone(*arguments).stdout)
        assert said["rows"] == expected["rows"]
        for measure, value in expected["measures"].items():
            found = said["measures"][measure]
            assert found == value or found == pytest.approx(value, rel=1e-9, abs=1e-12), (name, measure)
        assert [row["row"] for row in said["suspects"]] == [row["row"] for row in expected["suspects"]]
    for rank in runs.of("bad"):
        assert rank["code"] == 2
        assert "bad.parquet: row" in rank["err"]
        assert rank["err"].count("\n") == 1
    assert all("--rows is done by one process" in rank["err"] for rank in runs.of("rows"))
    (left,) = runs.of("dies")
    assert left["code"] == 1, left
    assert "another rank has ended" in left["err"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".", "p.html", "r.parquet"))]
