"""torch's own operator samples, with xent's functions in their place."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

import xent

INF, NAN = math.inf, math.nan
NAMES = (
    "nn.functional.cross_entropy",
    "nn.functional.linear_cross_entropy",
    "nn.functional.binary_cross_entropy",
    "nn.functional.binary_cross_entropy_with_logits",
    "nn.functional.kl_div",
)
OPS = [op for op in op_db if op.name in NAMES]


def test_the_samples_are_there():
    assert {op.name for op in OPS} == set(NAMES)


def as_is(tensor):
    return tensor


def in_double(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def evaluate(function, sample, convert, options, upstream=None):
    """Loss of a sample and its gradients, under one upstream gradient (random unless given)."""

    def leaf(value):
        if not isinstance(value, torch.Tensor):
            return value
        return convert(value.detach()).requires_grad_(value.requires_grad)

    arguments = [leaf(a) for a in (sample.input, *sample.args)]
    kw = {k: leaf(v) for k, v in options.items()}
    leaves = [t for t in (*arguments, *kw.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    loss = function(*arguments, **kw)
    upstream = torch.randn_like(loss) if upstream is None else convert(upstream)
    return upstream, [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def ours(op, sample):
    options = {k: v for k, v in sample.kwargs.items() if k != "options"}  # how torch chunks is torch's own
    return evaluate(getattr(xent, op.name.split(".")[-1]), sample, as_is, options)


@pytest.mark.filterwarnings("ignore:linear_cross_entropy:UserWarning")
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.name}-{op.variant_test_name or 'plain'}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_torch(op, dtype):
    count = 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        upstream, values = ours(op, sample)
        _, expected = evaluate(op.op, sample, as_is, sample.kwargs, upstream)
        for a, b in zip(values, expected, strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            torch.testing.assert_close(a, b)
        count += 1
    assert count >= 10


@pytest.mark.filterwarnings("ignore:linear_cross_entropy:UserWarning")
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.name}-{op.variant_test_name or 'plain'}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_once(op, dtype):
    """torch computes these in the half type throughout; ours is torch's float64 answer, rounded once."""
    half_ulp = torch.finfo(dtype).eps / 2
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    count = 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        upstream, values = ours(op, sample)
        unchunked = {k: v for k, v in sample.kwargs.items() if k != "options"}
        _, exact = evaluate(op.op, sample, in_double, unchunked, upstream)
        for a, b in zip(values, exact, strict=True):
            assert a.dtype == dtype
            # float32 inside: its rounding is relative to what was summed, not to the sum
            inside = 64 * torch.finfo(torch.float32).eps * b.abs().max() if b.numel() else 0.0
            assert ((a.double() - b).abs() <= half_ulp * b.abs() + inside + smallest).all()
        count += 1
    assert count >= 10


def gradient_of(x, f):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def none(name, *arguments, **options):
    """Call (of torch's namespace or ours) -> the unreduced loss."""
    return lambda F: getattr(F, name)(*arguments, reduction="none", **options)


def slope(name, x, *arguments, **options):
    """The gradient of the same in its first argument."""
    return lambda F: gradient_of(x, lambda x: getattr(F, name)(x, *arguments, reduction="none", **options))


def vector(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


P, S, K = "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div"
one, zero, nothing = vector(1.0), vector(0.0), vector()
tail = vector(37.42994775023705, dtype=torch.float64)
# what, call, torch's answer, ours: a number, or what is raised; the reasons stand in
# docs/explanation/binary.md
DIFFERENCES = [
    ("a certain error", none(P, zero, one), 100.0, INF),
    ("its gradient", slope(P, zero, one), -1e12, -INF),
    ("the gradient of what is certain and true", slope(P, one, one), 0.0, -1.0),
    ("the gradient of a small probability", slope(P, vector(1e-20), one), -1e12, -1e20),
    ("types that differ", none(P, vector(0.5).double(), one), RuntimeError, math.log(2)),
    ("a probability outside", none(P, vector(1.5), one), RuntimeError, ValueError),
    ("an infinite logit", none(S, vector(-INF), zero), NAN, 0.0),
    ("a tail's gradient", slope(S, tail, torch.ones_like(tail)), 0.0, -5.551115123125783e-17),
    ("a left-out nan", none(S, vector(NAN), one, zero), NAN, 0.0),
    ("neither has probability", none(K, vector(-INF), zero), NAN, 0.0),
    ("the same in logarithms", none(K, vector(-INF), vector(-INF), log_target=True), NAN, 0.0),
    ("a class without probability", none(K, vector(-1.0), vector(-INF), log_target=True), NAN, 0.0),
    ("a negative probability", none(K, vector(-1.0), vector(-0.5)), NAN, ValueError),
    ("the mean over nothing", lambda F: F.kl_div(nothing, nothing), NAN, 0.0),
    ("integers", none(K, vector(-1.0), torch.tensor([1])), RuntimeError, TypeError),
]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize(("what", "call", "theirs", "ours"), DIFFERENCES, ids=[d[0] for d in DIFFERENCES])
def test_differences_from_torch(what, call, theirs, ours):
    for functions, expected in ((F, theirs), (xent, ours)):
        if isinstance(expected, type):
            with pytest.raises(expected):
                call(functions)
        else:
            assert call(functions).item() == pytest.approx(expected, rel=1e-6, nan_ok=True, abs=0)
