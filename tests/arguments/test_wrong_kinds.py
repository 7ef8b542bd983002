"""Every parameter of the estimator and every option of a metric, of the wrong kind: named in the error.

The walk is over the signatures: a new parameter without a row here fails.
"""

from __future__ import annotations

import inspect
import math
import re

import numpy as np
import pytest
import torch

from xent import SoftmaxRegression, metrics

NAN, INF = math.nan, math.inf
X, Y = np.eye(4), [0, 1, 0, 1]
P = [[0.5, 0.5], [0.25, 0.75], [0.5, 0.5], [0.25, 0.75]]
TENSOR = torch.tensor(1.0)
NO_NUMBER = ["a", None, [1.0], {}, True, 1j, object()]
NO_FLAG = ["yes", None, 1, 0.0, [], TENSOR]
NO_WEIGHTS = [
    *("a", ["a"] * 4, {}, object(), [1.0], [[1.0]] * 4, np.ones((4, 1)), torch.ones(3)),
    *([1, 1, -1, 1], [1, NAN, 1, 1], [1, 1, INF, 1], [0] * 4, [None] * 4, [1j] * 4),
    torch.ones(4, dtype=torch.complex64),
]

ESTIMATOR = {
    "C": [*NO_NUMBER, TENSOR, torch.ones(2), NAN, 0, -1, -INF],
    "tol": [*NO_NUMBER, TENSOR, NAN, -1e-9],
    "max_iter": [*NO_NUMBER, TENSOR, 1.5, NAN, INF, -1],
    "fit_intercept": NO_FLAG,
    "class_weight": [
        *(3, "x", [1, 2], {1, 2}, True, TENSOR, {0: -1}, {0: NAN}, {0: INF, 1: 1}, {0: "a"}, {0: None}),
        *({0: [1]}, {0: 1j}, {0: torch.ones(2)}, {0: torch.tensor(-1.0)}, {"a": 1.0}, {0: 0, 1: 0}),
    ],
    "stopping": [None, 3, "loss", True, ["objective"], TENSOR],
    "solver": [None, 3, "sag", "LBFGS", True, ["lbfgs"], TENSOR],
    "warm_start": NO_FLAG,
    "random_state": ["a", 1.5, -1, 2**32, [1], TENSOR, object()],
    "verbose": ["x", None, -1, 1.5, [1], TENSOR],
}
FIT = {"sample_weight": NO_WEIGHTS, "callback": ["x", 3, [print]]}
SCORE = {"sample_weight": NO_WEIGHTS}
METRICS = {
    "normalize": NO_FLAG,
    "renormalize": [*NO_FLAG, "auto"],
    "scale_by_half": ["half", "True", None, 1, 0.5, [], TENSOR],
    "sample_weight": [*NO_WEIGHTS, 2.0],
    "labels": [
        3,
        "ab",
        {0: 1},
        {0, 1},
        [[0, 1]],
        [[0], [1, 2]],
        [0, 0],
        [0, 0.5],
        [0, NAN],
        [{}, 1],
        [0],
        [],
    ],
    "pos_label": [[1], {}, {1}, np.array([0, 1]), torch.tensor([0, 1]), 7, "a", NAN, (0,)],
}
PUBLIC = [getattr(metrics, name) for name in metrics.__all__ if inspect.isfunction(getattr(metrics, name))]


def options(function, *passed):
    """The parameters of a function but those that data go to."""
    return [name for name in inspect.signature(function).parameters if name not in passed]


def rows(function, table, *passed):
    """Each option with each of its wrong values; a KeyError for an option without any."""
    names = options(function, *passed)
    return [
        pytest.param(name, value, id=f"{name}-{n}") for name in names for n, value in enumerate(table[name])
    ]


def refused(name, call):
    with pytest.raises((TypeError, ValueError)) as found:
        call()
    said = str(found.value)
    assert re.search(rf"\b{name}\b", said), said
    assert "\n" not in said


@pytest.mark.parametrize(("name", "value"), rows(SoftmaxRegression.__init__, ESTIMATOR, "self"))
def test_parameters_of_the_estimator(name, value):
    model = SoftmaxRegression(**{name: value})  # scikit-learn wants no check before fit
    refused(name, lambda: model.fit(X, Y))
    assert not hasattr(model, "coef_")


@pytest.mark.parametrize(("name", "value"), rows(SoftmaxRegression.fit, FIT, "self", "X", "y"))
def test_arguments_of_fit(name, value):
    refused(name, lambda: SoftmaxRegression().fit(X, Y, **{name: value}))


@pytest.mark.parametrize("y", [Y, np.eye(2)[Y]], ids=["hard", "soft"])
@pytest.mark.parametrize(("name", "value"), rows(SoftmaxRegression.score, SCORE, "self", "X", "y"))
def test_arguments_of_score(name, value, y):
    model = SoftmaxRegression().fit(X, Y)
    refused(name, lambda: model.score(X, y, **{name: value}))


@pytest.mark.parametrize(
    ("metric", "name", "value"),
    [
        pytest.param(metric, *row.values, id=f"{metric.__name__}-{row.id}")
        for metric in PUBLIC
        for row in rows(metric, METRICS, "y", "y_true", "y_pred")
    ],
)
def test_options_of_metrics(metric, name, value):
    single = [row[1] for row in P]
    data = [Y] if metric is metrics.label_entropy else [Y, single if name == "pos_label" else P]
    refused(name, lambda: metric(*data, **{name: value}))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_what_is_of_the_right_kind():
    """The same walk with values that are taken, so that none above fails for another reason."""
    right = {
        "C": [2, np.float32(2), np.array(2.0), INF],
        "tol": [1, np.float64(1e-3), INF],
        "max_iter": [np.int64(50), 50.0],
        "fit_intercept": [True, np.False_],
        "class_weight": [None, "balanced", {0: 1, 1: np.float32(2)}, {0: torch.tensor(1.0).bfloat16(), 1: 2}],
        "solver": ["newton-cg", "auto"],
        "stopping": ["gradient"],
        "warm_start": [True, np.True_],
        "random_state": [None, 0, np.int64(3), np.random.RandomState(0)],
        "verbose": [0, False],
    }
    for name in options(SoftmaxRegression.__init__, "self"):
        for value in right[name]:
            assert SoftmaxRegression(**{name: value}).fit(X, Y).get_params()[name] is value
    taken = {
        "normalize": [True, np.False_],
        "renormalize": [True, np.False_],
        "scale_by_half": [True, np.False_, "auto"],
        "sample_weight": [None, [1, 2, 0, 1], torch.ones(4).bfloat16()],
        "labels": [None, [0, 1], (0, 1), range(2), torch.arange(2), [torch.tensor(0), torch.tensor(1)]],
        "pos_label": [None, 1, np.int64(1), torch.tensor(1), np.array(1), 1.0, True],
    }
    for metric in PUBLIC:
        single = [row[1] for row in P]
        for name in options(metric, "y", "y_true", "y_pred"):
            for value in taken[name]:
                data = [Y] if metric is metrics.label_entropy else [Y, single if name == "pos_label" else P]
                metric(*data, **{name: value})
