"""Prototypes: the loss against its definition, and digits without labels beside k-means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import xent
from digits_without_labels import compare


def draw(dtype=torch.float64, views=2):
    torch.manual_seed(0)
    head = xent.nn.PrototypeHead(6, 5, temperature=0.2, epsilon=0.1, dtype=dtype)
    x = torch.randn(20, 6, dtype=dtype)
    seen = [(x + 0.3 * torch.randn(20, 6, dtype=dtype)).requires_grad_() for _ in range(views)]
    return head, seen


@pytest.mark.parametrize(("views", "assigned"), [(2, 2), (2, 1), (4, 2), (3, 3)])
def test_equals_its_definition(views, assigned):
    """Each assigned view is predicted from every other; targets take no gradient."""
    head, seen = draw(views=views)
    z = [F.normalize(v, dim=1) @ F.normalize(head.prototypes, dim=1).T for v in seen]
    total, pairs = 0.0, 0
    for i in range(assigned):
        q = xent.sinkhorn.assign(z[i].detach(), epsilon=0.1, max_iterations=5, tolerance=None).plan
        for j in range(views):
            if i != j:
                total, pairs = total - (q * (z[j] / 0.2).log_softmax(1)).sum(1).mean(), pairs + 1
    loss = head(*seen, assigned=assigned)
    assert_close(loss, total / pairs)
    leaves = [*seen, head.prototypes]
    for a, b in zip(
        torch.autograd.grad(loss, leaves, allow_unused=True),
        torch.autograd.grad(total / pairs, leaves, allow_unused=True),
        strict=True,
    ):
        assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)


def test_assignments_are_balanced_however_alike_the_rows():
    head, (x, _) = draw()
    alike = F.normalize(head.prototypes[:1].detach() + 0.01 * x.detach(), dim=1)
    assert (head.predict(alike) == 0).all()
    plan = head.assign(alike).plan
    assert not plan.requires_grad
    assert_close(plan.sum(1), torch.ones(20, dtype=plan.dtype))
    assert ((plan.sum(0) - 4.0).abs() < 0.1).all()


def test_epsilon_sets_the_sharpness_of_the_assignments():
    """As ε goes to 0 each row has one prototype; with a large ε it has all equally."""
    head, (x, _) = draw()
    surest = [with_epsilon(head, e).assign(x).plan.amax(1).mean() for e in (0.01, 0.1, 10.0)]
    assert surest[0] > 0.9
    assert surest[0] > surest[1] > surest[2]
    assert surest[2] < 0.25


def with_epsilon(head, epsilon):
    other = xent.nn.PrototypeHead(6, 5, epsilon=epsilon, iterations=50, dtype=torch.float64)
    other.load_state_dict(head.state_dict())
    return other


def test_half_features():
    head, seen = draw(torch.bfloat16)
    loss = head(*seen)
    assert loss.dtype == torch.bfloat16
    loss.backward()
    assert head.prototypes.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda h, x: h(x), "two views or more"),
        (lambda h, x: h(x, x[:3]), "of the same rows"),
        (lambda h, x: h(x, x, assigned=3), "between 1 and the 2 views"),
        (lambda h, x: xent.nn.PrototypeHead(2, 3, temperature=0.0), "temperature must be positive"),
        (lambda h, x: xent.nn.PrototypeHead(2, 3, epsilon=-1.0), "epsilon must be positive"),
        (lambda h, x: xent.nn.PrototypeHead(2, 3, iterations=0), "iterations"),
    ],
)
def test_errors(call, match):
    head, (x, _) = draw()
    with pytest.raises(ValueError, match=match):
        call(head, x)


@pytest.mark.slow
def test_digits_without_labels():
    """Five seeds: clusters learnt without labels are better than those of k-means on the same pixels."""
    outcomes = np.array([compare(seed, epochs=30) for seed in range(5)])
    pixels, features, prototypes = outcomes.mean(0)
    assert (prototypes > pixels + 0.03).all()
    assert (features > pixels + 0.03).all()
