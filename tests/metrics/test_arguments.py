"""Every form of array, every kind of label, every way of naming the positive one."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from predictions import objects, problem
from xent import metrics

INF = math.inf


FORMS = {
    "list": lambda p: p.tolist(),
    "tensor": lambda p: torch.from_numpy(p.copy()),
    "differentiable tensor": lambda p: torch.from_numpy(p.copy()).requires_grad_(),
    "data frame": pd.DataFrame,
    "data frame of two types": lambda p: pd.DataFrame(p).astype({0: object}),
    "columns first": np.asfortranarray,
    "every second row": lambda p: np.repeat(p, 2, axis=0)[::2],
    "backwards": lambda p: p[::-1].copy()[::-1],
    "big-endian": lambda p: p.astype(">f8"),
    "long double": lambda p: p.astype(np.longdouble),
    "transposed tensor": lambda p: torch.from_numpy(p.T.copy()).t(),
}


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_array(form):
    y, p = problem()
    s = np.linspace(0, 1, len(y))
    expected = metrics.log_loss(y, p, sample_weight=s)
    assert metrics.log_loss(y, FORMS[form](p), sample_weight=s) == pytest.approx(expected, rel=1e-15)
    weight = FORMS[form](s[:, None])
    weight = (
        weight[0] if form.startswith("data frame") else np.ravel(weight) if form == "list" else weight[:, 0]
    )
    assert metrics.log_loss(y, p, sample_weight=weight) == pytest.approx(expected, rel=1e-15)
    assert metrics.brier_score(y, FORMS[form](p)) == pytest.approx(metrics.brier_score(y, p), rel=1e-15)


def test_read_only_arrays_are_read_in_silence(monkeypatch):
    """torch warns of them, once a process."""
    from_numpy = torch.from_numpy

    def writeable(array):
        assert array.flags.writeable
        return from_numpy(array)

    monkeypatch.setattr(torch, "from_numpy", writeable)
    y, p = problem()
    p.flags.writeable = y.flags.writeable = False
    assert metrics.log_loss(y, p, sample_weight=p[:, 0]) > 0


def test_nothing_of_the_caller_is_changed():
    y, p = problem()
    s = p[:, 0].copy()
    before = y.copy(), p.copy(), s.copy()
    for metric in (metrics.log_loss, metrics.brier_score, metrics.d2_log_loss, metrics.log_loss_per_class):
        metric(y, p, sample_weight=s)
    metrics.brier_score(y > 1, p[:, 0], sample_weight=s)
    for now, then in zip((y, p, s), before, strict=True):
        assert np.array_equal(now, then)


WORDS = np.array(["ant", "bee", "cow", "dog"])
LABELS = {
    "0..C−1": lambda y: y,
    "int8": lambda y: y.astype(np.int8),
    "uint8": lambda y: y.astype(np.uint8),
    "from 5": lambda y: y + 5,
    "negative": lambda y: y - 100,
    "int8 over its range": lambda y: np.array([-128, -1, 0, 127], dtype=np.int8)[y],
    "far apart": lambda y: y * 10**9 - 10**9,
    "at the ends of int64": lambda y: np.array([-(2**63), -(2**62), 0, 2**63 - 1])[y],
    "side by side at the end of int64": lambda y: y + (-(2**63)),
    "beyond int64": lambda y: y.astype(np.uint64) + np.uint64(2**63),
    "whole floats": lambda y: y.astype(np.float32),
    "half floats": lambda y: y.astype(np.float16) - 1,
    "strings": lambda y: WORDS[y],
    "objects": lambda y: WORDS[y].astype(object),
    "bytes": lambda y: WORDS[y].astype("S"),
    "list": lambda y: WORDS[y].tolist(),
    "series": lambda y: pd.Series(WORDS[y]),
    "categories": lambda y: pd.Categorical(WORDS[y]),
    "nullable integers": lambda y: pd.array(y, dtype="Int64"),
    "tensor": lambda y: torch.from_numpy(y.copy()),
    "int32 tensor": lambda y: torch.from_numpy(y.copy()).int(),
    "bfloat16 tensor": lambda y: torch.from_numpy(y.copy()).bfloat16(),
    "a column": lambda y: y[:, None],
    "one-hot": lambda y: np.eye(4)[y],
    "one-hot bools": lambda y: torch.eye(4, dtype=torch.bool)[torch.from_numpy(y.copy())],
    "tuples": lambda y: objects([("a", int(v)) for v in y]),
}


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("kind", LABELS)
def test_every_kind_of_label(kind):
    y, p = problem()
    labels = LABELS[kind](y)
    each = metrics.log_loss_per_class(labels, p)
    assert metrics.log_loss(labels, p) == metrics.log_loss(y, p)
    assert each.weight.tolist() == np.bincount(y).tolist()
    assert metrics.label_entropy(labels) == metrics.label_entropy(y)
    turned = [2, 0, 3, 1]
    names = each.labels[turned]
    assert metrics.log_loss(
        labels, p[:, turned] if "hot" not in kind else p, labels=names
    ) == metrics.log_loss(y, p)
    if kind in ("strings", "objects", "bytes", "whole floats", "from 5", "int8", "0..C−1"):
        assert np.array_equal(each.labels, np.unique(labels))
        assert each.labels.dtype.kind == np.unique(labels).dtype.kind or kind == "objects"


@pytest.mark.parametrize(
    "y", [[False, True, True], torch.tensor([False, True, True]), ["n", "y", "y"], [3, 9, 9]]
)
@pytest.mark.parametrize("column", [False, True])
def test_one_column_is_the_second_label(y, column):
    p = np.array([0.2, 0.6, 0.7])
    expected = -(math.log(0.8) + math.log(0.6) + math.log(0.7)) / 3
    assert metrics.log_loss(y, p[:, None] if column else p) == pytest.approx(expected, rel=1e-15)
    assert metrics.log_loss(y, np.stack([1 - p, p], 1)) == pytest.approx(expected, rel=1e-15)


def test_labels_of_other_types_are_matched_by_value():
    p = [[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]
    expected = metrics.log_loss([0, 1], p, labels=[0, 1, 2])
    assert metrics.log_loss([0.0, 1.0], p, labels=[0, 1, 2]) == expected
    assert metrics.log_loss([0, 1], p, labels=[0.0, 1.0, 2.0]) == expected
    assert metrics.log_loss([False, True], p, labels=torch.arange(3)) == expected
    mixed = objects(["a", 1])
    assert metrics.log_loss(mixed, p, labels=objects(["a", 1, None])) == expected


@pytest.mark.parametrize("scale", [True, False, "auto"])
def test_brier_scale(scale):
    y, p = problem()
    two, q = (y > 1).astype(int), p[:, 0]
    half = {True: 0.5, False: 1.0}
    many = ((p - np.eye(4)[y]) ** 2).sum(1).mean()
    few = 2 * ((q - two) ** 2).mean()
    assert metrics.brier_score(y, p, scale_by_half=scale) == pytest.approx(many * half.get(scale, 1.0))
    assert metrics.brier_score(two, q, scale_by_half=scale) == pytest.approx(few * half.get(scale, 0.5))


@pytest.mark.parametrize(
    ("y", "options", "positive"),
    [
        ([0, 1], {}, 1),
        ([-1, 1], {}, 1),
        ([3, 5], {}, 1),
        ([1, 0], {"pos_label": 0}, 1),
        (["b", "a"], {"pos_label": "a"}, 1),
        (["b", "a"], {"labels": ["b", "a"]}, 1),
        ([0, 0], {}, None),
        ([-1, -1], {}, None),
        ([False, False], {}, None),
        ([1, 1], {}, slice(None)),
        ([7, 7], {}, slice(None)),
        (["a", "a"], {"pos_label": "b"}, None),
        (["a", "a"], {"labels": ["a", "b"]}, None),
    ],
)
def test_brier_positive_label(y, options, positive):
    p, t = np.array([0.3, 0.6]), np.zeros(2)
    if positive is not None:
        t[positive] = 1
    assert metrics.brier_score(y, p, **options) == pytest.approx(((p - t) ** 2).mean(), rel=1e-15)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    y, p = problem(1000)
    s = torch.rand(1000, dtype=torch.float64)
    for metric in (metrics.log_loss, metrics.brier_score, metrics.d2_log_loss):
        for form in (torch.Tensor.cpu, torch.Tensor.cuda):
            there = metric(form(torch.from_numpy(y)), torch.from_numpy(p).cuda(), sample_weight=form(s))
            assert there == pytest.approx(metric(y, p, sample_weight=s), rel=1e-13)
