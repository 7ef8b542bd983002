"""Class indices of every integer type say what they say in int64, in every function that takes them.

A narrow type wraps what it is compared with: of uint8, −100 is 156 and 300 is 44.
"""

from __future__ import annotations

import pytest
import torch

import xent
from xent import curvature, triplets

N, C, D, K = 6, 200, 5, 3
TYPES = [torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64]
IGNORED = [-100, 300, None, 156]


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    w = torch.randn(C, D, generator=generator, dtype=torch.float64)
    target = torch.tensor([156, 44, 199, 0, 155, 156])
    negatives = torch.tensor([[5, 156, 44], [7, 8, 156], [0, 1, 2], [156, 44, 3], [9, 10, 11], [44, 45, 46]])
    return x, w, target, negatives


def quarter(n):
    return torch.full(n.shape, 0.25, dtype=torch.float64, device="cpu")


def of_logits(function, **options):
    return lambda x, w, y, _, ignored: function(x @ w.T, y, ignore_index=ignored, **options)


def of_head(function, **options):
    return lambda x, w, y, _, ignored: function(x, w, y, ignore_index=ignored, **options)


def sampled(x, w, y, _, ignored):
    classes = torch.arange(C, device="cpu").flip(0).to(y.dtype)
    return xent.linear_cross_entropy(x, w, y, classes=classes, ignore_index=ignored)


def sample_classes(x, w, y, _, ignored):
    generator = torch.Generator().manual_seed(1)
    return xent.sample_classes(y, C, 20, ignore_index=ignored, generator=generator)


def operator(kind):
    return lambda x, w, y, _, ignored: kind(x, w, y, ignore_index=ignored).diagonal()


FUNCTIONS = {
    "cross_entropy": of_logits(xent.cross_entropy),
    "cross_entropy, weighted": of_logits(
        xent.cross_entropy, weight=torch.arange(C).double(), label_smoothing=0.1, z_loss=0.1
    ),
    "cross_entropy, none": of_logits(xent.cross_entropy, reduction="none"),
    "cross_entropy, unchecked": of_logits(xent.cross_entropy, check_targets=False),
    "cross_entropy, margin": of_logits(xent.cross_entropy, margin=0.2),
    "linear_cross_entropy": of_head(xent.linear_cross_entropy),
    "linear_cross_entropy, normalised": of_head(xent.linear_cross_entropy, normalize=True),
    "linear_cross_entropy, angular": of_head(
        xent.linear_cross_entropy, normalize=True, margin=xent.Margin(angle=0.3)
    ),
    "linear_cross_entropy, sampled": sampled,
    "sample_classes": sample_classes,
    "row_statistics": of_logits(xent.row_statistics),
    "linear_row_statistics": of_head(xent.linear_row_statistics),
    "fit_temperature": lambda x, w, y, _, ignored: xent.fit_temperature(
        torch.eye(C)[[44] * N], y, ignore_index=ignored
    ),
    "margins": of_logits(triplets.margins),
    "linear_margins": of_head(triplets.linear_margins),
    "bounds": of_logits(triplets.bounds),
    "linear_bounds": of_head(triplets.linear_bounds),
    "attribution": of_logits(triplets.attribution),
    "linear_attribution": of_head(triplets.linear_attribution),
    "pair_matrix": lambda *given: of_logits(triplets.pair_matrix)(*given).matrix,
    "linear_pair_matrix": lambda *given: of_head(triplets.linear_pair_matrix, top_k=3)(
        *given
    ).matrix.to_dense(),
    "triplet_loss": of_logits(triplets.triplet_loss),
    "triplet_loss, sampled": lambda x, w, y, n, ignored: triplets.triplet_loss(
        x @ w.T, y, negatives=n, ignore_index=ignored
    ),
    "linear_smooth_triplet_loss, sampled": lambda x, w, y, n, ignored: triplets.linear_smooth_triplet_loss(
        x, w, y, negatives=n, ignore_index=ignored
    ),
    "HeadHessian": operator(curvature.HeadHessian),
    "HeadFisher": operator(lambda *a, **k: curvature.HeadFisher(*a, kind="empirical", **k)),
    "row_gradient_norms": of_head(curvature.row_gradient_norms),
    "sparse": lambda x, w, _, n, ignored: xent.cross_entropy(
        x @ w.T, xent.TopKTarget(n, quarter(n), "spread")
    ),
    "sparse, dense": lambda x, w, _, n, ignored: xent.TopKTarget(n, quarter(n)).to_dense(C),
    "sparse, divergence": lambda x, w, _, n, ignored: xent.kl_divergence(
        target=xent.TopKTarget(n, quarter(n)), input=x @ w.T
    ),
    "surrogate": lambda x, w, y, _, ignored: xent.surrogate_cross_entropy(x @ w.T, y),
}


@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_narrow_indices_are_int64(function, dtype, ignored):
    x, w, target, negatives = problem()
    answers = []
    for kind in (torch.int64, dtype):
        features = x.clone().requires_grad_()
        found = function(features, w, target.to(kind), negatives.to(kind), ignored)
        values = [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]
        values = [torch.as_tensor(value) for value in values]
        graded = [v.sum() for v in values if v.requires_grad]
        answers.append([*values, *(torch.autograd.grad(sum(graded), features) if graded else ())])
    for right, found in zip(*answers, strict=True):
        # to rounding: int64 has a shorter way where the problem is small
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("value", [2**64 - 100, 2**63, C])
def test_an_unsigned_index_beyond_int64_is_no_class(value):
    z, y = torch.zeros(1, C), torch.tensor([value], dtype=torch.uint64)
    with pytest.raises(IndexError, match=r"outside 0\.\.199"):
        xent.cross_entropy(z, y)
    assert xent.cross_entropy(z, y, check_targets=False).isnan()


def test_an_index_that_wraps_to_the_ignored_one_is_a_class():
    z = torch.zeros(1, C)
    z[0, 156] = 5
    rows = xent.row_statistics(z, torch.tensor([156], dtype=torch.uint8))
    assert rows.correct.item()
    x, w, y = torch.randn(1, 4), torch.randn(C, 4, requires_grad=True), torch.tensor([156], dtype=torch.uint8)
    loss = xent.linear_cross_entropy(x, w, y, normalize=True)
    unit = torch.nn.functional.normalize
    assert loss.item() == pytest.approx(
        torch.nn.functional.cross_entropy(unit(x) @ unit(w).T, y.long()).item(), rel=1e-6
    )
    assert torch.autograd.grad(loss, w)[0].abs().sum() > 0
