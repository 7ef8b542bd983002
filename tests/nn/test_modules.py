"""The modules."""

from __future__ import annotations

import pytest
import torch

import xent


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_features", [(), (2, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_loads_the_state_dict_of_torch(bias, out_features, weighted):
    weight = torch.rand(7) + 0.5 if weighted else None
    options = {"bias": bias, "out_features": out_features, "weight": weight}
    theirs = torch.nn.LinearCrossEntropyLoss(5, 7, **options)
    ours = xent.nn.LinearCrossEntropyLoss(5, 7, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 5)
    target = torch.randint(7, (4, *out_features))
    a, b = ours(x, target), theirs(x, target)
    torch.testing.assert_close(a, b)
    a.backward()
    b.backward()
    torch.testing.assert_close(ours.linear.weight.grad, theirs.linear.weight.grad)
    theirs.load_state_dict(ours.state_dict())


def test_cross_entropy_loss_takes_every_option():
    z, target, s = torch.randn(4, 5), torch.tensor([0, 1, -1, 3]), torch.rand(4)
    options = {
        "ignore_index": -1,
        "reduction": "sum",
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "softcap": 10.0,
        "temperature": 2.0,
    }
    weight = torch.rand(5)
    module = xent.nn.CrossEntropyLoss(weight, **options)
    torch.testing.assert_close(
        module(z, target, sample_weight=s), xent.cross_entropy(z, target, weight, sample_weight=s, **options)
    )
    assert "label_smoothing=0.1" in repr(module)
    assert set(module.state_dict()) == {"weight"}
    assert module.double().weight.dtype == torch.float64


def test_denominator_reaches_the_module():
    head = xent.nn.LinearCrossEntropyLoss(3, 4)
    x, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    total = xent.linear_cross_entropy(x, head.linear.weight, target, reduction="sum")
    torch.testing.assert_close(head(x, target, denominator=10), total / 10)


def test_trains_like_the_unfused_pair():
    """Ten steps of Adam on the same data: the same weights."""
    x, target = torch.randn(32, 6), torch.randint(8, (32,))
    pair = torch.nn.Sequential(torch.nn.Linear(6, 8))
    head = xent.nn.LinearCrossEntropyLoss(6, 8, bias=True)
    head.linear.load_state_dict(pair[0].state_dict())
    for module, loss in (
        (pair, lambda: torch.nn.functional.cross_entropy(pair(x), target)),
        (head, lambda: head(x, target)),
    ):
        optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
        for _ in range(10):
            optimiser.zero_grad()
            loss().backward()
            optimiser.step()
    torch.testing.assert_close(head.linear.weight, pair[0].weight, rtol=1e-4, atol=1e-4)
