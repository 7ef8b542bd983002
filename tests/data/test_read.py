"""Tables from files: what is read, and the one line that each bad file ends in."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from xent._processes.group import Share
from xent.data import Table, Wanted, read_table
from xent.data import csv as csv_files
from xent.data import parquet as parquet_files
from xent.data.parts import read_parts
from xent.data.read import read_share
from xent.errors import BadInput


def labels(table: Table) -> list:
    return table.classes[table.codes].tolist()


def written(path, text: str | bytes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_csv_type_change(tmp_path):
    """A label column of numbers with `cat` after 800,000 rows; Arrow's inference gives up late."""
    rows = 800_000
    path = written(tmp_path / "a.csv", "x,label\n" + "0.25,7\n" * rows + "1.5,cat\n" * 3)
    with pytest.raises(pa.ArrowInvalid), csv.open_csv(path) as blocks:
        blocks.read_all()  # the reason for this test: inferred block by block, it fails late
    table = read_table(path, Wanted("label"))
    assert table.classes.tolist() == ["7", "cat"]
    assert np.bincount(table.codes).tolist() == [rows, 3]
    assert table.features[[0, -1], 0].tolist() == [0.25, 1.5]


@pytest.fixture
def small_blocks(monkeypatch):
    """Late in the file begins after 64 bytes, as after ``BLOCK`` in a large one."""
    monkeypatch.setattr(csv_files, "BLOCK", 64)


@pytest.mark.usefixtures("small_blocks")
def test_integers_that_turn_into_decimals_late(tmp_path):
    path = written(tmp_path / "a.csv", "x,y\n" + "1,a\n" * 100 + "2.5,b\n")
    assert read_table(path, Wanted("y")).features[[0, 100], 0].tolist() == [1.0, 2.5]


@pytest.mark.usefixtures("small_blocks")
def test_a_number_that_turns_into_text_late_is_named(tmp_path):
    path = written(tmp_path / "a.csv", "x,y\n" + "1,a\n" * 100 + "oops,b\n")
    with pytest.raises(BadInput, match=r"a\.csv: row 101, column 'x' holds 'oops'.*--exclude x"):
        read_table(path, Wanted("y"))
    assert read_table(
        written(tmp_path / "b.csv", "x,z,y\n1,2,a\n"), Wanted("y", exclude=["x"])
    ).feature_names == ("z",)


@pytest.mark.usefixtures("small_blocks")
def test_a_line_end_within_quotes_where_a_block_ends(tmp_path):
    path = written(tmp_path / "a.csv", "x,y\n" + '1,"two\nlines"\n' * 50)
    assert labels(read_table(path, Wanted("y"))) == ["two\nlines"] * 50


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("text", ["x" * 100 + ",y\n1,a\n", "x,y\n1,a\n1," + "a" * 200 + "\n1,a\n"])
def test_a_line_longer_than_a_block(tmp_path, text):
    with pytest.raises(BadInput, match=r"a line is longer than 64 bytes"):
        read_table(written(tmp_path / "a.csv", text), Wanted("y"))


@pytest.mark.parametrize("spoiled", ["?", "12,5", "1_0"])
def test_a_number_spoiled_early_is_an_error_and_text_is_not(tmp_path, spoiled):
    rows = "name,zip,u,y\nann,A1,1,a\nbob,7,,b\ncid,B2,{},a\ndan,9,2,b\neve,C3,3,a\nfay,9,4,a\n"
    path = written(tmp_path / "a.csv", rows.format(f'"{spoiled}"'))
    message = rf"row 3, column 'u' holds '{re.escape(spoiled)}'.*--exclude u"
    with pytest.raises(BadInput, match=message):
        read_table(path, Wanted("y"))
    good = written(tmp_path / "b.csv", rows.format("7").replace(",,", ",0,"))
    assert read_table(good, Wanted("y")).skipped == ("name", "zip")
    with pytest.raises(BadInput, match="no numeric column is left"):
        read_table(path, Wanted("y", exclude=["u"]))
    with pytest.raises(BadInput, match="no column 'kind' for --label"):
        read_table(path, Wanted("kind"))


def test_many_columns_are_read_at_once(tmp_path):
    names = [f"c{j}" for j in range(20_000)]
    text = ",".join(names) + ",u,y\n" + "art," * 20_000 + "1,a\n"
    assert len(read_table(written(tmp_path / "a.csv", text), Wanted("y")).skipped) == 20_000


def test_csv_features_are_the_numeric_columns(tmp_path):
    path = written(
        tmp_path / "a.csv", "id,name,u,v,kind,when\n1,ann,0.5,2,b,2020-01-01\n2,bob,1.5,3,a,2020-01-02\n"
    )
    table = read_table(path, Wanted("kind", exclude=["id"]))
    assert table.feature_names == ("u", "v")
    assert table.skipped == ("name", "when")
    assert table.features.tolist() == [[0.5, 2.0], [1.5, 3.0]]
    assert labels(table) == ["b", "a"]
    assert read_table(path, Wanted("kind", features=["v", "u"])).features.tolist() == [[2.0, 0.5], [3.0, 1.5]]


def test_csv_labels_are_text(tmp_path):
    path = written(tmp_path / "a.csv", "u,y\n1,007\n2,true\n3,NA\n")
    assert labels(read_table(path, Wanted("y"))) == ["007", "true", "NA"]


def test_tsv(tmp_path):
    assert labels(read_table(written(tmp_path / "a.tsv", "u\ty\n1\ta,b\n2\tc\n"), Wanted("y"))) == [
        "a,b",
        "c",
    ]


@pytest.mark.parametrize(
    ("values", "kind"),
    [(["b", "a"], "U"), ([3, -1], "i"), ([True, False], "b")],
    ids=["str", "int", "bool"],
)
def test_parquet_labels_keep_their_type(tmp_path, values, kind):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"u": [1.0, 2.0], "y": values}), path)
    table = read_table(path, Wanted("y"))
    assert labels(table) == values
    assert table.classes.dtype.kind == kind
    others = [pa.array(values).dictionary_encode()]
    if kind == "U":
        others += [pa.array(values, pa.large_string()), pa.array(values, pa.string_view())]
    for other in others:
        parquet.write_table(pa.table({"u": [1.0, 2.0], "y": other}), path)
        assert labels(read_table(path, Wanted("y"))) == values


def test_parquet_numbers(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {"i": pa.array([1, 2], pa.int8()), "f": pa.array([0.5, 1.5], pa.float32()), "on": [True, False]}
    parquet.write_table(pa.table({**columns, "y": ["a", "b"]}), path)
    table = read_table(path, Wanted("y"))
    assert table.feature_names == ("i", "f")
    assert table.skipped == ("on",)
    assert table.features.dtype == np.float64
    assert read_table(path, Wanted("y", features=["f"])).features.dtype == np.float32
    assert read_table(path, Wanted("y", features=["on"])).features.tolist() == [[1.0], [0.0]]


def test_npz_and_npy(tmp_path):
    X, y = np.arange(6, dtype=np.float32).reshape(3, 2), np.array(["b", "a", "b"])
    np.savez(tmp_path / "a.npz", other=X, y=y)
    np.savez(tmp_path / "X.npz", X=X, Z=X + 1, y=y)
    np.save(tmp_path / "X.npy", X)
    np.save(tmp_path / "y.npy", y[:, None])
    for path, label in (("a.npz", "y"), ("X.npz", "y"), ("X.npy", str(tmp_path / "y.npy"))):
        table = read_table(tmp_path / path, Wanted(label))
        np.testing.assert_array_equal(table.features, X)
        assert table.features.dtype == np.float32
        assert table.feature_names == ("x0", "x1")
        assert labels(table) == ["b", "a", "b"]
    assert read_table(tmp_path / "X.npz", Wanted("y", features=["x1"])).features.tolist() == [[1], [3], [5]]


def test_optional_labels(tmp_path):
    path = written(tmp_path / "a.csv", "u,y\n1,b\n2,\n3,a\n")
    assert read_table(path, Wanted("y", ["u"], label_optional=True)).codes.tolist() == [1, -1, 0]
    assert read_table(path, Wanted("z", ["u"], label_optional=True)).codes is None


@pytest.mark.parametrize(
    "column",
    [pa.nulls(2), pa.array([None, float("nan")]), pa.array(["", None]), pa.nulls(2, pa.int64())],
    ids=lambda column: str(column.type),
)
def test_a_label_column_without_a_label(tmp_path, column):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"u": [1.0, 2.0], "y": column}), path)
    assert read_table(path, Wanted("y", ["u"], label_optional=True)).codes is None
    with pytest.raises(BadInput, match="row 1 has no label"):
        read_table(path, Wanted("y", ["u"]))


def test_an_optional_label_of_npy_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("X.npy", np.eye(3))
    np.save("y.npy", np.arange(2))  # of other rows
    assert read_table("X.npy", Wanted("y.npy", label_optional=True)).codes is None


# Bad files: (name, content or a function that writes it, what is wanted, the message)

CSV = "id,u,y\n1,0.5,a\n2,1.5,b\n"
BAD_TEXT = {
    "empty": ("", Wanted("y"), r"a\.csv: the file is empty"),
    "blank": ("\n\n", Wanted("y"), r"a\.csv: not readable as CSV"),
    "header_only": ("u,y\n", Wanted("y", ["u"]), r"a\.csv: the file has columns but no rows"),
    "no_such_label": (CSV, Wanted("kind"), r"no column 'kind' for --label; its columns are 'id', 'u', 'y'"),
    "no_such_feature": (CSV, Wanted("y", ["w"]), r"no column 'w' \(--features\); its columns are"),
    "no_such_exclude": (CSV, Wanted("y", exclude=["w"]), r"no column 'w' \(--exclude\)"),
    "label_as_feature": (CSV, Wanted("y", ["y"]), r"label column 'y' cannot be a feature"),
    "twice_asked": (CSV, Wanted("y", ["u", "u"]), r"'u' is asked for 2 times \(--features\)"),
    "only_header": ("u,y\n", Wanted("y"), r"a\.csv: the file has columns but no rows"),
    "open_quote": (
        'u,y\n1,a\n"' + "2\n" * 999 + '",b\n',
        Wanted("y", ["u"]),
        r"row 2, column 'u' holds '2.{57}…",
    ),
    "utf16": (CSV.encode("utf-16"), Wanted("y"), r"the text is UTF-16; read it with --encoding utf-16"),
    "quoted_name": ('"u,v",y\n1,a\ninf,a\n', Wanted("y"), r"--exclude '\"u,v\"'"),
    "no_numeric": ("n,y\nann,a\nbob,b\n", Wanted("y"), r"no numeric column is left"),
    "one_text": ("n,y\nann,a\n", Wanted("y", ["n"]), r"row 1, column 'n' holds 'ann'"),
    "text_feature": (
        "n,y\nann,a\nbob,b\n",
        Wanted("y", ["n"]),
        r"holds text, .* with --categorical n, or leave",
    ),
    "weight": (
        "u,w,y\n1,1,a\n2,,b\n",
        Wanted("y", weight="w"),
        r"'w' is missing .*; correct or drop the row, or name another",
    ),
    "nan": ("u,y\n1,a\nnan,b\n", Wanted("y"), r"row 2, column 'u' (is missing|holds nan)"),
    "inf": ("u,v,y\n1,1,a\n2,-inf,b\n", Wanted("y"), r"row 2, column 'v' holds -inf"),
    "missing_number": ("u,v,y\n1,,a\n1,2,b\n", Wanted("y"), r"row 1, column 'v' is missing"),
    "NA": ("u,v,y\n1,3,a\n1,NA,b\n", Wanted("y"), r"row 2, column 'v' is missing"),
    "missing_label": ("u,y\n1,a\n2, \n", Wanted("y"), r"row 2 has no label in column 'y'"),
    "twice": ("u,u,y\n1,2,a\n", Wanted("y"), r"column 'u' is there 2 times"),
    "ragged": ("u,y\n1,a\n2\n", Wanted("y"), r"not readable as CSV: .*row 2: Expected 2 columns"),
    "semicolons": ("u;y\n1;a\n", Wanted("y"), r"one column, 'u;y': .* --delimiter ';'"),
    "latin1": ("u,y\n1,caf\xe9\n".encode("latin-1"), Wanted("y"), r"not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_csv(tmp_path, case):
    content, wanted, message = BAD_TEXT[case]
    with pytest.raises(BadInput, match=message) as caught:
        read_table(written(tmp_path / "a.csv", content), wanted)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "case", ["nan", "inf", "missing_number", "missing_label", "no_such_label", "no_numeric"]
)
def test_bad_parquet(tmp_path, case):
    content, wanted, message = BAD_TEXT[case]
    arrow = csv.read_csv(
        written(tmp_path / "a.csv", content), convert_options=csv.ConvertOptions(null_values=["", "NA", " "])
    )
    parquet.write_table(arrow, tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=message):
        read_table(tmp_path / "a.parquet", wanted)


def test_parquet_null_and_real_labels(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"u": [1.0, 2.0], "y": ["a", None]}), path)
    with pytest.raises(BadInput, match="row 2 has no label"):
        read_table(path, Wanted("y"))
    parquet.write_table(pa.table({"u": [1.0, 2.0], "y": [0.0, 1.0]}), path)
    with pytest.raises(BadInput, match="holds double; labels are text, integers, booleans"):
        read_table(path, Wanted("y"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match="not readable as Parquet"):
        read_table(path, Wanted("y"))


def test_bad_arrays(tmp_path):
    def refused(message, label="y.npy", X=None, y=None, name="X.npy"):
        np.save(tmp_path / "X.npy", np.eye(3) if X is None else X, allow_pickle=True)
        np.save(tmp_path / "y.npy", np.arange(3) if y is None else y, allow_pickle=True)
        with pytest.raises(BadInput, match=message):
            read_table(tmp_path / name, Wanted(str(tmp_path / label) if label.endswith(".npy") else label))

    refused(r"X\.npy: 3 rows, but .*y\.npy holds 2 labels", y=np.arange(2))
    refused(r"y\.npy: holds Python objects", y=np.array([1, "a", None], dtype=object))
    refused(r"X\.npy: holds Python objects", X=np.array([[1, "a"]], dtype=object))
    refused(r"z\.npy: no such file", label="z.npy")
    refused(r"the labels are a second file, --label y\.npy", label="y")
    refused(r"to be \(rows, columns\); this array has shape \(3,\)", X=np.arange(3.0))
    refused(r"type complex128, not real", X=np.eye(3) * 1j)
    refused(r"row 2, column 'x1' holds nan", X=np.diag([1, np.nan, 1]))
    refused(r"not float64; cast", y=np.arange(3.0))
    refused(r"row 2 has no label", y=np.array(["a", "", "b"]))
    refused(r"label 9223372036854775808 is above 2\*\*63", y=np.array([1, 2, 2**63], dtype=np.uint64))
    refused(r"the label b'\\xff' is not UTF-8", y=np.array([b"a", b"\xff", b"b"]))
    refused(r"the label '\\ud800' is not valid text", y=np.array(["a", "\ud800", "b"]))
    refused(r"one-dimensional", y=np.eye(3, dtype=int))
    refused(r"no such file", name="W.npy")
    (tmp_path / "t.npz").write_bytes(b"PK\x03\x04 not a zip")
    refused(r"t\.npz: not readable as NPZ", name="t.npz", label="y")
    np.savez(tmp_path / "two.npz", a=np.eye(3), b=np.eye(3), y=np.arange(3))
    refused(r"which array holds the features\? Name it with --array", name="two.npz", label="y")
    refused(r"no array 'k' for --label; its arrays are 'a', 'b', 'y'", name="two.npz", label="k")
    np.savez(tmp_path / "o.npz", X=np.eye(3), y=np.array([1, "a", None], dtype=object))
    refused(r"o\.npz: holds Python objects", name="o.npz", label="y")


def test_other_suffixes_and_directories(tmp_path):
    with pytest.raises(
        BadInput, match=r"told by their suffix.*\.csv, \.tsv, \.parquet, \.npz, \.safetensors, \.npy"
    ):
        read_table(written(tmp_path / "a.xlsx", "x"), Wanted("y"))
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(BadInput, match=r"a\.csv: the folder holds no file that is read, which end in one of"):
        read_table(tmp_path / "a.csv", Wanted("y"))


def in_every_format(folder, rows: int) -> dict[str, str]:
    """The same rows in files of all kinds: each with its label."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(rows, 3)), np.sort(rng.integers(4, size=rows))
    arrow = pa.table({f"x{j}": x[:, j] for j in range(3)} | {"y": [f"class {c}" for c in y]})
    parquet.write_table(arrow, folder / "few_groups.parquet")
    parquet.write_table(arrow, folder / "groups.parquet", row_group_size=3)
    encoded = arrow.set_column(3, "y", arrow.column("y").dictionary_encode())
    parquet.write_table(encoded, folder / "encoded.parquet", row_group_size=4)
    csv.write_csv(arrow, folder / "a.csv")
    np.save(folder / "X.npy", np.asfortranarray(x))
    np.save(folder / "y.npy", y[:, None])
    np.savez(folder / "a.npz", X=x, y=y)
    names = ("few_groups.parquet", "groups.parquet", "encoded.parquet", "a.csv", "a.npz")
    return dict.fromkeys(names, "y") | {"X.npy": str(folder / "y.npy")}


@pytest.mark.parametrize("rows", [1, 2, 23])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_make_up_the_whole(tmp_path, monkeypatch, rows, count):
    monkeypatch.setattr(csv_files, "BLOCK", 128)
    monkeypatch.setattr(parquet_files, "MOST_ROWS", 5)
    for name, label in in_every_format(tmp_path, rows).items():
        whole = read_table(tmp_path / name, Wanted(label))
        shares = [read_share(tmp_path / name, Wanted(label), Share(i, count)) for i in range(count)]
        assert [len(share.features) for share in shares] == [
            (i + 1) * rows // count - i * rows // count for i in range(count)
        ]
        start = 0
        for share in shares:
            assert share.start == start or not len(share.features)
            start += len(share.features)
            assert share.features.dtype == whole.features.dtype
            base = share.features.base
            assert (
                isinstance(share.features, np.memmap) or base is None or base.nbytes == share.features.nbytes
            )
        np.testing.assert_array_equal(np.concatenate([share.features for share in shares]), whole.features)
        assert [label for share in shares for label in labels(share)] == labels(whole)


def in_parts(folder, rows: int) -> dict[str, str]:
    """Folders of files with the rows of `in_every_format`: each with its label."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(rows, 3)), np.sort(rng.integers(4, size=rows))
    cuts = [0, rows // 3, rows // 3, rows]  # of unequal length, one without rows
    for kind in ("parquet", "csv", "npz", "npy"):
        (folder / kind).mkdir()
        (folder / kind / "_SUCCESS").touch()
        for i, (low, high) in enumerate(itertools.pairwise(cuts)):
            path = folder / kind / f"part-{i}.{kind}"
            names = pa.array([f"class {c}" for c in y[low:high]], pa.string())
            arrow = {f"x{j}": x[low:high, j] for j in range(3)} | {"y": names}
            if kind == "parquet":
                parquet.write_table(pa.table(arrow), path, row_group_size=3)
            elif kind == "npz":
                np.savez(path, X=x[low:high], y=y[low:high])
            elif kind == "npy":
                np.save(path, x[low:high])
            elif high > low:  # a CSV without rows is an error
                csv.write_csv(pa.table(arrow), path)
    np.save(folder / "labels.npy", y)
    return {"parquet": "y", "csv": "y", "npz": "y", "npy": str(folder / "labels.npy")}


def rows_of(table: Table) -> np.ndarray:
    return np.concatenate([x[:].numpy() for _, x in table.rows.batches()])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_several_files_are_one_table(tmp_path, monkeypatch, count):
    monkeypatch.setattr(csv_files, "BLOCK", 128)
    one = tmp_path / "one"
    one.mkdir()
    whole = read_table(one / "a.csv", Wanted(in_every_format(one, 23)["a.csv"]))
    for folder, label in in_parts(tmp_path, 23).items():
        table = read_table(tmp_path / folder, Wanted(label))
        assert table.feature_names == whole.feature_names
        np.testing.assert_array_equal(rows_of(table), whole.features)
        np.testing.assert_array_equal(table.codes, whole.codes)
        assert len(table.classes) == 4
        files = sorted((tmp_path / folder).glob("part-*"))
        assert read_table(files, Wanted(label)).codes.tolist() == table.codes.tolist()
        shares = [read_parts(files, Wanted(label), Share(i, count), read_share) for i in range(count)]
        assert [share.start for share in shares] == [i * 23 // count for i in range(count)]
        np.testing.assert_array_equal(np.concatenate([rows_of(share) for share in shares]), whole.features)
        names = [each for share in shares for each in share.classes[share.codes].tolist()]
        assert names == labels(table)


def test_parts_that_differ_are_named(tmp_path):
    a, b = written(tmp_path / "a.csv", "x,y\n1,a\n"), written(tmp_path / "b.csv", "x,z,y\n1,2,a\n")
    for files, says in (
        ([a, b], r"b\.csv: has other columns than .*a\.csv: 'z' is a feature in one alone"),
        (
            [a, written(tmp_path / "c.csv", "x,y\n1,a\n2,a\noops,b\n")],
            r"c\.csv: row 3, column 'x' holds 'oops'",
        ),
        ([a, written(tmp_path / "d.tsv", "x\ty\n1\tb\n"), tmp_path / "e.csv"], r"e\.csv: no such file"),
        ([a, tmp_path / "f.parquet"], r"a\.csv and .*f\.parquet are of two formats"),
    ):
        with pytest.raises(BadInput, match=says):
            read_table(files, Wanted("y"))
    for name, classes in (("g", [1, 2]), ("h", ["a", "b"])):
        parquet.write_table(pa.table({"x": [1.0, 2.0], "y": classes}), tmp_path / f"{name}.parquet")
    with pytest.raises(BadInput, match=r"g\.parquet: its labels are numbers, and those of .*h\.parquet text"):
        read_table([tmp_path / "g.parquet", tmp_path / "h.parquet"], Wanted("y"))
    np.save(tmp_path / "u.npy", np.eye(3))
    np.save(tmp_path / "v.npy", np.eye(4)[:, :3])
    np.save(tmp_path / "y.npy", np.arange(5))
    with pytest.raises(BadInput, match=r"7 rows, but .*y\.npy holds 5 labels"):
        read_table([tmp_path / "u.npy", tmp_path / "v.npy"], Wanted(str(tmp_path / "y.npy")))


def test_a_large_parquet_file_is_decoded_when_it_is_used(tmp_path, monkeypatch):
    """Row groups a batch at a time, as often as the rows are gone through; a fault is found beforehand."""
    monkeypatch.setattr(parquet_files, "IN_MEMORY", 100)
    monkeypatch.setattr(parquet_files, "MOST_ROWS", 5)
    in_every_format(tmp_path, 23)
    whole = read_table(tmp_path / "a.npz", Wanted("y"))
    for name in ("few_groups.parquet", "groups.parquet", "encoded.parquet"):
        for i in range(3):
            table = read_share(tmp_path / name, Wanted("y"), Share(i, 3))
            rows = Share(i, 3).of(23)
            assert isinstance(table.features, parquet_files.ParquetRows)
            assert max(len(x) for _, x in table.rows.batches()) <= 5
            for _ in range(2):
                np.testing.assert_array_equal(rows_of(table), whole.features[rows])
            np.testing.assert_array_equal(labels(table), [f"class {c}" for c in whole.codes[rows]])
    bad = pa.table({"x": [1.0] * 11 + [None] + [1.0] * 5, "y": ["a", "b"] * 8 + ["a"]})
    parquet.write_table(bad, tmp_path / "bad.parquet", row_group_size=4)
    with pytest.raises(BadInput, match=r"bad\.parquet: row 12, column 'x' is missing"):
        read_table(tmp_path / "bad.parquet", Wanted("y"))
    table = read_table(tmp_path / "groups.parquet", Wanted("y"))
    (tmp_path / "groups.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match=r"groups\.parquet: not readable as Parquet"):
        rows_of(table)


@pytest.mark.parametrize("share", [Share(), Share(1, 2), Share(2, 3)], ids=str)
def test_rows_are_counted_from_the_files_first(tmp_path, monkeypatch, share):
    monkeypatch.setattr(csv_files, "BLOCK", 64)
    monkeypatch.setattr(parquet_files, "MOST_ROWS", 5)
    x = np.arange(20.0)
    x[17] = np.inf
    np.save(tmp_path / "X.npy", x[:, None])
    np.savez(tmp_path / "a.npz", X=x[:, None], y=np.array(["a"] * 18 + [" ", "a"]))
    np.savez(tmp_path / "b.npz", X=np.ones((20, 1)), y=np.array(["a"] * 18 + [" ", "a"]))
    parquet.write_table(pa.table({"x0": x, "y": ["a"] * 20}), tmp_path / "a.parquet")
    nulls = pa.table({"x0": [None if i == 17 else 1.0 for i in range(20)], "y": ["a"] * 20})
    parquet.write_table(nulls, tmp_path / "b.parquet", row_group_size=3)
    unlabelled = pa.table({"x0": np.ones(20), "y": ["a"] * 18 + [None, "a"]})
    parquet.write_table(unlabelled, tmp_path / "c.parquet", row_group_size=3)
    text = "x0,y\n" + "1.5,a\n" * 17
    for name, rest in (("a", "nan,a\n"), ("b", "oops,a\n"), ("c", "1.5,a\n1.5, \n")):
        written(tmp_path / f"{name}.csv", text + rest + "1.5,a\n")
    for name, message in (
        ("X.npy", "row 18, column 'x0' holds inf"),
        ("a.npz", "row 18, column 'x0' holds inf"),
        ("b.npz", "row 19 has no label"),
        ("a.parquet", "row 18, column 'x0' holds inf"),
        ("b.parquet", "row 18, column 'x0' is missing"),
        ("c.parquet", "row 19 has no label"),
        ("a.csv", "row 18, column 'x0' is missing"),
        ("b.csv", "row 18, column 'x0' holds 'oops'"),
        ("c.csv", "row 19 has no label"),
    ):
        label = None if name == "X.npy" else "y"
        with pytest.raises(BadInput, match=rf"{name}.*: {message}"):
            read_share(tmp_path / name, Wanted(label), share)
