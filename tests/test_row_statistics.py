"""The statistics of each row, against float64 autograd of the unfused form, for every row of the table."""

import math

import mpmath
import pytest
import torch
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.testing import assert_close

import xent
from table import ROWS, TOLERANCE, problem, spelt_out
from xent._autograd import custom_ops
from xent._autograd.forms import OneHead
from xent._core import reference
from xent._core.logits import LinearHead
from xent._core.problem import Problem
from xent._core.selection import Selection
from xent._core.targets import no_targets

# what row_statistics has no option for, or says before it (a z-loss is no row's own)
OPTIONS = ("label_smoothing", "softcap", "temperature", "weight")
MOVED = ("z_loss", "margin")
TABLE = [row for row in ROWS if row.name.endswith("everything") or not any(o in row.options for o in MOVED)]
CASES = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
SCORES = pytest.mark.parametrize("scores", ["dense", "linear", "tiled"])
FIELDS = ("loss", "log_prob", "logsumexp", "entropy")


def expected(z, target, **options):
    """The differentiable fields by plain operations, (4, N) float64, and the argmax."""
    classes = z.shape[1]
    full = reference.transform(
        z.double(), softcap=options.get("softcap"), temperature=options.get("temperature", 1.0)
    )
    log_p = -reference.surprise(full)
    loss = reference.cross_entropy(z, spelt_out(target, classes), reduction="none", **options)
    is_index = isinstance(target, torch.Tensor) and not target.is_floating_point()
    kept = target != -100 if is_index else torch.ones(len(z), dtype=torch.bool)
    own = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0] if is_index else torch.zeros_like(loss)
    entropy = -(log_p.exp() * log_p).sum(1)
    fields = (loss, own, full.logsumexp(1), entropy)
    return torch.stack([torch.where(kept, f, 0.0) for f in fields]), torch.where(kept, z.argmax(1), -1)


def pair(row, scores, dtype=torch.float64):
    p = problem(row, dtype, n=5, d=3, c=6)
    options = {k: v for k, v in p.options.items() if k in OPTIONS}
    budget = 40 * 6 * dtype.itemsize if scores == "tiled" else None

    def stacked(found):
        zero = torch.zeros_like(found.logsumexp)
        return torch.stack([zero if getattr(found, f) is None else getattr(found, f) for f in FIELDS])

    if scores == "dense":

        def ours(z):
            return stacked(xent.row_statistics(z, p.target, **options))

        return ours, lambda z: expected(z, p.target, **options)[0], (p.logits,), p, options

    def linear(x, w, b):
        return stacked(
            xent.linear_row_statistics(x, w, p.target, linear_bias=b, memory_budget=budget, **options)
        )

    def plain(x, w, b):
        return expected(x @ w.T + b, p.target, **options)[0]

    return linear, plain, (p.x, p.w, p.b), p, options


@CASES
@SCORES
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_values(row, scores, dtype):
    ours, theirs, arguments, p, options = pair(row, scores, dtype)
    assert_close(
        ours(*arguments).double(),
        theirs(*(t.double() for t in arguments)),
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
    )
    found = xent.row_statistics(p.logits, p.target, **options)
    assert torch.equal(found.argmax, expected(p.logits, p.target, **options)[1])
    if row.target == "index":
        assert torch.equal(found.correct, p.logits.argmax(1) == p.target)
    else:
        assert found.correct is None
        assert found.log_prob is None


@CASES
@SCORES
def test_derivatives(row, scores):
    """Reverse, reverse over reverse, forward, forward over reverse: of all fields at once."""
    ours, theirs, arguments, *_ = pair(row, scores)
    upstream = torch.randn(4, 5, dtype=torch.float64)
    tangents = tuple(torch.randn_like(t) for t in arguments)
    every = tuple(range(len(arguments)))
    near = dict(rtol=1e-9, atol=1e-10)

    def scalar(f):
        return lambda *arguments: (f(*arguments) * upstream).sum()

    leaves = [t.detach().clone().requires_grad_() for t in arguments]
    found = []
    for f in (ours, theirs):
        first = torch.autograd.grad(scalar(f)(*leaves), leaves, create_graph=True)
        found.append((first, torch.autograd.grad(first, leaves, tangents)))
    assert_close(*found, **near)
    assert_close(
        *(jvp(f, arguments, tangents)[1] for f in (ours, theirs)), **near
    )  # fields with a tangent each
    assert_close(*(jvp(grad(scalar(f), every), arguments, tangents)[1] for f in (ours, theirs)), **near)
    stacks = tuple(torch.stack([t, -t]) for t in arguments)
    assert_close(*(vmap(grad(scalar(f), every))(*stacks) for f in (ours, theirs)), **near)


def test_hessian_and_jacobian_of_entropy():
    z = torch.randn(3, 4, dtype=torch.float64)

    def plain(z):
        return torch.special.entr(z.softmax(1)).sum(1)

    assert_close(jacfwd(xent.entropy)(z), jacfwd(plain)(z))
    assert_close(*(hessian(lambda z, f=f: f(z).sum())(z) for f in (xent.entropy, plain)))
    leaf = z.clone().requires_grad_()
    assert torch.autograd.gradcheck(xent.entropy, leaf)
    assert torch.autograd.gradgradcheck(xent.entropy, leaf)


def exact_entropy(z):
    with mpmath.workdps(400):
        weights = [mpmath.exp(mpmath.mpf(v)) for v in z]
        total = mpmath.fsum(weights)
        return -mpmath.fsum(w / total * mpmath.log(w / total) for w in weights)


@pytest.mark.parametrize(
    "z", [[0.0, -40.0], [-40.0, 0.0, -41.0], [1e8, 1e8], [0.0, -600.0], [3.0, 1.0, 0.2, -5.0], [1e-9, 0.0]]
)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("target", [None, 0, 1])
def test_entropy_keeps_its_digits(z, dtype, target):
    """Also of a row that is sure, rightly or wrongly, and through tiles of one class."""
    z = torch.tensor([z], dtype=dtype)
    exact = exact_entropy(z[0].tolist())
    y = None if target is None else torch.tensor([target])
    eye = torch.eye(z.shape[1], dtype=dtype)
    small = 3 * z.shape[1] * dtype.itemsize + 24
    for found in (
        xent.row_statistics(z, y).entropy,
        xent.linear_row_statistics(z, eye, y).entropy,
        xent.linear_row_statistics(z, eye, y, memory_budget=small).entropy,
    ):
        limits = torch.finfo(dtype)
        assert abs(found.item() - exact) <= 16 * limits.eps * exact + limits.tiny


def test_confident_row_without_a_target():
    z = torch.tensor([[0.0, -40.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    rows = xent.row_statistics(z)
    assert rows.loss is None
    assert rows.log_prob is None
    assert rows.correct is None
    (g,) = torch.autograd.grad(rows.entropy, z)
    assert g[0, 0].item() == pytest.approx(-40 * math.exp(-40), rel=1e-12)
    assert g[0, 1].item() == pytest.approx(40 * math.exp(-40), rel=1e-12)
    assert g[0, 2].item() == 0


def test_argmax_is_the_lowest_of_equal_classes_that_a_sparse_target_names():
    target = xent.TopKTarget(torch.tensor([[2, 1]]), torch.tensor([[0.5, 0.5]]))
    assert xent.row_statistics(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), target).argmax.tolist() == [1]


def test_argmax_is_the_lowest_class_of_equal_ones():
    z = torch.zeros(2, 50)
    z[1, [7, 31]] = 1.0
    eye = torch.eye(50)
    for target in (None, torch.tensor([31, 31]), torch.tensor([0, 7])):
        for budget in (None, 2000):
            rows = xent.linear_row_statistics(z, eye, target, memory_budget=budget)
            assert rows.argmax.tolist() == [0, 7]


def test_positions_and_batches():
    x, w = torch.randn(2, 3, 4), torch.randn(6, 5, 4)
    target = torch.randint(6, (2, 3, 5))
    rows = xent.linear_row_statistics(x, w, target)
    logits = torch.einsum("abd,cpd->abpc", x, w)
    assert rows.entropy.shape == (2, 3, 5)
    assert_close(rows.logsumexp, logits.logsumexp(-1))
    assert torch.equal(rows.correct, logits.argmax(-1) == target)
    assert xent.entropy(torch.randn(2, 6, 5)).shape == (2, 5)
    assert xent.row_statistics(torch.randn(6)).argmax.shape == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_give_full_statistics(dtype):
    z = torch.randn(4, 9).to(dtype)
    rows = xent.row_statistics(z, torch.tensor([0, 1, 2, 3]))
    assert rows.log_prob.dtype == torch.float32
    assert_close(rows.log_prob, z.float().log_softmax(1).gather(1, torch.arange(4)[:, None])[:, 0])


def test_compiled():
    x, w = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    target = torch.tensor([0, 6, -100, 2, 3])

    def f(x, w):
        rows = xent.linear_row_statistics(x, w, target)
        return (rows.log_prob - 0.1 * rows.entropy).sum(), rows.argmax

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    (a, k), (b, expected_k) = compiled(x, w), f(x, w)
    assert_close(a, b)
    assert torch.equal(k, expected_k)
    assert_close(torch.autograd.grad(a, (x, w)), torch.autograd.grad(b, (x, w)))


@pytest.mark.parametrize("budget", [None, 700])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_top_k(budget, k):
    x, w, b = torch.randn(6, 3, dtype=torch.float64), torch.randn(40, 3), torch.randn(40)
    w, b = w.double(), b.double()
    p, indices = xent.linear_top_k(x, w, k, linear_bias=b, temperature=1.5, memory_budget=budget)
    expected_p, expected_indices = ((x @ w.T + b) / 1.5).softmax(1).topk(k)
    assert_close(p, expected_p)
    assert torch.equal(indices, expected_indices)
    for found, right in zip(xent.top_k((x @ w.T + b), k, temperature=1.5), (p, indices), strict=True):
        assert_close(found, right)
    assert not p.requires_grad


def test_a_target_of_top_k_keeps_their_order_and_moves():
    probabilities, indices = xent.top_k(torch.randn(4, 9), 3)
    target = xent.TopKTarget.from_top_k(probabilities, indices, remainder="spread")
    assert target.probabilities is probabilities
    assert target.indices is indices
    moved = target.to("meta")
    assert (moved.indices.device.type, moved.probabilities.device.type) == ("meta", "meta")
    assert moved.remainder == "spread"
    with pytest.raises(TypeError, match="indices must be of an integer type"):
        xent.TopKTarget.from_top_k(indices, probabilities)


def test_top_k_is_what_a_sparse_target_takes():
    x, w = torch.randn(6, 3), torch.randn(40, 3)
    p, indices = xent.linear_top_k(x, w, 5)
    teacher = xent.TopKTarget(indices, p, remainder="spread")
    assert_close(teacher.to_dense(40).sum(1), torch.ones(6))
    assert xent.linear_cross_entropy(x, w, teacher) > 0


@pytest.mark.parametrize("k", [0, 6])
def test_top_k_refuses(k):
    with pytest.raises(ValueError, match=f"between 1 and the number of classes, 5; got {k}"):
        xent.top_k(torch.zeros(2, 5), k)


def test_a_bad_target_is_named():
    with pytest.raises(IndexError, match="target 5 at row 1"):
        xent.row_statistics(torch.zeros(2, 5), torch.tensor([0, 5]))


@pytest.mark.parametrize(
    ("indices", "error", "match"),
    [
        ([[0, 1], [2, 5]], IndexError, r"indices\[1, 1\] is 5, outside 0..4"),
        ([[0, 1], [3, 3]], ValueError, r"indices\[1\] names class 3 twice"),
        ([[0, 1]], ValueError, "must have shape"),
    ],
)
def test_a_bad_top_k_target_is_named(indices, error, match):
    indices = torch.tensor(indices)
    target = xent.TopKTarget(indices, torch.full(indices.shape, 0.5))
    with pytest.raises(error, match=match):
        xent.cross_entropy(torch.zeros(2, 5), target)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2)), ValueError),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), TypeError),
        ((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)), TypeError),
        ((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), "keep"), ValueError),
        ((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, requires_grad=True)), ValueError),
    ],
)
def test_a_top_k_target_that_is_none(arguments, error):
    with pytest.raises(error):
        xent.TopKTarget(*arguments)


@pytest.mark.parametrize("z", [[math.inf, 0.0, 0.0], [0.0, math.inf, 0.0], [math.inf, math.inf, 0.0]])
def test_a_logit_at_plus_infinity_has_no_loss_on_any_path(z):
    """inf − inf is no number: a model that has diverged is not to be told that it costs nothing."""
    z, target = torch.tensor([z, [1.0, 2.0, 3.0]]), torch.tensor([0, 0])
    one_hot = torch.nn.functional.one_hot(target, 3).float()
    rows = xent.row_statistics(z, target)
    found = (
        rows.loss,
        rows.entropy,
        xent.cross_entropy(z, target, reduction="none"),
        xent.cross_entropy(z, one_hot, reduction="none"),
        xent.cross_entropy(z, target, label_smoothing=0.1, reduction="none"),
        xent.surrogate_cross_entropy(z, target, reduction="none"),
    )
    for each in found:
        assert each.isnan().tolist() == [True, False]


def largest(z, k):
    p, indices = z.softmax(-1).topk(k)
    return p, indices


@pytest.mark.parametrize("budget", [None, 700])
def test_top_k_under_vmap(budget):
    x, w = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    found = vmap(lambda x: xent.linear_top_k(x, w, 5, memory_budget=budget))(x)
    assert_close(found, largest(x @ w.T, 5))
    assert_close(vmap(lambda z: xent.top_k(z, 5))(x @ w.T), largest(x @ w.T, 5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_top_k_in_a_graph_and_without_data(dynamic):
    x, w = torch.randn(6, 3, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    f = torch.compile(xent.linear_top_k, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert_close(f(x, w, 5), largest((x @ w.T).detach(), 5))
    g = torch.compile(xent.top_k, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert_close(g(x, 2), largest(x, 2))
    p, indices = xent.linear_top_k(x.to("meta"), w.to("meta"), 5)
    assert (p.shape, p.dtype, indices.shape, indices.dtype) == ((6, 5), torch.float64, (6, 5), torch.int64)
    form, tensors = Problem(LinearHead(x, w.detach(), None), no_targets(40, Selection(6))).flatten()
    given, present, *settings = custom_ops.arguments(OneHead(form), tensors)
    torch.library.opcheck(torch.ops.xent.top_k, (given, present, 5, *settings))


@pytest.mark.parametrize("linear", [False, True])
def test_a_derivative_that_top_k_has_not_is_no_silent_zero(linear):
    x, w = torch.randn(6, 3), torch.randn(40, 3)

    def f(x):
        return (xent.linear_top_k(x, w, 2) if linear else xent.top_k(x, 2))[0]

    def total(x):
        return f(x).sum()

    for derive in (
        lambda: grad(total)(x),
        lambda: hessian(total)(x),
        lambda: jvp(f, (x,), (x,)),
        lambda: jacfwd(total)(x),
        lambda: vmap(grad(total))(x[None]),
        lambda: grad(lambda x: vmap(total)(x[None]).sum())(x),
    ):
        with pytest.raises(NotImplementedError, match="top_k has no derivative"):
            derive()
    assert_close(grad(lambda x: (x * total(x.detach())).sum())(x), torch.full_like(x, total(x)))
    assert_close(grad(lambda y: (y * total(x)).sum())(x), torch.full_like(x, total(x)))
