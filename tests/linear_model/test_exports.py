"""Exports give the probabilities and labels of the estimator, whatever its classes, types and temperature."""

from __future__ import annotations

import json
import pickle
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import xent
from xent.errors import BadInput, MissingExtra
from xent.linear_model.softmax_regression import SoftmaxRegression

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

N, D = 60, 4
NAMES = {
    "text": ["rot", "grün", "", "a b", "b", "c", "d"],
    "objects": np.array(["zz", "y", "x", "w", "v", "u", "t"], dtype=object),
    "whole": [7, -3, 0, 2**40, 5, 6, 8],
    "small": np.array([3, 1, 2, 0, 4, 5, 6], dtype=np.uint8),
    "float": [0.0, 2.0, 1.0, 7.0, 4.0, 5.0, 6.0],
    "bool": [False, True],
}
ONNX_TYPE = {
    "text": "tensor(string)",
    "objects": "tensor(string)",
    "whole": "tensor(int64)",
    "small": "tensor(int64)",
    "float": "tensor(double)",
    "bool": "tensor(bool)",
}


class Subclass(SoftmaxRegression):
    """A subclass with the estimator's parameters."""


class Fewer(SoftmaxRegression):
    """A subclass whose parameters are none of the estimator's."""

    def __init__(self) -> None:
        super().__init__(2.0)

    def _parameters(self):
        return SoftmaxRegression(2.0)._parameters()


ESTIMATORS = {
    "plain": SoftmaxRegression,
    "flat": lambda: SoftmaxRegression(fit_intercept=False, C=np.inf, max_iter=3),
    "cv": lambda: xent.SoftmaxRegressionCV(Cs=[0.1, 1.0], cv=2),
    "subclass": Subclass,
    "fewer": Fewer,
}
CASES = [
    (kind, classes, dtype, "plain", temperature)
    for kind in NAMES
    for classes in (2, 3, 7)
    for dtype in (np.float32, np.float64)
    for temperature in (None, 2.5)
    if classes <= len(NAMES[kind])
] + [
    ("text", classes, np.float64, estimator, temperature)
    for classes in (2, 3)
    for estimator in ESTIMATORS
    for temperature in (None, 0.3)
    if estimator != "plain"
]


def rows(classes, dtype=np.float64):
    """Features that a float32 holds, and positions of classes, each one occurring."""
    generator = np.random.default_rng(classes)
    X = generator.normal(size=(N, D)).astype(np.float32).astype(dtype)
    return X, np.r_[np.arange(classes), generator.integers(classes, size=N - classes)]


def fitted(case):
    kind, classes, dtype, estimator, temperature = case
    X, at = rows(classes, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some stop early
        model = ESTIMATORS[estimator]().fit(X, np.array(NAMES[kind])[at])
    assert model.coef_.dtype == dtype
    if temperature is not None:
        model.temperature_ = temperature
    return model, X


def expected(model, X):
    """softmax((W x + b)/T) from the fitted numbers, (N, C) float64, and the labels."""
    z = X.astype(np.float64) @ model.coef_.T.astype(np.float64) + model.intercept_
    z = np.concatenate([np.zeros_like(z), z], axis=1) if z.shape[1] == 1 else z
    p = softmax(z / getattr(model, "temperature_", 1.0), axis=1)
    return p, model.classes_[z.argmax(axis=1)]


def rounding(dtype):
    return 1e-13 if dtype == np.float64 else 1e-5


def run(path, X):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    p, label = session.run(["probabilities", "label"], {"features": X.astype(np.float32)})
    return session, p, label


cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2].__name__}-{c[3]}-{c[4]}")


@cases
def test_a_layer_has_the_same_probabilities(case):
    model, X = fitted(case)
    layer = model.to_torch()
    assert type(layer) is torch.nn.Linear
    assert layer.weight.shape == (len(model.classes_), D)
    assert (layer.in_features, layer.out_features) == (D, len(model.classes_))
    p, labels = expected(model, X)
    with torch.no_grad():
        z = layer(torch.from_numpy(X))
    assert z.numpy().dtype == model.coef_.dtype
    np.testing.assert_allclose(z.softmax(1).numpy(), p, rtol=0, atol=rounding(model.coef_.dtype))
    assert (model.classes_[z.argmax(1).numpy()] == labels).all()
    if len(model.classes_) == 2:
        assert not layer.weight[0].any()
        assert layer.bias[0] == 0


@cases
def test_a_pipeline_has_the_same_probabilities(case):
    model, X = fitted(case)
    pipeline = model.to_sklearn()
    (peer,) = (step for _, step in pipeline.steps)
    assert type(peer) is LogisticRegression
    p, labels = expected(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(pipeline.predict_proba(X), p, rtol=0, atol=rounding(model.coef_.dtype))
        found = pipeline.predict(X)
    assert found.dtype == model.classes_.dtype
    assert (found == labels).all()
    assert peer.coef_.shape == model.coef_.shape
    assert peer.coef_.dtype == model.coef_.dtype
    assert peer.intercept_.shape == model.intercept_.shape
    assert peer.n_iter_.tolist() == [model.n_iter_]
    assert pipeline.n_features_in_ == peer.n_features_in_ == D
    assert (pickle.loads(pickle.dumps(pipeline)).predict(X) == labels).all()


@cases
def test_a_file_has_the_same_probabilities(case, tmp_path):
    model, X = fitted(case)
    path = tmp_path / "model.onnx"
    model.to_onnx(path)
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    session, found, label = run(path, X)
    p, labels = expected(model, X)
    np.testing.assert_allclose(found, p, rtol=0, atol=1e-5)
    assert found.dtype == np.float32
    assert session.get_outputs()[1].type == ONNX_TYPE[case[0]]
    assert label.tolist() == labels.tolist()
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == model.classes_.tolist()
    assert [put.name for put in session.get_inputs()] == ["features"]
    assert session.get_inputs()[0].shape == ["N", D]
    assert session.get_outputs()[0].shape == ["N", len(model.classes_)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_predict_proba_is_what_they_have(tmp_path):
    """The estimator's own, where it has no temperature."""
    for classes in (2, 3):
        model, X = fitted(("text", classes, np.float64, "plain", None))
        p = model.predict_proba(X)
        np.testing.assert_allclose(model.to_sklearn().predict_proba(X), p, rtol=0, atol=1e-15)
        logits = model.to_torch()(torch.from_numpy(X))
        np.testing.assert_allclose(logits.softmax(1).detach(), p, rtol=0, atol=1e-14)
        model.to_onnx(str(tmp_path / "model.onnx"))
        np.testing.assert_allclose(run(tmp_path / "model.onnx", X)[1], p, rtol=0, atol=1e-6)


def test_soft_labels_have_columns_for_classes(tmp_path):
    X, at = rows(3)
    model = SoftmaxRegression().fit(X, np.eye(3)[at] * 0.8 + 0.1)
    model.to_onnx(tmp_path / "model.onnx")
    _, p, label = run(tmp_path / "model.onnx", X)
    np.testing.assert_allclose(p, model.predict_proba(X), atol=1e-5)
    assert (label == model.predict(X)).all()
    assert (model.to_sklearn().predict(X) == label).all()


def test_exports_share_nothing_with_the_estimator():
    for classes in (2, 3):
        model, X = fitted(("whole", classes, np.float64, "plain", None))
        before = pickle.dumps(model)
        layer = model.to_torch()
        layer(torch.from_numpy(X)).square().sum().backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.sub_(parameter.grad)
        peer = model.to_sklearn()[-1]
        for array in (peer.coef_, peer.intercept_, peer.classes_):
            array += 1
        assert pickle.dumps(model) == before


def test_a_layer_draws_no_random_numbers_and_can_be_trained():
    model, X = fitted(("whole", 3, np.float32, "plain", None))
    state = torch.get_rng_state()
    with torch.inference_mode():
        layer = model.to_torch()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in layer.parameters())
    layer(torch.from_numpy(X)).sum().backward()
    assert layer.weight.grad is not None
    copy = torch.nn.Linear(D, 3)
    copy.load_state_dict(layer.state_dict())


def test_torch_s_default_type_changes_nothing():
    model, _ = fitted(("whole", 3, np.float64, "plain", None))
    torch.set_default_dtype(torch.float16)
    try:
        assert model.to_torch().weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_names_of_features_are_kept(tmp_path):
    X, at = rows(3)
    frame = pd.DataFrame(X, columns=["länge", "b", "c", "d"])
    model = SoftmaxRegression().fit(frame, at)
    pipeline = model.to_sklearn()
    assert pipeline.feature_names_in_.tolist() == list(frame)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (pipeline.predict(frame) == model.predict(frame)).all()
    with pytest.raises(ValueError, match="feature names"):
        pipeline.predict(frame.rename(columns={"b": "other"}))
    model.to_onnx(tmp_path / "model.onnx")
    session, *_ = run(tmp_path / "model.onnx", X)
    assert json.loads(session.get_modelmeta().custom_metadata_map["features"]) == list(frame)
    SoftmaxRegression().fit(X, at).to_onnx(tmp_path / "model.onnx")
    assert "features" not in run(tmp_path / "model.onnx", X)[0].get_modelmeta().custom_metadata_map


def test_an_encoder_goes_before_a_pipeline():
    X, at = rows(3)
    scaler = StandardScaler().fit(100 * X + 3)
    model = SoftmaxRegression().fit(scaler.transform(100 * X + 3), at)
    whole = make_pipeline(scaler, *(step for _, step in model.to_sklearn().steps))
    assert (whole.predict(100 * X + 3) == model.predict(scaler.transform(100 * X + 3))).all()


def test_a_pipeline_fitted_again_has_the_same_objective():
    X, at = rows(3)
    for model, C in ((SoftmaxRegression(0.05, tol=1e-9), 0.05), (xent.SoftmaxRegressionCV([0.3, 3]), None)):
        model.fit(X, at)
        pipeline = model.to_sklearn()
        assert (model.C_ if C is None else C) == pipeline[-1].C
        again = clone(pipeline).set_params(logisticregression__tol=1e-10).fit(X, at)
        atol = 2e-2 if C is None else 1e-4
        np.testing.assert_allclose(again.predict_proba(X), model.predict_proba(X), atol=atol)


def test_files_are_for_old_runtimes_and_the_same_each_time(tmp_path):
    model, _ = fitted(("text", 3, np.float64, "plain", None))
    model.to_onnx(tmp_path / "a.onnx")
    model.to_onnx(tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    written = onnx.load(tmp_path / "a.onnx")
    assert written.ir_version <= 7
    assert [(opset.domain, opset.version) for opset in written.opset_import] == [("", 13)]


def test_labels_are_right_where_probabilities_round_to_one_number(tmp_path):
    """Of two logits 3e-8 apart in one ulp of p, and of saturated ones: the larger logit has the label."""
    model, _ = fitted(("whole", 3, np.float32, "plain", None))
    model.coef_ = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]], dtype=np.float32)
    model.intercept_ = np.zeros(3, dtype=np.float32)
    x = np.float32([[2e-8, 1e-8, 0, 0], [1e-8, 2e-8, 0, 0], [0, 0, 0, 0], [200, 201, 0, 0]])
    model.to_onnx(tmp_path / "model.onnx")
    _, _, label = run(tmp_path / "model.onnx", x)
    assert label.tolist() == model.classes_[[1, 2, 0, 2]].tolist() == model.predict(x).tolist()


# Refusals


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_not_fitted(estimator, tmp_path):
    model = ESTIMATORS[estimator]()
    for export in (model.to_torch, model.to_sklearn, lambda: model.to_onnx(tmp_path / "model.onnx")):
        with pytest.raises(NotFittedError):
            export()
        model.n_features_in_ = 4  # as after a fit that found the labels to be bad
    assert not list(tmp_path.iterdir())


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_weights_beyond_the_type_are_refused(tmp_path):
    model, _ = fitted(("whole", 3, np.float64, "plain", None))
    model.coef_[1, 2] = -1e39
    path = tmp_path / "model.onnx"
    with pytest.raises(BadInput, match=r"coef_\[1, 2\] is -1e\+39 beyond float32; ") as error:
        model.to_onnx(path)
    one_line(error)
    assert not list(tmp_path.iterdir())
    assert model.to_torch().weight[1, 2] == -1e39
    model.temperature_ = 10.0
    model.to_onnx(path)  # the quotient is within float32
    model.temperature_ = 1e-300
    for export in (model.to_torch, model.to_sklearn):
        with pytest.raises(BadInput, match=r"coef_\[1, 2\].* divided by temperature_ 1e-300, beyond float64"):
            export()
    del model.temperature_
    model.coef_[1, 2] = 0
    model.intercept_[2] = np.nan
    with pytest.raises(BadInput, match=r"intercept_\[2\] is nan; fit again"):
        model.to_sklearn()


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.inf, np.nan])
def test_a_temperature_that_is_none(temperature):
    model, _ = fitted(("whole", 3, np.float64, "plain", temperature))
    with pytest.raises(BadInput, match=r"temperature_ is .* positive"):
        model.to_torch()


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (np.array([1, 2, 2**63], dtype=np.uint64), "9223372036854775808 is beyond int64"),
        (np.array(["a", "b", "\ud800"]), "no valid Unicode"),
        (np.array([b"a", b"b", b"c"]), "of type bytes, for which ONNX has no tensor"),
        (np.array([1, "b", None], dtype=object), "of type int, for which"),
        (np.array([1, 2, 3], dtype="datetime64[D]"), "of type date, for which"),
    ],
)
def test_classes_that_onnx_has_no_type_for(classes, said, tmp_path):
    model, _ = fitted(("whole", 3, np.float64, "plain", None))
    model.classes_ = classes
    with pytest.raises(BadInput, match=said) as error:
        model.to_onnx(tmp_path / "model.onnx")
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_a_model_beyond_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("xent.linear_model.exports.MOST_BYTES", 100)
    model, _ = fitted(("whole", 7, np.float64, "plain", None))
    with pytest.raises(BadInput, match="2048; use to_torch"):
        model.to_onnx(tmp_path / "model.onnx")


def test_paths_that_cannot_be_written_to(tmp_path):
    model, _ = fitted(("whole", 3, np.float64, "plain", None))
    with pytest.raises(BadInput, match="is a directory; name a file"):
        model.to_onnx(tmp_path)
    with pytest.raises(BadInput, match=r"there is no folder .*; make it first"):
        model.to_onnx(tmp_path / "none" / "model.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="not a directory"):
        model.to_onnx(tmp_path / "file" / "model.onnx")


def test_a_file_in_place_survives_what_fails(tmp_path, monkeypatch):
    model, _ = fitted(("whole", 3, np.float64, "plain", None))
    path = tmp_path / "model.onnx"
    model.to_onnx(path)
    before = path.read_bytes()

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        model.to_onnx(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == before


def test_the_extra_is_named_where_onnx_is_missing(monkeypatch, tmp_path):
    model, _ = fitted(("whole", 3, np.float64, "plain", None))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtra, match=r"xent\[onnx\]"):
        model.to_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    model.to_torch()
