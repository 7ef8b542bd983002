"""What depends on the directions of rows alone is the same for rows of any length."""

from __future__ import annotations

import pytest
import torch

import xent
from xent import nn, triplets

N, D, C = 4, 6, 9


def margin_loss(x, w, y):
    head = nn.MarginLoss(D, C, margin=xent.Margin(cosine=0.1, angle=0.2), scale=8.0, dtype=w.dtype)
    return torch.func.functional_call(head, {"class_weight": w}, (x, y))


def of_module(make):
    def cosines(x, w, y):
        head = make(w.dtype)
        name = "class_weight" if isinstance(head, nn.MarginLoss) else "prototypes"
        setattr(head, name, torch.nn.Parameter(w.detach()))
        return head.cosines(x).gather(1, y[:, None]).float().sum()

    return cosines


FUNCTIONS = {
    "normalize": lambda x, w, y: xent.linear_cross_entropy(x, w, y, normalize=True, temperature=0.1),
    "normalize, none": lambda x, w, y: xent.linear_cross_entropy(
        x, w, y, normalize=True, temperature=0.1, reduction="none"
    ).sum(),
    "sampled": lambda x, w, y: xent.linear_cross_entropy(
        x, w, y, normalize=True, temperature=0.1, classes=torch.arange(C).flip(0)
    ),
    "margin": margin_loss,
    "triplets": lambda x, w, y: triplets.linear_triplet_loss(x, w, y, geometry="cosine"),
    "smooth triplets": lambda x, w, y: triplets.linear_smooth_triplet_loss(
        x, w, y, geometry="cosine", negatives=3
    ),
    "margin's cosines": of_module(lambda dtype: nn.MarginLoss(D, C, dtype=dtype)),
    "prototypes' cosines": of_module(lambda dtype: nn.PrototypeHead(D, C, dtype=dtype)),
    "prototypes": lambda x, w, y: torch.func.functional_call(
        nn.PrototypeHead(D, C, dtype=w.dtype), {"prototypes": w}, (x, x.flip(0).roll(1, 0))
    ),
}
SCALES = {
    torch.float64: [1e200, 1e-200, 1e307, 5e-308],
    torch.float32: [1e20, 1e-20, 1e37, 2e-38],
    torch.bfloat16: [1e20, 1e-20, 1e37],
    torch.float16: [1e4, 1e-4],
}


def problem(dtype):
    generator = torch.Generator().manual_seed(3)
    x, w = (torch.randn(n, D, generator=generator).to(dtype) for n in (N, C))
    return x, w, torch.tensor([3, 1, 4, 1])


@pytest.mark.parametrize("which", ["features", "classes"])
@pytest.mark.parametrize(
    ("dtype", "scale"), [(dtype, scale) for dtype, scales in SCALES.items() for scale in scales], ids=str
)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_lengths_change_nothing(function, dtype, scale, which):
    x, w, y = problem(dtype)
    scales = (scale, 1.0) if which == "features" else (1.0, scale)
    given = tuple((t.double() * by).to(dtype).requires_grad_() for t, by in zip((x, w), scales, strict=True))
    exact = tuple((t.detach().double() / by).requires_grad_() for t, by in zip(given, scales, strict=True))
    right = function(*exact, y)
    slopes = torch.autograd.grad(right, exact, allow_unused=True)
    found = function(*given, y)
    eps = torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype).eps
    loose = 200 * eps + N * torch.finfo(dtype).eps  # a loss, and each cosine, is rounded to the type
    assert found.item() == pytest.approx(right.item(), rel=loose, abs=loose)
    graded = torch.autograd.grad(found, given, allow_unused=True) if found.requires_grad else (None, None)
    limits = torch.finfo(dtype)
    for g, slope, by in zip(graded, slopes, scales, strict=True):
        if g is None or slope is None:
            continue
        slope = slope / by
        if slope.abs().max() > limits.max / 100 or slope.abs().max() < limits.tiny * 100:
            continue  # the true gradient leaves the type
        error = (g.double() - slope).abs().max() / slope.abs().max()
        assert error < 2000 * eps + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", SCALES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_row_of_zeros_has_no_direction(function, dtype):
    x, w, y = problem(dtype)
    x[1], w[2] = 0.0, 0.0
    x, w = x.requires_grad_(), w.requires_grad_()
    loss = function(x, w, y)
    assert loss.isfinite()
    for t, row, g in zip((x, w), (1, 2), torch.autograd.grad(loss, (x, w), allow_unused=True), strict=True):
        if g is not None:
            assert g.isfinite().all()
            assert (g[row] == 0).all()
            assert t.shape == g.shape


def test_cosines_of_a_row_of_zeros_are_zero():
    head = nn.MarginLoss(D, C)
    assert torch.equal(head.cosines(torch.zeros(2, D)), torch.zeros(2, C))
    assert (nn.PrototypeHead(D, C).cosines(torch.zeros(D)) == 0).all()


@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-20])
def test_unit_has_both_derivatives_in_every_mode(scale):
    from xent._core.directions import unit

    x = torch.randn(3, D, dtype=torch.float64)

    def scaled(x):
        return unit(scale * x)

    assert torch.autograd.gradcheck(scaled, (x.requires_grad_(),))
    assert torch.autograd.gradgradcheck(scaled, (x,))
    x = x.detach()
    one = torch.stack([scaled(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(scaled)(x), one)
    torch.testing.assert_close(torch.compile(scaled, backend="eager", fullgraph=True)(x), one)
    along = torch.randn_like(x)
    plain = torch.nn.functional.normalize(x, dim=1)
    right = (along - plain * (plain * along).sum(1, keepdim=True)) / x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.func.jvp(scaled, (x,), (along,))[1], right)


def test_extreme_and_infinite_entries():
    from xent._core.directions import unit

    x = torch.tensor([[3e38, 3e38, 1e-45], [1e-45, 0.0, 0.0], [3e38, -3e38, 3e38]])
    torch.testing.assert_close(unit(x).norm(dim=1), torch.ones(3))
    assert unit(torch.tensor([[torch.inf, 1.0]])).isnan().any()
    assert unit(torch.tensor([[torch.nan, 1.0]])).isnan().all()
    assert unit(torch.zeros(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("scale", [1e5, 1e-9])
@pytest.mark.parametrize("loss", [triplets.linear_triplet_loss, triplets.linear_smooth_triplet_loss])
def test_lengths_are_divided_out_before_autocast_rounds(loss, scale):
    x, w, y = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        found = loss(scale * x, w, y, geometry="cosine")
        right = loss(x, w, y, geometry="cosine")
    assert found.item() == pytest.approx(right.item(), abs=2e-3)
