"""Invalid arguments: each message names the argument, the place and a remedy."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch

from predictions import objects, problem
from xent import metrics

INF = math.inf


GOOD = [[0.5, 0.5], [0.25, 0.75]]
NAN = math.nan


def refused(*args, message, error=ValueError, metric=metrics.log_loss, **options):
    return pytest.param(metric, args, options, error, message, id=message[:60])


REFUSED = [
    refused(
        [0, 1],
        [[0.5, 0.5], [0.25, 0.25]],
        message=(
            "y_pred sums to 0.5 at row 1, and the probabilities of a row sum to 1 (± 0.001 at most); divide "
            "each row by its sum, or pass what was computed"
        ),
    ),
    refused(
        [0, 1],
        torch.tensor([[0.5, 0.5], [0.9, 0.2]]),
        message=(
            "y_pred sums to 1.09999998 at row 1, and the probabilities of a row sum to 1 (± 0.001 at most)"
        ),
    ),
    refused(
        [0, 1],
        [[0.5, 0.5], [-0.25, 1.25]],
        message=(
            "y_pred is -0.25 at row 1, column 0, and a probability lies in 0..1; for logits use "
            "xent.cross_entropy"
        ),
    ),
    refused([0, 1], [[0.5, 0.5], [0.0, 1.25]], message="y_pred is 1.25 at row 1, column 1"),
    refused([0, 1], [[NAN, 0.5], [0.0, 1.25]], message="y_pred is nan at row 0, column 0"),
    refused([0, 1], [[0.5, 0.5], [0.5, INF]], message="y_pred is inf at row 1, column 1"),
    refused([0, 1], [[None, 0.5], [0.5, 0.5]], message="y_pred is nan at row 0, column 0"),
    refused([0, 1], [0.5, 1.5], message="y_pred is 1.5 at row 1, and a"),
    refused([0, 1], [[0.5], [NAN]], message="y_pred is nan at row 1, and a"),
    refused(
        [0, 1],
        0.5,
        message=(
            "y_pred must be (N, C), one column for each label, or (N,), the probabilities of the "
            "second of two labels; got shape ()"
        ),
    ),
    refused([0, 1], np.ones((2, 0)), message="y_pred must be (N, C), one column for each label"),
    refused([0, 1], np.ones((2, 2, 2)), message="got shape (2, 2, 2)"),
    refused([0, 1], [[0.5, 0.5], [1.0]], message="y_pred is no array"),
    refused(
        [0, 1],
        [["a", "b"], ["c", "d"]],
        error=TypeError,
        message="y_pred must hold real numbers, got an array of <U1",
    ),
    refused([0, 1], [["a", None], ["c", "d"]], error=TypeError, message="y_pred must hold real numbers"),
    refused(
        [0, 1],
        torch.ones(2, 2, dtype=torch.complex64),
        error=TypeError,
        message="y_pred must hold real numbers, got torch.complex64",
    ),
    refused([0, 1, 0], GOOD, message="y_true has 3 rows and y_pred has 2; they must agree"),
    refused([], [], message="y_true has no rows"),
    refused(3, GOOD, message="y_true must be (N,), (N, 1) or one-hot (N, C); got shape ()"),
    refused([2, 2], GOOD, message="y_true holds only one label, [2]; name those of all columns as labels="),
    refused([2, 2], [0.5, 0.5], message="y_true holds only one label, [2]"),
    refused([0, 0], GOOD, labels=[0], message="labels must name at least two labels, got [0]"),
    refused([0, 0], GOOD, labels=[], message="labels must name at least two labels, got []"),
    refused([0, 0], GOOD, labels=[[0, 1]], message="labels must be a list of labels, got shape (1, 2)"),
    refused([0, 0], GOOD, labels=[0, 0], message="labels names 0 twice; a label has one column"),
    refused([0, 0], GOOD, labels=[0, 0.5], message="labels is 0.5 at position 1, which is no label"),
    refused(
        [0, 1, 2],
        [[0.5, 0.5]] * 3,
        message=(
            "y_pred has 2 columns, but y_true holds 3 labels, [0, 1, 2]; name those of the columns as labels="
        ),
    ),
    refused(
        [0, 1, 2],
        [0.5] * 3,
        message=(
            "y_pred has one column, that of the second of two labels, but y_true holds 3 labels, [0, 1, 2]"
        ),
    ),
    refused(
        list("aabbccddeeffgghhii"),
        [[0.5, 0.5]] * 18,
        message="but y_true holds 9 labels, ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', ...: 9]",
    ),
    refused(
        [0, 1], GOOD, labels=[0, 1, 2], message="y_pred has 2 columns, but labels has 3 entries, [0, 1, 2]"
    ),
    refused([0, 5], GOOD, labels=[0, 1], message="y_true is 5 at row 1, which is none of the labels [0, 1]"),
    refused([0, 2], GOOD, labels=[0, 1], message="y_true is 2 at row 1"),
    refused(
        [0, -1], GOOD, labels=[0, 1], message="y_true is -1 at row 1, which is none of the labels [0, 1]"
    ),
    refused([4, 7], GOOD, labels=[4, 6], message="y_true is 7 at row 1, which is none of the labels [4, 6]"),
    refused([4, 5], GOOD, labels=[4, 6], message="y_true is 5 at row 1"),
    refused([4, -5], GOOD, labels=[4, 6], message="y_true is -5 at row 1"),
    refused(
        [4, 5],
        GOOD,
        labels=[4, 10**9],
        message="y_true is 5 at row 1, which is none of the labels [4, 1000000000]",
    ),
    refused([4, 10**10], GOOD, labels=[4, 10**9], message="y_true is 10000000000 at row 1"),
    refused(
        ["a", "x"],
        GOOD,
        labels=["a", "b"],
        message="y_true is 'x' at row 1, which is none of the labels ['a', 'b']",
    ),
    refused(
        [0, 1],
        GOOD,
        labels=["0", "1"],
        message="y_true is 0 at row 0, which is none of the labels ['0', '1']",
    ),
    refused(
        ["0", "1"], GOOD, labels=[0, 1], message="y_true is '0' at row 0, which is none of the labels [0, 1]"
    ),
    refused(
        [0.5, 1],
        GOOD,
        message=("y_true is 0.5 at row 0, which is no label: labels are whole numbers, bools or strings"),
    ),
    refused([0, NAN], GOOD, message="y_true is nan at row 1, which is no label"),
    refused([0, INF], GOOD, message="y_true is inf at row 1, which is no label"),
    refused(["a", None], GOOD, message="y_true is None at row 1, which is no label; drop the row or name it"),
    refused(pd.Series(["a", NAN], dtype=object), GOOD, message="y_true is nan at row 1, which is no label"),
    refused(objects(["a", pd.NA]), GOOD, message="y_true is <NA> at row 1, which is no label"),
    refused(pd.Series([0, pd.NA], dtype="Int64"), GOOD, message="at row 1, which is no label"),
    refused(objects(["a", pd.NaT]), GOOD, message="y_true is NaT at row 1, which is no label"),
    refused(objects([1, [2]]), GOOD, error=TypeError, message="y_true is [2] at row 1, which is no label"),
    refused([0, 1], GOOD, error=TypeError, labels=[{}, 1], message="labels is {} at position 0, which is no"),
    refused(
        [0, 1],
        torch.tensor(GOOD).to_sparse(),
        error=TypeError,
        message="y_pred is a sparse tensor; pass y_pred.to_dense()",
    ),
    refused(
        torch.tensor([0, 1]).to_sparse(), GOOD, error=TypeError, message="y_true is a sparse tensor; pass"
    ),
    refused(
        objects(["a", 1]),
        GOOD,
        message=("y_true holds labels that cannot be sorted (int, str); give their order as labels="),
    ),
    refused(
        [[1, 0], [1, 1]],
        GOOD,
        message=(
            "y_true is not one-hot at row 1: one 1 among zeros; for rows of probabilities use "
            "xent.cross_entropy(y_pred.log(), y_true)"
        ),
    ),
    refused([[0.5, 0.5], [0, 1]], GOOD, message="y_true is not one-hot at row 0"),
    refused([[1, 0], [1, 0.5]], GOOD, message="y_true is not one-hot at row 1"),
    refused([[1, 0, 0]], [[0.5, 0.5]], message="y_pred has 2 columns, but y_true holds 3 labels"),
    refused(
        [[1, 0]], [[0.5, 0.5]], labels=[1, 2, 3], message="labels has 3 entries, but y_true has 2 columns"
    ),
    refused(
        np.ones((2, 2, 2)), GOOD, message="y_true must be (N,), (N, 1) or one-hot (N, C); got shape (2, 2, 2)"
    ),
    refused([[0, 1], [1]], GOOD, message="y_true is no array"),
    refused(
        [0, 1],
        GOOD,
        sample_weight=[1, -1],
        message="sample_weight is -1 at row 1; weights are finite and not negative",
    ),
    refused([0, 1], GOOD, sample_weight=[NAN, -1], message="sample_weight is nan at row 0"),
    refused([0, 1], GOOD, sample_weight=[1, INF], message="sample_weight is inf at row 1"),
    refused(
        [0, 1],
        GOOD,
        sample_weight=[1],
        message="sample_weight must have shape (2,), one for each row; got (1,)",
    ),
    refused(
        [0, 1],
        GOOD,
        sample_weight=[[1], [1]],
        message="sample_weight must have shape (2,), one for each row; got (2, 1)",
    ),
    refused(
        [0, 1],
        GOOD,
        sample_weight=2.0,
        message="sample_weight must have shape (2,), one for each row; got ()",
    ),
    refused(
        [0, 1],
        GOOD,
        sample_weight=["a", "b"],
        error=TypeError,
        message="sample_weight must hold real numbers",
    ),
    refused(
        [0, 1],
        GOOD,
        sample_weight=[0, 0],
        message="sample_weight is 0 at every row; an average needs a row that counts, of a weight above zero",
    ),
    refused([0, 1], GOOD, sample_weight=[0, 0], normalize=False, message="sample_weight is 0 at every row"),
    refused(
        [0, 1, 2],
        [0.5] * 3,
        metric=metrics.brier_score,
        message=(
            "y_pred has one column, that of the second of two labels, but there are 3 labels, [0, "
            "1, 2]; give y_pred a column for each"
        ),
    ),
    refused(
        [0, 1],
        [0.5] * 2,
        metric=metrics.brier_score,
        pos_label=2,
        message="pos_label 2 is none of the labels [0, 1]",
    ),
    refused(
        ["a", "b"],
        [0.5] * 2,
        metric=metrics.brier_score,
        message=(
            "y_pred has one column, and the labels are ['a', 'b']: say which it is about with "
            "pos_label= or labels=[negative, positive]"
        ),
    ),
    refused(
        [0, 1],
        GOOD,
        metric=metrics.brier_score,
        pos_label=1,
        message=(
            "pos_label is for y_pred of shape (N,); here y_pred has 2 columns: say what they "
            "stand for with labels="
        ),
    ),
    refused(
        [0, 1],
        GOOD,
        metric=metrics.brier_score,
        scale_by_half="half",
        message="scale_by_half must be True, False or 'auto', got 'half'",
    ),
    refused([0, 0.5], metric=metrics.label_entropy, message="y is 0.5 at row 1, which is no label"),
    refused([], metric=metrics.label_entropy, message="y has no rows"),
    refused(
        [0, 1], metric=metrics.label_entropy, sample_weight=[1], message="sample_weight must have shape (2,)"
    ),
]


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(("metric", "args", "options", "error", "message"), REFUSED)
def test_refused(metric, args, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        metric(*args, **options)


@pytest.mark.parametrize(
    "metric",
    [metrics.log_loss_per_sample, metrics.log_loss_per_class, metrics.brier_score, metrics.d2_log_loss],
)
def test_every_metric_checks(metric):
    y, p = problem()
    bad = p.copy()
    bad[11] /= 2
    with pytest.raises(ValueError, match=r"y_pred sums to 0\.5 at row 11"):
        metric(y, bad)
    with pytest.raises(ValueError, match=r"y_true is 3 at row"):
        metric(y, p, labels=[0, 1, 2, 4])


@pytest.mark.usefixtures("parts")
def test_the_first_bad_row_is_named():
    y, p = problem()
    p[25] /= 2
    p[31, 2] = -1
    with pytest.raises(ValueError, match="row 25"):
        metrics.log_loss(y, p)
    y[13] = 9
    with pytest.raises(ValueError, match="y_true is 9 at row 13"):
        metrics.log_loss(y, p, labels=range(4))
    with pytest.raises(ValueError, match="sample_weight is -3 at row 29"):
        metrics.log_loss(y, p, labels=[0, 1, 2, 3], sample_weight=np.where(np.arange(40) == 29, -3, 1))


@pytest.mark.parametrize(
    ("dtype", "slack"), [("float64", 1.4e-6), ("float32", 3.4e-4), ("float16", 0.03), ("bfloat16", 0.08)]
)
def test_how_far_a_row_may_be_off(dtype, slack):
    """Three numbers of six places, or √eps of the stored type, whichever way, and not much more."""
    for sign in (1, -1):
        row = torch.tensor([[0.5, 0.25, 0.25 + sign * slack]], dtype=getattr(torch, dtype))
        metrics.log_loss([0], row, labels=[0, 1, 2])
        row = torch.tensor([[0.5, 0.25, 0.25 + sign * slack * 1.2]], dtype=getattr(torch, dtype))
        with pytest.raises(ValueError, match="y_pred sums to"):
            metrics.log_loss([0], row, labels=[0, 1, 2])
