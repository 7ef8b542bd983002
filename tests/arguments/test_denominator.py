"""The denominator of a mean: any number, and what 0, negative numbers and nan mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import xent
from xent import curvature

GENERATOR = torch.Generator().manual_seed(0)
Z, X, W = (torch.randn(shape, dtype=torch.float64, generator=GENERATOR) for shape in ((6, 5), (6, 3), (5, 3)))
Y = torch.tensor([0, 1, 2, 3, 4, 0])
NOTHING = torch.full((6,), -100)
LOSSES = {
    "logits": lambda y, **options: xent.cross_entropy(Z.clone().requires_grad_(), y, **options),
    "features": lambda y, **options: xent.linear_cross_entropy(X.clone().requires_grad_(), W, y, **options),
    "positions": lambda y, **options: xent.linear_cross_entropy(
        X.clone().requires_grad_(), W[:, None], y[:, None], **options
    ),
    "no gradient": lambda y, **options: xent.linear_cross_entropy(X, W, y, **options),
    "z-loss": lambda y, **options: xent.linear_cross_entropy(X, W, y, z_loss=0.1, **options),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@losses
@pytest.mark.parametrize(
    "five",
    [5, 5.0, np.int64(5), np.float32(5), torch.tensor(5), torch.tensor([5.0]), torch.tensor(5.0)],
    ids=str,
)
def test_any_number_divides(loss, five):
    torch.testing.assert_close(loss(Y, denominator=five), loss(Y, reduction="sum") / 5)


@losses
@pytest.mark.parametrize("zero", [0, 0.0, np.int64(0), torch.tensor(0), torch.tensor(0.0)], ids=str)
def test_zero_is_a_loss_of_zero_where_no_row_counts(loss, zero):
    found = loss(NOTHING, denominator=zero)
    assert found.item() == 0
    if found.requires_grad:
        found.backward()
    with pytest.raises(ValueError, match=r"denominator must be positive where rows count, got 0.* for 6"):
        loss(Y, denominator=zero)
    with pytest.raises(ValueError, match="for 1 of them"):
        loss(torch.where(torch.arange(6) == 3, Y, -100), denominator=zero)


@losses
@pytest.mark.parametrize("wrong", [-1, -1.0, float("nan"), float("inf"), np.float32(-2)], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_what_is_no_divisor_is_named(loss, wrong, as_tensor):
    with pytest.raises(ValueError, match="denominator must be positive, or 0 where no row counts"):
        loss(Y, denominator=torch.tensor(wrong) if as_tensor else wrong)


def under_vmap(denominators, y=Y):
    return torch.func.vmap(lambda d: xent.linear_cross_entropy(X, W, y, denominator=d))(denominators)


def in_a_graph(denominators, y=Y):
    run = torch.compile(
        lambda d: xent.linear_cross_entropy(X, W, y, denominator=d), backend="eager", fullgraph=True
    )
    return torch.stack([run(d) for d in denominators])


@pytest.mark.parametrize("way", [under_vmap, in_a_graph])
def test_where_data_cannot_be_read(way):
    """Where data cannot be read, a denominator that is not positive shows in the loss.

    A denominator of 0 gives inf, or 0 where no row counts; a negative one or nan gives nan.
    """
    found = way(torch.tensor([2.0, 0.0, -1.0, torch.nan]))
    torch.testing.assert_close(found[0], xent.linear_cross_entropy(X, W, Y, denominator=2.0))
    assert found[1].isposinf()
    assert found[2:].isnan().all()
    found = way(torch.tensor([2.0, 0.0]), NOTHING)
    assert torch.equal(found, torch.zeros(2, dtype=torch.float64))


def test_curvature_divides_by_it_too():
    whole = curvature.HeadHessian(X, W, Y, reduction="sum").to_dense()
    torch.testing.assert_close(curvature.HeadHessian(X, W, Y, denominator=np.int64(4)).to_dense(), whole / 4)
    with pytest.raises(ValueError, match="denominator must be positive where rows count"):
        curvature.HeadHessian(X, W, Y, denominator=0)
    assert (curvature.HeadHessian(X, W, NOTHING, denominator=0).to_dense() == 0).all()
