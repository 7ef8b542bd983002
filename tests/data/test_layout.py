"""Files whose layout the name does not say: marks, encodings, compression, patterns, standard input."""

from __future__ import annotations

import bz2
import gzip
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from xent.data import Wanted, read_table
from xent.data.layout import Layout, spooled
from xent.data.stream import stream
from xent.errors import BadInput

TEXT = "u,v,kind\n1.5,2,ä\n-3,4e1,b\n5,6,ä\n"
FEATURES, KINDS = [[1.5, 2.0], [-3.0, 40.0], [5.0, 6.0]], ["ä", "b", "ä"]

LAYOUTS = {  # name of the file: its bytes, its layout
    "a.csv": (TEXT.encode(), {}),
    "bom.csv": (b"\xef\xbb\xbf" + TEXT.encode(), {}),
    "semicolons.csv": (TEXT.replace(",", ";").encode(), {"delimiter": ";"}),
    "pipes.csv": (TEXT.replace(",", "|").encode(), {"delimiter": "|"}),
    "tabs.csv": (TEXT.replace(",", "\t").encode(), {"delimiter": "\t"}),
    "tabs.tsv": (TEXT.replace(",", "\t").encode(), {}),
    "commas.tsv": (TEXT.encode(), {"delimiter": ","}),
    "german.csv": (TEXT.replace(",", ";").replace(".", ",").encode(), {"delimiter": ";", "decimal": ","}),
    "latin.csv": (TEXT.encode("latin-1"), {"encoding": "latin-1"}),
    "cp1252.csv": (TEXT.encode("cp1252"), {"encoding": "cp1252"}),
    "utf16.csv": (TEXT.encode("utf-16"), {"encoding": "utf-16"}),
    "a.csv.gz": (gzip.compress(TEXT.encode()), {}),
    "two.csv.gz": (gzip.compress(TEXT[:20].encode()) + gzip.compress(TEXT[20:].encode()), {}),
    "a.tsv.gz": (gzip.compress(TEXT.replace(",", "\t").encode()), {}),
    "a.CSV.GZ": (gzip.compress(TEXT.encode()), {}),
    "a.csv.bz2": (bz2.compress(TEXT.encode()), {}),
    "a.csv.zst": (pa.Codec("zstd").compress(TEXT.encode(), asbytes=True), {}),
    "latin.csv.gz": (gzip.compress(TEXT.encode("latin-1")), {"encoding": "latin-1"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_the_same_table(tmp_path, name):
    data, layout = LAYOUTS[name]
    (tmp_path / name).write_bytes(data)
    table = read_table(tmp_path / name, Wanted("kind", layout=Layout(**layout)))
    assert table.feature_names == ("u", "v")
    assert table.features.tolist() == FEATURES
    assert table.classes[table.codes].tolist() == KINDS


def test_a_file_without_a_header(tmp_path):
    (tmp_path / "a.csv").write_text(TEXT.partition("\n")[2])
    table = read_table(tmp_path / "a.csv", Wanted("f2", layout=Layout(header=False)))
    assert (table.feature_names, table.features.tolist()) == (("f0", "f1"), FEATURES)
    (tmp_path / "b.csv").write_text("1,2,3\n4,5,6\n")
    with pytest.raises(BadInput, match=r"its header is '1', '2', '3': .* with --no-header"):
        read_table(tmp_path / "b.csv", Wanted("kind"))
    with pytest.raises(BadInput, match="--no-header"):  # labels that are text
        read_table(tmp_path / "a.csv", Wanted("kind"))
    with pytest.raises(BadInput, match="--no-header"):
        read_table(tmp_path / "a.csv", Wanted(features=["f0"], model=tmp_path / "m.safetensors"))


ODD = {
    "gzip": (gzip.compress(TEXT.encode()), r"compressed by gzip: .* \.csv\.gz"),
    "bzip2": (bz2.compress(TEXT.encode()), r"compressed by bzip2: .* \.csv\.bz2"),
    "zstd": (b"\x28\xb5\x2f\xfd\x00\x00", r"compressed by zstd: .* \.csv\.zst"),
    "parquet": (b"PAR1\x15\x04", r"a Parquet file: its name ends in \.parquet"),
    "npy": (b"\x93NUMPY\x01\x00", r"an array of NumPy: its name ends in \.npy"),
    "xlsx": (b"PK\x03\x04\x14\x00", r"a spreadsheet is read when it is saved as CSV"),
}


@pytest.mark.parametrize("name", ODD)
def test_files_that_are_no_text_are_named_for_what_they_are(tmp_path, name):
    content, message = ODD[name]
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(BadInput, match=rf"a\.csv: is .*{message}"):
        read_table(tmp_path / "a.csv", Wanted("kind"))


HINTS = {
    "semicolons": ("u;kind\n1;a\n", Wanted("kind"), r"--delimiter ';'"),
    "decimal commas": (
        'u;kind\n"1,5";a\n2,5;b\n',
        Wanted("kind", layout=Layout(delimiter=";")),
        r"--decimal ,",
    ),
    "columns": ("u;kind\n1,2;a\n3,4,5;b\n", Wanted("kind"), "what lies between the columns"),
}


@pytest.mark.parametrize("name", HINTS)
def test_messages_name_the_option_that_helps(tmp_path, name):
    text, wanted, hint = HINTS[name]
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(BadInput, match=hint):
        read_table(tmp_path / "a.csv", wanted)


@pytest.mark.parametrize(
    "compressed", [b"", b"\x1f\x8b", b"nonsense", gzip.compress(TEXT.encode(), mtime=0)[:-9]]
)
def test_damaged_compressed_files(tmp_path, compressed):
    (tmp_path / "a.csv.gz").write_bytes(compressed)
    with pytest.raises(BadInput, match=r"a\.csv\.gz"):
        read_table(tmp_path / "a.csv.gz", Wanted("kind"))


def test_other_formats_are_not_decompressed(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(BadInput, match="files are told by their suffix"):
        read_table(tmp_path / "a.parquet.gz", Wanted("kind"))


@pytest.mark.parametrize(
    "layout",
    [
        {"delimiter": ";;"},
        {"delimiter": '"'},
        {"delimiter": "\n"},
        {"decimal": "1"},
        {"decimal": "-"},
        {"decimal": ",", "delimiter": ","},
        {"encoding": "klingon"},
        {"delimiter": "é"},
    ],
)
def test_layouts_that_no_file_has(layout):
    with pytest.raises(BadInput):
        Layout(**layout)


def test_a_pattern_is_the_files_that_it_matches(tmp_path):
    for name in ("b.csv", "a.csv", "c.txt"):
        (tmp_path / name).write_text(TEXT.replace("1.5", f"{ord(name[0])}"))
    table = read_table(str(tmp_path / "*.csv"), Wanted("kind"))
    x = np.concatenate([batch[:].numpy() for _, batch in table.rows.batches()])
    assert x[:, 0].tolist() == [97.0, -3.0, 5.0, 98.0, -3.0, 5.0]
    with pytest.raises(BadInput, match=r"no file matches the pattern"):
        read_table(str(tmp_path / "*.parquet"), Wanted("kind"))
    (tmp_path / "[1].csv").write_text(TEXT)
    assert len(read_table(tmp_path / "[1].csv", Wanted("kind"))) == 3


def test_standard_input_is_spooled_once(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    with spooled([Path("-")], ".csv") as (file,):
        assert read_table(file, Wanted("kind")).features.tolist() == FEATURES
    assert not file.exists()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"u,kind\nx,a\n1,b\n2,b\n3,b\n")))
    with pytest.raises(BadInput, match=r"^standard input: row 1"), spooled([Path("-")], ".csv") as (file,):
        read_table(file, Wanted("kind"))
    with pytest.raises(BadInput, match="name - once"), spooled([Path("-"), Path("-")], ".csv"):
        pass


@pytest.mark.parametrize(
    "layout", [{"delimiter": ";"}, {"decimal": ","}, {"encoding": "latin-1"}, {"header": False}]
)
@pytest.mark.parametrize("suffix", [".parquet", ".npz", ".npy", ".safetensors"])
def test_options_of_text_are_not_passed_over(tmp_path, suffix, layout):
    (tmp_path / f"a{suffix}").write_bytes(b"any")
    wanted = Wanted("kind", layout=Layout(**layout))
    for read in (read_table, lambda path, wanted: list(stream([path], wanted))):
        with pytest.raises(BadInput, match=r"is of text files, and this is .*; leave it out"):
            read(tmp_path / f"a{suffix}", wanted)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".npy"])
def test_an_array_is_not_named_of_other_files(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"any")
    with pytest.raises(BadInput, match="--array is of NPZ and safetensors files"):
        read_table(tmp_path / f"a{suffix}", Wanted("kind", layout=Layout(array="train")))
