"""Files of every format that the command line reads, and ways to damage them."""

from __future__ import annotations

import io
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import safetensors.numpy
from pyarrow import csv, parquet

from running import run
from xent.data import model_file
from xent.data.model_file import Model

ROWS = 24
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 3))
TEXT = np.array(["ab", "c", "dé"])[np.arange(ROWS) % 3]
WHOLE = np.arange(ROWS) % 3
TABLE = ["--categorical", "auto", "--missing", "impute", "--weight", "w", "--exclude", "p0,p1,p2"]


def table() -> pa.Table:
    columns = {f"x{j}": X[:, j] for j in range(3)}
    return pa.table({**columns, "note": ["some, text"] * ROWS, "y": TEXT})


def a_csv() -> bytes:
    file = io.BytesIO()
    csv.write_csv(table(), file)
    return file.getvalue()


def a_tsv() -> bytes:
    return "\n".join(
        "\t".join(map(str, row)) for row in [("u", "v", "y"), *zip(*X.T[:2], TEXT, strict=True)]
    ).encode()


def a_parquet(**options: object) -> bytes:
    file = io.BytesIO()
    parquet.write_table(table(), file, **options)
    return file.getvalue()


def a_parquet_of_lists() -> bytes:
    """Lists of any length and of a fixed one beside each other; null in the lists of neither."""
    sizes = np.arange(0, X.size + 1, X.shape[1], dtype=np.int32)
    flat = pa.array(X.ravel().astype(np.float32))
    lists = {
        "of any length": pa.ListArray.from_arrays(sizes, flat),
        "of one": pa.FixedSizeListArray.from_arrays(flat, X.shape[1]),
    }
    written = io.BytesIO()
    parquet.write_table(pa.table(lists | {"y": table().column("y")}), written, row_group_size=11)
    return written.getvalue()


def a_table() -> pa.Table:
    """Numbers with gaps, text and truths of few values, weights, masses of three classes, and labels."""
    gaps = [None if i % 7 == 3 else float(x) for i, x in enumerate(X[:, 0])]
    colour = [None if i % 11 == 5 else ("red", "green", "blü")[i % 4 % 3] for i in range(ROWS)]
    masses = RNG.dirichlet(np.ones(3), ROWS)
    return pa.table(
        {
            "size": gaps,
            "colour": colour,
            "ripe": WHOLE > 0,
            "w": np.arange(ROWS) % 5 + 0.5,
            **{f"p{j}": masses[:, j] for j in range(3)},
            "y": TEXT,
        }
    )


def a_table_as_csv(encoding: str = "utf-8", delimiter: str = ",") -> bytes:
    file = io.BytesIO()
    csv.write_csv(a_table(), file, csv.WriteOptions(delimiter=delimiter))
    return file.getvalue().decode().encode(encoding)


def a_table_as_parquet() -> bytes:
    file = io.BytesIO()
    parquet.write_table(a_table(), file, row_group_size=10)
    return file.getvalue()


def a_safetensors() -> bytes:
    return safetensors.numpy.save({"X": X.astype(np.float16), "Z": X, "y": WHOLE})


def a_model_of_a_table(path: Path) -> bytes:
    """Return a model with categories, medians and a temperature, as `xent fit` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t.csv"
        file.write_bytes(a_table_as_csv())
        job = ["fit", file, "--label", "y", *TABLE, "--max-iter", 3, "--calibrate", "--out", f"{folder}/m"]
        run(*job)
        path.write_bytes(Path(folder, "m", "model.safetensors").read_bytes())
    return path.read_bytes()


def an_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def an_npz(save: Callable[..., None], labels: np.ndarray) -> bytes:
    file = io.BytesIO()
    save(file, X=X, y=labels)
    return file.getvalue()


def a_model(path: Path) -> bytes:
    rng = np.random.default_rng(1)
    numbers = rng.normal(size=(3, 3)), rng.normal(size=3), rng.normal(size=3), np.ones(3)
    names = ("x0", "x1", "x2")
    model_file.save(Model(*numbers, np.unique(TEXT), names, "y", {"l2": 1.0}, "text", 3), path)
    return path.read_bytes()


def damaged(whole: bytes, seed: int) -> bytes:
    """Return the file after one to three accidents, more of them near its ends, where its headers are."""
    chance, data = random.Random(seed), bytearray(whole)

    def place() -> int:
        near = min(len(data), 160)
        return chance.choice(
            [
                chance.randrange(len(data) + 1),
                chance.randrange(near + 1),
                len(data) - chance.randrange(near + 1),
            ]
        )

    for _ in range(chance.choice([1, 1, 2, 3])):
        at, other, size = place(), place(), chance.choice([1, 1, 2, 4, 8, 40])
        piece = bytes(data[other : other + size])
        accident = chance.randrange(8)
        if accident == 0 and data:  # a bit
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif accident == 1 and data:  # a byte
            data[at % len(data)] = chance.choice([0, 0x7F, 0x80, 0xFF, *b"0123456789\",'(){}[]\n\r\t-.\\#"])
        elif accident == 2:
            del data[at:]
        elif accident == 3:
            data[at:at] = chance.randbytes(size)
        elif accident == 4:
            data[at:at] = piece * chance.choice([1, 2, 50])
        elif accident == 5:
            del data[at : at + size]
        elif accident == 6:  # two fields trade places
            here = bytes(data[at : at + size])
            data[other : other + size], data[at : at + size] = here, piece
        else:  # a number becomes another
            digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
            if digits:
                i = chance.choice(digits[:400])
                data[i : i + 1] = chance.choice([b"0", b"-1", b"99999999999", b"1e400", b"1" * 400])
    return bytes(data)
