"""What a file claims is held against limits, the file and the machine, before memory is taken for it."""

from __future__ import annotations

import io
import re
import tracemalloc
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from xent.data import Wanted, limits, read_table, reading
from xent.errors import BadInput, MissingExtra

POOL = pa.proxy_memory_pool(pa.default_memory_pool())
"""Counts what Arrow holds; never let go, because Arrow's threads may free into it after a test has ended."""


def refused(path, message: str, wanted: Wanted | None = None) -> None:
    """The file is refused with the message, and without much memory."""
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match=message) as caught:
            read_table(path, wanted or Wanted("y"))
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_too_many_columns(tmp_path):
    count = 400_000
    header = ",".join(f"c{j}" for j in range(count)) + ",y\n"
    (tmp_path / "a.csv").write_text(header + ("1," * count + "a\n") * 2)
    refused(tmp_path / "a.csv", r"a\.csv: has 400,001 columns, more than the 100,000 that are read")
    np.savez(tmp_path / "a.npz", X=np.zeros((2, 100_001), np.int8), y=[0, 1])
    refused(tmp_path / "a.npz", r"a\.npz: has 100,001 columns")
    parquet.write_table(pa.table({f"c{j}": [1] for j in range(100_001)}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", r"a\.parquet: has 100,001 columns")


def test_long_names_labels_and_cells(tmp_path):
    long = "z" * (1 << 20)
    path = tmp_path / "a.csv"
    path.write_text("u,y\n" + "1,a\n" * 1000 + f"1,{long}\n")
    refused(path, r"column 'y': the label 'z+… takes 1,048,576 bytes, more than 65,536")
    parquet.write_table(pa.table({"u": np.arange(1001), "y": ["a"] * 1000 + [long]}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", r"the label 'z+… takes 1,048,576 bytes")
    path.write_text(f"u,t,y\n1,b,a\n2,{long}z,b\n")
    refused(path, r"row 2, column 't' holds 1,048,577 bytes, more than the 1,048,576 of a cell")
    for size in (70_000, 200_000):
        path.write_text(f"{long[:size]},y\n1,a\n")
        refused(path, r"a\.csv: .*column.* name .*65,536")
    parquet.write_table(pa.table({long[:70_000]: [1], "y": ["a"]}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", r"the column name 'z+… takes 70,000 bytes")
    np.savez(tmp_path / "a.npz", X=np.eye(2), y=np.array(["a", long[:70_000]]))
    refused(tmp_path / "a.npz", r"labels of 70,000 characters, more than 65,536")


def test_a_long_label_makes_no_other_longer(tmp_path, monkeypatch):
    monkeypatch.setattr("xent.data.labels.MOST_TEXT", 1 << 20)
    path = tmp_path / "a.csv"
    path.write_text("u,y\n" + "".join(f"1,{i}\n" for i in range(1000)) + "1," + "z" * 300 + "\n")
    refused(path, r"1,001 different labels, each as long as 'z+…, take 0\.0 GiB")


def test_one_text_in_many_rows_is_there_once(tmp_path):
    rows = 8_000
    labels = pa.DictionaryArray.from_arrays(np.arange(rows) % 2, ["z" * 50_000, "a" * 50_000])
    for name, column in (("a", labels), ("b", labels.cast(pa.large_string()))):  # the latter takes 400 MB
        parquet.write_table(pa.table({"u": np.arange(rows), "y": column}), tmp_path / f"{name}.parquet")
    usual = pa.default_memory_pool()
    pa.set_memory_pool(POOL)
    try:
        for name in "ab":
            table = read_table(tmp_path / f"{name}.parquet", Wanted("y"))
            assert np.bincount(table.codes).tolist() == [rows // 2] * 2
    finally:
        pa.set_memory_pool(usual)
    assert 0 < POOL.max_memory() < 20 << 20


def header(text: str) -> bytes:
    line = text.encode() + b" " * (117 - len(text)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line


CLAIMS = {
    "rows": ("(1000000000000000, 3)", "<f8"),
    "columns": ("(2, 1000000000000000)", "<f8"),
    "negative": ("(-2, -3)", "<f8"),
    "no size": ("(1000000000000000, 2)", "<U0"),
    "text": ("(2, 3)", "<U500000000"),
    "one more": ("(2, 4)", "<f8"),
    "one less": ("(2, 2)", "<f8"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_header_that_claims_what_is_not_there(tmp_path, claim):
    shape, kind = CLAIMS[claim]
    start = header(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}")
    np.save(tmp_path / "y.npy", np.arange(2))
    (tmp_path / "X.npy").write_bytes(start + np.ones((2, 3)).tobytes())
    message = rf"its header claims an array of shape {re.escape(shape)} and type .* follow; it is cut short"
    refused(tmp_path / "X.npy", message, Wanted(str(tmp_path / "y.npy")))
    (tmp_path / "z.npy").write_bytes(start + np.ones((2, 3)).tobytes())
    np.save(tmp_path / "X.npy", np.eye(2))
    refused(tmp_path / "X.npy", r"z\.npy: " + message, Wanted(str(tmp_path / "z.npy")))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("X.npy", start + np.ones((2, 3)).tobytes())
        archive.writestr("y.npy", (tmp_path / "y.npy").read_bytes())
    refused(tmp_path / "a.npz", message)


def test_more_than_the_machine_has(tmp_path, monkeypatch):
    for module in (limits, reading):
        monkeypatch.setattr(module, "memory", lambda: 1 << 20)
    np.savez_compressed(tmp_path / "a.npz", X=np.zeros((1000, 200)), y=np.arange(1000) % 2)
    refused(tmp_path / "a.npz", r"claims an array of shape \(1000, 200\) .*GiB, of which this machine holds")
    np.savez_compressed(tmp_path / "a.npz", X=np.zeros((1000, 200), np.int8), y=np.arange(1000) % 2)
    refused(tmp_path / "a.npz", r"claims an array of shape \(1000, 200\) as float64")
    table = pa.table({"u": np.zeros(100_000), "y": np.arange(100_000) % 2})
    parquet.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "claims 100,000 rows")


def test_the_memory_of_this_machine_is_known():
    assert 1 << 27 < limits.memory() < 1 << 50


# What passes the one place where a reader's failures are told


class Library(Exception):
    pass


def raised_below(error: BaseException):
    """Raise in a module that is not of this package."""
    scope = {"__name__": "elsewhere", "error": error}
    exec("def fail(): raise error", scope)
    scope["fail"]()


def raised_here(error: BaseException):
    """Raise in a line of the package, as far as the frame says."""
    scope = {"__name__": "xent.data.read", "error": error}
    exec("def fail(): raise error", scope)
    scope["fail"]()


def test_whatever_a_library_raises_names_the_file(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"x")
    for error in (
        Library("odd\nerror"),
        SyntaxError("x"),
        NotImplementedError(),
        KeyError("y"),
        TypeError("t"),
    ):
        with (
            pytest.raises(BadInput, match=r"a\.npz: not readable as NPZ: .") as caught,
            reading.reading(path, "NPZ"),
        ):
            raised_below(error)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="a file of 1 bytes that claims more"), reading.reading(path, "NPZ"):
        raised_below(MemoryError())
    with pytest.raises(BadInput, match="cannot be read: Permission denied"), reading.reading(path, "NPZ"):
        raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    "error",
    [BadInput("mine"), MissingExtra("extra"), KeyboardInterrupt(), SystemExit(3)],
    ids=lambda error: type(error).__name__,
)
def test_what_is_not_the_files_fault_passes(tmp_path, error):
    with pytest.raises(type(error)) as caught, reading.reading(tmp_path / "a.npz", "NPZ"):
        raised_below(error)
    assert caught.value is error


def test_a_mistake_of_our_own_passes_and_what_data_makes_of_our_lines_does_not(tmp_path):
    for error in (TypeError("t"), AttributeError("a"), IndexError("i"), AssertionError()):
        with pytest.raises(type(error)), reading.reading(tmp_path / "a.npz", "NPZ"):
            raised_here(error)
    with pytest.raises(BadInput), reading.reading(tmp_path / "a.npz", "NPZ"):
        raised_here(ValueError("v"))


def test_honest_files_that_memory_does_not_hold_are_no_bad_input(tmp_path, monkeypatch):
    (tmp_path / "a.npz").write_bytes(bytes(1000))
    monkeypatch.setattr(reading, "memory", lambda: 50_000)
    with pytest.raises(MemoryError), reading.reading(tmp_path / "a.npz", "NPZ"):
        raised_below(MemoryError())


# Files of another kind than their name says, and text that is none


def test_archives_and_arrays_are_told_apart(tmp_path):
    file = io.BytesIO()
    np.save(file, np.eye(2))
    (tmp_path / "a.npz").write_bytes(file.getvalue())
    refused(tmp_path / "a.npz", r"a\.npz: is a single array, not an archive of them; call it \.npy")
    np.savez(tmp_path / "b.npz", X=np.eye(2), y=np.arange(2))
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npz").read_bytes())
    refused(tmp_path / "b.npy", r"b\.npy: is an archive of arrays; call it \.npz", Wanted("b.npy"))
    with zipfile.ZipFile(tmp_path / "b.npz", "a") as archive:
        archive.writestr("about.txt", "two by two")
    assert read_table(tmp_path / "b.npz", Wanted("y")).classes.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("größe,y\n1,a\n".encode("latin-1"), "the text is not UTF-8; name its encoding"),
        ("u,y\n1,größe\n".encode("latin-1"), "the text is not UTF-8; name its encoding"),
        ("u,y\n1,a\n".encode("utf-16"), "the text is UTF-16; read it with --encoding utf-16"),
        (
            "u,y\n1,a\n".encode("utf-16-le"),
            "the header holds NUL bytes; if it is UTF-16, read it with --encoding utf-16",
        ),
        ("u,y\n1,a\n".encode("utf-16-be"), "the header holds NUL bytes"),
        ("u,y\n1,a\n".encode("utf-32"), "the text is UTF-16"),
        (b"u,y\n1,a\0\n2,a\n", r"the label 'a\\x00' holds a NUL character; rename it"),
        (b"u,y\n1\0,a\n", r"row 1, column 'u' holds '1\\x00'"),
    ],
)
def test_text_that_is_none(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    refused(tmp_path / "a.csv", message, Wanted("y", ["u"] if b"u,y" in content else None))


def test_characters_that_do_not_exist(tmp_path):
    labels = np.array(["ab", "c"])
    for order in "<>":
        bad = labels.astype(f"{order}U2")
        bad.view(f"{order}u4")[1] = 0x110000
        np.savez(tmp_path / "a.npz", X=np.eye(2), y=bad)
        refused(tmp_path / "a.npz", "a label holds 0x110000, which is no character")
        np.savez(tmp_path / "a.npz", X=np.eye(2), y=labels.astype(f"{order}U2"))
        assert read_table(tmp_path / "a.npz", Wanted("y")).classes.tolist() == ["ab", "c"]


def test_a_flipped_bit_in_an_archive_is_seen(tmp_path):
    np.savez(tmp_path / "a.npz", X=np.full((4, 2), 1.5), y=np.arange(4) % 2)
    whole = (tmp_path / "a.npz").read_bytes()
    at = whole.index(np.float64(1.5).tobytes()) + 6
    (tmp_path / "a.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    refused(tmp_path / "a.npz", "Bad CRC-32")
