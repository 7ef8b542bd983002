"""The audit of arrays: every measure beside an independent formula, and the same whatever the batches."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pandas
import polars
import pytest
import torch
from sklearn import metrics as peers
from sklearn.isotonic import IsotonicRegression

import xent
from xent.auditing import mean_loss, pairs, sample, scores, sweeps


def problem(n=3000, classes=6, seed=0, sharp=1.5, dtype=np.float64):
    """Return logits that are ``sharp`` times too sure, and classes drawn from their softmax."""
    rng = np.random.default_rng(seed)
    z = 2 * rng.standard_normal((n, classes))
    y = (z + rng.gumbel(size=z.shape)).argmax(1)
    return (sharp * z).astype(dtype), y


def softmax(z):
    return torch.as_tensor(z).softmax(1).numpy()


@pytest.fixture(params=[False, True], ids=["equal", "weighted"])
def found(request):
    z, y = problem()
    weight = np.random.default_rng(1).integers(0, 4, len(y)).astype(float) if request.param else None
    return z, softmax(z), y, weight, xent.audit(logits=z, target=y, sample_weight=weight)


def test_scores_are_those_of_peers(found):
    _, p, y, weight, result = found
    about = {"sample_weight": weight}
    near = {"rel": 1e-12}
    assert result.log_loss == pytest.approx(peers.log_loss(y, p, **about), **near)
    assert result.log_loss == pytest.approx(xent.metrics.log_loss(y, p, **about), **near)
    assert result.d2 == pytest.approx(peers.d2_log_loss_score(y, p, **about), **near)
    assert result.accuracy == pytest.approx(peers.accuracy_score(y, p.argmax(1), **about), **near)
    for k, value in result.top_k.items():
        assert value == pytest.approx(peers.top_k_accuracy_score(y, p, k=k, **about), **near)
    assert sorted(result.top_k) == [1, 2, 3, 5]
    one_hot = np.eye(6)[y]
    assert result.brier == pytest.approx(np.average(((p - one_hot) ** 2).sum(1), weights=weight), **near)
    assert result.entropy == pytest.approx(np.average(-(p * np.log(p)).sum(1), weights=weight), **near)
    assert result.gradient_norm == pytest.approx(
        np.average(np.linalg.norm(p - one_hot, axis=1), weights=weight), **near
    )


def test_the_classes_are_those_of_peers(found):
    _, p, y, weight, result = found
    precision, recall, _, _ = peers.precision_recall_fscore_support(y, p.argmax(1), sample_weight=weight)
    np.testing.assert_allclose([row.precision for row in result.per_class], precision)
    np.testing.assert_allclose([row.recall for row in result.per_class], recall)
    loss = -np.log(p[np.arange(len(y)), y])
    s = np.ones(len(y)) if weight is None else weight
    for c, row in enumerate(result.per_class):
        mine = y == c
        assert row.rows == mine.sum()
        assert row.loss == pytest.approx(np.average(loss[mine], weights=s[mine]))
        assert row.threshold == pytest.approx(np.average(p[mine, c], weights=s[mine]))
        assert row.share == pytest.approx((s * loss)[mine].sum() / (s * loss).sum())
    assert sum(row.share for row in result.per_class) == pytest.approx(1)


def test_the_pairs_are_the_matrix_and_add_up(found):
    z, _, y, weight, result = found
    times = np.ones(len(y), int) if weight is None else weight.astype(int)
    z, y = (torch.from_numpy(np.repeat(x, times, axis=0)) for x in (z, y))
    largest = xent.triplets.pair_matrix(z, y).largest(30)
    for pair, expected in zip(result.pairs, largest, strict=True):
        assert (int(pair.name), int(pair.rival)) == (expected.true, expected.rival)
        assert pair.share == pytest.approx(expected.share, rel=1e-9)
    assert len(result.pairs) == 30
    assert sum(pair.loss for pair in result.pairs) == pytest.approx(result.log_loss)
    assert sum(pair.share for pair in result.pairs) == pytest.approx(1)
    assert result.pairs_remainder == pytest.approx(0, abs=1e-12)


def test_the_temperature_is_the_best_of_all_rows(found):
    z, _, y, weight, result = found
    s = None if weight is None else torch.from_numpy(weight)
    best = xent.fit_temperature(z, y, sample_weight=s)
    assert result.temperature == pytest.approx(best, rel=1e-9)
    at_best = xent.cross_entropy(torch.from_numpy(z), torch.from_numpy(y), temperature=best, sample_weight=s)
    assert result.temperature_saving == pytest.approx(result.log_loss - at_best.item(), rel=1e-6)


@pytest.mark.parametrize("kept", [True, False], ids=["scores", "cells"])
def test_the_calibration_is_that_of_isotonic_regression(monkeypatch, found, kept):
    """Exactly from the scores, while these are few; else from cells of them."""
    z, p, y, weight, result = found
    near = 1e-9
    if not kept:
        monkeypatch.setattr(scores, "MOST", 0)
        result, near = xent.audit(logits=z, target=y, sample_weight=weight, sweeps=1), 1e-4
    s = np.ones(len(y)) if weight is None else weight
    p, y, s = p[s > 0], y[s > 0], s[s > 0]
    right = (p.argmax(1) == y).astype(float)

    def parts(score, event):
        best = IsotonicRegression(y_min=0, y_max=1).fit_transform(score, event, sample_weight=s)
        own, at_best, base = (
            peers.log_loss(event, x, sample_weight=s)
            for x in (score, best, np.full(len(event), np.average(event, weights=s)))
        )
        return own - at_best, base - at_best, base

    np.testing.assert_allclose(
        [result.miscalibration, result.discrimination, result.uncertainty], parts(p.max(1), right), atol=near
    )
    for c, row in enumerate(result.per_class):
        np.testing.assert_allclose(row.calibration[1:], parts(p[:, c], (y == c).astype(float)), atol=2 * near)


def test_intervals():
    z, y = problem(60_000)
    result = xent.audit(logits=z, target=y)
    loss = -np.log(softmax(z)[np.arange(len(y)), y])
    error = loss.std() / np.sqrt(len(y))
    assert result.standard_error == pytest.approx(error)
    assert (result.low, result.high) == pytest.approx(
        (loss.mean() - 1.96 * error, loss.mean() + 1.96 * error), 1e-4
    )
    # rows are independent, so that blocks of them say the same
    assert result.bootstrap_high - result.bootstrap_low == pytest.approx(result.high - result.low, rel=0.35)
    assert result.bootstrap_low < result.log_loss < result.bootstrap_high
    few = xent.audit(logits=z[:5000], target=y[:5000])
    assert few.bootstrap_low is None


def test_blocks_see_that_neighbours_are_alike():
    loss = np.repeat(np.random.default_rng(0).exponential(size=100), 1024)
    p = np.exp(-loss)
    result = xent.audit(p, target=np.ones(len(p), int), sweeps=1)
    assert result.bootstrap_high - result.bootstrap_low > 10 * (result.high - result.low)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classes", [2, 6, 1200])
def test_batches_and_parts_give_the_same(classes, seed):
    rng = np.random.default_rng(seed)
    n = 4000 if classes < 100 else 400
    z, y = problem(n, classes, seed)
    p, weight = softmax(z), rng.uniform(0, 2, n)
    whole = xent.audit(p, target=y, sample_weight=weight)
    cuts = np.sort(rng.choice(n, 6, replace=False))
    ranges = list(zip([0, *cuts], [*cuts, n], strict=True))

    def swept(audits):
        for i, (a, b) in enumerate(ranges):
            audits[i % len(audits)].update(p[a:b], target=y[a:b], sample_weight=weight[a:b], start=int(a))
        first, *others = audits
        for other in others:
            first.merge(other)
        return first

    first = swept([xent.Audit(classes) for _ in range(3)])
    second = first.second_sweep()
    parts = swept([first.second_sweep() for _ in range(3)])
    for a, b in ranges:
        second.update(p[a:b], target=y[a:b], sample_weight=weight[a:b], start=int(a))
    for made in (second.result(), parts.result()):
        one, other = whole.to_dict(), made.to_dict()
        assert_alike(one, other)


def assert_alike(one, other, where=""):
    """Compare two JSON values, numbers to rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            if key not in ("pairs",):
                assert_alike(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_alike(*pair, f"{where}[{i}]")
    elif isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-8, abs=1e-12), where
    else:
        assert one == other, where


def test_forms_and_libraries_agree():
    z, y = problem(500, 3)
    p = softmax(z)
    whole = xent.audit(p, target=y).to_dict()
    frame = pandas.DataFrame(p)
    for made in (
        xent.audit(torch.from_numpy(p), target=torch.from_numpy(y)),
        xent.audit(frame, target=pandas.Series(y)),
        xent.audit(polars.DataFrame(p), target=polars.Series(y)),
        xent.audit(np.asfortranarray(p), target=y.tolist()),
        xent.audit(logits=z, target=y),
        xent.audit(log_probabilities=torch.from_numpy(z).log_softmax(1), target=y),
        xent.audit(p, target=np.eye(3)[y]),
    ):
        made = made.to_dict()
        # of masses no label is a fraction of the row's loss
        assert_alike(whole["measures"], made["measures"])
        assert_alike(whole["per_class"], made["per_class"])


def test_features_and_a_head():
    torch.manual_seed(0)
    x, w, b = torch.randn(700, 8), torch.randn(5, 8), torch.randn(5)
    y = torch.randint(5, (700,))
    whole = xent.audit(logits=x @ w.T + b, target=y)
    linear = torch.nn.Linear(8, 5)
    with torch.no_grad():
        linear.weight.copy_(w)
        linear.bias.copy_(b)
    low_rank = xent.LowRank(w - torch.ones(5, 8), torch.ones(1, 8), torch.ones(5, 1))
    for head in (
        (w, b),
        linear,
        {"linear_weight": w, "linear_bias": b},
        (low_rank, b),
        (w.numpy(), b.numpy()),
    ):
        made = xent.audit(features=x, head=head, target=y)
        assert made.log_loss == pytest.approx(whole.log_loss, rel=1e-5)
        assert made.accuracy == whole.accuracy
    made = xent.audit(features=x, head=w, target=y)
    norms = made.rows["head_gradient_norm"].to_numpy()
    np.testing.assert_allclose(norms, xent.curvature.row_gradient_norms(x, w, y), rtol=1e-4, atol=1e-6)


def test_rows_are_every_row():
    z, y = problem(300, 4)
    result = xent.audit(logits=z, target=y, ids=[f"r{i}" for i in range(300)])
    rows = result.rows
    assert rows.num_rows == 300
    assert rows["id"].to_pylist() == [f"r{i}" for i in range(300)]
    assert np.average(rows["loss"]) == pytest.approx(result.log_loss)
    assert [str(c) for c in y] == rows["label"].to_pylist()
    worst = int(np.argmax(rows["loss"]))
    assert result.worst[0].id == f"r{worst}"
    assert result.worst[0].row == worst + 1


def test_of_many_classes_the_heaviest_pairs_are_exact():
    z, y = problem(3000, 1300, sharp=3)
    y = np.where(np.random.default_rng(0).random(3000) < 0.5, y % 7, z.argmax(1))
    result = xent.audit(logits=z, target=y)
    p = softmax(z)
    rows = np.arange(len(y))
    loss = -np.log(p[rows, y])
    for pair in result.pairs[:50]:
        mine = y == int(pair.name)
        others = 1 - p[mine, int(pair.name)]
        expected = (loss[mine] * p[mine, int(pair.rival)] / others).sum() / len(y)
        assert pair.loss == pytest.approx(expected, rel=1e-9)
    assert sum(pair.loss for pair in result.pairs) + result.pairs_remainder == pytest.approx(result.log_loss)
    measured = [row for row in result.per_class if row.calibration is not None]
    assert len(measured) <= 100
    heaviest = max(result.per_class, key=lambda row: row.share)
    assert heaviest.calibration is not None
    one = xent.audit(logits=z, target=y, sweeps=1)
    assert one.left_out
    assert all(row.calibration is None for row in one.per_class)
    assert one.pairs[0].loss <= result.pairs[0].loss * (1 + 1e-9)


def test_a_probability_of_0():
    p = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    result = xent.audit(p, target=[1, 0, 1])
    assert result.log_loss is None
    assert result.finite_log_loss == pytest.approx(np.log(2) / 2)
    assert result.infinite_rows == 1
    assert result.worst[0].loss is None
    json.loads(result.to_json(), parse_constant=pytest.fail)
    assert "infinite loss in 1 of 3 rows" in str(result)


def test_a_sure_model_costs_nothing():
    result = xent.audit(np.eye(3)[[0, 1, 2, 0]], target=[0, 1, 2, 0])
    assert result.log_loss == result.brier == result.entropy == 0
    assert result.d2 == 1
    assert not result.pairs
    json.loads(result.to_json(), parse_constant=pytest.fail)
    str(result)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"probabilities": [[0.5, 0.6]], "target": [0]}, "sums to 1.1 at row 0"),
        ({"probabilities": [[0.5, 0.5], [-0.1, 1.1]], "target": [0, 1]}, "-0.1 at row 1, column 0"),
        ({"probabilities": [[0.5, float("nan")]], "target": [0]}, "nan at row 0, column 1"),
        ({"logits": [[0.5, float("inf")]], "target": [0]}, "inf at row 0, column 1"),
        ({"logits": [[-np.inf, -np.inf]], "target": [0]}, "no class is possible"),
        ({"log_probabilities": [[0.5, -3.0]], "target": [0]}, "0.5 at row 0, column 0"),
        ({"probabilities": [[0.5, 0.5]], "target": [2]}, "none of the labels"),
        ({"probabilities": [[0.5, 0.5]], "target": [0, 1]}, "2 rows"),
        ({"probabilities": [[0.5, 0.5]], "target": ["a"]}, "name those of the columns as classes="),
        ({"probabilities": [[1.0]], "target": [1], "classes": ["a"]}, "classes"),
        ({"probabilities": [[0.5, 0.5]], "logits": [[0.5, 0.5]], "target": [0]}, "one of"),
        ({"features": [[0.5, 0.5]], "target": [0]}, "go together"),
        ({"features": [[0.5, 0.5]], "head": "w", "target": [0]}, "head must be"),
        ({"features": [[0.5, 0.5]], "head": [[0.5, 0.5]], "target": [0]}, "one class"),
        ({"features": [[0.5, 0.5]], "head": [[0.5], [0.5]], "target": [0]}, "features must be"),
        ({"probabilities": [[0.5, 0.5]], "target": [0], "sample_weight": [-1.0]}, "sample_weight"),
        ({"probabilities": [[0.5, 0.5]], "target": [0], "sweeps": 3}, "sweeps"),
        ({"probabilities": [[0.5, 0.5]], "target": [[0.5, 0.6]]}, "target sums to 1.1"),
        ({"probabilities": [[0.5, 0.5]], "target": [0], "ids": ["a", "b"]}, "ids"),
    ],
)
def test_what_cannot_be_audited_is_named(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        xent.audit(**given)


def test_a_sample_is_that_of_the_rows_not_of_the_batches(monkeypatch):
    z, y = problem(20_000, 3)
    whole, parts = sample.Sample(3), [sample.Sample(3) for _ in range(3)]
    for each in (whole, *parts):
        each.size = 500
    given = xent.auditing.arrays.read(None, None, z, None, None, y, None, None, None, False)
    monkeypatch.setattr(sweeps, "NUMBERS", 999)
    batches = list(given.batches())
    assert len(batches) > 9
    for number, batch in enumerate(batches):
        for tile in batch.tiles:
            whole.update(tile, tile.known())
            parts[number % 3].update(tile, tile.known())
    for other in parts[1:]:
        parts[0].merge(other)
    for one, other in zip(whole.result()[:3], parts[0].result()[:3], strict=True):
        assert torch.equal(one, other)
    assert len(whole.key) == 501
    assert len(whole.result()[1]) == 500
    log_p = torch.from_numpy(z).double().log_softmax(1)
    loss = -log_p[torch.arange(20_000), torch.from_numpy(y)].numpy()
    rows = np.argsort(sample.uniform(np.arange(20_000, dtype=np.uint64)) / (1 + loss))[:500]
    assert whole.result()[1].tolist() == y[rows].tolist()
    _, _, weight, _ = whole.result()
    assert weight.sum().item() == pytest.approx(20_000, rel=0.1)
    assert (weight.numpy() * loss[rows]).sum() == pytest.approx(loss.sum(), rel=0.15)


def test_a_bootstrap_does_not_know_of_batches(monkeypatch):
    z, y = problem(30_000, 3)
    one = xent.audit(logits=z, target=y, sweeps=1)
    monkeypatch.setattr(sweeps, "NUMBERS", 999)
    other = xent.audit(logits=z, target=y, sweeps=1)
    assert one.bootstrap_low == pytest.approx(other.bootstrap_low, rel=1e-12)
    assert mean_loss.REPLICATES == 200
    assert pairs.DENSE == 1000


def test_attributes_and_forms_of_a_result(tmp_path):
    z, y = problem(200, 3)
    result = xent.audit(logits=z, target=y)
    assert "log_loss" in dir(result)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = result.no_such_thing
    assert "nats" in result._repr_html_()
    result.to_json(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["measures"]["log_loss"] == result.log_loss
    result.report(tmp_path / "a.html")
    assert "<svg" in (tmp_path / "a.html").read_text()


def test_a_sample_that_is_off_is_corrected_by_the_sweep(monkeypatch):
    """The sample's best β is 10 % off; three derivatives over all rows bring it within its fourth power."""
    z, y = problem(20_000, 4)
    true = xent.fit_temperature(z, y)
    monkeypatch.setattr("xent.auditing.sweeps.of_sample", lambda _: 1.1 / true)
    result = xent.audit(logits=z, target=y)
    assert result.temperature == pytest.approx(true, rel=1e-3)
    best = xent.cross_entropy(torch.from_numpy(z), torch.from_numpy(y), temperature=true).item()
    assert result.temperature_saving == pytest.approx(result.log_loss - best, abs=1e-5)


@pytest.mark.parametrize("case", ["few heavy rows", "few huge losses", "weights of a long tail"])
def test_the_temperature_is_that_of_all_rows(case):
    """Where a simple random sample would miss the rows that decide it."""
    rng = np.random.default_rng(3)
    z, y = problem(60_000, 3)
    z, weight = z.astype(np.float64), np.ones(60_000)
    if case == "few heavy rows":
        weight[:50], z[:50], z[50:] = 1000.0, z[:50] / 3, 3 * z[50:]
    elif case == "few huge losses":
        z[:10], z[np.arange(10), (y[:10] + 1) % 3] = 0.0, 5000.0
    else:
        weight = rng.pareto(0.6, 60_000)
    found = xent.audit(logits=z, target=y, sample_weight=weight)
    tensors = (torch.from_numpy(z), torch.from_numpy(y))
    expected = xent.fit_temperature(*tensors, sample_weight=torch.from_numpy(weight))
    assert found.temperature == pytest.approx(expected, rel=1e-5)
    losses = [
        np.average(
            torch.nn.functional.cross_entropy(tensors[0] / t, tensors[1], reduction="none"), weights=weight
        )
        for t in (1.0, expected)
    ]
    assert found.temperature_saving == pytest.approx(losses[0] - losses[1], rel=1e-5)


@pytest.mark.parametrize("gap", [130.0, 1300.0])
@pytest.mark.parametrize("kind", ["logits", "log_probabilities"])
def test_a_loss_is_finite_where_its_probability_is_too_small_for_a_number(kind, gap):
    torch.manual_seed(0)
    z = torch.randn(300, 4)
    y = z.argmax(1)
    z[0] = 0
    z[0, (y[0] + 1) % 4] = gap
    x = z if kind == "logits" else z.log_softmax(1)
    found, exact = (xent.audit(**{kind: each}, target=y) for each in (x, x.double()))
    for each in (found, exact):
        assert each.worst[0].loss == pytest.approx(gap)
        assert each.worst[0].saving == pytest.approx(gap)
        assert each.per_class[int(y[0])].calibration is not None
    assert found.miscalibration == pytest.approx(exact.miscalibration, rel=1e-5)


def test_equal_classes_are_not_all_among_the_first():
    p = np.full((50, 50), 0.02)
    found = xent.audit(p, target=np.arange(50))
    assert {k: round(50 * share) for k, share in found.top_k.items()} == {
        1: 1,
        2: 2,
        3: 3,
        5: 5,
        10: 10,
        20: 20,
    }


def test_the_top_of_soft_labels_is_mass():
    p, mass = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [[0.6, 0.3, 0.1], [0.0, 1.0, 0.0]]
    found = xent.audit(p, target=mass)
    assert found.top_k == pytest.approx({1: 0.3, 2: 0.45})
    assert found.accuracy == pytest.approx(0.3)


def test_intervals_that_are_not_known():
    p, y = np.array([[0.9, 0.1], [0.2, 0.8]]), [0, 0]
    assert xent.audit(p, target=y, sample_weight=[1.0, 0.0]).standard_error is None
    for scale in (1e-170, 1e200):
        assert xent.audit(p, target=y, sample_weight=[scale, scale]).standard_error is None
    assert xent.audit(p, target=y).low == 0  # a loss is never less


@pytest.mark.parametrize("form", ["series", "torch", "numpy", "arrow", "polars", "mixed"])
def test_ids_go_by_position(form):
    import pandas as pd
    import polars as pl
    import pyarrow as pa

    z, y = problem(60, 3)
    names = list(range(100, 160))
    ids = {
        "series": pd.Series(names, index=np.random.default_rng(0).permutation(60)),
        "torch": torch.tensor(names),
        "numpy": np.array(names),
        "arrow": pa.array(names),
        "polars": pl.Series(names),
        "mixed": [str(name) if name % 2 else name for name in names],
    }[form]
    found = xent.audit(logits=z, target=y, ids=ids)
    assert [int(row.id) for row in found.worst] == [row.row + 99 for row in found.worst]
    assert [int(name) for name in found.rows["id"].to_pylist()] == names


@pytest.mark.parametrize("named_first", [True, False])
def test_rows_without_ids_among_others(named_first):
    z, y = problem(60, 3)
    for merged in (False, True):
        audits = [xent.Audit(3), xent.Audit(3)]
        into = [audits[0], audits[1] if merged else audits[0]]
        for part, audit, named in zip(
            (slice(30), slice(30, 60)), into, (named_first, not named_first), strict=True
        ):
            audit.update(
                logits=z[part], target=y[part], ids=list(range(30)) if named else None, start=part.start or 0
            )
        if merged:
            audits[0].merge(audits[1])
        for row in audits[0].result().worst:
            assert row.id == ((row.row - 1) % 30 if (row.row <= 30) == named_first else None)


def test_a_frame_whose_classes_are_in_another_order_is_an_error():
    import pandas as pd

    z, y = problem(60, 3)
    p = pd.DataFrame(torch.from_numpy(z).softmax(1).numpy(), columns=list("abc"))
    label = np.array(list("abc"))[y]
    assert xent.audit(p, target=label, classes=list("abc")).log_loss > 0
    with pytest.raises(ValueError, match=r"columns of probabilities are the classes in another order"):
        xent.audit(p[["b", "a", "c"]], target=label, classes=list("abc"))
    with pytest.raises(ValueError, match="columns of target"):
        xent.audit(p, target=p[["b", "a", "c"]], classes=list("abc"))


def test_an_update_that_fails_leaves_the_audit_as_it_was(monkeypatch):
    monkeypatch.setattr(sweeps, "NUMBERS", 30)
    monkeypatch.setattr(sweeps, "ROWS", 10)
    z, y = problem(100, 3)
    bad = z.copy()
    bad[90, 1] = np.nan
    audit = xent.Audit(3)
    with pytest.raises(ValueError, match="row 90"):
        audit.update(logits=bad, target=y)
    audit.update(logits=z, target=y)
    assert audit.result().log_loss == pytest.approx(xent.audit(logits=z, target=y).log_loss)
    assert audit.result().count == 100


def test_what_an_audit_does_not_take():
    z, y = problem(60, 3)
    audit = xent.Audit(np.int64(3))
    audit.update(logits=z, target=y)
    again = audit.second_sweep()
    again.update(logits=z[:20], target=y[:20])
    with pytest.raises(ValueError, match="second sweep has 20 of the first one's 60 rows"):
        again.result()
    again.update(logits=z[20:], target=y[20:])
    assert again.result().suspects == xent.audit(logits=z, target=y, classes=3).suspects
    with pytest.raises(TypeError, match="merge takes another Audit"):
        audit.merge(3)
    with pytest.raises(ValueError, match="with itself"):
        audit.merge(audit)
    with pytest.raises(ValueError, match="start must be 0 or more"):
        audit.update(logits=z, target=y, start=-5)
    with pytest.raises(ValueError, match="names 'a' twice"):
        xent.Audit(["a", "a"])


def test_a_result_is_pickled_without_the_rows():
    z, y = problem(60, 3)
    found = xent.audit(logits=z, target=y)
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    assert again.rows is None


def test_a_single_column_has_the_tolerance_of_two():
    x = np.array([2e-16, -1.0])
    assert xent.audit(log_probabilities=x, target=[1, 0]).log_loss == pytest.approx(0.2293, abs=1e-3)
    with pytest.raises(ValueError, match=r"log_probabilities is 0.1 at row 0"):
        xent.audit(log_probabilities=np.array([0.1, -1.0]), target=[1, 0])


def test_scores_that_become_many_are_cells_in_every_order():
    z, y = problem(40_000, 4)
    audits = [xent.Audit(4) for _ in range(3)]
    for number, part in enumerate(np.array_split(np.arange(40_000), 7)):
        audits[number % 3].update(logits=z[part], target=y[part], start=int(part[0]))
    assert audits[0]._first.per_class.scores.kept
    for other in audits[1:]:
        audits[0].merge(other)
    whole = xent.audit(logits=z, target=y, sweeps=1)
    assert audits[0].result().miscalibration == pytest.approx(whole.miscalibration, rel=1e-9)
    many = scores.Scores()
    column = torch.zeros(scores.MOST // 2 + 1, 1)
    for _ in range(2):
        one = scores.Scores()
        one.add(column, column, column[:, 0])
        assert one.kept
        many.merge(one)
    assert not many.kept
    assert many.cells() is None


def test_sure_rows_keep_their_order():
    """Every probability here is 1 in float32, and some are surer than others."""
    rng = np.random.default_rng(0)
    gap = rng.uniform(20, 60, 400)
    z = torch.from_numpy(np.stack([gap, np.zeros(400)], 1))
    y = (rng.random(400) > (gap - 20) / 40).astype(int)
    found, exact = (xent.audit(logits=each, target=y, sweeps=1) for each in (z.float(), z))
    assert (z.float().softmax(1)[:, 0] == 1).all()
    for one, other in zip(found.per_class, exact.per_class, strict=True):
        assert one.calibration == pytest.approx(other.calibration, rel=1e-5)
    assert found.discrimination == pytest.approx(exact.discrimination, rel=1e-5)
    assert found.discrimination > 0.05
