"""Columns of few values, gaps, weights and masses: the same from every format and split over parts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from xent.data import Wanted, read_table
from xent.data import parquet as parquet_files
from xent.data.encoding import Encoding
from xent.errors import BadInput

ROWS = {
    "size": [1.0, None, 3.0, 4.0, None, 10.0],
    "sex": ["f", "m", None, "f", "m", "m"],
    "wild": [True, False, True, True, False, False],
    "zip": [10, 20, 10, 10, 20, 30],
    "note": [f"text {i}" for i in range(6)],
    "w": [1.0, 0.5, 2.0, 0.0, 1.0, 1.0],
    "pa": [0.0, 1.0, 0.5, 1.0, 1.0, 0.0],
    "pb": [1.0, 0.0, 0.5, 0.0, 2.0, 1.0],
    "kind": list("abcabc"),
}


def written(folder, form):
    arrow = pa.table(ROWS)
    if form == "parquet":
        parquet.write_table(arrow, folder / "a.parquet")
        return folder / "a.parquet"
    if form == "dictionary":
        sex = arrow.column("sex").dictionary_encode()
        parquet.write_table(arrow.set_column(1, "sex", sex), folder / "a.parquet")
        return folder / "a.parquet"
    if form == "csv":
        arrow.to_pandas().to_csv(folder / "a.csv", index=False)
        return folder / "a.csv"
    for i in range(3):
        parquet.write_table(arrow.slice(2 * i, 2), folder / f"{i}.parquet")
    return folder


FORMS = ["parquet", "dictionary", "csv", "parts"]
OPTIONS = {"label": "kind", "exclude": ["note", "zip", "w", "pa", "pb"], "categorical": "auto"}


def features(table):
    return np.concatenate([batch[:].double().numpy() for _, batch in table.rows.batches()])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("streamed", [False, True])
def test_imputed_features_of_every_format(tmp_path, monkeypatch, form, streamed):
    if streamed:
        monkeypatch.setattr(parquet_files, "IN_MEMORY", 0)
        monkeypatch.setattr("xent.data.encoding.KEPT", 0)
    table = read_table(written(tmp_path, form), Wanted(**OPTIONS, missing="impute"))
    encoding = Encoding.learnt(table, np.arange(6), impute=True)
    made = encoding.encoded(table)
    truth = ("False", "True") if form == "csv" else ("false", "true")
    assert made.feature_names == (
        "size", "size is missing", "sex is missing", "sex=f", "sex=m", *(f"wild={value}" for value in truth)
    )  # fmt: skip
    assert features(made).tolist() == [
        [1, 0, 0, 1, 0, 0, 1],
        [3.5, 1, 0, 0, 1, 1, 0],
        [3, 0, 1, 0, 0, 0, 1],
        [4, 0, 0, 1, 0, 0, 1],
        [3.5, 1, 0, 0, 1, 1, 0],
        [10, 0, 0, 0, 1, 1, 0],
    ]
    assert Encoding.of(encoding.about()).names == encoding.names
    assert encoding.encoded(made) is made


@pytest.mark.parametrize("form", FORMS)
def test_rows_with_gaps_are_dropped_and_counted(tmp_path, form):
    table = read_table(written(tmp_path, form), Wanted(**OPTIONS, missing="drop"))
    assert (table.dropped, features(table).tolist()) == (3, [[1.0], [4.0], [10.0]])
    assert table.classes[table.codes].tolist() == ["a", "a", "c"]
    assert [column.codes.tolist() for column in table.categories] == [[0, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize("form", FORMS)
def test_a_gap_is_an_error_unless_something_is_said(tmp_path, form):
    path = written(tmp_path, form)
    with pytest.raises(BadInput, match=r"row 2, column 'size' .* let --missing drop or impute it"):
        read_table(path, Wanted(**OPTIONS))
    wanted = Wanted("kind", ["sex"], categorical="auto")
    with pytest.raises(BadInput, match=r"row [13], column 'sex' is missing where a category is needed"):
        read_table(path, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_named_columns_of_whole_numbers_are_categories(tmp_path, form):
    wanted = Wanted("kind", ["w"], categorical=["zip"])
    table = read_table(written(tmp_path, form), wanted)
    (column,) = table.categories
    assert (column.values, column.codes.tolist()) == (("10", "20", "30"), [0, 1, 0, 0, 1, 2])


@pytest.mark.parametrize("form", FORMS)
def test_weights_and_masses(tmp_path, form):
    wanted = Wanted(features=["zip"], weight="w", soft=["pb", "pa"])
    table = read_table(written(tmp_path, form), wanted)
    assert table.weight.tolist() == ROWS["w"]
    assert table.classes.tolist() == ["pa", "pb"]
    assert table.soft.T.tolist() == [ROWS["pa"], ROWS["pb"]]
    assert table.codes.tolist() == [1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("form", FORMS)
def test_too_many_values(tmp_path, form):
    path = written(tmp_path, form)
    table = read_table(path, Wanted("kind", exclude=["size", "sex"], categorical="auto", most=4))
    assert [column.name for column in table.categories] == ["wild"]
    assert table.unused == {"note": "text of more than 4 values"}
    with pytest.raises(
        BadInput, match=r"column 'note' \(--categorical\) has more than 4 values; raise --max"
    ):
        read_table(path, Wanted("kind", ["w"], categorical=["note"], most=4))


def test_categories_that_the_encoding_does_not_know_are_zero_and_counted(tmp_path):
    encoding = Encoding((), {"sex": ("f", "m")}, np.empty(0), ("sex",))
    (tmp_path / "a.csv").write_text("sex\nf\nx\n\nx\n m\nm\n")
    table = read_table(
        tmp_path / "a.csv", Wanted(features=[], categorical=["sex"], missing="impute", model=tmp_path)
    )
    made = encoding.encoded(table)
    assert features(made).tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert made.unknown == {"sex": 3}


def test_the_index_of_a_data_frame_is_no_feature(tmp_path):
    frame = pd.DataFrame({"u": [1.0, 2.0, 3.0], "kind": list("aba")}, index=[7, 8, 9])
    named = frame.rename_axis("number")
    for name, made in (("plain", frame), ("named", named), ("range", frame.reset_index(drop=True))):
        made.to_parquet(tmp_path / f"{name}.parquet")
        made.to_csv(tmp_path / f"{name}.csv")
    pd.read_csv(tmp_path / "plain.csv").to_csv(tmp_path / "twice.csv", index=False)
    index = "the index of the data frame"
    for name, unused in {
        "plain.parquet": {"__index_level_0__": index},
        "named.parquet": {"number": index},
        "range.parquet": {},
        "plain.csv": {"": index},
        "twice.csv": {"Unnamed: 0": index},
    }.items():
        table = read_table(tmp_path / name, Wanted("kind"))
        assert (table.feature_names, table.unused) == (("u",), unused), name
    table = read_table(tmp_path / "named.parquet", Wanted("kind", ["number", "u"]))
    assert table.feature_names == ("number", "u")


BAD = {
    "negative": ({"weight": "w"}, [1.0, -1.0], r"row 2, column 'w' holds -1 where a weight"),
    "missing": ({"weight": "w"}, [None, 1.0], r"row 1, column 'w' is missing"),
    "infinite": ({"weight": "w"}, [1.0, np.inf], r"row 2, column 'w' holds inf"),
    "no mass": ({"soft": ["w", "u"]}, [0.0, 0.0], r"row 2 has no mass in any of --soft-labels"),
    "one class": ({"soft": ["w"]}, [1.0, 1.0], "--soft-labels names one class"),
    "text": ({"soft": ["w", "kind"]}, [1.0, 1.0], r"column 'kind' \(--soft-labels\) holds text"),
    "twice": ({"soft": ["w", "u"], "weight": "w"}, [1.0, 1.0], "'w' is named in --weight and in --soft"),
    "no column": ({"weight": "x"}, [1.0, 1.0], r"no column 'x' \(--weight\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_weights_and_masses_that_are_none(tmp_path, name):
    options, w, message = BAD[name]
    parquet.write_table(
        pa.table({"u": [1.0, 0.0], "v": [1, 2], "w": w, "kind": ["a", "b"]}), tmp_path / "a.parquet"
    )
    with pytest.raises(BadInput, match=message):
        read_table(tmp_path / "a.parquet", Wanted(features=["v"], **options))
