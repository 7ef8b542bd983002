"""The whole cross product of options, against the float64 reference and against torch; shapes; errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import xent
from table import spelt_out
from xent._core import reference

N, D, C = 7, 5, 6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

PRODUCT = list(
    itertools.product(
        (0.0, 0.1, 1.0),  # label_smoothing
        (False, True),  # class weights
        (False, True),  # sample weights
        (False, True),  # an ignored row
        (0.0, 0.01),  # z_loss
        (None, 5.0),  # softcap
        (1.0, 2.0),  # temperature
        (False, True),  # bias
    )
)


def draw(kind, dtype, smoothing, weighted, sampled, ignored, z_loss, softcap, temperature, biased):
    x, w = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((N, D), (C, D)))
    b = torch.randn(C, dtype=dtype, requires_grad=True) if biased else None
    if kind == "index":
        target = torch.randint(C, (N,))
        if ignored:
            target[2] = -100
    elif kind == "probabilities":
        target = torch.rand(N, C, dtype=dtype, requires_grad=True)
    else:
        q = torch.rand(N, 2, dtype=dtype) / 2
        target = xent.TopKTarget(torch.rand(N, C).argsort(1)[:, :2], q, kind)
    options = {
        "label_smoothing": smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "temperature": temperature,
        "weight": torch.rand(C, dtype=dtype) + 0.5 if weighted else None,
        "sample_weight": torch.rand(N, dtype=dtype) if sampled else None,
    }
    leaves = [t for t in (x, w, b, target) if isinstance(t, torch.Tensor) and t.requires_grad]
    return x, w, b, target, options, leaves


KINDS = ["index", "probabilities", "drop", "spread"]
REDUCTIONS = ["none", "sum", "mean", "denominator"]
SCORES = ["dense", "linear", "tiled"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("share", ["a twelfth", pytest.param("all", marks=pytest.mark.slow)])
def test_every_combination_of_options_equals_the_reference(kind, dtype, reduction, scores, share):
    """Value, gradients of a first backward, and gradients of a second one.

    A cell tries a twelfth of the combinations, and its neighbours others; the slow test tries all.
    """
    how = (
        {"reduction": "mean", "denominator": 3.0} if reduction == "denominator" else {"reduction": reduction}
    )
    tolerance = TOLERANCE[dtype]
    cell = KINDS.index(kind) + REDUCTIONS.index(reduction) + SCORES.index(scores)
    for choice in PRODUCT if share == "all" else PRODUCT[(cell + 6 * (dtype == torch.float32)) % 12 :: 12]:
        x, w, b, target, options, leaves = draw(kind, dtype, *choice)
        options |= how
        if scores == "dense":
            loss = xent.cross_entropy(F.linear(x, w, b), target, **options)
        else:
            budget = 4 * 70 * dtype.itemsize if scores == "tiled" else None
            loss = xent.linear_cross_entropy(x, w, target, linear_bias=b, memory_budget=budget, **options)
        logits = F.linear(x.double(), w.double(), None if b is None else b.double())
        exact = reference.cross_entropy(logits, spelt_out(target, C), **options)
        upstream = torch.randn(loss.shape, dtype=dtype)
        expected = torch.autograd.grad(exact, leaves, upstream.double())
        assert loss.dtype == dtype
        assert loss.shape == exact.shape
        torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=tolerance, msg=str(choice))
        for _ in range(2):
            for got, right in zip(
                torch.autograd.grad(loss, leaves, upstream, retain_graph=True), expected, strict=True
            ):
                torch.testing.assert_close(
                    got.double(), right.double(), rtol=tolerance, atol=tolerance, msg=str(choice)
                )


@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("positions", [(), (3,), (2, 3), (1, 1, 2)])
def test_every_option_of_torch_equals_torch(kind, reduction, positions):
    for smoothing, weighted, ignore in itertools.product((0.0, 0.3), (False, True), (-100, 2)):
        z = torch.randn(N, C, *positions, dtype=torch.float64, requires_grad=True)
        options = {"reduction": reduction, "label_smoothing": smoothing}
        options["weight"] = torch.rand(C, dtype=torch.float64) if weighted else None
        if kind == "index":
            target = torch.randint(C, (N, *positions))
            options["ignore_index"] = ignore
        else:
            target = torch.rand(N, C, *positions, dtype=torch.float64)
        ours, theirs = xent.cross_entropy(z, target, **options), F.cross_entropy(z, target, **options)
        torch.testing.assert_close(ours, theirs)
        upstream = torch.randn_like(theirs)
        torch.testing.assert_close(*(torch.autograd.grad(v, z, upstream) for v in (ours, theirs)))


@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("positions", [(3,), (2, 3)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_k_dimensional_heads_equal_torch(kind, positions, reduction):
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    w = torch.randn(C, *positions, D, dtype=torch.float64, requires_grad=True)
    b = torch.randn(C, *positions, dtype=torch.float64, requires_grad=True)
    if kind == "index":
        target = torch.randint(C, (N, *positions))
        target[1, 0] = target[3, 1] = -100
    else:
        target = torch.rand(N, C, *positions, dtype=torch.float64)
    options = {"reduction": reduction, "weight": torch.rand(C, dtype=torch.float64)}
    ours = xent.linear_cross_entropy(x, w, target, linear_bias=b, **options)
    theirs = F.linear_cross_entropy(x, w, target, linear_bias=b, **options)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(theirs)
    torch.testing.assert_close(*(torch.autograd.grad(v, (x, w, b), upstream) for v in (ours, theirs)))


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (2, 1, 2)])
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_leading_batch_dimensions(batch, kind):
    x, w = torch.randn(*batch, D, dtype=torch.float64), torch.randn(C, D, dtype=torch.float64)
    target = torch.randint(C, batch) if kind == "index" else torch.rand(*batch, C, dtype=torch.float64)
    loss = xent.linear_cross_entropy(x, w, target, reduction="none")
    assert loss.shape == batch
    flat = target.reshape(-1) if kind == "index" else target.reshape(-1, C)
    expected = F.cross_entropy(x.reshape(-1, D) @ w.T, flat, reduction="none")
    torch.testing.assert_close(loss, expected.reshape(batch))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_targets_of_any_width(dtype):
    x, w = torch.randn(N, D), torch.randn(C, D)
    target = torch.randint(C, (N,))
    expected = F.cross_entropy(x @ w.T, target)
    torch.testing.assert_close(xent.linear_cross_entropy(x, w, target.to(dtype)), expected)
    torch.testing.assert_close(xent.cross_entropy(x @ w.T, target.to(dtype)), expected)


@pytest.mark.parametrize(("dtype", "classes"), [(torch.uint8, 256), (torch.int8, 1000), (torch.int16, 40000)])
def test_narrow_targets_among_more_classes_than_they_can_count(dtype, classes):
    z = torch.randn(4, classes)
    target = torch.tensor([1, 2, 3, 127], dtype=dtype)
    assert_close(xent.cross_entropy(z, target), F.cross_entropy(z, target.long()))
    if dtype == torch.uint8:
        with pytest.raises(IndexError, match="target 156 at row 0"):  # not the ignore index, −100, wrapped
            xent.cross_entropy(z[:, :100], torch.tensor([156, 0, 0, 0], dtype=dtype))


def test_no_features():
    """D = 0: every class alike, or the bias alone."""
    x, w, b, target = torch.zeros(3, 0), torch.zeros(5, 0), torch.randn(5), torch.tensor([0, 1, 4])
    assert_close(xent.linear_cross_entropy(x, w, target), torch.tensor(5.0).log())
    expected = F.cross_entropy(b.expand(3, 5), target)
    assert_close(xent.linear_cross_entropy(x, w, target, linear_bias=b), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("changed", ["target", "weight", "sample_weight"])
def test_a_target_changed_before_backward_is_noticed(reduction, changed):
    z, target = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
    given = {
        "weight": torch.rand(4, dtype=torch.float64),
        "sample_weight": torch.ones(3, dtype=torch.float64),
    }
    given = {k: v for k, v in given.items() if k == changed}
    loss = xent.cross_entropy(z, target, reduction=reduction, **given).sum()
    (target if changed == "target" else given[changed]).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_mean_without_weight_is_zero_whatever_its_rows_cost():
    loss = xent.cross_entropy(
        torch.tensor([[-math.inf, 0.0]]), torch.tensor([1]), torch.tensor([1.0, 0.0]), label_smoothing=0.1
    )
    assert loss == 0


def test_ignore_index_none_is_minus_hundred():
    z, target = torch.randn(3, 4), torch.tensor([1, -100, 2])
    ignoring = xent.cross_entropy(z, target, ignore_index=None)
    torch.testing.assert_close(ignoring, F.cross_entropy(z, target))
    z, q = torch.randn(3, 4), torch.rand(3, 4)
    torch.testing.assert_close(xent.cross_entropy(z, q, ignore_index=None), F.cross_entropy(z, q))


def test_non_contiguous_inputs():
    x, w = torch.randn(D, N).t(), torch.randn(D, 2 * C).t()[::2]
    target = torch.randint(C, (2 * N,))[::2]
    torch.testing.assert_close(
        xent.linear_cross_entropy(x, w, target), F.cross_entropy(x @ w.T, target), rtol=1e-6, atol=1e-6
    )
    z = torch.randn(2, 3, C, 4).permute(0, 2, 1, 3)
    t = torch.randint(C, (2, 3, 4))
    torch.testing.assert_close(xent.cross_entropy(z, t), F.cross_entropy(z, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_obeyed(dtype):
    """Factors become the half type, as in `linear`; the loss is float32, as in `cross_entropy`."""
    x, w = torch.randn(N, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    target = torch.randint(C, (N,))
    with torch.autocast("cpu", dtype):
        loss = xent.linear_cross_entropy(x, w, target)
        dense = xent.cross_entropy((x @ w.T), target)
        assert (x @ w.T).dtype == dtype
    assert loss.dtype == dense.dtype == torch.float32
    xh, wh = x.detach().to(dtype).double().requires_grad_(), w.detach().to(dtype).double().requires_grad_()
    exact = F.cross_entropy(xh @ wh.T, target)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(loss, (x, w))
    for ours, right in zip(grads, torch.autograd.grad(exact, (xh, wh)), strict=True):
        assert ours.dtype == torch.float32
        tolerance = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), right, rtol=tolerance, atol=1e-5)
    with torch.autocast("cpu", dtype):
        double = xent.linear_cross_entropy(x.double(), w.double(), target)
    assert double.dtype == torch.float64


def test_float16_gradients_survive_a_scaled_loss():
    """What GradScaler relies on: a gradient is scaled before it is rounded to float16."""
    x = (torch.randn(4, 3) * 1e-3).half().requires_grad_()
    w = (torch.randn(5, 3) * 1e-3).half().requires_grad_()
    target = torch.tensor([0, 1, 2, 3])
    (xent.linear_cross_entropy(x, w, target, denominator=1e5) * 32768).backward()
    logits = (x.detach().double() @ w.detach().double().T).requires_grad_()
    (F.cross_entropy(logits, target, reduction="sum") / 1e5 * 32768).backward()
    right = logits.grad.T @ x.detach().double()
    torch.testing.assert_close(w.grad.double(), right, rtol=2e-3, atol=1e-7)


def test_mean_divisors():
    """Index: Σ s·w[y] over rows not ignored. Probabilities: Σ s, and rows of zero mass count."""
    z = torch.randn(3, 4, dtype=torch.float64)
    s = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    w = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    target = torch.tensor([1, 2, -100])
    rows = xent.cross_entropy(z, target, w, sample_weight=s, reduction="none")
    mean = xent.cross_entropy(z, target, w, sample_weight=s)
    torch.testing.assert_close(mean, rows.sum() / (0.5 + 4.0))
    q = torch.rand(3, 4, dtype=torch.float64)
    q[0] = 0
    rows = xent.cross_entropy(z, q, w, sample_weight=s, reduction="none")
    torch.testing.assert_close(xent.cross_entropy(z, q, w, sample_weight=s), rows.sum() / 6)
    nothing = xent.cross_entropy(z, torch.tensor([0, 0, 0]), torch.tensor([0.0, 1, 1, 1]))
    assert nothing == 0


def test_denominator_may_be_a_tensor():
    z, target = torch.randn(3, 4), torch.tensor([1, 2, 0])
    by_number = xent.cross_entropy(z, target, denominator=7)
    torch.testing.assert_close(xent.cross_entropy(z, target, denominator=torch.tensor(7)), by_number)
    torch.testing.assert_close(by_number, F.cross_entropy(z, target, reduction="sum") / 7)


Z, T = torch.zeros(3, 4), torch.tensor([0, 1, 2])
BAD = [
    (ValueError, "reduction must be", dict(reduction="average")),
    (ValueError, "label_smoothing must be between 0 and 1, got 1.5", dict(label_smoothing=1.5)),
    (ValueError, r"weight must have shape \(4,\)", dict(weight=torch.ones(3))),
    (ValueError, r"sample_weight must have the shape .* \(3,\)", dict(sample_weight=torch.ones(4))),
    (ValueError, "softcap must be positive", dict(softcap=0.0)),
    (ValueError, "temperature must be positive", dict(temperature=-1.0)),
    (ValueError, "z_loss must be finite", dict(z_loss=math.inf)),
    (ValueError, "denominator replaces the divisor", dict(denominator=2.0, reduction="sum")),
    (ValueError, "denominator replaces the divisor", dict(denominator=2.0, reduction="none")),
    (ValueError, "denominator must be positive", dict(denominator=0)),
    (ValueError, "denominator must be one number", dict(denominator=torch.ones(2))),
    (ValueError, r"target must have shape \(3,\)", dict(target=torch.tensor([0, 1]))),
    (TypeError, "must be of an integer type", dict(target=torch.tensor([0.0, 1.0, 2.0]))),
    (TypeError, "integer type, got torch.bool", dict(target=torch.tensor([True, False, True]))),
    (
        TypeError,
        "holds probabilities and must be floating",
        dict(target=torch.zeros(3, 4, dtype=torch.int64)),
    ),
    (ValueError, "no meaning for a target of probabilities", dict(target=torch.rand(3, 4), ignore_index=1)),
    (TypeError, "input must be of a floating type", dict(input=torch.zeros(3, 4, dtype=torch.int64))),
    (ValueError, "needs a class dimension", dict(input=torch.zeros(()))),
    (ValueError, "at least one class", dict(input=torch.zeros(3, 0))),
    (IndexError, "target 9 at row 1 is outside 0..3", dict(target=torch.tensor([0, 9, 2]))),
    (
        ValueError,
        r"weight takes no gradient: pass weight\.detach",
        dict(weight=torch.ones(4, requires_grad=True)),
    ),
    (TypeError, "16, 32 or 64 bits", dict(input=torch.zeros(3, 4).to(torch.float8_e5m2))),
]


@pytest.mark.parametrize(("error", "match", "changed"), BAD, ids=lambda v: v if isinstance(v, str) else None)
def test_errors_say_what_and_the_way_out(error, match, changed):
    with pytest.raises(error, match=match):
        xent.cross_entropy(**{"input": Z, "target": T} | changed)


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (ValueError, "5 features a row, linear_weight has 3", dict(input=torch.zeros(3, 5))),
        (ValueError, r"linear_bias must have shape \(4,\)", dict(linear_bias=torch.zeros(3))),
        (ValueError, r"\(C, D\)", dict(linear_weight=torch.zeros(3))),
        (TypeError, "linear_weight is torch.float64", dict(linear_weight=torch.zeros(4, 3).double())),
        (ValueError, "memory_budget must be a positive number of bytes", dict(memory_budget=0)),
        (ValueError, "holds not even one row", dict(memory_budget=3)),
        (IndexError, r"4 at position \(0, 1\)", dict(input=Z[None, :2, :3], target=T[None, [0, 1]] * 4)),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)  # fmt: skip
def test_errors_of_the_head(error, match, changed):
    with pytest.raises(error, match=match):
        xent.linear_cross_entropy(
            **{"input": torch.zeros(3, 3), "linear_weight": torch.zeros(4, 3), "target": T} | changed
        )


def test_worked_values():
    """The worked values of the mathematics page."""
    p = torch.tensor([[0.4, 0.4, 0.2]], dtype=torch.float64)
    assert xent.cross_entropy(p.log(), torch.tensor([1])).item() == pytest.approx(
        0.916290731874155, rel=1e-14
    )
    p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log().requires_grad_()
    xent.cross_entropy(p, torch.tensor([0])).backward()
    assert p.grad.norm().item() == pytest.approx(0.37416574, rel=1e-7)


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "softcap", "temperature"])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_an_option_without_gradient_says_so(name, value):
    """A learnt temperature would otherwise have no gradient, silently."""
    option = {name: torch.tensor(value, requires_grad=True)}
    with pytest.raises(ValueError, match=f"{name} takes no gradient"):
        xent.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), **option)


def test_tensors_without_data_among_others_are_an_error():
    x, w, target = torch.zeros(4, 3), torch.zeros(5, 3), torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match="one device"):
        xent.linear_cross_entropy(x, w.to("meta"), target)
    with pytest.raises(ValueError, match="one device"):
        xent.cross_entropy(x @ w.T, target.to("meta"))


def test_a_sparse_target_of_no_classes_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        xent.TopKTarget(torch.zeros(4, 0, dtype=torch.int64), torch.zeros(4, 0))


@pytest.mark.parametrize("target", [[0, 1], 3, "cat"], ids=str)
@pytest.mark.parametrize("call", [xent.cross_entropy, xent.row_statistics])
def test_a_target_that_is_no_tensor_is_named(call, target):
    with pytest.raises(TypeError, match="target must be a tensor or a TopKTarget"):
        call(torch.zeros(2, 3), target)


@pytest.mark.parametrize("remainder", ["drop", "spread"])
@pytest.mark.parametrize("head", [False, True], ids=["dense", "linear"])
@pytest.mark.parametrize("stored", [4, 6], ids=["all with weight", "all"])
def test_a_sparse_target_leaves_no_mass_of_rounding_at_masked_classes(remainder, head, stored):
    """Of classes without weight, or of none at all: what rounding left of their mass once cost ±inf."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(200, C, generator=generator, dtype=torch.float64)
    z[:, stored:] = -math.inf
    weight = torch.rand(C, generator=generator, dtype=torch.float64)
    weight[stored:] = 0.0
    indices = torch.rand(200, stored, generator=generator).argsort(1)
    q = torch.rand(200, stored, generator=generator, dtype=torch.float64)
    target = xent.TopKTarget(indices, q, remainder)
    options = dict(weight=weight, label_smoothing=0.2, reduction="none")
    bias = torch.zeros(C, dtype=torch.float64)
    bias[stored:] = -math.inf
    given = torch.where(z == -math.inf, 0.0, z).requires_grad_()
    if head:
        eye = torch.eye(C, dtype=torch.float64)
        loss = xent.linear_cross_entropy(given, eye, target, linear_bias=bias, **options)
    else:
        loss = xent.cross_entropy(given + bias, target, **options)
    assert_close(loss, reference.cross_entropy(z, target.to_dense(C), **options))
    (gradient,) = torch.autograd.grad(loss.sum(), given)
    assert gradient.isfinite().all()


X, Y = torch.ones(2, 3), torch.tensor([0, 1])
NO_TENSORS = {
    "input": [
        lambda: xent.cross_entropy([[1.0, 2.0]], Y),
        lambda: xent.linear_cross_entropy([[1.0, 2.0]], X, Y),
        lambda: xent.row_statistics(X.numpy()),
        lambda: xent.binary_cross_entropy([0.5], torch.ones(1)),
        lambda: xent.kl_div([0.5], torch.ones(1)),
        lambda: xent.kl_divergence(target=X, input=[1.0]),
    ],
    "logits": [lambda: xent.fit_temperature({0: 1.0}, Y)],
    "linear_weight": [lambda: xent.linear_cross_entropy(X, torch.nn.Linear(3, 4), Y)],
    "target": [
        lambda: xent.cross_entropy(X, [0, 1]),
        lambda: xent.binary_cross_entropy_with_logits(X, [0, 1]),
        lambda: xent.kl_divergence(target=[1.0], input=X),
    ],
    "pos_weight": [lambda: xent.binary_cross_entropy_with_logits(X, X, pos_weight=2.0)],
    "weight": [lambda: xent.cross_entropy(X, Y, [1.0, 1.0, 1.0])],
    "the student's weight": [
        lambda: xent.linear_kl_divergence(student=(X, torch.nn.Linear(3, 4)), teacher=(X, X))
    ],
}


@pytest.mark.parametrize(("name", "call"), [(n, c) for n, calls in NO_TENSORS.items() for c in calls])
def test_what_is_no_tensor_is_named(name, call):
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        call()


def test_the_reference_where_classes_are_masked():
    """−log p is +inf of each masked class, however many; nan where there is no class at all."""
    z = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0], [-math.inf] * 4], requires_grad=True)
    cost = reference.surprise(z)
    log2 = math.log(2.0)
    assert_close = torch.testing.assert_close
    assert_close(cost[0], torch.tensor([math.inf, log2, math.inf, log2], dtype=torch.float64))
    assert cost[1].isnan().all()
    (gradient,) = torch.autograd.grad(cost[0, 1], z)
    assert_close(gradient[0], torch.tensor([0.0, -0.5, 0.0, 0.5]))
