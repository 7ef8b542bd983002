"""Tensors of a safetensors file as features, labels and weights: every type, mapped, by name."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from running import run
from xent._processes.group import Share
from xent.data import Wanted, read_table
from xent.data.layout import Layout
from xent.data.read import read_share
from xent.data.rows import row_source
from xent.errors import BadInput

X = torch.from_numpy(np.random.default_rng(0).integers(0, 120, (40, 5))).float() / 4
Y = torch.arange(40) % 3
TYPES = ["float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"]


def write(path, **tensors):
    safetensors.torch.save_file(tensors, path)
    return path


def dense(table):
    parts = [batch[:] for _, batch in row_source(table.features).batches()]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_is_read(tmp_path, dtype):
    x = X.to(getattr(torch, dtype))
    path = write(tmp_path / "a.safetensors", train=x, y=Y)
    table = read_table(path, Wanted("y", layout=Layout(array="train")))
    assert torch.equal(dense(table).double(), x.double())
    assert (table.codes == Y.numpy()).all()
    assert table.feature_names == ("x0", "x1", "x2", "x3", "x4")
    if "float" in dtype:
        assert dense(table).dtype == x.dtype  # float16 and bfloat16 stay so until they are used
    columns = read_table(path, Wanted("y", ["x4", "x1"], layout=Layout(array="train")))
    assert torch.equal(dense(columns).double(), x[:, [4, 1]].double())
    parts = [read_share(path, Wanted("y", layout=Layout(array="train")), Share(rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat([dense(part) for part in parts]).double(), x.double())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_features_lie_in_the_file(tmp_path, dtype):
    table = read_table(write(tmp_path / "a.safetensors", X=X.to(getattr(torch, dtype)), y=Y), Wanted("y"))
    assert not row_source(table.features).in_memory


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_and_masses_are_of_any_type(tmp_path, dtype):
    kind = getattr(torch, dtype)
    path = write(tmp_path / "a.safetensors", X=X, y=Y, w=(Y + 0.5).to(kind), p=torch.eye(3)[Y].to(kind))
    assert read_table(path, Wanted("y", weight="w")).weight.tolist() == (Y + 0.5).tolist()
    soft = read_table(path, Wanted(None, soft=["p"], layout=Layout(array="X"))).soft
    np.testing.assert_array_equal(soft, np.eye(3)[Y])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_number_that_is_none_is_named(tmp_path, dtype, value):
    x = X.to(getattr(torch, dtype)).clone()
    x[7, 2] = value
    with pytest.raises(BadInput, match="row 8, column 'x2'"):
        read_table(write(tmp_path / "a.safetensors", X=x, y=Y), Wanted("y"))


BAD = {
    "type": ({"X": X.to(torch.float8_e4m3fn), "y": Y}, r"'X' is of type F8_E4M3, .* save it as float16"),
    "complex": ({"X": X.to(torch.complex64), "y": Y}, "'X' is of type C64"),
    "dimensions": ({"X": X[:, 0].contiguous(), "y": Y}, r"\(rows, columns\); this array has shape \(40,\)"),
    "rows": ({"X": X, "y": Y[:30]}, "40 rows, but .* 30 labels"),
    "no rows": ({"X": X[:0], "y": Y[:0]}, "no rows"),
    "no columns": ({"X": X[:, :0].contiguous(), "y": Y}, r"shape \(40, 0\)"),
    "labels": ({"X": X, "y": X[:, 0].to(torch.bfloat16)}, "cast them first"),
    "which": ({"a": X, "b": X.clone(), "y": Y}, "--array"),
    "no label": ({"X": X}, "no array 'y' for --label"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(tmp_path, case):
    tensors, message = BAD[case]
    with pytest.raises(BadInput, match=message):
        read_table(write(tmp_path / "a.safetensors", **tensors), Wanted("y"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fit_and_predict(tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    x = (X + 200 * torch.nn.functional.one_hot(Y, 5)).to(getattr(torch, dtype))
    path = write(tmp_path / "a.safetensors", emb=x, y=Y)
    same = write(tmp_path / "b.safetensors", emb=x.float(), y=Y)
    for number, file in enumerate((path, same)):
        run(
            "fit", file, "--array", "emb", "--label", "y", "--validation", 0, "--out", f"m{number}", "--quiet"
        )
        model = f"m{number}/model.safetensors"
        run("predict", model, file, "--array", "emb", "-o", f"p{number}.csv")
    first, second = (pd.read_csv(f"p{n}.csv") for n in (0, 1))
    np.testing.assert_allclose(first[["0", "1", "2"]], second[["0", "1", "2"]], rtol=1e-3, atol=1e-5)
    assert first.prediction.tolist() == Y.tolist()
