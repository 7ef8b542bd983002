"""A model comes back as it was written, or the file is refused in one line; a file is whole or absent."""

from __future__ import annotations

import dataclasses
import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save as to_bytes

from xent._util.atomic_write import atomic_write, check_writable
from xent.data import model_file
from xent.data.labels import kind_of
from xent.data.model_file import Model
from xent.errors import BadInput


def example(classes=("a", "b", "c"), dtype=np.float64) -> Model:
    rng = np.random.default_rng(0)
    rows = 1 if len(classes) == 2 else len(classes)
    return Model(
        rng.normal(size=(rows, 4)).astype(dtype),
        rng.normal(size=rows).astype(dtype),
        rng.normal(size=4).astype(dtype),
        rng.uniform(1, 2, size=4).astype(dtype),
        np.array(classes),
        ("u", "é", 'a "b"', "w"),
        "kind",
        {"l2": 1.0},
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "classes",
    [("a", "b", "c"), ("no", "yes"), ("10", "9"), ("False", "True"), (-1, 3, 7), (False, True)],
    ids=str,
)
def test_round_trip(tmp_path, classes, dtype):
    path = tmp_path / "m.safetensors"
    model = dataclasses.replace(example(classes, dtype), kind=kind_of(np.array(classes)), width=7)
    model_file.save(model, path)
    back = model_file.load(path)
    assert (back.kind, back.width) == (model.kind, 7)
    assert back.fingerprint == model.fingerprint
    for other in (dataclasses.replace(model, width=8), dataclasses.replace(model, kind="text", width=None)):
        assert other.fingerprint != model.fingerprint
    for name in ("weight", "bias", "mean", "scale", "classes"):
        np.testing.assert_array_equal(getattr(back, name), getattr(model, name))
        assert getattr(back, name).dtype == getattr(model, name).dtype
    assert (back.feature_names, back.label_name, back.settings) == (
        ("u", "é", 'a "b"', "w"),
        "kind",
        {"l2": 1.0},
    )


def test_the_same_model_is_the_same_bytes(tmp_path):
    for name in "ab":
        model_file.save(example(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_two_classes_are_logits_0_s():
    model, x = example(("no", "yes")), np.random.default_rng(1).normal(size=(5, 4))
    z = model.logits(x)
    assert (z[:, 0] == 0).all()
    p = np.exp(model.log_proba(x))
    np.testing.assert_allclose(p[:, 1], 1 / (1 + np.exp(-z[:, 1])), rtol=1e-14)
    assert np.isfinite(model.log_proba(1e6 * x)).all()


def test_truncated_anywhere_is_refused(tmp_path):
    path, cut = tmp_path / "m.safetensors", tmp_path / "cut.safetensors"
    model_file.save(example(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(BadInput, match=r"cut\.safetensors: "):
            model_file.load(cut)


def changed(path, change_about=None, change_tensors=None) -> None:
    """Write the example with its metadata or tensors changed."""
    model_file.save(example(), path)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["xent"])
        tensors = {name: file.get_tensor(name) for name in ("weight", "bias", "mean", "scale")}
    if change_about:
        change_about(about)
    if change_tensors:
        change_tensors(tensors)
    path.write_bytes(to_bytes(tensors, metadata={"xent": json.dumps(about)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"change_about": lambda a: a.update(version=3)}, "format version 3.*upgrade xent"),
        ({"change_about": lambda a: a.update(version=-3)}, "not a model that `xent fit` wrote"),
        ({"change_about": lambda a: a.update(version=True)}, "not a model that `xent fit` wrote"),
        ({"change_about": lambda a: a.update(label=7)}, "not a model that `xent fit` wrote"),
        ({"change_about": lambda a: a.update(features="uvwx")}, "not a model that `xent fit` wrote"),
        (
            {"change_about": lambda a: a.update(features=list("uvwu"))},
            "feature 'u' is there 2 times.*damaged",
        ),
        ({"change_about": lambda a: a["classes"].update(values=list("aba"))}, "class 'a' is there 2 times"),
        (
            {"change_about": lambda a: a.update(classes={"type": "int", "values": [0, 1, 2**70]})},
            "not a model that `xent fit` wrote",
        ),
        (
            {"change_about": lambda a: a.update(classes={"type": "str", "values": ["a", "b", "\ud800"]})},
            "not a model that `xent fit` wrote",
        ),
        (
            {"change_about": lambda a: a["classes"].update(values=["a", "b", "z" * 70_000])},
            r"the label 'z+… takes 70,000 bytes",
        ),
        (
            {"change_about": lambda a: a["features"].__setitem__(0, "z" * 70_000)},
            r"feature 'z+… takes 70,000",
        ),
        ({"change_about": lambda a: a["classes"].update(kind="whole")}, "not a model that `xent fit` wrote"),
        ({"change_about": lambda a: a["classes"].update(kind=3)}, "not a model that `xent fit` wrote"),
        ({"change_about": lambda a: a.update(classes=["a", "b", "c"])}, "not a model that `xent fit` wrote"),
        ({"change_about": lambda a: a.update(width=3)}, "not a model that `xent fit` wrote"),
        ({"change_about": lambda a: a.update(width="4")}, "not a model that `xent fit` wrote"),
        ({"change_about": lambda a: a.update(format="else")}, "not a model that `xent fit` wrote"),
        ({"change_about": lambda a: a.pop("classes")}, "not a model that `xent fit` wrote"),
        ({"change_about": lambda a: a["classes"].update(type="int")}, "not a model that `xent fit` wrote"),
        ({"change_about": lambda a: a["features"].pop()}, "weight is float64 .*damaged"),
        ({"change_about": lambda a: a["classes"]["values"].pop()}, "weight is float64 .*damaged"),
        ({"change_tensors": lambda t: t.pop("mean")}, "not a model that `xent fit` wrote"),
        ({"change_tensors": lambda t: t.update(bias=np.full(3, np.nan))}, "bias holds nan or inf"),
        ({"change_tensors": lambda t: t.update(scale=np.zeros(4))}, "scale that is not positive"),
        ({"change_tensors": lambda t: t.update(bias=np.zeros(3, int))}, "bias is int64"),
    ],
)
def test_foreign_or_damaged_is_refused(tmp_path, change, message):
    changed(tmp_path / "m.safetensors", **change)
    with pytest.raises(BadInput, match=message):
        model_file.load(tmp_path / "m.safetensors")


def test_deeply_nested_metadata_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(to_bytes({"weight": np.eye(2)}, metadata={"xent": "[" * 100_000 + "]" * 100_000}))
    with pytest.raises(BadInput, match="not a model that `xent fit` wrote"):
        model_file.load(path)


def test_a_model_that_would_be_refused_is_not_written(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(BadInput, match=r"not written, because class 'z+… takes 70,000 bytes"):
        model_file.save(example(("a", "b", "z" * 70_000)), path)
    with pytest.raises(BadInput, match="not written, because bias holds nan or inf"):
        model_file.save(dataclasses.replace(example(), bias=np.full(3, np.inf)), path)
    assert not path.exists()


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(BadInput, match="no such model file"):
        model_file.load(path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(BadInput, match="not a safetensors file"):
        model_file.load(path)
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{" + bytes(100))
    with pytest.raises(BadInput, match="claims 1099511627776 bytes"):
        model_file.load(path)
    path.write_bytes(struct.pack("<Q", 1000) + b"{" + bytes(100))
    with pytest.raises(BadInput, match="ends inside its header; it is truncated"):
        model_file.load(path)
    path.write_bytes(to_bytes({"weight": np.eye(2)}))
    with pytest.raises(BadInput, match="not a model that `xent fit` wrote"):
        model_file.load(path)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_check_writable_leaves_no_trace(tmp_path):
    check_writable(tmp_path / "new" / "deeper")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="file is a file, not a directory"):
        check_writable(tmp_path / "file" / "out")
    with pytest.raises(BadInput, match="cannot write to /proc/out"):
        check_writable(type(tmp_path)("/proc/out"))
