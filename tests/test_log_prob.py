"""Log-probabilities of given classes, against the unfused form in float64 and in each of torch's modes."""

from __future__ import annotations

import mpmath
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vmap
from torch.testing import assert_close

import xent
from xent._core import reference

F64 = torch.float64
OPTIONS = {
    "plain": {},
    "everything": {"logit_scale": 0.6, "softcap": 3.0, "temperature": 0.7},
    "scaled": {"logit_scale": 1.7},
    "a temperature a row": {"temperature": torch.linspace(0.5, 2.0, 5, dtype=F64), "logit_scale": 0.5},
}
# (5, k): one of a row, several, equal ones, ignored ones, a row of nothing else
INDICES = {
    "one a row": torch.tensor([0, 5, 2, -100, 1]),
    "one of k": torch.tensor([[0], [5], [2], [-100], [1]]),
    "three": torch.tensor([[0, 1, 2], [5, 4, 3], [1, 3, 5], [2, 0, 4], [0, 3, 1]]),
    "equal": torch.tensor([[0, 0, 0], [5, 4, 5], [1, 3, 3], [2, 0, 4], [0, 0, 1]]),
    "ignored": torch.tensor([[0, -100, 2], [-100, -100, -100], [1, 1, -100], [2, 0, 4], [-100, 3, 3]]),
}
CASES = pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES)
WITH = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def expected(z, indices, *, logit_scale=1.0, softcap=None, temperature=1.0):
    """The two results by plain operations, float64."""
    z = reference.transform(logit_scale * z.double(), softcap=softcap)
    z = z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    log_p = z.log_softmax(1)
    columns = indices if indices.dim() == 2 else indices[:, None]
    value = torch.where(columns == -100, 0.0, log_p.gather(1, columns.clamp(min=0)))
    entropy = torch.where((columns == -100).all(1), 0.0, -(log_p.exp() * log_p).sum(1))
    return value.reshape(indices.shape), entropy


def leaves():
    torch.manual_seed(0)
    sizes = (5, 4), (6, 4), (6,)
    return [torch.randn(size, dtype=F64, requires_grad=True) for size in sizes]


def ours(indices, budget=None, **options):
    def f(x, w, b):
        return tuple(
            xent.linear_log_prob(
                x, w, indices, linear_bias=b, return_entropy=True, memory_budget=budget, **options
            )
        )

    return f


def plain(indices, **options):
    return lambda x, w, b: expected(torch.nn.functional.linear(x, w, b), indices, **options)


def mixed(found):
    """A number that gives every entry a gradient of its own."""
    value, entropy = found
    up = torch.linspace(-1.0, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)
    return (up * value).sum() + (torch.linspace(0.5, 1.0, len(entropy), dtype=value.dtype) * entropy).sum()


@CASES
@WITH
@pytest.mark.parametrize("budget", [None, 400])
def test_values_and_both_derivatives(indices, options, budget):
    given = leaves()
    f, g = ours(indices, budget, **options), plain(indices, **options)
    assert_close(f(*given), g(*given))
    first = [torch.autograd.grad(mixed(h(*given)), given, create_graph=True) for h in (f, g)]
    assert_close(*first)
    along = [torch.randn_like(t) for t in given]
    second = [
        torch.autograd.grad(sum((a * d).sum() for a, d in zip(along, h, strict=True)), given) for h in first
    ]
    assert_close(*second)


@CASES
def test_from_logits(indices):
    z = torch.randn(5, 6, dtype=F64, requires_grad=True)
    found = xent.log_prob(z, indices, return_entropy=True, softcap=3.0, temperature=0.7)
    assert_close(tuple(found), expected(z, indices, softcap=3.0, temperature=0.7))
    assert_close(xent.log_prob(z, indices), expected(z, indices)[0])
    assert gradcheck(
        lambda z: tuple(xent.log_prob(z, indices, return_entropy=True)), (z,), check_forward_ad=True
    )
    assert gradgradcheck(lambda z: xent.log_prob(z, indices), (z,))


@CASES
def test_modes_of_torch(indices):
    given = leaves()
    plain_ones = [t.detach() for t in given]
    options = OPTIONS["everything"]
    rows = ours(indices, **options)
    f, g = (lambda *t, h=h: mixed(h(*t)) for h in (rows, plain(indices, **options)))
    along = tuple(torch.randn_like(t) for t in given)
    assert_close(jvp(f, tuple(plain_ones), along), jvp(g, tuple(plain_ones), along))
    for way in (grad, hessian, jacfwd):
        assert_close(way(f, argnums=1)(*plain_ones), way(g, argnums=1)(*plain_ones))
    batch = torch.randn(3, 6, 4, dtype=F64)
    each = vmap(lambda w: grad(f, argnums=1)(plain_ones[0], w, plain_ones[2]))(batch)
    assert_close(each[1], grad(g, argnums=1)(plain_ones[0], batch[1], plain_ones[2]))
    torch._dynamo.reset()
    compiled = torch.compile(rows, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*given), rows(*given))
    assert_close(torch.autograd.grad(mixed(compiled(*given)), given), torch.autograd.grad(f(*given), given))


def test_indices_under_vmap():
    z, indices = torch.randn(3, 5, 6, dtype=F64), torch.randint(6, (3, 5, 4))
    assert_close(
        vmap(xent.log_prob)(z, indices),
        torch.stack([xent.log_prob(*t) for t in zip(z, indices, strict=True)]),
    )


def test_shapes_are_those_of_gather():
    z = torch.randn(2, 6, 3, 4, dtype=F64)
    for k in (1, 3):
        indices = torch.randint(6, (2, k, 3, 4))
        assert_close(xent.log_prob(z, indices), z.log_softmax(1).gather(1, indices))
    one = torch.randint(6, (2, 3, 4))
    assert_close(xent.log_prob(z, one), z.log_softmax(1).gather(1, one[:, None])[:, 0])
    assert_close(xent.log_prob(z[0, :, 0, 0], torch.tensor([2, 2])), z[0, :, 0, 0].log_softmax(0)[[2, 2]])
    assert xent.log_prob(z[0, :, 0, 0], torch.tensor(2)).shape == ()
    x, w = torch.randn(2, 7, 5, dtype=F64), torch.randn(6, 3, 5, dtype=F64)  # a head of three positions
    logits = torch.einsum("bnd,cpd->bnpc", x, w).log_softmax(-1)
    for shape in ((2, 7, 3), (2, 7, 3, 1), (2, 7, 3, 4)):
        indices = torch.randint(6, shape)
        found = xent.linear_log_prob(x, w, indices, return_entropy=True)
        assert_close(found.log_prob, logits.gather(-1, indices.reshape(2, 7, 3, -1)).reshape(shape))
        assert_close(found.entropy, -(logits.exp() * logits).sum(-1))


def test_no_probability_exceeds_1():
    """In any type, for sure rows and for a common offset: the term of the largest logit is left out of r."""
    x = torch.randn(200, 64, dtype=torch.float32)
    w = 30 * torch.randn(1000, 64)
    classes = (x @ w.t()).topk(3).indices
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = xent.linear_log_prob(x.to(dtype), w.to(dtype), classes)
        assert (found <= 0).all(), dtype
        assert found.dtype == torch.float32
    z = torch.randn(50, 9, dtype=torch.bfloat16)
    assert_close(
        xent.log_prob(z.double() + 1e4, torch.zeros(50, 2, dtype=torch.int64)).float(),
        z.double().log_softmax(1)[:, [0, 0]].float(),
    )


def test_rows_that_are_sure_keep_their_digits():
    z = torch.tensor([[0.0, -40.0, -50.0, -40.0]], requires_grad=True)
    log_p = xent.log_prob(z, torch.tensor([[0, 1, 2]]))
    with mpmath.workdps(40):
        p = [mpmath.exp(v) for v in (0, -40, -50, -40)]
        whole = sum(p)
        logs = [float(mpmath.log(v / whole)) for v in p[:3]]
        # of Σ λ_j log p_j with λ = (1, 2, 0): ∂/∂z_0 = 1 − 3 p_0, and with λ = (1, 0, 0) 1 − p_0
        sure = float(1 - p[0] / whole)
    assert_close(log_p[0].double(), torch.tensor(logs, dtype=F64), rtol=1e-6, atol=0.0)
    (g,) = torch.autograd.grad(log_p[0, 0], z)
    assert g[0, 0].item() == pytest.approx(sure, rel=1e-6)


def test_what_is_ignored_has_no_gradient_and_touches_nothing():
    x = torch.randn(4, 3, requires_grad=True)
    w = torch.randn(6, 3, requires_grad=True)
    with torch.no_grad():
        x[2] = torch.nan
    indices = torch.tensor([[0, -1], [2, 2], [-1, -1], [5, 0]])
    found = xent.linear_log_prob(x, w, indices, ignore_index=-1, return_entropy=True)
    assert found.log_prob[0, 1] == found.entropy[2] == 0
    assert not found.log_prob[2].any()
    dx, dw = torch.autograd.grad(mixed(found), (x, w))
    assert dx.isfinite().all()
    assert dw.isfinite().all()
    assert not dx[2].any()


def test_errors_name_what_is_wrong():
    x, w = torch.randn(4, 3), torch.randn(6, 3)
    for indices, kind, message in (
        (torch.zeros(4, 2), TypeError, "indices must be of an integer type"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"indices must have shape \(4,\), or .* \(4, 'k'\)"),
        (torch.zeros(4, 0, dtype=torch.int64), ValueError, "k at least 1"),
        (torch.tensor([[0, 6]] * 4), IndexError, r"indices\[0, 1\] is 6, outside 0\.\.5"),
        (torch.tensor([0, 1, 2, -1]), IndexError, r"-1 at row 3 is outside 0\.\.5"),
    ):
        with pytest.raises(kind, match=message):
            xent.linear_log_prob(x, w, indices)
    with pytest.raises(ValueError, match="temperature=1/logit_scale"):
        xent.linear_cross_entropy(x, w, torch.zeros(4, dtype=torch.int64), margin=0.1, logit_scale=2.0)


def test_narrow_and_unsigned_indices():
    z = torch.randn(3, 200, dtype=F64)
    indices = torch.tensor([[199, 0], [127, 128], [5, 5]])
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint64):
        assert_close(xent.log_prob(z, indices.to(dtype)), xent.log_prob(z, indices))


@pytest.mark.parametrize("loss", [xent.linear_cross_entropy, xent.linear_focal_loss, xent.linear_poly_loss])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_logit_scale_is_a_factor_before_the_softcap(loss, softcap):
    given = leaves()
    y = torch.tensor([0, 5, 2, 3, 1])
    found = loss(given[0], given[1], y, linear_bias=given[2], logit_scale=0.3, softcap=softcap)
    scaled = [given[0], 0.3 * given[1], 0.3 * given[2]]
    same = loss(scaled[0], scaled[1], y, linear_bias=scaled[2], softcap=softcap)
    assert_close(found, same)
    assert_close(torch.autograd.grad(found, given), torch.autograd.grad(same, given))


def test_a_module_with_a_logit_scale():
    head = xent.nn.LinearCrossEntropyLoss(4, 6, logit_scale=0.25, dtype=F64)
    assert "logit_scale=0.25" in repr(head)
    x, y = torch.randn(5, 4, dtype=F64), torch.randint(6, (5,))
    weight = 0.25 * head.linear.weight
    assert_close(head(x, y), xent.linear_cross_entropy(x, weight, y))
    assert_close(
        functional_call(head, {"linear.weight": weight}, (x, y)), xent.linear_cross_entropy(x, weight / 4, y)
    )
    rows = xent.linear_row_statistics(x, head.linear.weight, y, logit_scale=0.25)
    assert_close(rows.loss, xent.linear_cross_entropy(x, weight, y, reduction="none"))
    p, classes = xent.linear_top_k(x, head.linear.weight, 2, logit_scale=0.25)
    assert_close((p, classes), xent.linear_top_k(x, weight, 2))
