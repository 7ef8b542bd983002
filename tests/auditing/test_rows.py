"""The measures of rows, by the formulas written out in float64."""

from __future__ import annotations

import pytest
import torch

import xent
from xent.auditing.rows import joined
from xent.auditing.tiles import Tile
from xent.auditing.top_two import first_equal, top_two


def tile_of(x, label, kind="logits", by_class=False, mass=None):
    ones = torch.ones(len(label), dtype=torch.float64)
    return Tile(x.t().contiguous().t() if by_class else x, kind, label, ones, mass)


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("kind", ["logits", "log-probs", "probs"])
@pytest.mark.parametrize("classes", [2, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measures_are_the_formulas(dtype, classes, kind, by_class):
    torch.manual_seed(0)
    z, y = 3 * torch.randn(200, classes, dtype=dtype), torch.randint(classes, (200,))
    x = {"logits": z, "log-probs": z.log_softmax(1), "probs": z.softmax(1)}[kind]
    tile = tile_of(x, y, kind, by_class)
    rows = joined([tile.chosen(torch.arange(130)).measured(), tile.chosen(torch.arange(130, 200)).measured()])
    log_p = {"logits": z.double().log_softmax(1), "log-probs": x.double(), "probs": x.double().log()}[kind]
    p = log_p.exp()
    t = torch.nn.functional.one_hot(y, classes).double()
    torch.testing.assert_close(tile.p.double(), p, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tile.log_p.double(), log_p, rtol=1e-5, atol=1e-5)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(rows.loss, -(t * log_p).sum(1), **near)
    torch.testing.assert_close(rows.entropy, -(p * log_p).sum(1), **near)
    torch.testing.assert_close(rows.brier, (p - t).square().sum(1), **near)
    torch.testing.assert_close(rows.gradient_norm, (p - t).norm(dim=1), **near)
    jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    torch.testing.assert_close(rows.curvature_trace, jacobian.diagonal(dim1=1, dim2=2).sum(1), **near)
    torch.testing.assert_close(rows.confidence, p.amax(1), **near)
    others = log_p.masked_fill(t > 0, -torch.inf)
    torch.testing.assert_close(rows.margin, (t * log_p).sum(1) - others.amax(1), **near)
    assert (rows.prediction == p.argmax(1)).all()
    assert (rows.right == (p.argmax(1) == y)).all()
    torch.testing.assert_close(rows.own, (p * t).sum(1), **near)
    torch.testing.assert_close(rows.others, (p * (1 - t)).sum(1), **near)
    torch.testing.assert_close(rows.rest, 1 - p.amax(1), **near)
    torch.testing.assert_close(rows.saving, (log_p.amax(1) - (t * log_p).sum(1)), **near)
    without = log_p.scatter(1, rows.prediction[:, None], -torch.inf)
    assert (rows.runner_up == without.argmax(1)).all()
    assert (rows.rank == (p > p.gather(1, y[:, None])).sum(1).clamp(max=100)).all()


@pytest.mark.parametrize("classes", [5, 255, 256, 1000])
def test_the_rank_counts_equal_classes_in_their_order(classes):
    torch.manual_seed(3)
    z = torch.randint(-3, 3, (400, classes)).float()  # many equal ones
    z[:200] += torch.randn(200, classes)
    order = z.sort(dim=1, descending=True, stable=True).indices
    place = torch.randint(min(classes, 120), (400,))
    place[::3] = torch.randint(2, (134,))
    y = order.gather(1, place[:, None])[:, 0]
    assert (tile_of(z, y, "logits").measured().rank == place.clamp(max=100)).all()


def test_gradient_norms_are_those_of_curvature():
    torch.manual_seed(1)
    x, w, y = torch.randn(20, 5), torch.randn(4, 5), torch.randint(4, (20,))
    rows = tile_of((x @ w.T).log_softmax(1), y, "log-probs").measured()
    norms = xent.curvature.row_gradient_norms(x, w, y)
    torch.testing.assert_close((rows.gradient_norm * x.double().norm(dim=1)).float(), norms.float())


def test_a_probability_of_0_and_equal_ones():
    log_p = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    log_p[1:] = log_p[1:].log()
    rows = tile_of(log_p, torch.tensor([0, 1, 1]), "log-probs").measured()
    assert rows.entropy[0] == 0
    assert rows.loss.tolist()[0] == 0
    assert rows.prediction.tolist() == [0, 0, 2]
    assert rows.runner_up.tolist() == [1, 1, 0]
    assert rows.rank.tolist() == [0, 1, 2]  # of equal classes the lower is before
    assert rows.margin[0] == torch.inf
    never = tile_of(log_p[:1], torch.tensor([1]), "log-probs")
    assert never.impossible.tolist() == [True]
    assert never.measured().loss.item() == torch.inf


def test_sure_rows_keep_their_digits():
    """z = (40, 0): ‖p − t‖ = √2·(1 − p) and the trace 2·p·(1 − p), where 1 − p = 4.248e-18."""
    rows = tile_of(torch.tensor([[40.0, 0.0]]), torch.tensor([0])).measured()
    assert rows.loss.item() == pytest.approx(4.248354255291589e-18, rel=1e-6)
    assert rows.gradient_norm.item() == pytest.approx(2**0.5 * 4.248354255291589e-18, rel=1e-6)
    assert rows.curvature_trace.item() == pytest.approx(2 * 4.248354255291589e-18, rel=1e-6)


def test_soft_labels_are_the_formulas():
    torch.manual_seed(2)
    z, mass = torch.randn(50, 4, dtype=torch.float64), torch.rand(50, 4, dtype=torch.float64)
    mass[:10, 0] = 0
    mass /= mass.sum(1, keepdim=True)
    z[:10, 0] = -torch.inf
    log_p = z.log_softmax(1)
    p = log_p.exp()
    rows = tile_of(z, mass.argmax(1), mass=mass).measured()
    torch.testing.assert_close(rows.loss, -torch.where(mass > 0, mass * log_p, 0.0).sum(1))
    torch.testing.assert_close(rows.brier, (p - mass).square().sum(1))
    torch.testing.assert_close(rows.hit, mass[torch.arange(50), p.argmax(1)])


def test_the_lowest_of_equal_classes():
    x = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0], [3.0, 1.0, 0.0]])
    for each in (x, x.t().contiguous().t()):
        assert first_equal(each, each.amax(1)).tolist() == [1, 0, 0]
    many = torch.zeros(2, 70_000)
    many[0, [3, 69_999]] = 1.0
    many[1, 69_998] = 1.0
    assert first_equal(many, many.amax(1)).tolist() == [3, 69_998]


@pytest.mark.parametrize("classes", [2, 3, 64, 65, 128, 129, 200, 1000])
@pytest.mark.parametrize("values", [2, 5, 1000])
def test_the_two_largest(classes, values):
    """Against a stable sort, with few values so that many are equal, and with classes that are masked."""
    torch.manual_seed(classes)
    x = torch.randint(values, (300, classes)).float()
    x[torch.rand(x.shape) < 0.3] = -torch.inf
    x[:, classes // 2] = x[:, classes // 2].clamp(min=0)
    x[:50] = -torch.inf
    x[torch.arange(50), torch.arange(50) % classes] = 1.0
    value, order = x.sort(dim=1, descending=True, stable=True)
    for each in (x, x.t().contiguous().t()):
        found = top_two(each)
        assert torch.equal(found.top, value[:, 0])
        assert torch.equal(found.second, value[:, 1])
        assert torch.equal(found.likely, order[:, 0])
        assert torch.equal(found.runner_up, order[:, 1])


def test_masked_classes_cost_nothing():
    tile = tile_of(torch.tensor([[0.0, -torch.inf, 0.0]]), torch.tensor([0]))
    assert tile.p.tolist() == [[0.5, 0.0, 0.5]]
    rows = tile.measured()
    assert rows.entropy.item() == pytest.approx(0.6931472)
    assert rows.curvature_trace.item() == 0.5
