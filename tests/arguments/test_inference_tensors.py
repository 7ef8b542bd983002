"""A tensor made under inference mode, as a teacher's often is, is a constant like any other."""

from __future__ import annotations

import pytest
import torch

import xent
from arguments.test_narrow_indices import problem
from xent import sinkhorn, triplets

N, C = 6, 200


def teacher():
    x, w, y, n = problem()
    return {
        "x": x + 1,
        "w": 2 * w,
        "z": (x + 1) @ w.T,
        "big": (x + 1).repeat(60, 1) @ w.T,
        "p": ((x + 1) @ w.T).softmax(1),
        "y": y,
        "n": n,
        "q": torch.full(n.shape, 0.25, dtype=torch.float64),
        "weight": torch.linspace(0.5, 2, C, dtype=torch.float64),
        "s": torch.linspace(0.5, 2, N, dtype=torch.float64),
        "classes": torch.arange(C).flip(0),
        "u": torch.rand(N, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5)),
    }


FUNCTIONS = {
    "indices": lambda x, w, t: xent.cross_entropy(x @ w.T, t["y"]),
    "indices, features": lambda x, w, t: xent.linear_cross_entropy(x, w, t["y"]),
    "indices, tiles": lambda x, w, t: xent.linear_cross_entropy(x, w, t["y"], memory_budget=600),
    "probabilities": lambda x, w, t: xent.linear_cross_entropy(x, w, t["p"]),
    "sparse": lambda x, w, t: xent.cross_entropy(x @ w.T, xent.TopKTarget(t["n"], t["q"], "spread")),
    "sparse, features": lambda x, w, t: xent.linear_cross_entropy(x, w, xent.TopKTarget(t["n"], t["q"])),
    "weights": lambda x, w, t: xent.linear_cross_entropy(
        x, w, t["y"], weight=t["weight"], sample_weight=t["s"], label_smoothing=0.1, z_loss=0.1
    ),
    "log_q": lambda x, w, t: xent.cross_entropy(x @ w.T, t["y"], log_q=-t["weight"]),
    "sampled": lambda x, w, t: xent.linear_cross_entropy(x, w, t["y"], classes=t["classes"]),
    "frozen features": lambda _, w, t: xent.linear_cross_entropy(t["x"], w, t["y"]),
    "frozen classes": lambda x, _, t: xent.linear_cross_entropy(x, t["w"], t["y"], linear_bias=t["weight"]),
    "normalised": lambda x, _, t: xent.linear_cross_entropy(x, t["w"], t["y"], normalize=True),
    "low rank": lambda x, w, t: xent.linear_cross_entropy(
        x, xent.LowRank(t["w"], w[:3], t["w"][:, :3]), t["y"]
    ),
    "rows": lambda x, _, t: xent.linear_row_statistics(x, t["w"], t["y"]).log_prob.sum(),
    "kl_divergence": lambda x, w, t: xent.kl_divergence(
        target=t["z"], input=x @ w.T, target_is_logits=True
    ).sum(),
    "kl_divergence, many": lambda x, w, t: xent.kl_divergence(
        target=t["big"], input=(x @ w.T).repeat(60, 1), target_is_logits=True
    ).sum(),
    "kl_divergence, sparse": lambda x, w, t: xent.kl_divergence(
        target=xent.TopKTarget(t["n"], t["q"]), input=x @ w.T
    ).sum(),
    "linear_kl_divergence": lambda x, w, t: xent.linear_kl_divergence(
        student=(x, w), teacher=(t["x"], t["w"]), sample_weight=t["s"]
    ),
    "surrogate": lambda x, w, t: xent.surrogate_cross_entropy(x @ w.T, t["p"]),
    "binary logits": lambda x, _, t: xent.binary_cross_entropy_with_logits(
        x, t["u"], t["s"][:, None], pos_weight=t["s"][:5]
    ),
    "binary": lambda x, _, t: xent.binary_cross_entropy(x.sigmoid(), t["u"], t["s"][:, None]),
    "kl_div": lambda x, _, t: xent.kl_div(x.log_softmax(1), t["u"]),
    "triplets": lambda x, _, t: triplets.linear_triplet_loss(x, t["w"], t["y"], geometry="cosine"),
    "triplets, sampled": lambda x, w, t: triplets.triplet_loss(x @ w.T, t["y"], negatives=t["n"]),
    "embeddings": lambda x, _, t: triplets.triplet_margin_loss(x, t["x"], t["u"], smooth=True),
    "assign": lambda x, _, t: sinkhorn.assign(x, row_marginal=t["s"] / t["s"].sum()).plan.square().sum(),
    "margins": lambda x, w, t: triplets.margins(x @ w.T, t["y"]).square().sum(),
}


def gradients(function, constants):
    x, w, *_ = problem()
    x, w = x.requires_grad_(), w.requires_grad_()
    loss = function(x, w, constants)
    first = torch.autograd.grad(loss, (x, w), create_graph=True, allow_unused=True)
    total = sum(g.square().sum() for g in first if g is not None)
    second = torch.autograd.grad(total, (x, w), allow_unused=True)
    return [loss, *first, *second]


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_inference_tensors_are_constants(function):
    with torch.inference_mode():
        frozen = teacher()
    assert frozen["w"].is_inference()
    versions = {name: t.clone() for name, t in frozen.items()}
    for found, right in zip(gradients(function, frozen), gradients(function, teacher()), strict=True):
        assert (found is None) == (right is None)
        if found is not None:
            torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(t, versions[name]) for name, t in frozen.items())


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_losses_work_inside_inference_mode(function):
    with torch.inference_mode():
        x, w, *_ = problem()
        found = function(x, w, teacher())
    x, w, *_ = problem()
    torch.testing.assert_close(found, function(x, w, teacher()), rtol=1e-12, atol=1e-12)


def test_a_view_of_an_inference_tensor_is_read_as_it_lies():
    with torch.inference_mode():
        whole = torch.randn(12, 5, dtype=torch.float64)
        part = whole[::2].t()[1:4]
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 0])
    (g,) = torch.autograd.grad(xent.linear_cross_entropy(x, part, y, memory_budget=100), x)
    (e,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x @ part.clone().T, y), x)
    torch.testing.assert_close(g, e)


def test_what_changes_before_the_backward_changes_nothing():
    with torch.inference_mode():
        q = torch.rand(3, 4)
    right = q.clone()
    z = torch.randn(3, 4, requires_grad=True)
    loss = xent.cross_entropy(z, q, reduction="none").sum()
    with torch.inference_mode():
        q.mul_(0)
    (e,) = torch.autograd.grad(xent.cross_entropy(z, right, reduction="none").sum(), z)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], e)


def test_a_negated_view_is_read_with_its_sign():
    with torch.inference_mode():
        q = torch.tensor([[-0.25j, -0.75j]]).conj().imag
    z = torch.tensor([[1.0, 0.0]], requires_grad=True)
    assert xent.cross_entropy(z, q).item() == pytest.approx(
        xent.cross_entropy(z, torch.tensor([[0.25, 0.75]])).item()
    )
