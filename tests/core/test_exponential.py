"""Exponentials of which many are too small for a normal number are those of torch."""

from __future__ import annotations

import pytest
import torch

from xent._core.exponential import FEW, exp_


def spread(shape, dtype, low):
    torch.manual_seed(0)
    x = torch.empty(shape, dtype=dtype).uniform_(low, 1.0)
    x.view(-1)[::7] = -torch.inf
    x.view(-1)[3::1001] = 0.0
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("low", [-10.0, -90.0, -110.0, -800.0, -3e3])
@pytest.mark.parametrize("shape", [(3, 5), (300, 1000), (2 * FEW + 3,), (1, 1), (0, 4)])
def test_they_are_those_of_torch(shape, low, dtype):
    x = spread(shape, dtype, low)
    expected = x.exp()
    found = exp_(x)
    assert found.data_ptr() == x.data_ptr()
    # both factors of a subnormal number are rounded before their product is
    smallest = torch.finfo(dtype).smallest_normal
    normal = expected >= 2 * smallest
    torch.testing.assert_close(found[normal], expected[normal], rtol=2 * torch.finfo(dtype).eps, atol=0)
    apart = (found[~normal].double() - expected[~normal].double()).abs()
    assert (apart <= 4 * smallest * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("many", [False, True])
def test_rows_and_columns_of_a_wider_tensor(many):
    wide = spread((700, 900), torch.float32, -500.0 if many else -5.0)
    for part in (wide[:, 3:890], wide.t(), wide[::2, ::3], wide.t()[5:600, 2:]):
        expected = part.exp()
        torch.testing.assert_close(exp_(part.clone(memory_format=torch.preserve_format)), expected)
        whole = wide.clone()
        view = whole.as_strided(part.shape, part.stride(), part.storage_offset())
        torch.testing.assert_close(exp_(view), expected)


def test_nan_and_infinities_stay_apart():
    for count in (8, 4 * FEW):
        x = torch.full((count,), -95.0)
        x[1], x[2], x[3] = torch.nan, torch.inf, -torch.inf
        found = exp_(x.clone())
        torch.testing.assert_close(found, x.exp(), equal_nan=True)
        assert found[2] == torch.inf
        assert found[3] == 0
