"""Predictions as rows are read: columns kept, most probable classes, bad rows, standard output, memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from running import run
from xent.data import csv as csv_files
from xent.data import model_file, stream
from xent.data import parquet as parquet_files


def table(rows: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, rows)
    frame = pd.DataFrame(rng.normal(size=(rows, 3)) + rng.normal(size=(4, 3))[y], columns=["u", "v", "w"])
    return frame.assign(name=[f"row {i}" for i in range(rows)], kind=np.array(list("abcd"))[y])


@pytest.fixture
def model():
    table().to_csv("a.csv", index=False)
    run("fit", "a.csv", "--label", "kind", "--out", "m", "--quiet")
    return model_file.load("m/model.safetensors")


def written(frame: pd.DataFrame, form: str) -> str:
    if form == "parts":
        Path("parts").mkdir()
        for i in range(3):
            frame[i::3].to_parquet(f"parts/{i}.parquet", index=False)
        return "parts"
    if form == "csv":
        frame.to_csv("b.csv", index=False)
    elif form == "parquet":
        frame.to_parquet("b.parquet", index=False)
    return f"b.{form}"


@pytest.mark.parametrize("form", ["csv", "parquet", "parts"])
@pytest.mark.parametrize("small", [False, True])
def test_rows_are_predicted_as_they_are_read(monkeypatch, model, form, small):
    if small:
        monkeypatch.setattr(csv_files, "BLOCK", 300)
        monkeypatch.setattr(parquet_files, "MOST_ROWS", 7)
        monkeypatch.setattr("xent.report.predictions.CHUNK", 24)
    frame = table(seed=1)
    data = written(frame, form)
    frame = pd.concat([frame[i::3] for i in range(3)]) if form == "parts" else frame
    done = run("predict", "m/model.safetensors", data, "-o", "p.parquet", "--keep", "name,u")
    found = pd.read_parquet("p.parquet")
    assert list(found) == ["name", "u", "a", "b", "c", "d", "prediction"]
    assert found.name.tolist() == frame.name.tolist()
    np.testing.assert_allclose(found.u, frame.u, rtol=1e-15)
    p = np.exp(model.log_proba(frame[["u", "v", "w"]].to_numpy()))
    np.testing.assert_allclose(found[list("abcd")], p, rtol=1e-12)
    accuracy = (model.classes[p.argmax(1)] == frame.kind).mean()
    assert f"accuracy {100 * accuracy:.2f} %" in done.stdout


def test_arrays_are_predicted_in_parts(monkeypatch):
    monkeypatch.setattr(stream, "ROWS", 7)
    frame = table()
    X, y = frame[["u", "v", "w"]].to_numpy(np.float32), frame.kind.to_numpy(str)
    np.save("X.npy", X)
    np.save("y.npy", y)
    run("fit", "X.npy", "--label", "y.npy", "--out", "m", "--quiet")
    done = run("predict", "m/model.safetensors", "X.npy", "-o", "p.csv", "--label", "y.npy", "--json")
    assert json.loads(done.stdout)["evaluation"]["rows"] == 200
    found = pd.read_csv("p.csv")
    log_p = model_file.load("m/model.safetensors").log_proba(X)
    np.testing.assert_allclose(found[list("abcd")], np.exp(log_p), rtol=1e-5)
    assert (
        "--keep"
        in run("predict", "m/model.safetensors", "X.npy", "-o", "q.csv", "--keep", "u", code=2).stderr
    )
    assert not Path("q.csv").exists()


def test_the_most_probable_classes(model):
    frame = table(seed=1)
    frame.to_csv("b.csv", index=False)
    run("predict", "m/model.safetensors", "b.csv", "-o", "p.csv", "--top", 2)
    found = pd.read_csv("p.csv")
    assert list(found) == ["class_1", "probability_1", "class_2", "probability_2", "prediction"]
    p = np.exp(model.log_proba(frame[["u", "v", "w"]].to_numpy()))
    order = np.argsort(-p, axis=1)
    assert found.class_1.tolist() == found.prediction.tolist() == model.classes[order[:, 0]].tolist()
    assert found.class_2.tolist() == model.classes[order[:, 1]].tolist()
    np.testing.assert_allclose(found.probability_2, np.sort(p, axis=1)[:, -2], rtol=1e-12)
    assert (
        "more than the 4 classes"
        in run("predict", "m/model.safetensors", "b.csv", "-o", "q.csv", "--top", 5, code=2).stderr
    )


@pytest.mark.parametrize("line", [b"1,2,3,\xff,5", b"\xff", b"1,2,3,\xff"])
def test_bad_rows_are_text_in_the_encoding(model, line):
    Path("b.csv").write_bytes(b"u,v,w,note\n1,2,3,a\n" + line + b"\n4,5,6,b\n")
    done = run("predict", "m/model.safetensors", "b.csv", "-o", "p.csv", "--skip-bad", code=2)
    assert "--encoding" in done.stderr
    assert not Path("p.csv").exists()
    run("predict", "m/model.safetensors", "b.csv", "-o", "p.csv", "--skip-bad", "--encoding", "latin-1")
    assert 1 in pd.read_csv("p.csv").row_number.tolist()


KEPT = {  # a column, and its first value as JSON lines have it
    "day": (pa.array([date(2026, 11, 27)] * 5), "2026-11-27"),
    "time": (pa.array([datetime(2026, 11, 27, 1, 2, 3)] * 5), "2026-11-27T01:02:03"),
    "duration": (pa.array([timedelta(hours=1)] * 5), "1:00:00"),
    "decimal": (pa.array([Decimal("1.10")] * 5), "1.10"),
    "bytes": (pa.array([b"\xff\x00"] * 5), "/wA="),
    "list": (pa.array([[1, 2]] * 5), [1, 2]),
    "struct": (pa.array([{"a": 1.5, "b": date(2026, 1, 2)}] * 5), {"a": 1.5, "b": "2026-01-02"}),
    "null": (pa.nulls(5), None),
    "category": (pa.array(["x"] * 5).dictionary_encode(), "x"),
}


@pytest.mark.parametrize("kind", KEPT)
def test_columns_of_every_kind_are_kept(model, kind):
    column, value = KEPT[kind]
    frame = pa.table({"u": np.arange(5.0), "v": np.ones(5), "w": np.ones(5), "k": column})
    parquet.write_table(frame, "b.parquet")
    for name in ("p.jsonl", "p.csv", "p.parquet"):
        run("predict", "m/model.safetensors", "b.parquet", "-o", name, "--keep", "k")
    assert json.loads(Path("p.jsonl").read_text().splitlines()[0])["k"] == value
    assert parquet.read_table("p.parquet")["k"].to_pylist() == column.to_pylist()
    text = pd.read_csv("p.csv", dtype=str, keep_default_na=False).k[0]
    if kind in ("list", "struct"):
        assert json.loads(text) == value
    elif kind in ("day", "decimal", "bytes", "category"):
        assert text == value


BAD_ROWS = (
    "u,v,w,kind\n1,2,3,a\nx,2,3,b\n1,,3,a\n1,2,inf,b\n1,2\n1,2,3,4,5,6\n1,2,1e308,c\n0,-1,+.5e1,d\n1,2,3\n"
)


def test_bad_rows_are_left_out_and_counted(model):
    Path("b.csv").write_text(BAD_ROWS)
    done = run("predict", "m/model.safetensors", "b.csv", "-o", "p.csv", "--skip-bad", "--json")
    found = json.loads(done.stdout)
    kept = pd.read_csv("p.csv").row_number.tolist()
    assert kept in ([1, 8], [1, 7, 8])  # 1e308 may be within the range of the logits
    assert (found["rows"], found["skipped_rows"]) == (len(kept), 9 - len(kept))
    done = run("predict", "m/model.safetensors", "b.csv", "-o", "p.csv", "--skip-bad")
    assert f"{9 - len(kept)} rows that cannot be predicted: 2, 3, 4, 5, 6, ..." in done.stdout
    for text, message in (
        ("1,2,3\nx,2,3\n", "row 2, column 'u' holds 'x'"),
        ("1,2\n", "Expected 3 columns"),
    ):
        Path("d.csv").write_text("u,v,w\n" + text)
        said = run("predict", "m/model.safetensors", "d.csv", "-o", "q.csv", code=2).stderr
        assert message in said
        assert not Path("q.csv").exists()
    for rows in ("x,y,z\n", "1,2\n1\n"):
        Path("c.csv").write_text("u,v,w\n" + rows)
        done = run("predict", "m/model.safetensors", "c.csv", "-o", "q.csv", "--skip-bad", code=2)
        assert "every row is bad" in done.stderr
    assert not Path("q.csv").exists()


@pytest.mark.parametrize("header", [True, False])
def test_rows_keep_their_numbers_where_lines_are_too_short(monkeypatch, header):
    """In whatever blocks they are read."""
    monkeypatch.setattr(csv_files, "BLOCK", 64)
    monkeypatch.setattr(csv_files, "STREAMED", 64)
    frame = table()
    frame[["u", "v", "w", "kind"]].to_csv("a.csv", index=False, header=header)
    how = ["--label", "kind"] if header else ["--label", "f3", "--no-header"]
    run("fit", "a.csv", *how, "--out", "m", "--quiet")
    lines = Path("a.csv").read_text().splitlines(keepends=True)
    rng = np.random.default_rng(0)
    odd = 1 + np.sort(rng.choice(229, 30, replace=False))  # the first row says how many columns there are
    rows = iter(lines[header:])
    mixed = ["1,2\n" if i in odd else next(rows) for i in range(230)]
    Path("b.csv").write_text("".join([*lines[:header], *mixed]))
    more = [] if header else ["--no-header"]
    run("predict", "m/model.safetensors", "b.csv", "-o", "p.csv", "--skip-bad", *more)
    run("predict", "m/model.safetensors", "a.csv", "-o", "q.csv", *more)
    found, right = pd.read_csv("p.csv"), pd.read_csv("q.csv")
    assert found.row_number.tolist() == (np.setdiff1d(np.arange(230), odd) + 1).tolist()
    assert found.prediction.tolist() == right.prediction.tolist()
    np.testing.assert_allclose(found[list("abcd")], right[list("abcd")], rtol=1e-12)


def test_bad_lists_are_left_out():
    rng = np.random.default_rng(0)
    lists = pa.array(rng.normal(size=(40, 3)).astype(np.float32).tolist(), pa.list_(pa.float32()))
    kinds = pa.array([*"ab"] * 20)
    parquet.write_table(pa.table({"emb": lists, "kind": kinds}), "a.parquet")
    run("fit", "a.parquet", "--label", "kind", "--out", "m", "--quiet")
    bad = [[1.0, 2.0, 3.0], [1.0], None, [1.0, None, 2.0], [1.0, float("nan"), 2.0], [4.0, 5.0, 6.0]]
    parquet.write_table(pa.table({"emb": pa.array(bad, pa.list_(pa.float32()))}), "b.parquet")
    run("predict", "m/model.safetensors", "b.parquet", "-o", "p.csv", "--skip-bad")
    assert pd.read_csv("p.csv").row_number.tolist() == [1, 6]
    said = run("predict", "m/model.safetensors", "b.parquet", "-o", "p.csv", code=2).stderr
    assert "row 3, column 'emb' is missing" in said


@pytest.mark.parametrize("lines", [False, True])
def test_standard_output(model, lines):
    table(seed=1).to_csv("b.csv", index=False)
    how = ["--lines"] if lines else []
    done = run("predict", "m/model.safetensors", "b.csv", "-o", "-", "--keep", "name", "--top", 1, *how)
    assert "accuracy" in done.stderr
    if lines:
        found = pd.DataFrame([json.loads(line) for line in done.stdout.splitlines()])
    else:
        found = pd.read_csv(io.StringIO(done.stdout))
    assert found.name.tolist() == table().name.tolist()
    assert list(found) == ["name", "class_1", "probability_1", "prediction"]


def test_rows_before_a_fault_are_out(monkeypatch, model):
    monkeypatch.setattr(csv_files, "BLOCK", 64)
    Path("b.csv").write_text("u,v,w\n" + "1,2,3\n" * 50 + "x,2,3\n")
    done = run("predict", "m/model.safetensors", "b.csv", "-o", "-", code=2)
    assert 10 < len(done.stdout.splitlines()) <= 51
    assert "row 51, column 'u' holds 'x'" in done.stderr


USAGE = {
    "keep": (["--keep", "none"], "no column 'none' (--keep)"),
    "twice": (["--keep", "u,u"], "would be called 'u'"),
    "a class": (["--keep", "a"], "would be called 'a'"),
    "lines": (["--lines"], "files are called .jsonl"),
    "top": (["--top", 0], "0 is not in the range"),
}


@pytest.mark.parametrize("name", USAGE)
def test_options_that_do_not_go_together(model, name):
    options, message = USAGE[name]
    done = run("predict", "m/model.safetensors", "a.csv", "-o", "p.csv", *options, code=2)
    assert message in done.stderr
    assert not Path("p.csv").exists()
    if name == "lines":
        assert (
            "--json prints"
            in run("predict", "m/model.safetensors", "a.csv", "-o", "-", "--json", code=2).stderr
        )


RESIDENT = """
import sys
from pathlib import Path
from xent.cli.commands import cli
try:
    cli(sys.argv[1:])
finally:
    # of a child's first page on, where ru_maxrss begins with what its parent had
    status = Path("/proc/self/status").read_text()
    print(status.partition("VmHWM:")[2].split()[0], file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_memory_does_not_grow_with_the_rows(model, form):
    frame = table(100_000)
    if form == "csv":
        text = frame.to_csv(index=False)
        with open("b.csv", "w") as file:
            file.write(text)
            for _ in range(29):
                file.write(text.partition("\n")[2])
    else:
        arrow = pa.Table.from_pandas(frame, preserve_index=False)
        with parquet.ParquetWriter("b.parquet", arrow.schema) as file:
            for _ in range(50):
                file.write_table(arrow)
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, "predict", "m/model.safetensors", f"b.{form}", "-o", "p.parquet",
         "--keep", "name"],
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    most = int(done.stderr.splitlines()[-1]) * 1024
    assert most < 500e6, f"{most / 1e6:.0f} MB"
