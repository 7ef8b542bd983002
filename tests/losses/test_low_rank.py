"""A head with a low-rank term is the head of the matrix that it stands for, in every mode of torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import xent
from xent._core.logits import LinearHead

N, D, C, R, KAPPA = 7, 5, 11, 3, 0.7
NONE = {"reduction": "none"}
TARGET = torch.tensor([3, 0, -100, 10, 5, 5, 1])


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, W, A, B and the bias."""
    shapes = (N, D), (C, D), (R, D), (C, R), (C,)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def adapted(w: Tensor, down: Tensor, up: Tensor) -> xent.LowRank:
    return xent.LowRank(w, down, up, KAPPA)


def whole(w: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return w + KAPPA * up @ down


MADE = torch.Generator().manual_seed(3)
TEACHER = tuple(torch.randn(shape, dtype=torch.float64, generator=MADE) for shape in ((N, 4), (C, 4)))
BUCKET = xent.TopKTarget(torch.tensor([[2, 5]] * N), torch.tensor([[0.5, 0.25]] * N), "bucket")
LOSSES = {
    "cross-entropy": lambda x, w, b, **o: xent.linear_cross_entropy(x, w, TARGET, linear_bias=b, **o),
    "everything": lambda x, w, b, **o: xent.linear_cross_entropy(
        *(x, w, TARGET),
        linear_bias=b,
        label_smoothing=0.1,
        z_loss=0.1,
        logit_scale=0.5,
        softcap=4.0,
        temperature=0.7,
        weight=torch.linspace(0.5, 2, C, dtype=torch.float64),
        sample_weight=torch.linspace(0, 2, N, dtype=torch.float64),
        **o,
    ),
    "rows": lambda x, w, b, **o: xent.linear_cross_entropy(x, w, TARGET, linear_bias=b, **NONE, **o).sum(),
    "subset": lambda x, w, b, **o: xent.linear_cross_entropy(
        x, w, TARGET, linear_bias=b, classes=torch.tensor([0, 1, 3, 5, 7, 10]), **o
    ),
    "bucket": lambda x, w, b, **o: xent.linear_cross_entropy(x, w, BUCKET, linear_bias=b, **o),
    "focal": lambda x, w, b, **o: xent.linear_focal_loss(x, w, TARGET, linear_bias=b, **o),
    "poly": lambda x, w, b, **o: xent.linear_poly_loss(x, w, TARGET, linear_bias=b, **o),
    "log-prob": lambda x, w, b, **o: sum(
        t.sum() for t in xent.linear_log_prob(x, w, TARGET, linear_bias=b, return_entropy=True, **o)
    ),
    "statistics": lambda x, w, b, **o: sum(
        t.sum() for t in xent.linear_row_statistics(x, w, TARGET, linear_bias=b, **o)[:4]
    ),
    "KL": lambda x, w, b, **o: xent.linear_kl_divergence(student=(x, w, b), teacher=TEACHER, **o),
    "KL, reverse": lambda x, w, b, **o: xent.linear_kl_divergence(
        student=(x, w, b), teacher=TEACHER, direction="reverse", **o
    ),
    "JS, as student and teacher": lambda x, w, b, **o: xent.linear_js_divergence(
        student=(x, w, b), teacher=(2 * x, w), **o
    ),
    "KL, bucket": lambda x, w, b, **o: xent.linear_kl_divergence(student=(x, w, b), teacher=BUCKET, **o),
}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("budget", [1 << 26, 1 << 12])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_value_and_two_derivatives_are_those_of_the_matrix(loss, budget):
    given = leaves()
    directions = [torch.randn_like(t) for t in given]
    results = []
    for head in (adapted, whole):
        x, w, down, up, b = given
        value = loss(x, head(w, down, up), b, memory_budget=budget)
        first = torch.autograd.grad(value, given, create_graph=True)
        along = sum((g * v).sum() for g, v in zip(first, directions, strict=True))
        results.append((value, *first, *torch.autograd.grad(along, given)))
    for found, expected in zip(*results, strict=True):
        close(found, expected)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_transforms_of_torch(loss):
    given = [t.detach() for t in leaves()]

    def of(head, down: Tensor) -> Tensor:
        x, w, _, up, b = given
        return loss(x, head(w, down, up), b)

    def adapted_by(down: Tensor) -> Tensor:
        return of(adapted, down)

    def whole_of(down: Tensor) -> Tensor:
        return of(whole, down)

    down = given[2]
    downs = torch.stack([down, 2 * down])
    of_whole = torch.func.grad(whole_of)
    close(torch.func.grad(adapted_by)(down), of_whole(down))
    value, tangent = torch.func.jvp(adapted_by, (down,), (down,))
    expected, slope = torch.func.jvp(whole_of, (down,), (down,))
    close(value, expected)
    close(tangent, slope)
    batched = torch.func.vmap(torch.func.grad(adapted_by))(downs)
    close(batched, torch.stack([of_whole(each) for each in downs]))


@pytest.mark.parametrize("name", ["everything", "JS, as student and teacher"])
def test_a_compiled_loss(name):
    given, loss = leaves(), LOSSES[name]

    def of(x: Tensor, w: Tensor, down: Tensor, up: Tensor, b: Tensor) -> Tensor:
        return loss(x, adapted(w, down, up), b)

    x, w, down, up, b = given
    found, expected = torch.compile(of, fullgraph=True)(*given), loss(x, whole(w, down, up), b)
    close(found, expected)
    pairs = zip(torch.autograd.grad(found, given), torch.autograd.grad(expected, given), strict=True)
    for one, other in pairs:
        close(one, other)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True], ids=["half factors", "float32 factors"])
def test_half_types_accumulate_in_float32(half, wide):
    x, w, down, up, b = (t.detach().to(half) for t in leaves())
    kind = torch.float32 if wide else half
    given = [t.requires_grad_() for t in (x, w, down.to(kind), up.to(kind), b)]
    exact = [t.detach().double().requires_grad_() for t in given]
    x, w, down, up, b = given
    rows = xent.linear_row_statistics(x, adapted(w, down, up), TARGET, linear_bias=b).loss
    loss = xent.linear_cross_entropy(x, adapted(w, down, up), TARGET, linear_bias=b)
    x, w, down, up, b = exact
    right = xent.linear_cross_entropy(x, whole(w, down, up), TARGET, linear_bias=b)
    expected = xent.linear_row_statistics(x, whole(w, down, up), TARGET, linear_bias=b).loss
    torch.testing.assert_close(rows.double(), expected, rtol=3e-6, atol=3e-6)
    gradients = zip(given, torch.autograd.grad(loss, given), torch.autograd.grad(right, exact), strict=True)
    for leaf, found, wanted in gradients:
        assert found.dtype == leaf.dtype
        # features are reached on two ways, each of which rounds once, and so does their sum
        eps = torch.finfo(leaf.dtype).eps * (3 if leaf is given[0] else 1)
        size = wanted.abs().max().item()
        torch.testing.assert_close(found.double(), wanted, rtol=eps, atol=max(eps, 3e-6) * size)


def test_a_row_that_is_left_out_may_hold_anything():
    x, w, down, up, b = leaves()
    with torch.no_grad():
        x[2] = torch.nan
    every = x, w, down, up
    for loss in (
        xent.linear_cross_entropy(x, adapted(w, down, up), TARGET, linear_bias=b),
        xent.linear_kl_divergence(
            student=(x, adapted(w, down, up)), teacher=TEACHER, sample_weight=(TARGET >= 0).double()
        ),
        xent.linear_log_prob(x, adapted(w, down, up), TARGET).sum(),
    ):
        found = torch.autograd.grad(loss, every)
        assert all(g.isfinite().all() for g in found)
        assert (found[0][2] == 0).all()


def test_a_frozen_weight_has_no_gradient(monkeypatch):
    """No tensor of the classifier's shape is made where it takes no gradient."""
    x, w, down, up, b = leaves()
    wanted = []
    make = LinearHead.accumulator
    pull = LinearHead.pull_back
    monkeypatch.setattr(
        LinearHead, "accumulator", lambda self, ops, wants: wanted.append(wants) or make(self, ops, wants)
    )
    monkeypatch.setattr(
        LinearHead, "pull_back", lambda self, x, g, wants: wanted.append(wants) or pull(self, x, g, wants)
    )
    head = adapted(w.detach(), down, up)
    for budget in (1 << 26, 1 << 12):
        xent.linear_cross_entropy(x, head, TARGET, linear_bias=b, memory_budget=budget).backward()
    xent.linear_kl_divergence(student=(x, head, b), teacher=TEACHER).backward()
    assert len(wanted) >= 3
    assert {wants[:5] for wants in wanted if any(wants)} == {(True, False, True, True, True)}
    assert down.grad is not None


def test_top_k_of_an_adapted_head():
    x, w, down, up, b = (t.detach() for t in leaves())
    found = xent.linear_top_k(x, adapted(w, down, up), 3, linear_bias=b)
    expected = xent.linear_top_k(x, whole(w, down, up), 3, linear_bias=b)
    close(found[0], expected[0])
    assert (found[1] == expected[1]).all()


def test_a_subset_has_sparse_gradients():
    x, w, down, up, b = leaves()
    classes = torch.tensor([0, 1, 3, 5, 7, 10])
    xent.linear_cross_entropy(
        x, adapted(w, down, up), TARGET, linear_bias=b, classes=classes, sparse_grad=True
    ).backward()
    assert w.grad.is_sparse
    assert up.grad.is_sparse
    assert not down.grad.is_sparse


def test_under_autocast_it_is_the_half_loss():
    x, w, down, up, b = leaves(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = xent.linear_cross_entropy(x, adapted(w, down, up), TARGET, linear_bias=b)
    x, w, down, up, b = (t.bfloat16().double() for t in (x, w, down, up, b))
    expected = xent.linear_cross_entropy(x, whole(w, down, up), TARGET, linear_bias=b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=3e-6)


def test_what_needs_the_matrix_refuses_by_name():
    x, w, down, up, _ = leaves()
    head, y = adapted(w, down, up), TARGET.clamp(min=0)
    for call in (
        lambda: xent.triplets.linear_bounds(x, head, y),
        lambda: xent.triplets.linear_triplet_loss(x, head, y),
        lambda: xent.triplets.linear_attribution(x, head, y),
        lambda: xent.curvature.HeadGGN(x, head, y),
        lambda: xent.curvature.row_gradients(x, head, y),
    ):
        with pytest.raises(TypeError, match=r"weight is a LowRank.*pass \w*weight\.to_dense\(\)"):
            call()
    with pytest.raises(ValueError, match=r"normalize needs the length.*to_dense\(\)"):
        xent.linear_cross_entropy(x, head, y, normalize=True)
    close(
        xent.triplets.linear_bounds(x, head.to_dense(), y).loss,
        xent.cross_entropy(x @ whole(w, down, up).T, y, **NONE),
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"down": torch.ones(R, D + 1)}, r"weight says C = 11, D = 5"),
        ({"up": torch.ones(C, R + 1)}, r"weight says C = 11, D = 5"),
        ({"up": torch.ones(C + 1, R)}, r"weight says C = 11, D = 5"),
        ({"weight": torch.ones(C, 2, D)}, r"must be \(C, D\), \(R, D\) and \(C, R\)"),
        ({"down": torch.ones(R, D).double()}, "down is torch.float64 but up is torch.float32"),
        ({"down": torch.ones(R, D).half(), "up": torch.ones(C, R).half()}, "must be torch.float32, as"),
        ({"down": torch.ones(R, D, dtype=torch.int64)}, "down must be of a floating type"),
    ],
)
def test_factors_that_do_not_fit(changed, message):
    given = {"weight": torch.ones(C, D), "down": torch.ones(R, D), "up": torch.ones(C, R)}
    with pytest.raises((ValueError, TypeError), match=message):
        xent.LowRank(**given | changed)


def test_the_scale_may_be_zero_or_negative():
    x, w, down, up, _ = leaves()
    for scale in (0.0, -2.0):
        found = xent.linear_cross_entropy(x, xent.LowRank(w, down, up, scale), TARGET)
        close(found, xent.linear_cross_entropy(x, w + scale * up @ down, TARGET))


def test_devices_and_tensors_without_data():
    x, w, down, up, _ = (t.detach() for t in leaves())
    with pytest.raises(ValueError, match="all tensors must be on one device, got cpu, meta"):
        xent.linear_cross_entropy(x, xent.LowRank(w, down.to("meta"), up), TARGET)
    head = xent.LowRank(w, down, up).mapped(lambda t: t.to("meta"))
    assert xent.linear_cross_entropy(x.to("meta"), head, TARGET.to("meta")).is_meta
    with pytest.raises(TypeError, match="down must be of a floating type of 16, 32 or 64 bits"):
        xent.LowRank(w.float(), down.to(torch.float8_e4m3fn), up.to(torch.float8_e4m3fn))
