"""Columns of lists, which embeddings come in: features ``emb[0]``, ``emb[1]``, ... of every kind of list."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import parquet

from xent._processes.group import Share
from xent.cli.commands import cli
from xent.data import Wanted, read_table, table_from_arrow
from xent.data import parquet as parquet_files
from xent.data.read import read_share
from xent.errors import BadInput

rng = np.random.default_rng(0)
X = rng.normal(size=(60, 4))
Y = ["a", "b", "c"] * 20


def flat(kind):
    return pa.array(X.ravel().astype(kind), pa.from_numpy_dtype(np.dtype(kind)))


LISTS = {
    "list": lambda kind: pa.ListArray.from_arrays(np.arange(0, 244, 4, dtype=np.int32), flat(kind)),
    "large_list": lambda kind: pa.LargeListArray.from_arrays(np.arange(0, 244, 4), flat(kind)),
    "fixed_size_list": lambda kind: pa.FixedSizeListArray.from_arrays(flat(kind), 4),
    "tensor": lambda kind: pa.FixedShapeTensorArray.from_numpy_ndarray(X.astype(kind).reshape(60, 2, 2)),
}


def rows_of(table):
    return np.concatenate([x[:].numpy() for _, x in table.rows.batches()])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "int8", "uint16", "int64"])
@pytest.mark.parametrize("lists", LISTS)
def test_lists_of_any_kind(tmp_path, monkeypatch, lists, kind, streamed):
    if lists == "tensor" and kind == "float16":
        pytest.skip("Arrow makes no tensors of float16")
    monkeypatch.setattr(parquet_files, "IN_MEMORY", 0 if streamed else 1 << 20)
    monkeypatch.setattr(parquet_files, "MOST_ROWS", 7)
    made = pa.table({"emb": LISTS[lists](kind), "y": Y})
    parquet.write_table(made, tmp_path / "a.parquet", row_group_size=13)
    names = tuple(f"emb[{i}]" for i in range(4))
    expected = X.astype(kind)
    for share in (Share(), Share(0, 3), Share(1, 3), Share(2, 3)):
        table = read_share(tmp_path / "a.parquet", Wanted("y"), share)
        assert table.feature_names == names
        stored = kind if kind.startswith("float") else "float64"
        assert rows_of(table).dtype == stored
        np.testing.assert_array_equal(rows_of(table), expected[share.of(60)])
        arrow = table_from_arrow(tmp_path / "x", Wanted("y"), made, share)
        np.testing.assert_array_equal(rows_of(arrow), expected[share.of(60)])


def test_columns_beside_each_other(tmp_path):
    half = pa.FixedSizeListArray.from_arrays(pa.array(X.ravel().astype(np.float16)), 4)
    text = pa.array(["no number"] * 60)
    table = pa.table({"n": X[:, 0], "emb": LISTS["list"]("float32"), "text": text, "half": half, "y": Y})
    parquet.write_table(table, tmp_path / "a.parquet")

    def read(**options):
        return read_table(tmp_path / "a.parquet", Wanted("y", **options))

    found = read()
    emb, halves = [f"emb[{i}]" for i in range(4)], [f"half[{i}]" for i in range(4)]
    assert found.feature_names == ("n", *emb, *halves)
    assert found.skipped == ("text",)
    np.testing.assert_array_equal(
        found.features, np.hstack([X[:, :1], X.astype(np.float32), X.astype(np.float16)])
    )
    assert read(features=["half", "n"]).feature_names == (*halves, "n")
    assert read(exclude=["emb", "n"]).feature_names == tuple(halves)
    # features of a model, in its order, of which some are entries
    some = read(features=["emb[2]", "n", "half[3]", "half[0]", "emb[0]"])
    assert some.feature_names == ("emb[2]", "n", "half[3]", "half[0]", "emb[0]")
    expected = np.stack([X[:, 2].astype(np.float32), X[:, 0], X[:, 3], X[:, 0], X[:, 0]], axis=1)
    np.testing.assert_allclose(some.features, expected, atol=1e-3)


REFUSED = {
    r"row 3, column 'emb' holds a list of 3 numbers and the first row one of 2.*--exclude emb": (
        [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0, 7.0], [8.0, 9.0]]
    ),
    r"row 2, column 'emb' is missing": [[1.0, 2.0], None, [5.0, 6.0], [8.0, 9.0]],
    r"row 1, column 'emb' is missing": [None, [1.0, 2.0], [5.0, 6.0], [8.0, 9.0]],
    r"row 4, column 'emb\[1\]' is missing.*--exclude emb$": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [8.0, None]],
    r"row 2, column 'emb\[0\]' holds inf.*--exclude emb$": [
        [1.0, 2.0],
        [np.inf, 4.0],
        [5.0, 6.0],
        [8.0, 9.0],
    ],
    r"no numeric column is left": [[], [], [], []],
    r"its columns are 'emb' \(lists of text\), 'y' \(text\)": [
        ["a"],
        ["b"],
        ["c"],
        ["d"],
    ],
}


@pytest.mark.parametrize("says", REFUSED)
@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_refused(tmp_path, monkeypatch, says, streamed):
    monkeypatch.setattr(parquet_files, "IN_MEMORY", 0 if streamed else 1 << 20)
    parquet.write_table(pa.table({"emb": REFUSED[says], "y": [*"abab"]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=says):
        read_table(tmp_path / "a.parquet", Wanted("y"))


def test_a_column_that_is_left_out_is_not_looked_at(tmp_path):
    table = pa.table({"emb": [[1.0, 2.0]] * 4, "gap": [None, [1.0], [2.0], [3.0]], "y": [*"abab"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    for options in ({"exclude": ["gap"]}, {"features": ["emb"]}, {"features": ["emb[1]"]}):
        assert set(read_table(tmp_path / "a.parquet", Wanted("y", **options)).feature_names) <= {
            "emb[0]",
            "emb[1]",
        }


def test_choices_that_are_refused(tmp_path):
    parquet.write_table(pa.table({"emb": [[1.0, 2.0]] * 4, "y": [*"abab"]}), tmp_path / "a.parquet")
    for features, says in (
        (["emb[2]"], r"no 'emb\[2\]' \(--features\): the lists of column 'emb' hold 2 numbers"),
        (["emb[0]", "emb[0]"], r"column 'emb\[0\]' is asked for 2 times"),
        (["other[0]"], r"no column 'other\[0\]' \(--features\); its columns are 'emb', 'y'"),
    ):
        with pytest.raises(BadInput, match=says):
            read_table(tmp_path / "a.parquet", Wanted("y", features=features))


def test_fit_and_predict_from_embeddings(tmp_path):
    """The id beside the embedding is no reason to fit the id alone."""
    y = rng.integers(3, size=300)
    emb = (rng.normal(size=(300, 16)) + 2 * np.eye(16)[y]).astype(np.float16)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(emb.ravel()), 16)
    parquet.write_table(pa.table({"emb": lists, "y": y}), tmp_path / "a.parquet")
    arguments = ["fit", tmp_path / "a.parquet", "--label", "y", "--out", tmp_path / "m", "--json"]
    done = CliRunner().invoke(cli, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    about = json.loads(done.stdout)
    assert about["features"] == 16
    assert about["validation"]["accuracy"] > 0.7
    model, out = tmp_path / "m" / "model.safetensors", tmp_path / "p.parquet"
    done = CliRunner().invoke(cli, ["predict", str(model), str(tmp_path / "a.parquet"), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert parquet.read_table(out).num_rows == 300
    shorter = pa.FixedSizeListArray.from_arrays(pa.array(emb[:, :15].ravel()), 15)
    parquet.write_table(pa.table({"emb": shorter}), tmp_path / "b.parquet")
    done = CliRunner().invoke(cli, ["predict", str(model), str(tmp_path / "b.parquet"), "-o", str(out)])
    assert done.exit_code == 2
    assert "the lists of column 'emb' hold 15 numbers" in done.stderr
