"""The decomposition of a row's loss by rival, and the losses of pairs over a data set."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

import triplet_cases as cases
import xent
from table import close, dtypes
from triplet_cases import EXTREME, ROW, head, row
from xent import triplets
from xent._core.tiles import top_k as streaming
from xent.triplets._pairs import MAX_DENSE_CLASSES

INF = math.inf


def spelt_out(z, y):
    """π (N, C) and CE (N,), float64."""
    z = z.double()
    rivals = z.scatter(1, y[:, None], -INF)
    loss = xent.cross_entropy(z, y, reduction="none")
    return rivals.softmax(1), loss


# Attribution


@given(ROW)
def test_it_adds_up_to_the_loss(given_row):
    z, y = row(*given_row, torch.float64)
    found = triplets.attribution(z, y, 3)
    assert_close(found.losses.sum(1) + found.remainder, found.loss, rtol=1e-15, atol=0.0)
    expected = float(cases.bounds(z[0].tolist(), int(y))["loss"][0])
    slack = 2e-15 * (1 + float(cases.bounds(z[0].tolist(), int(y))["loss"][1]))
    assert found.loss.item() == pytest.approx(expected, rel=slack)
    assert ((found.shares >= 0) & (found.shares <= 1)).all()
    assert found.classes.shape == (1, min(3, z.shape[1] - 1))


@pytest.mark.parametrize(("z", "y"), EXTREME, ids=str)
@dtypes()
def test_shares_of_extreme_rows_are_exact(z, y, dtype):
    z, y = row(z, y, dtype)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    found = triplets.attribution(z, y, 3)
    right = cases.shares(z[0].tolist(), int(y)) if z.shape[1] > 1 else []
    loss, moved = cases.bounds(z[0].tolist(), int(y))["loss"]
    assert abs(found.loss.item() - loss) <= 4 * eps * loss + 2 * eps * moved + tiny
    top = z[0].scatter(0, y, -INF).amax().item()
    for j, share, carries in zip(found.classes[0], found.shares[0], found.losses[0], strict=True):
        if j < 0:
            assert share == carries == 0
            continue
        distance = abs(top - z[0, j].item())
        assert abs(share.item() - right[j]) <= (8 + distance) * eps * right[j] + tiny
        assert carries.item() == pytest.approx(share.item() * found.loss.item(), rel=4 * eps, abs=tiny)


def test_each_term_is_a_softplus():
    """π_j·softplus(m_j − log π_j), which are the terms that the decomposition is made of."""
    z, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(6, (20,))
    found = triplets.attribution(z, y, 5)
    m = z.gather(1, found.classes) - z.gather(1, y[:, None])
    terms = found.shares * torch.nn.functional.softplus(m - found.shares.log(), threshold=40)
    assert_close(found.losses, terms)
    assert (found.remainder == 0).all()


@dtypes()
@pytest.mark.parametrize("k", [1, 5, 40, 2000])
@pytest.mark.parametrize("classes", [2, 45, 1300])
def test_the_largest_shares(dtype, k, classes):
    z, y = torch.randn(9, classes, dtype=dtype), torch.randint(classes, (9,))
    found = triplets.attribution(z, y, k)
    pi, loss = spelt_out(z, y)
    shares, indices = pi.topk(min(k, classes - 1))
    assert torch.equal(found.classes, indices)
    close(found.shares, shares)
    close(found.losses, shares * loss[:, None])
    close(found.loss, loss)
    close(found.remainder, (1 - shares.sum(1)) * loss)
    assert (found.remainder >= 0).all()


@pytest.mark.parametrize("k", [1, 3])
def test_the_largest_of_blocks(k, monkeypatch):
    """The largest rivals also lie in the remainder beyond the blocks, and across tiles."""
    monkeypatch.setattr(streaming, "BLOCK", 4)
    x, w, y = torch.randn(30, 3), torch.randn(303, 3), torch.randint(303, (30,))
    w[302] *= 5  # beyond the last block of every tile that holds it
    indices = spelt_out(x @ w.T, y)[0].topk(k).indices
    for budget in (None, 20_000, 3_000):
        assert torch.equal(triplets.linear_attribution(x, w, y, k, memory_budget=budget).classes, indices)
        assert torch.equal(xent.linear_top_k(x, w, k, memory_budget=budget)[1], (x @ w.T).topk(k).indices)


@dtypes()
def test_tiling_changes_nothing(dtype):
    x, w, b, y = head(dtype)
    given = dict(softcap=4.0, temperature=0.8)
    whole = triplets.attribution(x @ w.T + b, y, 4, **given)
    for budget in (None, 600, 3_000):
        found = triplets.linear_attribution(x, w, y, 4, linear_bias=b, memory_budget=budget, **given)
        assert torch.equal(found.classes, whole.classes)
        for name in ("shares", "losses", "remainder", "loss"):
            close(getattr(found, name), getattr(whole, name))


def test_ignored_rows_and_masked_rivals():
    z = torch.tensor([[0.0, 1.0, -INF, -INF], [math.nan] * 4])
    found = triplets.attribution(z, torch.tensor([0, -100]), 2)
    assert found.classes.tolist() == [[1, -1], [-1, -1]]
    assert found.shares.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert found.losses.tolist() == [[found.loss[0].item(), 0.0], [0.0, 0.0]]
    assert found.remainder.tolist() == [0.0, 0.0]
    lost = triplets.attribution(torch.tensor([[-INF, 1.0, 1.0, -INF]]), torch.tensor([0]), 3)
    assert lost.loss.item() == INF
    assert lost.losses.tolist() == [[INF, INF, 0.0]]
    assert triplets.attribution(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 2).classes.shape == (
        0,
        2,
    )


def test_shapes():
    z, y = torch.randn(2, 5, 3), torch.randint(5, (2, 3))
    found = triplets.attribution(z, y, 2)
    assert found.classes.shape == found.shares.shape == found.losses.shape == (2, 3, 2)
    assert found.remainder.shape == found.loss.shape == (2, 3)
    one = triplets.attribution(z[1, :, 2], y[1, 2], 2)
    assert torch.equal(one.classes, found.classes[1, 2])
    x, w = torch.randn(4, 3), torch.randn(5, 7, 3)
    y = torch.randint(5, (4, 7))
    found = triplets.linear_attribution(x, w, y, 2)
    at = triplets.linear_attribution(x, w[:, 6], y[:, 6], 2)
    assert torch.equal(found.classes[:, 6], at.classes)
    assert_close(found.losses[:, 6], at.losses)


def test_under_vmap():
    z, y = torch.randn(3, 4, 6), torch.randint(6, (3, 4))
    y[0, 0] = -100
    found = torch.func.vmap(lambda z, y: triplets.attribution(z, y, 2))(z, y)
    for i in range(3):
        for a, e in zip(found, triplets.attribution(z[i], y[i], 2), strict=True):
            assert_close(a[i], e)


@pytest.mark.parametrize("k", [0, -1])
def test_no_rival_at_all_is_refused(k):
    with pytest.raises(ValueError, match=f"top_k must be at least 1, got {k}"):
        triplets.attribution(torch.zeros(1, 3), torch.tensor([0]), k)
    with pytest.raises(ValueError, match=f"at least 1, got {k}"):
        triplets.pair_matrix(torch.zeros(1, 3), torch.tensor([0]), top_k=k)


# Pairs


def class_losses(z, y):
    loss, kept = xent.cross_entropy(z.double(), y, reduction="none"), y != -100
    return torch.zeros(z.shape[1], dtype=torch.float64).index_add_(0, y[kept], loss[kept])


def batch(dtype=torch.float64, n=60, c=7):
    z, y = 3 * torch.randn(n, c, dtype=dtype), torch.randint(c, (n,))
    y[::9] = -100
    return z, y


def dense(pairs):
    return pairs.matrix.to_dense() if pairs.matrix.is_sparse else pairs.matrix


@pytest.mark.parametrize("top_k", [None, 1, 3, 100])
@dtypes()
def test_rows_of_the_matrix_are_class_losses(top_k, dtype):
    z, y = batch(dtype)
    found = triplets.pair_matrix(z, y, top_k=top_k)
    assert found.matrix.is_sparse == (top_k is not None)
    assert found.matrix.dtype == torch.float64
    near = dict(rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0.0)
    assert_close(found.loss, class_losses(z, y), **near)
    # exactly the sum of its own rows, whatever type the logits have
    assert_close(dense(found).sum(1) + found.remainder, found.loss, rtol=1e-15, atol=0.0)
    assert torch.equal(found.count, torch.bincount(y[y != -100], minlength=7))
    assert not dense(found).diagonal().any()
    assert (found.remainder >= 0).all()


def test_rows_of_the_matrix_add_up_in_its_own_type():
    """Whatever the type of the logits: shares that are float32 numbers add up to 1 in float64."""
    z, y = 3 * torch.randn(1, 900), torch.tensor([4])
    rivals = z[0, torch.arange(900) != 4]
    weights = (rivals - rivals.max()).exp().double()
    loss = torch.log1p(weights.sum() * (rivals.max().double() - z[0, 4].double()).exp())
    assert_close(triplets.pair_matrix(z, y).matrix.sum(), loss, rtol=1e-14, atol=0.0)


def test_the_matrix_spelt_out():
    z, y = batch()
    pi, loss = spelt_out(z[y != -100], y[y != -100])
    expected = torch.zeros(7, 7, dtype=torch.float64).index_add_(0, y[y != -100], pi * loss[:, None])
    assert_close(triplets.pair_matrix(z, y).matrix, expected)
    assert_close(dense(triplets.pair_matrix(z, y, top_k=6)), expected)


@pytest.mark.parametrize("top_k", [None, 2])
def test_batches_add_up(top_k):
    z, y = batch()
    whole = triplets.pair_matrix(z, y, top_k=top_k)
    parts = [triplets.pair_matrix(z[i], y[i], top_k=top_k) for i in torch.arange(60).split(17)]
    found = sum(parts[1:], parts[0])
    for a, b in ((dense(found), dense(whole)), (found.remainder, whole.remainder), (found.loss, whole.loss)):
        assert_close(a, b)
    assert torch.equal(found.count, whole.count)
    assert_close(dense(parts[0] + parts[1]), dense(parts[1] + parts[0]))
    both = (parts[0] + parts[0]).largest(2)
    assert [(pair.true, pair.rival) for pair in both] == [pair[:2] for pair in parts[0].largest(2)]
    assert [pair.loss for pair in both] == [2 * pair.loss for pair in parts[0].largest(2)]


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("budget", [None, 2_000])
def test_from_features(top_k, budget):
    x, w, b, y = head(n=40)
    expected = triplets.pair_matrix((x @ w.T + b) / 0.7, y, top_k=top_k)
    found = triplets.linear_pair_matrix(
        x, w, y, top_k=top_k, linear_bias=b, temperature=0.7, memory_budget=budget
    )
    assert_close(dense(found), dense(expected))
    assert_close(found.remainder, expected.remainder)
    positions = triplets.linear_pair_matrix(x, torch.stack([w, w], 1), torch.stack([y, y], 1), top_k=top_k)
    assert_close(positions.loss, 2 * triplets.linear_pair_matrix(x, w, y, top_k=top_k).loss)


@pytest.mark.parametrize("top_k", [None, 2])
def test_the_largest_pairs(top_k):
    z, y = batch()
    pairs = triplets.pair_matrix(z, y, top_k=top_k)
    matrix = dense(pairs)
    found = pairs.largest(4)
    assert [pair.loss for pair in found] == sorted(matrix.flatten().tolist(), reverse=True)[:4]
    for pair in found:
        assert matrix[pair.true, pair.rival].item() == pair.loss
        assert pair.share == pytest.approx(pair.loss / pairs.loss.sum().item())
    assert len(pairs.largest(1000)) == int((matrix > 0).sum())
    assert sum(pair.share for pair in pairs.largest(1000)) <= 1 + 1e-12


def test_infinite_losses_do_not_spread():
    z = torch.tensor([[-INF, 1.0, -INF], [0.0, 1.0, 2.0]])
    for top_k in (None, 2):
        found = dense(triplets.pair_matrix(z, torch.tensor([0, 1]), top_k=top_k))
        assert found[0].tolist() == [0.0, INF, 0.0]
        assert found[1:].isfinite().all()


@pytest.mark.parametrize("lost", [-math.inf, math.nan], ids=["all masked", "nan"])
def test_a_nan_loss_has_nan_terms(lost):
    z, y = torch.full((1, 3), lost), torch.tensor([1])
    found = triplets.attribution(z, y, 1)
    assert found.loss.isnan().all()
    assert (found.losses.sum(-1) + found.remainder).isnan().all()
    for top_k in (None, 1):
        pairs = triplets.pair_matrix(torch.cat([z, torch.zeros(1, 3)]), torch.tensor([1, 0]), top_k=top_k)
        assert pairs.loss[1].isnan()
        assert_close(pairs.loss[0].item(), math.log(3))


def test_matrices_of_different_kinds_do_not_add():
    z, y = batch()
    a, b = triplets.pair_matrix(z, y), triplets.pair_matrix(z, y, top_k=2)
    with pytest.raises(ValueError, match=r"got dense \(7, 7\) and sparse \(7, 7\)"):
        a + b
    with pytest.raises(ValueError, match=r"got dense \(7, 7\) and dense \(3, 3\)"):
        a + triplets.pair_matrix(z[:, :3], torch.zeros_like(y))
    with pytest.raises(TypeError):
        a + 1
    many = MAX_DENSE_CLASSES + 1
    with pytest.raises(ValueError, match=r"4097 classes takes 0\.1 GiB; with top_k"):
        triplets.pair_matrix(torch.zeros(1, many), torch.tensor([0]))
    assert triplets.pair_matrix(torch.zeros(1, many), torch.tensor([0]), top_k=2).matrix.is_sparse
    with pytest.raises(NotImplementedError, match="under vmap"):
        torch.func.vmap(lambda z: triplets.pair_matrix(z, y).loss)(z[None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    z, y = batch(torch.float32)
    z = z.to(dtype)
    found = triplets.attribution(z, y, 2)
    assert found.loss.dtype == torch.float32
    close(found.losses, triplets.attribution(z.float(), y, 2).losses)
    assert_close(triplets.pair_matrix(z, y).loss, triplets.pair_matrix(z.float(), y).loss)


def test_a_logit_scale_is_a_factor_of_the_features():
    """Before the softcap, in every report of a head."""
    x, w = (torch.randn(s, dtype=torch.float64) for s in ((6, 4), (9, 4)))
    y = torch.randint(9, (6,))
    for report in (
        xent.triplets.linear_bounds,
        xent.triplets.linear_attribution,
        xent.triplets.linear_pair_matrix,
    ):
        scaled = report(x, w, y, logit_scale=0.3, softcap=2.0)
        other = report(0.3 * x, w, y, softcap=2.0)
        for name, value in vars(scaled).items() if hasattr(scaled, "__dict__") else scaled._asdict().items():
            torch.testing.assert_close(value, getattr(other, name))
