"""One table in several formats: what one of them fits, every other is encoded as."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from xent.data import Wanted, read_table
from xent.data import csv as csv_files
from xent.data.encoding import Encoding
from xent.errors import BadInput

ROWS = {
    "size": [1.0, None, 3.0, 4.0, None, 10.0],
    "code": [1, 2, None, 2, 1, 30],
    "there": [True, False, None, True, True, False],
    "sex": ["f", "m", None, "m", "f", "f"],
    "flag": [True, False, True, True, False, False],
    "kind": list("abcabc"),
}
NUMBERS, CATEGORIES = ["size", "flag"], ["code", "there", "sex"]
FORMS = ["csv", "typed", "pandas", "parts", "read by pandas"]


def written(folder, form, rows=ROWS):
    """Write the table; ``pandas`` has floats where whole numbers have gaps, and objects for booleans."""
    folder.mkdir(exist_ok=True)
    arrow = pa.table(rows)
    if form == "csv":
        arrow.to_pandas().to_csv(folder / "a.csv")  # with the index
        return folder / "a.csv"
    if form == "read by pandas":
        arrow.to_pandas().to_csv(folder / "a.csv", index=False)
        pd.read_csv(folder / "a.csv").to_parquet(folder / "b.parquet")
        return folder / "b.parquet"
    if form == "parts":
        for i in range(3):
            parquet.write_table(arrow.slice(2 * i, 2), folder / f"{i}.parquet")
        return folder
    if form == "pandas":
        arrow.to_pandas().to_parquet(folder / "a.parquet")
    else:
        parquet.write_table(arrow, folder / "a.parquet")
    return folder / "a.parquet"


def features(table):
    return np.concatenate([batch[:].double().numpy() for _, batch in table.rows.batches()])


def as_fitted(path):
    wanted = Wanted(label="kind", features=[*NUMBERS, *CATEGORIES], categorical=CATEGORIES, missing="impute")
    table = read_table(path, wanted)
    return table, Encoding.learnt(table, np.arange(len(table)), impute=True)


def as_predicted(path, encoding, model=True, missing="impute"):
    wanted = Wanted(
        features=encoding.numbers,
        categorical=list(encoding.categories),
        known=encoding.categories,
        missing=missing,
        model=path if model else None,
    )
    return encoding.encoded(read_table(path, wanted))


@pytest.mark.parametrize("fitted", FORMS)
def test_every_format_gives_the_same_features(tmp_path, fitted):
    table, encoding = as_fitted(written(tmp_path / "fitted", fitted))
    expected = features(encoding.encoded(table))
    assert [name.lower() for name in encoding.names] == [
        *["size", "flag", "size is missing", "code is missing", "there is missing", "sex is missing"],
        *["code=1", "code=2", "code=30", "there=false", "there=true", "sex=f", "sex=m"],
    ]
    for form in FORMS:
        for model in (True, False):
            made = as_predicted(written(tmp_path / form, form), encoding, model)
            assert made.unknown == {}, form
            np.testing.assert_array_equal(features(made), expected, err_msg=form)


@pytest.mark.parametrize("blank", ["NA", "None", "nan", "null"])
def test_text_that_one_format_takes_for_no_value(tmp_path, blank):
    # a Parquet file may hold "NA" as text, which a model then knows; elsewhere it is no value
    arrow = pa.table({"where": ["EU", blank, "AS", None], "x": [1.0, 2.0, 3.0, 4.0], "kind": list("abab")})
    parquet.write_table(arrow, tmp_path / "a.parquet")
    arrow.to_pandas().to_csv(tmp_path / "a.csv", index=False)
    wanted = Wanted(label="kind", categorical=["where"], missing="impute")
    for fitted, values in (("a.parquet", {"EU", blank, "AS"}), ("a.csv", {"EU", "AS"})):
        table = read_table(tmp_path / fitted, wanted)
        assert {*table.categories[0].values} == values
        encoding = Encoding.learnt(table, np.arange(4), impute=True)
        expected = features(encoding.encoded(table))
        for file in ("a.parquet", "a.csv"):
            np.testing.assert_array_equal(features(as_predicted(tmp_path / file, encoding)), expected)


def test_a_category_that_is_no_whole_number_is_named(tmp_path):
    parquet.write_table(pa.table({"k": [1.0, None, 2.5], "y": list("aba")}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"column 'k' holds 2\.5; categories are text, booleans or whole"):
        read_table(tmp_path / "a.parquet", Wanted(label="y", categorical=["k"], missing="impute"))


@pytest.mark.parametrize("missing", ["error", "impute", "skip"])
@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_columns_without_any_value(tmp_path, missing, form):
    columns = ["size", "sex", "emb"] if form == "parquet" else ["size", "sex"]
    arrow = pa.table({name: pa.nulls(3) for name in columns})
    path = tmp_path / f"a.{form}"
    parquet.write_table(arrow, path) if form == "parquet" else path.write_text("size,sex\n,\n,\n,\n")
    wanted = Wanted(
        features=["size", *([] if form == "csv" else ["emb[0]", "emb[1]"])],
        categorical=["sex"],
        known={"sex": ("f", "m")},
        lists={"emb": 2},
        model=path,
        missing="impute" if missing == "impute" else "error",
        skip_bad=missing == "skip",
    )
    if missing == "error":
        with pytest.raises(BadInput, match=r"row 1, column '(size|sex|emb)' is missing"):
            read_table(path, wanted)
        return
    table = read_table(path, wanted)
    assert np.isnan(features(table)).all()
    assert features(table).shape == (3, len(wanted.features))
    assert table.categories[0].codes.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("missing", ["error", "drop", "impute"])
def test_a_part_in_which_a_column_has_no_value(tmp_path, missing):
    whole = {"x": [1.0, 2.0], "size": [3.0, 4.0], "sex": ["f", "m"], "emb": [[1.0, 2.0], [3.0, 4.0]]}
    empty = {name: pa.nulls(2) for name in whole} | {"x": [5.0, 6.0]}
    for name, rows in (("0", empty), ("1", whole), ("2", empty)):
        parquet.write_table(pa.table(rows | {"y": ["a", "b"]}), tmp_path / f"{name}.parquet")
    wanted = Wanted(label="y", categorical="auto", missing=missing)
    if missing == "error":
        with pytest.raises(BadInput, match=r"0\.parquet: row 1, column 'size' is missing"):
            read_table(tmp_path, wanted)
        return
    table = read_table(tmp_path, wanted)
    assert table.feature_names == ("x", "size", "emb[0]", "emb[1]")
    assert table.categories[0].values == ("f", "m")
    assert table.unused == {}
    rows = [[1.0, 3, 1, 2], [2, 4, 3, 4]]
    if missing == "drop":
        assert (features(table).tolist(), table.dropped) == (rows, 4)
    else:
        gap = [np.nan] * 3
        np.testing.assert_array_equal(features(table), [[5, *gap], [6, *gap], *rows, [5, *gap], [6, *gap]])
        assert table.categories[0].codes.tolist() == [-1, -1, 0, 1, -1, -1]


def test_a_text_column_of_one_part_alone_says_so(tmp_path):
    one = {"x": [1.0, 2.0], "sex": ["f", "m"], "y": ["a", "b"]}
    parquet.write_table(pa.table(one), tmp_path / "0.parquet")
    parquet.write_table(pa.table({"x": [1.0, 2.0], "y": ["a", "b"]}), tmp_path / "1.parquet")
    table = read_table(tmp_path, Wanted(label="y", categorical="auto"))
    assert table.unused == {"sex": f"not a column of {tmp_path / '1.parquet'}"}


@pytest.mark.parametrize("missing", ["error", "drop", "impute"])
def test_a_first_row_without_a_list(tmp_path, missing):
    arrow = pa.table({"emb": [None, None, [1.0, 2.0], [3.0, 4.0]], "y": list("abab")})
    parquet.write_table(arrow, tmp_path / "a.parquet")
    wanted = Wanted(label="y", missing=missing)
    if missing == "error":
        with pytest.raises(BadInput, match="row 1, column 'emb' is missing where a list of numbers"):
            read_table(tmp_path / "a.parquet", wanted)
        return
    made = features(read_table(tmp_path / "a.parquet", wanted))
    assert made[-2:].tolist() == [[1, 2], [3, 4]]
    assert len(made) == (2 if missing == "drop" else 4)
    parquet.write_table(arrow.slice(0, 2), tmp_path / "b.parquet")
    with pytest.raises(BadInput, match="column 'emb' holds no list in any row; leave the column out"):
        read_table(tmp_path / "b.parquet", wanted)


def test_booleans_as_numbers(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("b,x,y\nTrue,1,a\nFalse,2,b\ntrue,3,a\nFALSE,4,b\n")
    wanted = Wanted(label="y", features=["b", "x"])
    assert features(read_table(tmp_path / "a.csv", wanted))[:, 0].tolist() == [1, 0, 1, 0]
    monkeypatch.setattr(csv_files, "BLOCK", 64)
    (tmp_path / "a.csv").write_text("b,x,y\n" + "True,1,a\n" * 20 + "2,1,b\n")
    with pytest.raises(BadInput, match=r"row 21, column 'b' holds '2', and the rows before it booleans"):
        read_table(tmp_path / "a.csv", wanted)


def test_columns_without_a_name_are_an_index_where_they_come_first(tmp_path):
    for name in ("", "Unnamed: 3"):
        header = f"{'' if name else ' '},Unnamed: 0.1,x,{name},y\n"
        (tmp_path / "a.csv").write_text(header + "1,2,3,4,a\n2,3,4,5,b\n")
        table = read_table(tmp_path / "a.csv", Wanted(label="y"))
        assert table.feature_names == ("x", name)
        assert {*table.unused.values()} == {"the index of the data frame"}
    (tmp_path / "a.csv").write_text("x,,,y\n1,2,3,a\n1,2,3,b\n")
    with pytest.raises(BadInput, match="two columns have no name; name them"):
        read_table(tmp_path / "a.csv", Wanted(label="y"))
