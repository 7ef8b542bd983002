"""A file format made outside the package: read through the public function and the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from contributing import run_example
from xent._processes.group import Share
from xent.cli.commands import cli
from xent.data import Wanted, _registry, read_table, register_reader
from xent.data.read import read_share
from xent.errors import BadInput


@pytest.fixture(autouse=True)
def json_lines(monkeypatch):
    """Register the worked example, for one test."""
    monkeypatch.setattr(_registry, "_FORMATS", dict(_registry._FORMATS))
    run_example("A file format")


def flowers(path, rows=30):
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({"u": float(rng.normal() + c), "note": "x", "v": c, "kind": "abc"[c]})
        for c in (np.arange(rows) % 3).tolist()
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_worked_example_reads_a_table(tmp_path):
    table = read_table(flowers(tmp_path / "f.jsonl"), Wanted("kind"))
    assert table.feature_names == ("u", "v")
    assert table.skipped == ("note",)
    assert table.classes.tolist() == ["a", "b", "c"]
    assert table.codes.tolist() == [0, 1, 2] * 10
    assert table.features[:, 1].tolist() == [0, 1, 2] * 10


def test_shares_of_it_are_the_whole(tmp_path):
    path = flowers(tmp_path / "f.jsonl", 31)
    whole = read_table(path, Wanted("kind"))
    shares = [read_share(path, Wanted("kind"), Share(i, 4)) for i in range(4)]
    assert [share.start for share in shares] == [0, 7, 15, 23]
    np.testing.assert_array_equal(np.concatenate([share.features for share in shares]), whole.features)


def test_fit_and_predict_read_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flowers(tmp_path / "f.jsonl")
    for arguments in (
        ["fit", "f.jsonl", "--label", "kind", "--out", "m"],
        ["predict", "m/model.safetensors", "f.jsonl", "-o", "p.csv"],
    ):
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output
    assert "against 'kind': accuracy 100.00 %" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ('{"u": 1, "kind": "a"}\n{"u": ', "not readable as JSON lines"),
        ('{"v": 1, "kind": "a"}', "no column 'u' (--features)"),
        ('{"u": 1, "kind": "a"}\n{"u": null, "kind": "a"}', "row 2, column 'u' is missing"),
        ('{"u": 1, "kind": "a"}\n{"u": 2, "kind": null}', "row 2 has no label in column 'kind'"),
    ],
)
def test_what_is_wrong_with_a_file_is_bad_input(tmp_path, text, message):
    path = tmp_path / "f.jsonl"
    path.write_text(text)
    with pytest.raises(BadInput) as raised:
        read_table(path, Wanted("kind", features=["u"]))
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_messages_list_the_suffixes(tmp_path):
    (tmp_path / "f.xlsx").write_bytes(b"PK")
    with pytest.raises(
        BadInput, match=r"one of \.csv, \.tsv, \.parquet, \.npz, \.safetensors, \.npy, \.jsonl$"
    ):
        read_table(tmp_path / "f.xlsx", Wanted("kind"))


def test_a_suffix_is_taken_once():
    with pytest.raises(ValueError, match=r"files called \.csv have a reader already"):
        register_reader(".csv", lambda path, wanted, share: None)
