"""torch's own operator samples, with xent's functions in their place."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

import xent

NAMES = ("nn.functional.cross_entropy", "nn.functional.linear_cross_entropy")
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
