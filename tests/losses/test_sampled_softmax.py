"""A subset of the classes: its own softmax, and what it says of the whole one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.testing import assert_close

import xent

N, D, C = 8, 4, 11


def draw(dtype=torch.float64, positions=()):
    x = torch.randn(N, D, dtype=dtype, requires_grad=True)
    w = torch.randn(C, *positions, D, dtype=dtype, requires_grad=True)
    b = torch.randn(C, *positions, dtype=dtype, requires_grad=True)
    target = torch.randint(C, (N, *positions))
    target[2] = -100
    present = target[target >= 0].unique()
    others = torch.tensor([c for c in range(C) if c not in present])[:3]
    classes = torch.cat([others, present])  # in no order
    return x, w, b, target, classes


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("positions", [(), (2,)])
def test_equals_the_loss_of_the_smaller_head(reduction, smoothing, sparse, positions):
    """Smoothing, class weights and gradients over the subset; targets and weights are global."""
    x, w, b, target, classes = draw(positions=positions)
    weight = torch.rand(C, dtype=torch.float64) + 0.5
    options = {"reduction": reduction, "label_smoothing": smoothing}
    loss = xent.linear_cross_entropy(
        x, w, target, linear_bias=b, classes=classes, sparse_grad=sparse, weight=weight, **options
    )
    local = torch.full_like(target, -100)
    for place, c in enumerate(classes):
        local[target == c] = place
    logits = torch.einsum("nd,c...d->nc...", x, w[classes]) + b[classes]
    expected = F.cross_entropy(logits, local, weight[classes], **options)
    assert_close(loss, expected)
    upstream = torch.rand_like(expected)
    found, right = (torch.autograd.grad(v, (x, w, b), upstream) for v in (loss, expected))
    assert found[1].is_sparse == found[2].is_sparse == sparse
    for a, e in zip(found, right, strict=True):
        assert_close(a.to_dense() if a.is_sparse else a, e)
    if sparse:
        assert found[1].coalesce().indices().shape[1] <= len(classes)


def test_second_derivatives_of_a_subset():
    x, w, _, target, classes = draw()

    def loss(x, w):
        return xent.linear_cross_entropy(x, w, target, classes=classes)

    assert torch.autograd.gradcheck(loss, (x, w))
    assert torch.autograd.gradgradcheck(loss, (x, w))
    found = vmap(
        grad(lambda w, x, t: xent.linear_cross_entropy(x[None], w, t[None], classes=classes)), (None, 0, 0)
    )
    each = found(w, x, target)
    rows = xent.linear_cross_entropy(x, w, target, classes=classes, reduction="sum")
    assert_close(each.sum(0), torch.autograd.grad(rows, w)[0])


@pytest.mark.parametrize("ignored", [-100, 3, None])
def test_an_ignored_class_is_no_place_in_the_subset(ignored):
    """ignore_index is a global class: the place of the same number in the subset is another one."""
    x, w, _, target, _ = draw()
    target[2] = -100 if ignored is None else ignored
    every = torch.arange(C).flip(0)
    loss = xent.linear_cross_entropy(x, w, target, classes=every, ignore_index=ignored)
    expected = F.cross_entropy(x @ w.T, target, ignore_index=-100 if ignored is None else ignored)
    assert_close(loss, expected)


def subsets(own: int, classes: int, others: int):
    """Every sample of so many classes beside a row's own, each as likely as the others."""
    rest = [c for c in range(classes) if c != own]
    for chosen in itertools.combinations(rest, others):
        yield torch.tensor(sorted((own, *chosen))), others / len(rest)


def estimates(z, own, others):
    """Of Σ exp z and of the loss, from every sample."""
    w, x = z[:, None], torch.ones(1, 1, dtype=z.dtype)
    sums, losses = [], []
    for classes, chance in subsets(own, len(z), others):
        log_q = torch.full((len(classes),), math.log(chance), dtype=z.dtype)
        loss = xent.linear_cross_entropy(x, w, torch.tensor([own]), classes=classes, log_q=log_q)
        losses.append(loss)
        sums.append(torch.exp(loss + z[own]))
    return torch.stack(sums), torch.stack(losses)


def test_the_partition_function_is_unbiased_and_the_loss_is_not():
    """Over every sample there is: E Ẑ = Z to rounding; E ℓ̂ < ℓ, by less the larger the sample."""
    z = torch.randn(9, dtype=torch.float64) * 2
    own = 4
    exact = F.cross_entropy(z[None], torch.tensor([own]))
    biases = []
    for others in (1, 2, 4, 6, 8):
        sums, losses = estimates(z, own, others)
        assert_close(sums.mean(), z.exp().sum(), rtol=1e-13, atol=0.0)
        biases.append((exact - losses.mean()).item())
    assert biases == sorted(biases, reverse=True)
    assert biases[0] > 0.05
    assert abs(biases[-1]) < 1e-14  # all classes: no estimate at all


def test_an_accidental_hit_counts_once():
    """A class that two rows' samples share is corrected for the row whose own it is not."""
    x, w, _, target, classes = draw()
    log_q = -torch.rand(len(classes), dtype=torch.float64)
    rows = xent.linear_cross_entropy(x, w, target, classes=classes, log_q=log_q, reduction="none")
    for n in range(N):
        if target[n] == -100:
            assert rows[n] == 0
            continue
        z = {int(c): (w[c] @ x[n]).item() for c in classes}
        own = z.pop(int(target[n]))
        q = {int(c): v.item() for c, v in zip(classes, log_q, strict=True)}
        total = math.exp(own) + sum(math.exp(v - q[c]) for c, v in z.items())
        assert math.isclose(rows[n].item(), math.log(total) - own, rel_tol=1e-13)


def test_log_q_of_given_logits():
    """A batch's own items as the sample: columns of logits that exist."""
    z, target = torch.randn(5, 5, dtype=torch.float64), torch.arange(5)
    log_q = torch.rand(5, dtype=torch.float64).log()
    corrected = (z - log_q).diagonal_scatter(z.diagonal())
    assert_close(xent.cross_entropy(z, target, log_q=log_q), F.cross_entropy(corrected, target))
    assert_close(
        xent.linear_cross_entropy(torch.eye(5, dtype=torch.float64), z.T, target, log_q=log_q),
        F.cross_entropy(corrected, target),
    )


@pytest.mark.parametrize(("count", "samples"), [(50, 20), (50, 50), (50, 90), (5000, 30), (5000, 4000)])
def test_samples_hold_every_class_of_the_batch(count, samples):
    target = torch.randint(count, (4, 3))
    target[0, 0] = -100
    classes, log_q = xent.sample_classes(target, count, samples)
    own = target[target >= 0].unique()
    assert len(classes) == min(max(samples, len(own)), count)
    assert torch.equal(classes, classes.unique())
    assert torch.isin(own, classes).all()
    assert classes.min() >= 0
    assert classes.max() < count
    assert not log_q[torch.isin(classes, own)].any()
    rest = (len(classes) - len(own)) / (count - len(own))
    assert_close(log_q[~torch.isin(classes, own)].exp(), torch.full((len(classes) - len(own),), rest))


@pytest.mark.parametrize("count", [12, 200])  # drawn from a permutation, and by rejection
def test_samples_are_uniform(count):
    generator = torch.Generator().manual_seed(0)
    target, seen = torch.tensor([0, count // 2, count - 1]), torch.zeros(count)
    draws = 4000
    for _ in range(draws):
        classes, log_q = xent.sample_classes(target, count, 8, generator=generator)
        seen[classes] += 1
    chance = 5 / (count - 3)
    others = torch.tensor([c for c in range(count) if c not in target])
    spread = math.sqrt(draws * chance * (1 - chance))
    assert (seen[target] == draws).all()
    assert ((seen[others] - draws * chance).abs() < 5 * spread).all()
    assert math.isclose(log_q.min().exp().item(), chance, rel_tol=1e-6)


def test_samples_of_a_batch_without_classes():
    classes, log_q = xent.sample_classes(torch.tensor([-100, -100]), 10, 4)
    assert len(classes) == 4
    assert_close(log_q, torch.full((4,), math.log(0.4)))


def test_sampling_ignores_what_the_loss_ignores():
    classes, _ = xent.sample_classes(torch.tensor([-100, 2], dtype=torch.int8), 200, 1, ignore_index=None)
    assert classes.tolist() == [2]


def test_training_on_samples_reaches_the_whole_loss():
    """Sampled steps with log Q bring the loss over all classes down, nearly as far as full steps."""
    torch.manual_seed(0)
    target = torch.randint(200, (256,))
    x = torch.randn(200, 8)[target] + 0.1 * torch.randn(256, 8)
    ends = []
    for sampled in (False, True):
        w = torch.zeros(200, 8, requires_grad=True)
        optimiser = torch.optim.Adam([w], lr=0.1)
        generator = torch.Generator().manual_seed(1)
        for _ in range(60):
            optimiser.zero_grad()
            order = torch.randperm(256, generator=generator)[:64]
            classes = log_q = None
            if sampled:
                classes, log_q = xent.sample_classes(target[order], 200, 120, generator=generator)
            xent.linear_cross_entropy(x[order], w, target[order], classes=classes, log_q=log_q).backward()
            optimiser.step()
        ends.append(xent.linear_cross_entropy(x, w, target).item())
    assert ends[0] < 0.5
    assert ends[1] < ends[0] + 0.5


def test_under_vmap_a_target_outside_the_subset_costs_nan():
    x, w, _, _, _ = draw()
    classes = torch.tensor([1, 4, 6])
    targets = torch.tensor([[1, 4], [6, 2]])
    losses = vmap(lambda t: xent.linear_cross_entropy(x[:2], w, t, classes=classes))(targets)
    assert losses[0].isfinite()
    assert losses[1].isnan()
    unchecked = xent.linear_cross_entropy(x[:2], w, targets[1], classes=classes, check_targets=False)
    assert unchecked.isnan()


def test_compiles():
    x, w, b, target, classes = draw(torch.float32)
    log_q = -torch.rand(len(classes))

    def step(x, w, b):
        return xent.linear_cross_entropy(x, w, target, linear_bias=b, classes=classes, log_q=log_q)

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(x, w, b)
    assert_close(loss, step(x, w, b))
    assert_close(torch.autograd.grad(loss, (x, w, b)), torch.autograd.grad(step(x, w, b), (x, w, b)))


def call(**options):
    x, w = torch.ones(2, 3), torch.ones(6, 3)
    target = options.pop("target", torch.tensor([1, 4]))
    return xent.linear_cross_entropy(x, w, target, **options)


SOME = torch.tensor([1, 4])
BAD = [
    (
        {"classes": torch.tensor([1, 2])},
        IndexError,
        r"target 4 at row 1 is not among the 2 classes.*sample_classes",
    ),
    ({"classes": torch.tensor([1, 4, 6])}, IndexError, r"classes\[2\] is 6, outside 0\.\.5"),
    ({"classes": torch.tensor([1, 4, 1])}, ValueError, "holds 1 twice"),
    ({"classes": torch.tensor([[1, 4]])}, ValueError, r"must be a tensor \(S,\)"),
    ({"classes": [1, 4]}, ValueError, "got list"),
    ({"classes": torch.tensor([1.0, 4.0])}, TypeError, "integer"),
    ({"classes": SOME, "target": torch.ones(2, 6)}, ValueError, "classes needs a target of class indices"),
    (
        {"log_q": torch.zeros(6), "target": torch.ones(2, 6)},
        ValueError,
        "log_q needs a target of class indices",
    ),
    ({"classes": SOME, "log_q": torch.zeros(6)}, ValueError, r"log_q must have shape \(2,\)"),
    ({"log_q": torch.zeros(6, dtype=torch.int64)}, TypeError, "log_q must be floating"),
    ({"log_q": torch.tensor([0, 0, -torch.inf, 0, 0, 0])}, ValueError, r"log_q\[2\] is -inf"),
    ({"log_q": torch.zeros(6, requires_grad=True)}, ValueError, "log_q takes no gradient"),
    ({"sparse_grad": True}, ValueError, "pass classes"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD, ids=[match for *_, match in BAD])
def test_errors_say_what_and_the_way_out(options, error, match):
    with pytest.raises(error, match=match):
        call(**options)


def test_errors_of_sampling():
    for not_classes in (torch.tensor([1.5]), torch.tensor([True])):
        with pytest.raises(TypeError, match="class indices, of an integer type"):
            xent.sample_classes(not_classes, 6, 4)
    with pytest.raises(IndexError, match=r"target 9 is outside 0\.\.5"):
        xent.sample_classes(torch.tensor([1, 9]), 6, 4)
    with pytest.raises(ValueError, match="num_samples"):
        xent.sample_classes(torch.tensor([1]), 6, 0)
