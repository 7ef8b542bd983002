"""A teacher of k classes, the others counted as one: values, derivatives, and what it does not go with."""

from __future__ import annotations

import mpmath
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap
from torch.testing import assert_close

import xent
from table import merged

F64 = torch.float64
BETAS = [0.0, 0.3, 1.0]


def teacher(n=4, k=3, classes=9, mass=0.8, **options):
    q = torch.rand(n, k, dtype=F64)
    indices = torch.rand(n, classes).argsort(1)[:, :k]
    return xent.TopKTarget(indices, mass * q / q.sum(1, keepdim=True), "bucket", **options)


def head(n=4, d=5, classes=9):
    tensors = (
        torch.randn(n, d, dtype=F64),
        torch.randn(classes, d, dtype=F64),
        torch.randn(classes, dtype=F64),
    )
    return [t.requires_grad_() for t in tensors]


def divergence(student, target, beta, **options):
    if beta in (0.0, 1.0):
        direction = "forward" if beta == 0.0 else "reverse"
        return xent.linear_kl_divergence(student=student, teacher=target, direction=direction, **options)
    return xent.linear_js_divergence(student=student, teacher=target, beta=beta, **options)


def of_logits(z, target, beta, **options):
    if beta in (0.0, 1.0):
        direction = "forward" if beta == 0.0 else "reverse"
        return xent.kl_divergence(input=z, target=target, direction=direction, **options)
    return xent.js_divergence(input=z, target=target, beta=beta, **options)


def exact(z, target):
    """Cross-entropy and KL of one row in many digits, and the gradient of both in the logits."""
    with mpmath.workdps(60):
        e = [mpmath.exp(mpmath.mpf(v)) for v in z.tolist()]
        named = target.indices[0].tolist()
        q = {j: mpmath.mpf(v) for j, v in zip(named, target.probabilities[0].tolist(), strict=True)}
        rest = 1 - sum(q.values()) if target.rest is None else mpmath.mpf(target.rest[0].item())
        others = sum(v for j, v in enumerate(e) if j not in q)
        loss = -sum(v * mpmath.log(e[j] / sum(e)) for j, v in q.items()) - rest * mpmath.log(others / sum(e))
        entropy = -sum(v * mpmath.log(v) for v in [*q.values(), rest] if v)
        mass = sum(q.values()) + rest
        slope = [mass * v / sum(e) - (q[j] if j in q else rest * v / others) for j, v in enumerate(e)]
        return float(loss), float(loss - entropy), torch.tensor([float(v) for v in slope], dtype=F64)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("few", [False, True])  # classes at a time
@pytest.mark.parametrize("scale", [1.0, 30.0, 800.0])  # to 800: P̄ and Q̄/P̄ are beyond any type
@pytest.mark.parametrize("sure", [True, False])
def test_values_and_gradients_at_every_distance(dtype, few, scale, sure):
    """The student is sure of a class that the teacher names, or of one that it does not."""
    z = torch.linspace(-1, 1, 8, dtype=F64).mul(scale).to(dtype)
    target = xent.TopKTarget(
        torch.tensor([[7 if sure else 0, 1]]), torch.tensor([[0.5, 0.25]], dtype=dtype), "bucket"
    )
    loss, kl, slope = exact(z.double(), target)
    w = z[:, None].clone().requires_grad_()
    one = torch.ones(1, 1, dtype=dtype)
    budget = 4 * dtype.itemsize if few else None
    found = xent.linear_cross_entropy(one, w, target, memory_budget=budget)
    far = xent.linear_kl_divergence(student=(one, w), teacher=target, memory_budget=budget)
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    assert_close(found.double().item(), loss, **tolerance)
    assert_close(far.double().item(), kl, **tolerance)
    for value in (found, far):
        (g,) = torch.autograd.grad(value, w, retain_graph=True)
        assert_close(g[:, 0].double(), slope, **tolerance)
    dense = z[None].clone().requires_grad_()
    xent.cross_entropy(dense, target).backward()
    assert_close(dense.grad[0].double(), slope, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_student_that_is_sure_of_the_bucket_keeps_its_digits(dtype):
    """Loss and gradient of log P̄ alone, relative to themselves: they are 1e-21 here."""
    z = torch.tensor([-48.0, 0.5, 0.25, -49.0], dtype=dtype)
    target = xent.TopKTarget(torch.tensor([[0, 3]]), torch.zeros(1, 2), "bucket", torch.ones(1))
    loss, kl, slope = exact(z.double(), target)
    w = z[:, None].clone().requires_grad_()
    options = {"student": (torch.ones(1, 1, dtype=dtype), w), "teacher": target}
    for found in (
        xent.linear_cross_entropy(torch.ones(1, 1, dtype=dtype), w, target, reduction="sum"),
        xent.linear_cross_entropy(torch.ones(1, 1, dtype=dtype), w, target, reduction="none").sum(),
        xent.linear_kl_divergence(**options),
    ):
        (g,) = torch.autograd.grad(found, w)
        rtol = 64 * torch.finfo(dtype).eps
        assert_close(found.double().item(), loss, rtol=rtol, atol=0)
        assert_close(g[:, 0].double(), slope, rtol=rtol, atol=0)
    assert kl == loss


@pytest.mark.parametrize("beta", BETAS)
def test_divergences_are_those_of_k_plus_one_classes(beta):
    x, w, b = head()
    target = teacher()

    def f(x, w, b):
        options = {"temperature": torch.tensor([0.5, 1.0, 2.0, 3.0]), "scale_by_t2": True}
        return divergence((x, w, b), target, beta, reduction="none", **options)

    squares = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=F64) ** 2
    z = (x @ w.T + b) / squares.sqrt()[:, None]
    fewer, t = merged(z, target)
    assert_close(f(x, w, b), squares * of_logits(fewer, t, beta))
    assert_close(of_logits(z, target, beta), of_logits(fewer, t, beta))
    assert gradcheck(f, (x, w, b), check_forward_ad=True)
    assert gradgradcheck(f, (x, w, b))


@pytest.mark.parametrize("beta", BETAS)
def test_of_the_students_own_top_k_it_is_zero_and_never_negative(beta):
    """Where truncation goes below zero."""
    x, w = torch.randn(200, 16), torch.randn(64, 16)
    target = xent.TopKTarget.from_top_k(*xent.linear_top_k(x, w, 8), remainder="bucket")
    found = divergence((x, w), target, beta, reduction="none")
    assert (found >= 0).all()
    assert found.max() < 1e-10
    cut = (
        target.probabilities * (target.probabilities.log() - xent.linear_log_prob(x, w, target.indices))
    ).sum(1)
    assert cut.min() < 0


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_dropped_remainder_is_a_bucket_without_mass(beta):
    x, w, b = head()
    target = xent.TopKTarget(teacher().indices, teacher().probabilities)
    found = divergence((x, w, b), target, beta, reduction="none")
    assert_close(found, of_logits(x @ w.T + b, target.to_dense(9), beta))


def test_rows_are_weighed_and_left_out():
    x, w, b = head()
    target = teacher(rest=torch.tensor([0.2, 0.1, 0.3, 0.0], dtype=F64))
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=F64)
    each = divergence((x, w, b), target, 0.0, reduction="none")
    bad = target.mapped(
        lambda t: (
            torch.where(torch.arange(4).reshape(4, *(1,) * (t.dim() - 1)) == 1, torch.nan, t)
            if t.is_floating_point()
            else t
        )
    )
    found = divergence((x, w, b), bad, 0.0, sample_weight=weight)
    assert_close(found, (weight * each).sum() / weight.sum())
    loss = xent.linear_cross_entropy(x, w, bad, linear_bias=b, sample_weight=weight)
    rows = xent.linear_cross_entropy(x, w, target, linear_bias=b, reduction="none")
    assert_close(loss, (weight * rows).sum() / weight.sum())
    for g in torch.autograd.grad(found + loss, (x, w, b)):
        assert g.isfinite().all()


def test_in_a_graph_and_under_vmap():
    x, w, _ = head()
    target = teacher()

    def f(x, w):
        loss = xent.linear_cross_entropy(x, w, target)
        return loss + xent.linear_kl_divergence(student=(x, w), teacher=target)

    compiled = torch.compile(f, fullgraph=True)
    assert_close(compiled(x, w), f(x, w))
    assert_close(torch.autograd.grad(compiled(x, w), (x, w)), torch.autograd.grad(f(x, w), (x, w)))

    def of_row(x, indices, q):
        return xent.linear_cross_entropy(x[None], w, xent.TopKTarget(indices[None], q[None], "bucket"))

    each = xent.linear_cross_entropy(x, w, target, reduction="none")
    assert_close(vmap(of_row)(x, target.indices, target.probabilities), each)


def test_positions_of_a_head_and_of_logits():
    w, x = torch.randn(9, 2, 5, dtype=F64), torch.randn(4, 5, dtype=F64)
    target = teacher(8, rest=torch.full((8,), 0.25, dtype=F64))
    at_places = target.mapped(lambda t: t.reshape(4, 2, *t.shape[1:]))
    found = xent.linear_cross_entropy(x, w, at_places, reduction="none")
    z = torch.einsum("nd,cpd->ncp", x, w)
    assert_close(xent.cross_entropy(z, at_places, reduction="none"), found)
    flat = xent.cross_entropy(z.movedim(1, 2).reshape(8, 9), target, reduction="none")
    assert_close(found.reshape(8), flat)
    assert_close(xent.kl_divergence(input=z, target=at_places).shape, found.shape)


def test_every_class_stored_and_masses_near_zero():
    z = torch.randn(2, 3, dtype=F64)
    every = torch.arange(3).expand(2, 3)
    q = torch.tensor([[0.2, 0.3, 0.5 + 5e-7], [0.2, 0.3, 0.5 - 5e-7]], dtype=F64)
    found = xent.cross_entropy(z, xent.TopKTarget(every, q, "bucket"), reduction="none")
    assert_close(found, xent.cross_entropy(z, q, reduction="none"))
    some = xent.TopKTarget(every[:, :2], q[:, :2] / q[:, :2].sum(1, keepdim=True) + 2e-7, "bucket")
    assert xent.cross_entropy(z, some).isfinite()
    masked = torch.tensor([[0.0, 1.0, -torch.inf]], dtype=F64, requires_grad=True)
    loss = xent.cross_entropy(
        masked, xent.TopKTarget(every[:1, :2], torch.tensor([[0.4, 0.6]], dtype=F64), "bucket")
    )
    loss.backward()
    assert_close(
        masked.grad,
        torch.tensor([[1.0, 0.0, 0.0]], dtype=F64) * (masked.detach().softmax(1)[:, :1] - 0.4)
        + torch.tensor([[0.0, 1.0, 0.0]], dtype=F64) * (masked.detach().softmax(1)[:, 1:2] - 0.6),
    )


def test_what_it_does_not_go_with():
    x, w, b = (t.detach() for t in head())
    target, z = teacher(), x @ w.T + b
    for f in (
        lambda: xent.linear_row_statistics(x, w, target),
        lambda: xent.row_statistics(z, target),
        lambda: xent.surrogate_cross_entropy(z, target),
        lambda: xent.fit_temperature(z, target),
        lambda: xent.curvature.HeadHessian(x, w, target),
        lambda: xent.curvature.HeadFisher(x, w, target),
        lambda: xent.curvature.row_gradients(x, w, target),
        lambda: target.to_dense(9),
        lambda: xent.cross_entropy(z, target, label_smoothing=0.1),
        lambda: xent.linear_cross_entropy(x, w, target, weight=torch.ones(9)),
        lambda: xent.kl_divergence(input=z, target=target, target_is_logits=True),
        lambda: xent.linear_kl_divergence(student=(x, w), teacher=(x, w), group=object()),
    ):
        with pytest.raises(ValueError, match=r"bucket|TopKTarget|group"):
            f()
    with pytest.raises(TypeError, match="one positive"):
        xent.triplets.linear_margins(x, w, target)
    dropped = xent.TopKTarget(target.indices, target.probabilities)
    with pytest.raises(ValueError, match="infinite"):
        xent.linear_kl_divergence(student=(x, w), teacher=dropped, direction="reverse")
    with pytest.raises(ValueError, match="spread"):
        xent.linear_kl_divergence(
            student=(x, w), teacher=xent.TopKTarget(target.indices, target.probabilities, "spread")
        )


@pytest.mark.parametrize(
    ("rest", "error", "message"),
    [
        (0.5, TypeError, "floating tensor, got float"),
        (torch.zeros(4, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.zeros(3), ValueError, r"shape of the rows, \(4,\)"),
        (torch.zeros(4, requires_grad=True), ValueError, "detach"),
        (torch.tensor([0.0, 0.1, -2e-6, 0.1]), ValueError, "-2e-06 in row 2"),
        (torch.tensor([0.0, torch.nan, 0.0, 0.1]), ValueError, "nan in row 1"),
    ],
)
def test_a_rest_that_is_none(rest, error, message):
    with pytest.raises(error, match=message):
        xent.cross_entropy(torch.randn(4, 9, dtype=F64), teacher(rest=rest))


def test_an_error_counts_the_rows_that_are_left_out():
    q = torch.tensor([[0.5, 0.25]] * 3 + [[0.5, -0.25]])
    target = xent.TopKTarget(torch.tensor([[0, 1]] * 4), q, "bucket")
    weight = torch.tensor([0.0, 1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"got -0.25 at \(3, 1\)"):
        xent.kl_divergence(input=torch.zeros(4, 5), target=target, sample_weight=weight)
    target = xent.TopKTarget(target.indices, q + q.abs(), "bucket")
    with pytest.raises(ValueError, match=r"mass -0.5 in row 1"):
        xent.cross_entropy(torch.zeros(4, 5), target, sample_weight=weight)


def test_masses_that_exceed_one():
    too_much = xent.TopKTarget(torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.5]]), "bucket")
    with pytest.raises(ValueError, match=r"mass -0.25 in row 0.*rest="):
        xent.cross_entropy(torch.zeros(1, 4), too_much)
    with pytest.raises(ValueError, match="no class for it"):
        xent.cross_entropy(
            torch.zeros(1, 2), xent.TopKTarget(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]), "bucket")
        )
    with pytest.raises(ValueError, match="remainder='bucket'"):
        xent.TopKTarget(torch.tensor([[0]]), torch.tensor([[0.5]]), "drop", torch.tensor([0.5]))


def test_storage(tmp_path):
    target = teacher(rest=torch.full((4,), 0.2))
    save_file(target.as_dict(), tmp_path / "teacher.safetensors")
    again = xent.TopKTarget(**load_file(tmp_path / "teacher.safetensors"), remainder="bucket")
    assert_close(again.tensors, target.tensors)
    assert_close(again.to("cpu").rest, target.rest)
    found = xent.TopKTarget.from_top_k(target.probabilities, target.indices, "bucket", target.rest)
    assert_close(found.tensors, target.tensors)
