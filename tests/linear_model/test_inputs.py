"""What the estimator is given: soft labels beside hard ones, missing labels, tensors of any type."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.datasets import load_iris

from xent import SoftmaxRegression

X, Y = load_iris(return_X_y=True)
T = np.eye(3)[Y]

# --- soft labels at score --------------------------------------------------------------------------------

NAMES = {
    "0..2": np.arange(3),
    "-1..1": np.array([-1, 0, 1]),
    "text": np.array(["ant", "bee", "cow"]),
    "objects": np.array(["ant", "bee", "cow"], dtype=object),
    "floats": np.array([-0.5, 2.0, 7.0]).round(),
    "dates": np.array(["2020-01-01", "2020-01-02", "2020-01-03"], dtype="M8[D]"),
}
FORMS = {
    "array": np.asarray,
    "float32": np.float32,
    "whole numbers": lambda t: t.astype(int),
    "bools": lambda t: t.astype(bool),
    "objects": lambda t: t.astype(object),
    "lists": lambda t: t.tolist(),
    "data frame": pd.DataFrame,
    "tensor": torch.from_numpy,
    "bfloat16 with a gradient": lambda t: torch.from_numpy(t).bfloat16().requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", NAMES)
def test_soft_labels_are_scored_by_column(names, form):
    model = SoftmaxRegression().fit(X, NAMES[names][Y])
    right = np.mean(model.predict(X) == NAMES[names][Y])
    assert right == pytest.approx(0.9733333333)
    assert model.score(X, FORMS[form](T)) == pytest.approx(right, rel=1e-15)


def test_the_score_is_the_share_of_mass():
    masses = np.random.default_rng(0).random(T.shape) * 3
    weight = np.random.default_rng(1).random(len(X))
    model = SoftmaxRegression().fit(X, NAMES["text"][Y])
    at = np.searchsorted(model.classes_, model.predict(X))
    hit = masses[np.arange(len(X)), at]
    assert model.score(X, masses) == pytest.approx(hit.sum() / masses.sum(), rel=1e-14)
    right = (weight * hit).sum() / (weight * masses.sum(1)).sum()
    assert model.score(X, masses, weight) == pytest.approx(right, rel=1e-14)
    assert model.score(X, masses, sample_weight=torch.from_numpy(weight).requires_grad_()) == pytest.approx(
        right, rel=1e-14
    )


def test_soft_labels_of_two_classes():
    y = np.where(Y == 0, "yes", "no")
    model = SoftmaxRegression().fit(X, y)
    assert model.score(X, np.stack([y == "no", y == "yes"], axis=1)) == 1.0
    assert model.score(X, np.stack([y == "yes", y == "no"], axis=1)) == 0.0


def changed(row, column, value):
    masses = T.copy()
    masses[row, column] = value
    return masses


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.ones((150, 2)), "y has 2 columns and the model 3 classes"),
        (np.ones((150, 4)), "y has 4 columns and the model 3 classes"),
        (T[:149], "y has 149 rows and X has 150; they must agree"),
        (Y[:149], "y has 149 rows and X has 150; they must agree"),
        (changed(3, 1, -0.5), "soft label -0.5 at row 3, class 1 is negative"),
        (changed(3, 1, np.nan), "y is nan at row 3, class 1, which is no mass"),
        (changed(3, 1, np.inf), "y is inf at row 3, class 1, which is no mass"),
        (changed(3, 1, None).astype(object), "y is nan at row 3, class 1"),
        (T * 0, "y has no mass on rows that count"),
        (T[:, 0] / 2, "continuous"),
        (T[:, None], r"y must be labels \(N,\) or soft labels \(N, C\), got shape \(150, 1, 3\)"),
        (1.0, r"got shape \(\)"),
        (None, r"got shape \(\)"),
        (np.full((150, 3), "a"), "must be numbers"),
    ],
)
def test_what_is_not_scored(y, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxRegression().fit(X, Y).score(X, y)


def test_mass_on_rows_without_weight_is_none():
    model = SoftmaxRegression().fit(X, Y)
    with pytest.raises(ValueError, match="y has no mass on rows that count"):
        model.score(X, T * (np.arange(150) < 75)[:, None], sample_weight=np.arange(150) >= 75)


# --- columns of whole numbers ----------------------------------------------------------------------------

IDS = np.stack([Y, np.arange(150)], axis=1)
WHOLE = {
    "label and id": IDS,
    "label, id and another": np.concatenate([IDS, IDS[:, :1]], axis=1),
    "small": IDS.astype(np.uint8),
    "bools": IDS > 0,
    "objects": IDS.astype(object),
    "lists": IDS.tolist(),
    "data frame": pd.DataFrame(IDS, columns=["label", "id"]),
    "nullable data frame": pd.DataFrame(IDS).astype("Int64"),
    "tensor": torch.from_numpy(IDS),
    "masses": 2 * T.astype(int),
    "a row without a class": (T * (np.arange(150) != 7)[:, None]).astype(int),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_that_are_not_one_hot_are_no_soft_labels(kind):
    model = SoftmaxRegression().fit(X, Y)
    for call in (SoftmaxRegression().fit, model.score):
        with pytest.raises(ValueError, match=r"row \d+ sums to \d, not 1: pass one column of labels, or"):
            call(X, WHOLE[kind])


def test_a_label_of_minus_one_beside_an_id_is_refused():
    with pytest.raises(ValueError, match="soft label -1 at row 0, class 0 is negative"):
        SoftmaxRegression().fit(X, np.tile([-1, 2], (150, 1)))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_floating_columns_keep_any_mass():
    masses = IDS.astype(float)
    assert SoftmaxRegression().fit(X, masses).classes_.tolist() == [0, 1]
    for same in (masses.astype(object), masses.tolist(), torch.from_numpy(masses).requires_grad_()):
        np.testing.assert_array_equal(
            SoftmaxRegression(max_iter=3, tol=1).fit(X, same).coef_,
            SoftmaxRegression(max_iter=3, tol=1).fit(X, masses).coef_,
        )


@pytest.mark.parametrize("form", FORMS)
def test_one_hot_of_any_type_is_soft(form):
    right = SoftmaxRegression().fit(X, T)
    np.testing.assert_allclose(SoftmaxRegression().fit(X, FORMS[form](T)).coef_, right.coef_, atol=1e-12)


# --- labels that are missing -----------------------------------------------------------------------------

TEXT, WHOLE_NUMBERS = NAMES["text"][Y].tolist(), Y.tolist()


def without(values, absent):
    values = list(values)
    values[7] = absent
    return values


MISSING = {
    "None in a list": without(TEXT, None),
    "None among numbers": without(WHOLE_NUMBERS, None),
    "nan in floats": np.array(without(WHOLE_NUMBERS, np.nan)),
    "infinity in floats": np.array(without(WHOLE_NUMBERS, np.inf)),
    "nan among text": np.array(without(TEXT, float("nan")), dtype=object),
    "NumPy's nan among text": np.array(without(TEXT, np.float32("nan")), dtype=object),
    "NA among text": without(TEXT, pd.NA),
    "NA in a series": pd.Series(without(TEXT, pd.NA)),
    "NA of text": pd.Series(without(TEXT, pd.NA), dtype="string"),
    "NA of whole numbers": pd.Series(without(WHOLE_NUMBERS, pd.NA), dtype="Int64"),
    "a category": pd.Categorical(without(TEXT, None)),
    "NaT among text": np.array(without(TEXT, pd.NaT), dtype=object),
    "NaT of dates": np.array(without(NAMES["dates"][Y], "NaT"), dtype="M8[D]"),
    "NaT of a series": pd.Series(without([datetime.date(2020, 1, 1 + k) for k in Y], pd.NaT)),
    "nan in a tensor": torch.tensor(without(WHOLE_NUMBERS, float("nan"))).bfloat16(),
    "nan in a column": np.array(without(WHOLE_NUMBERS, np.nan))[:, None],
}


@pytest.mark.parametrize("kind", MISSING)
def test_a_missing_label_is_named(kind):
    model = SoftmaxRegression().fit(X, Y)
    for call in (SoftmaxRegression().fit, model.score):
        with pytest.raises(ValueError, match=r"y is (None|nan|inf|<NA>|NaT) at row 7, which is no label"):
            call(X, MISSING[kind])


def test_labels_of_two_types_are_named():
    with pytest.raises(ValueError, match="y is 'ant' at row 0 and 7 at row 7, labels of two types"):
        SoftmaxRegression().fit(X, np.array(without(TEXT, 7), dtype=object))


@pytest.mark.parametrize(
    "y",
    [Y.astype(object), pd.Series(Y, dtype="Int64"), pd.Series(Y).astype(object), list(torch.from_numpy(Y))],
)
def test_whole_numbers_are_labels_as_objects_too(y):
    model = SoftmaxRegression().fit(X, y)
    assert model.classes_.tolist() == [0, 1, 2]
    assert model.classes_.dtype.kind == "i"
    assert model.score(X, y) == pytest.approx(0.9733333333)


# --- tensors ---------------------------------------------------------------------------------------------

DTYPES = ["float64", "float32", "bfloat16", "float16"]


def tensor(values, dtype):
    return torch.tensor(values).to(getattr(torch, dtype)).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_any_type_are_taken_everywhere(dtype):
    x, y, weight, masses = (tensor(v, dtype) for v in (X, Y.astype(float), np.linspace(0.5, 2, 150), T))
    halves = {c: tensor(w, dtype) for c, w in enumerate((1.0, 2.0, 0.5))}
    wide = np.float64 if dtype == "float64" else np.float32

    def as_numbers(given):
        return given.detach().to(torch.promote_types(given.dtype, torch.float32)).numpy()

    model = SoftmaxRegression(class_weight=halves).fit(x, y, weight)
    plain = SoftmaxRegression(class_weight={0: 1.0, 1: 2.0, 2: 0.5})
    plain.fit(as_numbers(x), as_numbers(y), as_numbers(weight))
    assert model.coef_.dtype == wide
    np.testing.assert_array_equal(model.coef_, plain.coef_)
    for name in ("decision_function", "predict_proba", "predict_log_proba", "predict"):
        found = getattr(model, name)(x)
        assert isinstance(found, np.ndarray)
        if name == "predict":
            np.testing.assert_array_equal(found, plain.predict(as_numbers(x)))
        else:  # of bfloat16 torch forms the logits, of others NumPy
            np.testing.assert_allclose(found, getattr(plain, name)(as_numbers(x)), rtol=1e-5, atol=1e-6)
    assert model.predict_proba(x).dtype == wide
    assert model.score(x, y, weight) == plain.score(as_numbers(x), as_numbers(y), as_numbers(weight))
    soft = SoftmaxRegression().fit(x, masses)
    assert soft.score(x, masses, weight) == soft.score(as_numbers(x), as_numbers(masses), as_numbers(weight))
    assert x.grad is None
    assert x.requires_grad


def test_rows_and_labels_may_be_lists_of_tensors():
    model = SoftmaxRegression().fit(list(tensor(X, "bfloat16")), list(torch.from_numpy(Y)))
    assert model.coef_.dtype == np.float32
    assert model.score(list(tensor(X, "bfloat16")), list(tensor(Y.astype(float), "bfloat16"))) > 0.9


def test_half_precision_arrays_are_float32():
    model = SoftmaxRegression().fit(X.astype(np.float16), Y)
    assert model.coef_.dtype == np.float32
    assert model.predict_proba(X.astype(np.float16)).dtype == np.float32


def test_views_and_other_layouts():
    model = SoftmaxRegression().fit(X, Y)
    turned = torch.from_numpy(X.T.copy()).t()
    assert model.score(turned, Y) == model.score(X, Y)
    with torch.inference_mode():
        assert model.score(torch.from_numpy(X) * 1, Y) == model.score(X, Y)
    for call in (SoftmaxRegression().fit, model.score):
        with pytest.raises(TypeError, match=r"X is a sparse tensor; pass X\.to_dense\(\)"):
            call(torch.from_numpy(X).to_sparse(), Y)
        with pytest.raises(TypeError, match=r"y is a sparse tensor; pass y\.to_dense\(\)"):
            call(X, torch.from_numpy(T).to_sparse())
        with pytest.raises(TypeError, match=r"pass y\.toarray\(\)"):
            call(X, sparse.csr_matrix(T))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_on_a_gpu(solver, dtype):
    x, y, weight, masses = (torch.tensor(v).cuda() for v in (X, Y, np.linspace(0.5, 2, 150), T))
    x = x.to(dtype)
    on_host = x.double().cpu().numpy()
    options = {"solver": solver, "tol": 1e-7 if dtype != torch.float64 else 1e-12}
    model = SoftmaxRegression(class_weight={0: torch.tensor(2.0).cuda()}, **options).fit(x, y, weight)
    plain = SoftmaxRegression(class_weight={0: 2.0}, **options).fit(on_host, Y, weight.cpu().numpy())
    np.testing.assert_allclose(model.coef_, plain.coef_, atol=1e-5 if dtype == torch.float64 else 2e-2)
    np.testing.assert_allclose(model.predict_proba(x), plain.predict_proba(on_host), atol=2e-3)
    assert model.score(x, masses, weight) == plain.score(on_host, T, weight.cpu().numpy())
    for labels in (y[y < 2], masses[y < 2]):
        some = x[y < 2]
        two = SoftmaxRegression(**options).fit(some, labels)
        same = SoftmaxRegression(**options).fit(some.double().cpu().numpy(), labels.cpu().numpy())
        np.testing.assert_allclose(
            two.predict_proba(some), same.predict_proba(some.double().cpu()), atol=2e-3
        )
    x[3, 1] = torch.nan
    with pytest.raises(ValueError, match="X is nan at row 3, column 1; features are finite"):
        model.fit(x, y)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_tensors_that_stay_what_they_are_are_checked(bad):
    x = torch.tensor(X).bfloat16()
    x[7, 2] = bad
    for call in (SoftmaxRegression().fit, SoftmaxRegression().fit(X, Y).score):
        with pytest.raises(ValueError, match=f"X is {bad} at row 7, column 2; features are finite"):
            call(x, Y)
    with pytest.raises(ValueError, match="X has 3 features, but SoftmaxRegression is expecting 4"):
        SoftmaxRegression().fit(X, Y).predict(x[:, :3])


def test_half_features_are_not_copied():
    """float16 of any kind is computed with as float32 that was rounded to it; nothing of X's size is made."""
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=40_000)
    half = (rng.normal(size=(40_000, 64)) + np.eye(64)[y]).astype(np.float16)
    model = SoftmaxRegression(max_iter=5, tol=1.0).fit(half, y)
    right = SoftmaxRegression(max_iter=5, tol=1.0).fit(half.astype(np.float32), y)
    np.testing.assert_allclose(model.coef_, right.coef_, atol=1e-5)
    tracemalloc.start()
    SoftmaxRegression(max_iter=2, tol=1.0).fit(half, y)
    assert tracemalloc.get_traced_memory()[1] < half.nbytes
    tracemalloc.stop()


# --- numbers beyond the type -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "y", "weight", "message"),
    [
        ({}, Y, np.where(np.arange(150) == 5, 1e300, 1), "sample_weight is 1e.300 at row 5, beyond float32"),
        ({}, changed(4, 2, 1e300), None, "y is 1e.300 at row 4, beyond float32"),
        (
            {"class_weight": {0: 1, 1: 1e300, 2: 1}},
            Y,
            None,
            "class_weight is 1e.300 at class 1, beyond float32",
        ),
    ],
)
def test_numbers_beyond_float32_are_named(options, y, weight, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxRegression(**options).fit(X.astype(np.float32), y, weight)


DISPATCH = """
import numpy as np, sklearn, torch
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from xent import SoftmaxRegression, SoftmaxRegressionCV

X, y = load_digits(return_X_y=True)
X, t = X.astype(np.float32), torch.from_numpy(y)
plain = SoftmaxRegression().fit(X, y)
with sklearn.config_context(array_api_dispatch=True):
    for dtype in (torch.float32, torch.bfloat16):  # of whole numbers up to 16, which both hold
        model = SoftmaxRegression().fit(torch.from_numpy(X).to(dtype), t)
        assert np.array_equal(model.coef_, plain.coef_), dtype
        assert model.score(torch.from_numpy(X).to(dtype), t) == plain.score(X, y)
    assert SoftmaxRegressionCV(Cs=[0.1, 1.0], cv=2).fit(torch.from_numpy(X), t).C_ in (0.1, 1.0)
    scaled = make_pipeline(StandardScaler(), SoftmaxRegression()).fit(torch.from_numpy(X), t)
    assert scaled.score(torch.from_numpy(X), t) > 0.99
"""


def test_tensors_under_the_array_api_of_scikit_learn():
    """SciPy reads its environment once, so it is another process."""
    done = subprocess.run(
        [sys.executable, "-c", DISPATCH],
        env=os.environ | {"SCIPY_ARRAY_API": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
