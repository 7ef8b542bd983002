"""Every way of differentiating, against float64 autograd of the unfused form, for every row of the table.

The cells of the table in docs/explanation/differentiation.md: each test here is one.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

import xent
from table import BUCKETS, ROWS, Problem, plain_cross_entropy, problem
from xent._autograd import custom_ops
from xent._autograd.forms import OneHead
from xent._core import problem as core
from xent._core import reference
from xent._core.logit_map import LogitMap
from xent._core.logits import DenseLogits, LinearHead
from xent._core.selection import Selection
from xent._core.statistics import RequestedOutputs
from xent._core.targets import Targets, probability_targets

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

REDUCTIONS = ["mean", "sum", "none"]
EVERY = ROWS + BUCKETS
CASES = pytest.mark.parametrize("row", EVERY, ids=lambda row: row.name)
SCORES = pytest.mark.parametrize("scores", ["dense", "linear"])


def pair(row, scores, reduction, **options):
    """(ours, the unfused reference, arguments): scalar functions of logits, or of features, weight, bias."""
    p = problem(row, n=4, d=3, c=4)
    upstream = torch.linspace(0.5, 1.5, len(p.x), dtype=torch.float64)
    options = {**p.options, "reduction": reduction, **options}
    budget = options.pop("memory_budget", None)

    def scalar(loss):
        return (loss * upstream).sum() if loss.dim() else loss

    if scores == "dense":
        arguments = (p.logits,)

        def ours(z, target=p.target):
            return scalar(xent.cross_entropy(z, target, **options))

        def theirs(z, target=p.target):
            return scalar(plain_cross_entropy(z, target, **options))

    else:
        arguments = (p.x, p.w, p.b)

        def ours(x, w, b, target=p.target):
            loss = xent.linear_cross_entropy(x, w, target, linear_bias=b, memory_budget=budget, **options)
            return scalar(loss)

        def theirs(x, w, b, target=p.target):
            return scalar(plain_cross_entropy(x @ w.T + b, target, **options))

    return ours, theirs, arguments, p


def each(row, scores):
    for reduction in REDUCTIONS:
        yield pair(row, scores, reduction)


def near(a, b):
    assert_close(a, b, rtol=1e-9, atol=1e-10)


@CASES
@SCORES
def test_func_grad(row, scores):
    for ours, theirs, arguments, _ in each(row, scores):
        every = tuple(range(len(arguments)))
        near(grad(ours, every)(*arguments), grad(theirs, every)(*arguments))


@CASES
@SCORES
def test_forward_mode(row, scores):
    """torch.func.jvp and jacfwd, and dual numbers outside torch.func."""
    for ours, theirs, arguments, _ in each(row, scores):
        every = tuple(range(len(arguments)))
        tangents = tuple(torch.randn_like(a) for a in arguments)
        expected = jvp(theirs, arguments, tangents)
        near(jvp(ours, arguments, tangents), expected)
        near(jacfwd(ours, every)(*arguments), jacfwd(theirs, every)(*arguments))
        with torch.autograd.forward_ad.dual_level():
            duals = [
                torch.autograd.forward_ad.make_dual(a, t) for a, t in zip(arguments, tangents, strict=True)
            ]
            near(torch.autograd.forward_ad.unpack_dual(ours(*duals)).tangent, expected[1])


@CASES
@SCORES
def test_hessian_not_zero(row, scores):
    """Forward over reverse, reverse over reverse, reverse over forward: with mixed blocks, and none is 0."""
    for ours, theirs, arguments, _ in each(row, scores):
        every = tuple(range(len(arguments)))
        expected = hessian(theirs, every)(*arguments)
        near(hessian(ours, every)(*arguments), expected)
        near(jacrev(jacrev(ours, every), every)(*arguments), expected)
        tangents = tuple(torch.randn_like(a) for a in arguments)

        def directional(f, *a, tangents=tangents):
            return jvp(f, a, tangents)[1]

        near(
            grad(lambda *a, f=ours: directional(f, *a), every)(*arguments),
            grad(lambda *a, f=theirs: directional(f, *a), every)(*arguments),
        )
        assert expected[0][0].abs().max() > 1e-6


def test_autograd_functional_hessian():
    ours, theirs, (z,), _ = pair(ROWS[0], "dense", "mean")
    near(torch.autograd.functional.hessian(ours, z), torch.autograd.functional.hessian(theirs, z))


@CASES
@SCORES
@pytest.mark.parametrize("budget", [None, 900])
def test_double_backward(row, scores, budget):
    """create_graph, in all inputs at once and mixed, whole and in tiles."""
    for reduction in REDUCTIONS:
        options = {} if scores == "dense" else {"memory_budget": budget}
        ours, theirs, arguments, _ = pair(row, scores, reduction, **options)
        leaves = [a.clone().requires_grad_() for a in arguments]
        tangents = [torch.randn_like(a) for a in arguments]
        found = []
        for f in (ours, theirs):
            gradients = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
            penalty = sum((g * t).sum() + g.square().sum() for g, t in zip(gradients, tangents, strict=True))
            found.append((gradients, torch.autograd.grad(penalty, leaves)))
        near(*found)


@pytest.mark.parametrize("scores", ["dense", "linear"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_probability_target_is_differentiated_twice(scores, reduction):
    for row in [r for r in ROWS if r.target == "probabilities"]:
        ours, theirs, arguments, p = pair(row, scores, reduction)

        def of_target(f, arguments=arguments):
            return lambda q, *rest: f(*rest, target=q)

        every = tuple(range(1 + len(arguments)))
        near(
            hessian(of_target(ours), every)(p.target, *arguments),
            hessian(of_target(theirs), every)(p.target, *arguments),
        )


@CASES
@SCORES
def test_vmap_over_each_argument(row, scores):
    for ours, theirs, arguments, _ in each(row, scores):
        for i, argument in enumerate(arguments):
            stack = torch.stack([argument, argument / 2, -argument])
            dims = tuple(0 if j == i else None for j in range(len(arguments)))
            several = [*arguments]
            several[i] = stack
            expected = [theirs(*arguments[:i], s, *arguments[i + 1 :]) for s in stack]
            near(vmap(ours, dims)(*several), torch.stack(expected))


@CASES
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_per_sample_gradients(row, reduction):
    """vmap(grad): each row of the batch, target and sample weight with it, ignored rows zero."""
    p = problem(row, n=4, d=3, c=4)
    s = p.options.pop("sample_weight", torch.ones(len(p.x), dtype=torch.float64))
    options = {**p.options, "reduction": reduction}

    whole = p.target
    sparse = isinstance(whole, xent.TopKTarget)
    parts = whole.tensors if sparse else (whole,)

    def target(parts):
        if not sparse:
            return parts[0][None]
        indices, q, *rest = (t[None] for t in parts)
        return xent.TopKTarget(indices, q, whole.remainder, *rest)

    def ours(w, x, parts, s):
        return xent.linear_cross_entropy(x[None], w, target(parts), sample_weight=s[None], **options)

    def theirs(w, x, parts, s):
        return plain_cross_entropy(x[None] @ w.T, target(parts), sample_weight=s[None], **options)

    per_sample = vmap(grad(ours), (None, 0, 0, 0))(p.w, p.x, parts, s)
    expected = [grad(theirs)(p.w, x, each, w) for x, *each, w in zip(p.x, *parts, s, strict=True)]
    expected = torch.stack(expected)
    near(per_sample, expected)


def test_vmap_over_targets_and_weights():
    p = problem(ROWS[0], n=4, d=3, c=4)
    targets = torch.tensor([[0, 1, 2, 3], [3, -100, 0, 9], [-100] * 4])
    weights = torch.rand(3, 4, dtype=torch.float64)
    losses = vmap(lambda t, w: xent.cross_entropy(p.logits, t, w))(targets, weights)
    near(losses[0], xent.cross_entropy(p.logits, targets[0], weights[0]))
    assert losses[1].isnan(), "a target outside the classes costs nan where it cannot raise"
    assert losses[2] == 0


def test_vmap_leaves_nan_features_of_ignored_rows_out():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    x[:, 1] = torch.nan
    w = torch.randn(5, 4, dtype=torch.float64)
    target = torch.tensor([[0, -100, 4], [1, -100, 2]])
    gradients = vmap(grad(lambda w, x, t: xent.linear_cross_entropy(x, w, t)), (None, 0, 0))(w, x, target)
    assert gradients.isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}])
def test_gradcheck_and_gradgradcheck(reduction, options):
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (5, 3), (5,)))
    target = torch.tensor([0, 3, -100, 4])

    def loss(x, w, b):
        return xent.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, **options)

    assert torch.autograd.gradcheck(loss, (x, w, b), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, (x, w, b), check_fwd_over_rev=True, check_rev_over_rev=True)
    z, q = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def dense(z, q):
        return xent.cross_entropy(z, q, reduction=reduction, **options)

    assert torch.autograd.gradcheck(dense, (z, q), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(dense, (z, q), check_fwd_over_rev=True)


def test_a_third_derivative_raises():
    x = torch.randn(3, 4, dtype=torch.float64)
    target = torch.tensor([0, 1, 2])

    def loss(x):
        return xent.cross_entropy(x, target)

    with pytest.raises((NotImplementedError, RuntimeError), match="third"):
        jacrev(hessian(loss))(x)
    with pytest.raises((NotImplementedError, RuntimeError), match="reverse mode inside"):
        jacfwd(jacfwd(loss))(x)


@CASES
@pytest.mark.parametrize("scores", ["in turn", pytest.param("all", marks=pytest.mark.slow)])
def test_compiled_in_one_graph(row, scores):
    """torch.compile(fullgraph=True): the eager loss and gradients.

    The reduction is ordinary operations behind one operator, so that one is enough for each loss, and every
    other loss takes that of rows. Losses from logits and from features take turns; the slow test has both.
    """
    number = EVERY.index(row)
    for each_scores in ("linear", "dense") if scores == "all" else (("linear", "dense")[number // 2 % 2],):
        compiled_in_one_graph(row, each_scores, of_rows=number % 2 == 1)


def compiled_in_one_graph(row, scores, of_rows):
    torch._dynamo.reset()
    ours, _, arguments, _ = pair(row, scores, "none" if of_rows else "mean")
    leaves = [a.clone().requires_grad_() for a in arguments]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    eager, in_graph = ((f(*leaves), torch.autograd.grad(f(*leaves), leaves)) for f in (ours, compiled))
    near(in_graph, eager)


def test_compiling_does_not_recompile_per_batch_size():
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    w = torch.randn(6, 5, requires_grad=True)
    compiled = torch.compile(lambda x, t: xent.linear_cross_entropy(x, w, t), fullgraph=True, backend=counter)
    for n in (8, 9, 10, 20, 33):
        x, target = torch.randn(n, 5, requires_grad=True), torch.randint(6, (n,))
        loss = compiled(x, target)
        loss.backward()
        assert_close(loss, xent.linear_cross_entropy(x, w, target))
    assert counter.frame_count <= 2  # one static shape, then one dynamic


def test_options_may_be_symbols_of_a_graph():
    """With dynamic=True a number among the arguments is a symbol, of which not all can be asked."""

    def loss(x, w, target, number):
        return xent.linear_cross_entropy(
            x, w, target, temperature=number, softcap=3 * number, z_loss=number / 8
        )

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    given = torch.randn(7, 5, requires_grad=True), torch.randn(6, 5), torch.randint(6, (7,))
    for number in (2.0, 3.0):
        assert_close(compiled(*given, number), loss(*given, number))


def test_compiled_with_dynamic_shapes():
    torch._dynamo.reset()
    x, w, target = torch.randn(8, 5), torch.randn(6, 5), torch.randint(6, (8,))

    def loss(x, w, temperature, softcap, z_loss):
        options = {"temperature": temperature, "softcap": softcap, "z_loss": z_loss}
        return xent.linear_cross_entropy(x, w, target[: len(x)], **options) + xent.cross_entropy(
            x, target[: len(x)] % 5
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, *options in ((8, 0.5, 20.0, 0.1), (3, 0.7, 30.0, 0.2)):
        assert_close(compiled(x[:n], w, *options), loss(x[:n], w, *options))


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_derivative_that_a_graph_has_not_is_no_silent_zero():
    x, w, v = (torch.randn(s, dtype=torch.float64) for s in ((8, 5), (6, 5), (6, 5)))
    target = torch.randint(6, (8,))

    def loss(w):
        return xent.linear_cross_entropy(x, w, target)

    ways = (lambda w: jvp(loss, (w,), (v,))[1], jacfwd(loss), grad(loss), hessian(loss))
    for way in ways:
        torch._dynamo.reset()
        with pytest.raises(Exception, match="NotImplementedError"):
            torch.compile(way, fullgraph=True, backend="aot_eager")(w)
    for way in (ways[0], ways[-1]):
        torch._dynamo.reset()
        near((torch.compile(way, backend="aot_eager")(w),), (way(w),))  # in eager code instead
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    near((compiled(w),), (loss(w),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        compiled(torch.autograd.forward_ad.make_dual(w, v))


def test_a_bad_target_raises_in_a_graph():
    torch._dynamo.reset()
    z = torch.randn(3, 4)
    compiled = torch.compile(xent.cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=r"target 7 at row 1 is outside 0\.\.3"):
        compiled(z, torch.tensor([0, 7, 1]))


def test_inductor():
    import shutil

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("Inductor needs a C++ compiler, and there is none here")
    torch._dynamo.reset()
    head = xent.nn.LinearCrossEntropyLoss(5, 6, bias=True, label_smoothing=0.1)
    x, target = torch.randn(7, 5, requires_grad=True), torch.randint(6, (7,))
    eager = torch.autograd.grad(head(x, target), (x, head.linear.weight))
    compiled = torch.compile(head, fullgraph=True)
    assert_close(torch.autograd.grad(compiled(x, target), (x, head.linear.weight)), eager)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic):
    head = xent.nn.LinearCrossEntropyLoss(5, 6, bias=True)
    x, target = torch.randn(7, 5), torch.randint(6, (7,))
    rows = torch.export.Dim("rows", min=2)
    shapes = ({0: rows}, {0: rows}) if dynamic else None
    exported = torch.export.export(head, (x, target), dynamic_shapes=shapes).module()
    assert_close(exported(x, target), head(x, target))
    if dynamic:
        assert_close(exported(x[:3], target[:3]), head(x[:3], target[:3]))


def test_opcheck():
    """torch's own checks of the two operators: schema, fake tensors, autograd registration, AOT."""
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (5, 3), (5,)))
    mass, rest = torch.ones(4, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    rows = Selection(4, mask=torch.tensor([True, True, True, False]))
    log_q = -torch.rand(5, dtype=torch.float64)
    head = LinearHead(x, w, b, LogitMap(softcap=3.0, log_q=log_q))
    targets = Targets(5, rows, torch.tensor([[0], [3], [4], [0]]), mass, rest)
    every = RequestedOutputs(entropy=True, argmax=True, log_prob=True)
    q = torch.rand(4, 5, dtype=torch.float64, requires_grad=True)
    problem = core.Problem(head, targets, requested=every)
    for some in (
        problem,
        core.Problem(LinearHead(x, w, None), probability_targets(q)),
        core.Problem(DenseLogits(q), targets),
    ):
        form, tensors = some.flatten()
        given, present, *settings = custom_ops.arguments(OneHead(form), tensors)
        torch.library.opcheck(torch.ops.xent.rows.default, (given, present, True, *settings))
        given = [t.detach() for t in given]
        of_rows, statistics, _ = torch.ops.xent.rows(given, present, True, *settings)
        wants = [t is not None and t.requires_grad for t in tensors[: form.n_leaves]]
        arguments = (of_rows, statistics, wants, given, present, *settings)
        torch.library.opcheck(torch.ops.xent.rows_gradient.default, arguments)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_meta_and_fake_tensors(reduction):
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, w, target = torch.randn(7, 5), torch.randn(6, 5), torch.randint(6, (7,))
    mode = FakeTensorMode()
    for place, within in ((lambda t: t.to("meta"), contextlib.nullcontext()), (mode.from_tensor, mode)):
        with within:
            a, b, t = place(x).requires_grad_(), place(w).requires_grad_(), place(target)
            loss = xent.linear_cross_entropy(a, b, t, reduction=reduction)
            assert loss.shape == ((7,) if reduction == "none" else ())
            assert loss.dtype == torch.float32
            gradients = torch.autograd.grad(loss.sum(), (a, b))
            assert [g.shape for g in gradients] == [x.shape, w.shape]
            assert xent.cross_entropy(place(x), t, reduction=reduction).shape == loss.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grad_scaler_and_autocast_train(dtype):
    """A few steps under autocast, with GradScaler for float16, in step with the unfused pair."""
    torch.manual_seed(0)
    x, target = torch.randn(32, 6), torch.randint(8, (32,))
    losses = {}
    start = torch.nn.Linear(6, 8, bias=False)
    for name in ("pair", "head"):
        layer = copy.deepcopy(start)
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        for _ in range(8):
            optimiser.zero_grad()
            with torch.autocast("cpu", dtype):
                if name == "pair":
                    loss = torch.nn.functional.cross_entropy(layer(x), target)
                else:
                    loss = xent.linear_cross_entropy(x, layer.weight, target)
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
        losses[name] = loss.item()
    assert losses["head"] == pytest.approx(losses["pair"], rel=0.02)
    assert losses["head"] < 1.9


def test_no_grad_keeps_nothing():
    x, w, target = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 4, 0])
    with torch.no_grad():
        assert not xent.linear_cross_entropy(x, w, target).requires_grad
    assert xent.linear_cross_entropy(x, w, target).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_weight_changed_before_backward_is_noticed(reduction):
    """Saved tensors are checked, early gradient or not."""
    x, w, target = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 4, 0])
    value = xent.linear_cross_entropy(x, w, target, reduction=reduction).sum()
    w += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_tied_weights(reduction):
    """The same tensor as features and classifier: both gradients add up, twice differentiated too."""
    w = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    target = torch.arange(5)

    def ours(w):
        return xent.linear_cross_entropy(w, w, target, reduction=reduction).sum()

    def theirs(w):
        return torch.nn.functional.cross_entropy(w @ w.T, target, reduction="sum")

    near(torch.autograd.grad(ours(w), w), torch.autograd.grad(theirs(w), w))
    near(hessian(ours)(w.detach()), hessian(theirs)(w.detach()))


@pytest.mark.parametrize("options", [{}, {"check_targets": True}, {"z_loss": 0.1}], ids=str)
@pytest.mark.parametrize("features", [lambda w: w, lambda w: w[:4], lambda w: torch.tanh(w[:4])])
def test_tied_weights_in_every_backward(features, options):
    """Whatever reaches the classifier through the features is added once, in a graph of any order."""
    w = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    target = torch.arange(len(features(w)))
    z_loss = options.get("z_loss", 0.0)

    def ours(w):
        return xent.linear_cross_entropy(features(w), w, target, **options)

    def theirs(w):
        return reference.cross_entropy(features(w) @ w.T, target, z_loss=z_loss)

    def derivatives(loss):
        value = loss(w)
        first = [torch.autograd.grad(value, w, retain_graph=True)[0] for _ in range(2)]
        value = loss(w)
        (g,) = torch.autograd.grad(value, w, create_graph=True)
        return *first, g, *torch.autograd.grad(g.square().sum(), w)

    near(derivatives(ours), derivatives(theirs))


@pytest.mark.parametrize("options", [{}, {"check_targets": True}, {"z_loss": 0.1}], ids=str)
def test_a_hook_is_called_once_a_backward(options):
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (5, 3)))
    target, calls = torch.arange(4), []

    def doubled(g):
        calls.append(g.shape)
        return 2 * g

    (expected,) = torch.autograd.grad(xent.linear_cross_entropy(x, w, target, **options), x)
    for create_graph in (False, True):
        hidden = x * 1.0
        hidden.register_hook(doubled)
        loss = xent.linear_cross_entropy(hidden, w, target, **options)
        for _ in range(2):
            calls.clear()
            found = torch.autograd.grad(loss, x, retain_graph=True, create_graph=create_graph)
            near(found, (2 * expected,))
            assert len(calls) == 1


@pytest.mark.parametrize("options", [{}, {"check_targets": True}, {"z_loss": 0.1}], ids=str)
def test_an_upstream_gradient_of_one_keeps_its_tangent(options):
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (5, 3)))
    one, two = (torch.tensor(v, dtype=torch.float64) for v in (1.0, 2.0))

    def loss():
        return xent.linear_cross_entropy(x, w, torch.arange(4), **options)

    def gradient(loss, upstream):
        return torch.autograd.grad(loss, w, upstream)[0]

    expected, first, second = gradient(loss(), one), loss(), loss()
    near(jvp(lambda v: gradient(first, v), (one,), (two,)), (expected, 2 * expected))
    with torch.autograd.forward_ad.dual_level():
        dual = gradient(second, torch.autograd.forward_ad.make_dual(one, two))
        near(torch.autograd.forward_ad.unpack_dual(dual), (expected, 2 * expected))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reduction, reentrant):
    from torch.utils.checkpoint import checkpoint

    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 4), (5, 4)))
    target = torch.tensor([0, 1, 2, 3, 4, 0])

    def loss(x, w):
        return xent.linear_cross_entropy(x, w, target, reduction=reduction).sum()

    expected = torch.autograd.grad(loss(x, w), (x, w))
    checkpoint(loss, x, w, use_reentrant=reentrant).backward()
    assert_close((x.grad, w.grad), expected)


def test_gradient_accumulation():
    """Micro-batches that share a denominator: the gradient of the whole batch."""
    p: Problem = problem(replace(ROWS[1]), n=8)
    whole = p.differentiable()
    whole.linear().backward()
    kept = int((p.target != -100).sum())
    parts = p.differentiable()
    for start in (0, 3, 6):
        rows = slice(start, min(start + 3, 8))
        loss = xent.linear_cross_entropy(
            parts.x[rows], parts.w, p.target[rows], linear_bias=parts.b, denominator=kept
        )
        loss.backward()
    assert_close(parts.w.grad, whole.w.grad)
    assert_close(parts.x.grad, whole.x.grad)
