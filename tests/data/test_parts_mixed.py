"""Parts of a table that were written differently: labels as 0 and 0.0, and parts without rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from xent.data import Wanted, read_table
from xent.errors import BadInput


def written(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.csv").write_text(text)
    return folder


def test_whole_numbers_are_one_class_however_a_part_writes_them(tmp_path):
    written(tmp_path, a="x,y\n1,0\n2,1\n", b="x,y\n3,1.0\n4,2.0\n5,0.0\n")
    table = read_table(tmp_path, Wanted("y"))
    assert table.classes.tolist() == ["0", "1", "2"]
    assert table.codes.tolist() == [0, 1, 1, 2, 0]


def test_parts_that_agree_keep_their_text(tmp_path):
    written(tmp_path, a="x,y\n1,0.0\n2,1.0\n", b="x,y\n3,1.0\n4,2.0\n")
    assert read_table(tmp_path, Wanted("y")).classes.tolist() == ["0.0", "1.0", "2.0"]
    written(tmp_path, a="x,y\n1,01\n2,1\n", b="x,y\n3,1\n4,cat\n")
    assert read_table(tmp_path, Wanted("y")).classes.tolist() == ["01", "1", "cat"]


def test_parts_without_rows_are_passed_over(tmp_path):
    written(tmp_path, a="x,y\n", b="x,y\n3,u\n4,v\n", c="x,y\n")
    table = read_table(tmp_path, Wanted("y"))
    assert (table.features.tolist() if isinstance(table.features, np.ndarray) else table.rows.shape) == (2, 1)
    written(tmp_path, b="x,y\n")
    with pytest.raises(BadInput, match=r"a\.csv: the file has columns but no rows"):
        read_table(tmp_path, Wanted("y"))


def test_a_part_of_lists_without_rows_is_passed_over(tmp_path):
    kind = pa.schema([("emb", pa.list_(pa.float32())), ("y", pa.string())])
    for name, rows in (("a", []), ("b", [{"emb": [1.0, 2.0], "y": "u"}, {"emb": [3.0, 4.0], "y": "v"}])):
        parquet.write_table(pa.Table.from_pylist(rows, kind), tmp_path / f"{name}.parquet")
    assert read_table(tmp_path, Wanted("y")).feature_names == ("emb[0]", "emb[1]")
    with pytest.raises(BadInput, match=r"a\.parquet: the file has columns but no rows"):
        read_table(tmp_path / "a.parquet", Wanted("y"))


@pytest.mark.parametrize("shape", [(600, 0), (600,), (2, 2, 2)])
def test_arrays_that_are_no_table_are_named_with_their_shape(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.zeros(shape))
    np.save(tmp_path / "y.npy", np.arange(shape[0]))
    with pytest.raises(BadInput, match=r"are to be .rows, columns.; this array has shape"):
        read_table(tmp_path / "x.npy", Wanted(str(tmp_path / "y.npy")))


def test_records_are_named_with_their_fields(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(4, dtype=[("a", float), ("b", int)]))
    with pytest.raises(BadInput, match="an array of records with the fields 'a', 'b'"):
        read_table(tmp_path / "x.npy", Wanted())


def test_columns_that_are_no_features_are_named_with_their_types(tmp_path):
    rows = [{"emb": [], "words": ["a"], "kind": "u"}, {"emb": [], "words": ["b"], "kind": "v"}]
    kind = pa.schema(
        [("emb", pa.list_(pa.float32())), ("words", pa.list_(pa.string())), ("kind", pa.string())]
    )
    parquet.write_table(pa.Table.from_pylist(rows, kind), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"'emb' \(empty lists\), 'words' \(lists of text\)"):
        read_table(tmp_path / "a.parquet", Wanted("kind"))


def test_a_path_that_is_not_there_has_no_suffix_to_blame(tmp_path):
    with pytest.raises(BadInput, match="nothing: no such file"):
        read_table(tmp_path / "nothing", Wanted("y"))
