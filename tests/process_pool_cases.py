"""The jobs of a pool of processes: each compares its share of a head with the whole head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import table
import xent
from table import Problem, close

UNEVEN = {2: (4, 2), 3: (3, 0, 3)}  # of six classes
EVERYTHING = next(row for row in table.ROWS if row.name == "index-everything")
CASE = {2: (60, 41), 3: (40, 21, 40)}  # of 101


def cut(sizes: tuple[int, ...], part: int) -> slice:
    return slice(sum(sizes[:part]), sum(sizes[: part + 1]))


def here(sizes: tuple[int, ...]) -> slice:
    return cut(sizes, dist.get_rank())


def share(p: Problem, classes: slice) -> Problem:
    """This rank's slice of a problem."""
    options = dict(p.options)
    if "weight" in options:
        options["weight"] = options["weight"][classes]
    target = p.target
    if isinstance(target, Tensor) and target.is_floating_point():
        target = target[:, classes]
    return replace(p, w=p.w[classes], b=p.b[classes], target=target, options=options)


def leaves(p: Problem) -> list[Tensor]:
    return [p.x, p.w, p.b]


def local(whole: list[Tensor], classes: slice) -> list[Tensor]:
    x, w, b = whole
    return [x, w[classes], b[classes]]


def grad(value: Tensor, of: list[Tensor], *upstream: Tensor, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(value, of, *upstream, **options))


def all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        if a.numel():
            close(a.detach(), e.detach())


def law(name: str, dtype: torch.dtype) -> None:
    """Loss, gradients, second backward and second derivatives of one row of the table."""
    (row,) = (row for row in table.ROWS + table.OTHERS if row.name == name)
    whole = table.problem(row, dtype).differentiable()
    classes = here(UNEVEN[dist.get_world_size()])
    mine = share(whole, classes).differentiable()
    group = dist.group.WORLD
    for reduction in ("none", "sum", "mean"):
        one = whole.linear(reduction=reduction)
        spread = mine.linear(reduction=reduction, group=group)
        all_close([spread], [one])
        for _ in range(2):  # any upstream, and again
            upstream = torch.randn_like(one)
            found = grad(spread, leaves(mine), upstream, retain_graph=True)
            all_close(found, local(grad(one, leaves(whole), upstream, retain_graph=True), classes))
    dense = xent.cross_entropy if row.loss == "cross_entropy" else None
    if dense is not None:
        z = whole.logits.detach().requires_grad_()
        z_here = z.detach()[:, classes].clone().requires_grad_()
        one, spread = whole.dense(z), mine.dense(z_here, group=group)
        all_close([spread, *grad(spread, [z_here])], [one, grad(one, [z])[0][:, classes]])
    along = [torch.randn_like(t) for t in leaves(whole)]
    first = grad(whole.linear(), leaves(whole), create_graph=True)
    product = grad(sum((g * v).sum() for g, v in zip(first, along, strict=True)), leaves(whole))
    first_here = grad(mine.linear(group=group), leaves(mine), create_graph=True)
    # a number that the ranks share, each holding a part of it: its derivative is that of the sum
    part = sum((g * v).sum() for g, v in zip(first_here, local(along, classes), strict=True))
    all_close(grad(part, leaves(mine)), local(product, classes))

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return replace(mine, x=x, w=w, b=b).linear(group=group)

    tensors, tangents = (tuple(t.detach() for t in ts) for ts in (leaves(mine), local(along, classes)))
    slope = sum((g * v).sum() for g, v in zip(first, along, strict=True))
    value, found = torch.func.jvp(loss, tensors, tangents)
    all_close([value, found], [whole.linear(), slope])
    again = torch.func.jvp(torch.func.grad(loss, (0, 1, 2)), tensors, tangents)[1]
    all_close(list(again), local(product, classes))


def rows(dtype: torch.dtype) -> None:
    """What rows say, and the gradients of all of it, from logits and from features."""
    n, d = 23, 5
    sizes = CASE[dist.get_world_size()]
    classes, c = here(sizes), sum(sizes)
    x, w, b = (torch.randn(*shape, dtype=dtype) for shape in ((n, d), (c, d), (c,)))
    target = torch.randint(c, (n,))
    target[3] = -100
    options: dict[str, Any] = {"label_smoothing": 0.1, "softcap": 3.0, "temperature": 0.7}
    whole = [t.clone().requires_grad_() for t in (x, w, b)]
    mine = [t.clone().requires_grad_() for t in (x, w[classes], b[classes])]
    one = xent.linear_row_statistics(*whole[:2], target, linear_bias=whole[2], **options)
    spread = xent.linear_row_statistics(
        *mine[:2], target, linear_bias=mine[2], group=dist.group.WORLD, **options
    )
    upstream = torch.randn(4, n).to(one.loss)
    for name in one._fields:
        if name in ("argmax", "correct"):
            assert torch.equal(getattr(spread, name), getattr(one, name)), name
        else:
            close(getattr(spread, name).detach(), getattr(one, name).detach())

    def total(found: xent.RowStatistics) -> Tensor:
        fields = (found.loss, found.log_prob, found.logsumexp, found.entropy)
        return sum((f * u).sum() for f, u in zip(fields, upstream, strict=True))

    all_close(grad(total(spread), mine), local(grad(total(one), whole), classes))
    z = torch.nn.functional.linear(x, w, b)
    one = xent.row_statistics(z)
    spread = xent.row_statistics(z[:, classes], group=dist.group.WORLD)
    assert spread.loss is None
    close(spread.entropy, one.entropy)
    assert torch.equal(spread.argmax, one.argmax)


def uneven_shards() -> None:
    """cases.md: C = 101, smoothing 0.1 and class weights."""
    sizes = CASE[dist.get_world_size()]
    classes = here(sizes)
    z, w = torch.randn(9, 101, dtype=torch.float64), torch.rand(101, dtype=torch.float64)
    y = torch.randint(101, (9,))
    expected = torch.nn.functional.cross_entropy(z, y, w, label_smoothing=0.1)
    found = xent.cross_entropy(z[:, classes], y, w[classes], label_smoothing=0.1, group=dist.group.WORLD)
    close(found, expected)


def tied_maxima() -> None:
    """cases.md: the same maximum on two ranks counts once, and the lowest class is the argmax."""
    sizes = CASE[dist.get_world_size()]
    classes = here(sizes)
    z = torch.full((4, 101), -5.0, dtype=torch.float64)
    z[0, [7, 61, 100]] = 3.0  # on the first and on the last rank
    z[1] = 0.0
    z[2, [61, 100]] = 1e8
    z[3] = -torch.inf  # an ignored row
    y = torch.tensor([61, 50, 100, -100])
    one, spread = xent.row_statistics(z, y), xent.row_statistics(z[:, classes], y, group=dist.group.WORLD)
    close(spread.loss, one.loss)
    assert spread.argmax.tolist() == one.argmax.tolist() == [7, 0, 61, -1]
    close(spread.log_prob, one.log_prob)
    close(spread.entropy, one.entropy)


def extremes() -> None:
    """Rows that are sure, masked, infinite or nan, with the target on another rank than the maximum."""
    sizes = CASE[dist.get_world_size()]
    classes = here(sizes)
    z = torch.randn(8, 101, dtype=torch.float64)
    z[0] = -40.0
    z[0, 100] = 0.0  # sure: 100 terms of e^−40
    z[1, 0] = 1e4
    z[2, :90] = -torch.inf
    z[3] = -torch.inf
    z[4, 5] = torch.nan
    z[5, 99] = torch.inf
    z[6] += 1e8
    y = torch.tensor([100, 100, 95, 3, 90, 0, 1, 101])
    for soft in (False, True):
        target = torch.softmax(torch.randn(8, 101, dtype=torch.float64), 1) if soft else y
        whole, mine = z.clone().requires_grad_(), z[:, classes].clone().requires_grad_()
        part = target[:, classes] if soft else target
        options = {"reduction": "none", "check_targets": False}
        one = xent.cross_entropy(whole, target, **options)
        spread = xent.cross_entropy(mine, part, group=dist.group.WORLD, **options)
        torch.testing.assert_close(spread, one, rtol=1e-14, atol=0.0, equal_nan=True)
        assert one[3:6].isnan().tolist() == [True] * 3
        assert soft or one[7].isnan()
        (g,) = torch.autograd.grad(one.sum(), whole)
        (g_here,) = torch.autograd.grad(spread.sum(), mine)
        torch.testing.assert_close(g_here, g[:, classes], rtol=1e-12, atol=1e-300, equal_nan=True)


def known_values() -> None:
    """Values that other vocabulary-parallel losses miss: log 2 more, or smoothing over a rank's classes."""
    classes = here({2: (2, 2), 3: (2, 1, 1)}[dist.get_world_size()])
    z, y = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0])
    found = xent.cross_entropy(z[:, classes], y, group=dist.group.WORLD)
    assert round(found.item(), 7) == 0.4401897
    smoothed = xent.cross_entropy(z[:, classes], y, group=dist.group.WORLD, label_smoothing=0.2)
    assert round(smoothed.item(), 7) == round(0.4401897 + 0.2 * 1.5, 7)  # 2 − the mean of the logits


def low_rank() -> None:
    """An adapter's factors on several ranks: its up spread like the classes, its down on all of them."""
    p = table.problem(EVERYTHING).differentiable()
    down, up = torch.randn(2, p.x.shape[1], dtype=p.x.dtype), torch.randn(6, 2, dtype=p.x.dtype)
    down.requires_grad_()
    classes = here({2: (4, 2), 3: (1, 3, 2)}[dist.get_world_size()])
    whole, mine = up.clone().requires_grad_(), up[classes].clone().requires_grad_()
    w = p.w.detach()[classes].clone().requires_grad_()
    p_here = share(p, classes)

    def loss(w: Tensor, up: Tensor, options: dict[str, Any], **group: Any) -> Tensor:
        return xent.linear_cross_entropy(p.x, xent.LowRank(w, down, up, 0.7), p.target, **options, **group)

    for budget in (1 << 26, 600):
        more = {"memory_budget": budget}
        one = loss(p.w, whole, p.options | more)
        spread = loss(w, mine, p_here.options | more, group=dist.group.WORLD)
        expected = grad(one, [p.x, down, p.w, whole], create_graph=True)
        found = grad(spread, [p.x, down, w, mine], create_graph=True)
        all_close([spread, *found], [one, *expected[:2], *(g[classes] for g in expected[2:])])
        up_1, up_2 = torch.randn_like(p.x), torch.randn_like(down)
        all_close(grad(found[:2], [p.x, down], [up_1, up_2]), grad(expected[:2], [p.x, down], [up_1, up_2]))


def buckets() -> None:
    """A teacher of k classes, on several ranks, of a student that is sure of one, or of another."""
    sizes = CASE[dist.get_world_size()]
    classes = here(sizes)
    z = torch.randn(4, 101, dtype=torch.float64)
    z[0, 100], z[1, 3], z[2, 50] = 900.0, 900.0, 900.0
    x = torch.eye(4, dtype=torch.float64).requires_grad_()
    target = xent.TopKTarget(
        torch.tensor([[100, 3]] * 4), torch.tensor([[0.5, 0.25]] * 4, dtype=torch.float64), "bucket"
    )
    whole, mine = z.t().clone().requires_grad_(), z.t()[classes].clone().requires_grad_()
    group, none = dist.group.WORLD, {"reduction": "none"}
    for loss in (
        lambda w, **options: xent.linear_cross_entropy(x, w, target, **none, **options),
        lambda w, **options: xent.linear_kl_divergence(student=(x, w), teacher=target, **none, **options),
        lambda w, **options: xent.linear_js_divergence(student=(x, w), teacher=target, **none, **options),
    ):
        one, spread = loss(whole), loss(mine, group=group)
        torch.testing.assert_close(spread, one, rtol=1e-14, atol=1e-15)
        expected, found = grad(one.sum(), [x, whole]), grad(spread.sum(), [x, mine])
        torch.testing.assert_close(found, [expected[0], expected[1][classes]], rtol=1e-12, atol=1e-15)
        up = [torch.randn_like(t) for t in expected]
        of_whole = grad(grad(loss(whole).sum(), [x, whole], create_graph=True), [x, whole], up)
        of_mine = grad(
            grad(loss(mine, group=group).sum(), [x, mine], create_graph=True),
            [x, mine],
            [up[0], up[1][classes]],
        )
        torch.testing.assert_close(of_mine[1], of_whole[1][classes], rtol=1e-10, atol=1e-12)


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Every collective of torch.distributed that is called meanwhile: its kind and bytes."""
    calls: list[tuple[str, int]] = []
    real = dist.all_reduce

    def counting(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **options: Any) -> Any:
        kinds = {dist.ReduceOp.SUM: "SUM", dist.ReduceOp.MAX: "MAX", dist.ReduceOp.MIN: "MIN"}
        calls.append((kinds[op], tensor.nbytes))
        return real(tensor, op=op, **options)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("another collective")

    others = [
        name
        for name in (
            "all_gather",
            "all_gather_object",
            "broadcast",
            "all_gather_into_tensor",
            "reduce_scatter",
        )
        if hasattr(dist, name)
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "all_reduce", counting))
        for name in others:
            stack.enter_context(mock.patch.object(dist, name, forbidden))
        yield calls


def traffic(n: int, d: int) -> list[tuple[str, int]]:
    """Forward one MAX and one SUM, of O(N); backward the features' gradient, whatever C."""
    sizes = CASE[dist.get_world_size()]
    classes = here(sizes)
    x, w = torch.randn(n, d), torch.randn(101, d)[classes]
    y = torch.randint(101, (n,))
    cw = torch.rand(101)[classes]
    options: dict[str, Any] = {"weight": cw, "label_smoothing": 0.1, "group": dist.group.WORLD}
    xent.linear_cross_entropy(x, w, y, **options)  # the first use, where the ranks introduce themselves
    x.requires_grad_()
    w.requires_grad_()
    with counted() as forward:
        loss = xent.linear_cross_entropy(x, w, y, **options)
    header = 8 * (dist.get_world_size() + 4)
    assert [kind for kind, _ in forward] == ["MAX", "SUM"]
    assert forward[0][1] == 8 * n + header
    assert forward[1][1] == 5 * 8 * n  # r, ties, d, a and the own class's weight
    with counted() as backward:
        loss.backward()
    assert {kind for kind, _ in backward} == {"SUM"}
    assert sum(size for _, size in backward) == 4 * n * d
    return backward


def blocks(n: int, d: int) -> None:
    """The features' gradient goes out in parts, and nothing depends on how rows and classes are cut."""
    from xent._core import collectives

    sizes = CASE[dist.get_world_size()]
    classes = here(sizes)
    x, w, v = torch.randn(n, d), torch.randn(101, d), torch.randn(n, d)
    y = torch.randint(101, (n,))
    y[::7] = -100
    for dtype, budget in ((torch.float32, 1 << 14), (torch.float64, None), (torch.bfloat16, 1 << 14)):
        whole = [t.to(dtype).requires_grad_() for t in (x, w)]
        mine = [t.to(dtype).requires_grad_() for t in (x, w[classes])]
        with mock.patch.object(collectives, "BLOCK", 4096), counted() as calls:
            spread = xent.linear_cross_entropy(*mine, y, group=dist.group.WORLD, memory_budget=budget)
            found = grad(spread, mine, create_graph=True)
            again = grad((found[0] * v.to(dtype)).sum(), mine)
        assert len(calls) > 6
        one = xent.linear_cross_entropy(*whole, y, memory_budget=budget)
        expected = grad(one, whole, create_graph=True)
        product = grad((expected[0] * v.to(dtype)).sum(), whole)
        if dtype == torch.bfloat16:
            for a, e in zip(found, (expected[0], expected[1][classes]), strict=True):
                torch.testing.assert_close(a, e, rtol=2e-2, atol=1e-4)
        else:
            all_close([spread, *found], [one, expected[0], expected[1][classes]])
            all_close(again, [product[0], product[1][classes]])


def which_tensors() -> None:
    """Frozen tensors cost nothing and ask for nothing; without gradients nothing is sent back."""
    sizes = CASE[dist.get_world_size()]
    classes = here(sizes)
    x, w = torch.randn(11, 4), torch.randn(101, 4)
    y = torch.randint(101, (11,))
    for of_x, of_w in ((True, False), (False, True)):
        whole = [x.clone().requires_grad_(of_x), w.clone().requires_grad_(of_w)]
        mine = [x.clone().requires_grad_(of_x), w[classes].clone().requires_grad_(of_w)]
        xent.linear_cross_entropy(*whole, y).backward()
        with counted() as calls:
            xent.linear_cross_entropy(*mine, y, group=dist.group.WORLD).backward()
        assert [kind for kind, _ in calls] == ["MAX", "SUM"] + ["SUM"] * of_x
        if of_x:
            close(mine[0].grad, whole[0].grad)
        else:
            close(mine[1].grad, whole[1].grad[classes])
    with torch.no_grad(), counted() as calls:
        found = xent.linear_cross_entropy(x, w[classes], y, group=dist.group.WORLD)
    close(found, xent.linear_cross_entropy(x, w, y))
    assert len(calls) == 2


def other_slices() -> None:
    """A second head, of which one rank holds as many classes as of the first, is noticed by all of them."""
    size = dist.get_world_size()
    group = dist.new_group()
    x = torch.randn(5, 3, dtype=torch.float64)
    for last in (4, 7, 4, 0, 7):
        sizes = (*(4,) * (size - 1), last)
        w = torch.randn(sum(sizes), 3, dtype=torch.float64)
        y = torch.randint(sum(sizes), (5,))
        mine = w[here(sizes)].clone().requires_grad_()
        found = xent.linear_cross_entropy(x, mine, y, group=group)
        close(found.detach(), xent.linear_cross_entropy(x, w, y))
        found.backward()
        assert mine.grad.shape == mine.shape


def disagreements() -> dict[str, str]:
    """What the ranks say when they pass what does not belong together, at first use and later."""
    rank, said = dist.get_rank(), {}
    x, w, y = torch.randn(5, 3), torch.randn(4, 3), torch.randint(4, (5,))
    last = rank == dist.get_world_size() - 1

    def attempt(name: str, group: Any, *given: Tensor, **options: Any) -> None:
        try:
            xent.linear_cross_entropy(*given, group=group, **options)
        except (ValueError, TypeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
        else:
            said[name] = "nothing"

    attempt("rows", dist.new_group(), x[: 4 + last], w, y[: 4 + last])
    dtype = torch.float64 if last else torch.float32
    attempt("dtype", dist.new_group(), x.to(dtype), w.to(dtype), y)
    attempt("features", dist.new_group(), x[:, : 2 + last], w[:, : 2 + last], y)
    attempt("targets", dist.new_group(), x, w, (y + last) % 4)
    group = dist.new_group()
    attempt("agreement", group, x, w, y)
    attempt("targets later", group, x, w, (y + last) % 4)
    attempt("smoothing later", group, x, w, y, label_smoothing=0.1 * last)
    attempt("weights later", group, x, w, y, weight=torch.ones(4) if last else None)
    attempt("denominator later", group, x, w, y, denominator=1.0 + last)
    attempt("agreement again", group, x, w, y, label_smoothing=0)
    attempt("another type of number", group, x, w, y, label_smoothing=0 if last else 0.0)
    attempt(
        "weights of rows", dist.new_group(), x, w, y, sample_weight=torch.ones(5) - last * torch.eye(5)[2]
    )
    wide = 4 + 2 * last
    attempt("class weights", dist.new_group(), x, w, y, weight=torch.ones(wide))
    attempt("bias", dist.new_group(), x, w, y, linear_bias=torch.ones(wide))
    attempt("probabilities", dist.new_group(), x, w, torch.rand(5, wide))
    attempt("shape", dist.new_group(), x[:, : 3 - last], w, y)
    attempt("type", dist.new_group(), x, w.double() if last else w, y)
    return said


def refusals() -> dict[str, str]:
    """What a head that is spread does not take, or not so."""
    group, said = dist.group.WORLD, {}
    x, w, y = torch.randn(5, 3), torch.randn(4, 3), torch.randint(4, (5,))

    def attempt(name: str, run: Any) -> None:
        try:
            run()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
        else:
            said[name] = "nothing"

    def loss(*given: Tensor, **options: Any) -> Tensor:
        return xent.linear_cross_entropy(*(given or (x, w, y)), **{"group": group, **options})

    total = 4 * dist.get_world_size()
    attempt("label", lambda: loss(x, w, y + total))
    attempt("classes", lambda: loss(classes=torch.arange(4)))
    attempt("log_q", lambda: loss(log_q=torch.zeros(4)))
    attempt("group", lambda: loss(group="world"))
    attempt("vmap", lambda: torch.vmap(lambda u: loss(u[None], w, y[:1]))(x))
    empty = w if dist.get_rank() == 0 else w[:0]  # others than the first hold no class
    attempt("hessian", lambda: torch.func.hessian(lambda u: loss(u, empty, y % 4))(x))
    attempt("sum over data", lambda: loss(group=None, data_group=group, reduction="sum"))
    attempt("denominator", lambda: loss(group=None, data_group=group, denominator=3.0))
    attempt("graph", lambda: torch.compile(loss, backend="eager", fullgraph=True)())
    attempt("meta", lambda: loss(x.to("meta"), w.to("meta"), y.to("meta")))
    return said


def even(total: int) -> slice:
    """How DTensor cuts a dimension: equal parts, the last ones smaller or empty."""
    rank, part = dist.get_rank(), -(-total // dist.get_world_size())
    return slice(min(rank * part, total), min((rank + 1) * part, total))


def dtensors() -> dict[str, str]:
    """A classifier placed Shard(0) is used as it is, its gradient is placed so; other placements say how."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("classes",))
    x, y, cw = torch.randn(7, 3), torch.randint(10, (7,)), torch.rand(10)
    w, b = torch.randn(10, 3), torch.randn(10)
    whole = [t.clone().requires_grad_() for t in (x, w, b)]
    one = xent.linear_cross_entropy(*whole[:2], y, linear_bias=whole[2], weight=cw, label_smoothing=0.1)
    one.backward()
    placed = [
        distribute_tensor(t, mesh, [place]).requires_grad_()
        for t, place in ((x, Replicate()), (w, Shard(0)), (b, Shard(0)))
    ]
    for features in (placed[0], x.clone().requires_grad_()):
        for t in placed:
            t.grad = None
        spread = xent.linear_cross_entropy(
            features,
            placed[1],
            y,
            linear_bias=placed[2],
            weight=distribute_tensor(cw, mesh, [Shard(0)]),
            label_smoothing=0.1,
        )
        assert type(spread) is Tensor
        close(spread.detach(), one.detach())
        spread.backward()
        for t, e, place in zip(placed[1:], whole[1:], (Shard(0), Shard(0)), strict=True):
            assert isinstance(t.grad, DTensor)
            assert t.grad.placements == (place,)
            close(t.grad.full_tensor(), e.grad)
        given = features.grad.full_tensor() if isinstance(features.grad, DTensor) else features.grad
        close(given, whole[0].grad)
    z = torch.nn.functional.linear(x, w, b)
    logits = distribute_tensor(z, mesh, [Shard(1)])
    close(xent.cross_entropy(logits, y, cw[even(10)]), xent.cross_entropy(z, y, cw))
    rows = xent.row_statistics(logits, distribute_tensor(y, mesh, [Replicate()]))
    assert torch.equal(rows.correct, xent.row_statistics(z, y).correct)
    step = torch.optim.SGD(placed, lr=0.1)  # what comes back is what an optimiser takes
    step.step()
    said = {}
    grid = init_device_mesh("cpu", (1, size), mesh_dim_names=("rows", "classes"))
    wrong = {
        "two": lambda: xent.linear_cross_entropy(x, distribute_tensor(w, grid, [Replicate(), Shard(0)]), y),
        "columns": lambda: xent.linear_cross_entropy(x, distribute_tensor(w, mesh, [Shard(1)]), y),
        "replicated": lambda: xent.linear_cross_entropy(x, distribute_tensor(w, mesh, [Replicate()]), y),
        "rows": lambda: xent.linear_cross_entropy(distribute_tensor(x, mesh, [Shard(0)]), placed[1], y),
        "elsewhere": lambda: xent.linear_top_k(x, placed[1], 2),
        "curvature": lambda: xent.curvature.HeadHessian(x, placed[1], y),
    }
    for name, run in wrong.items():
        try:
            run()
        except (ValueError, TypeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


class Probe(torch.nn.Module):
    """An extractor and a head, as a model has them."""

    def __init__(self, c: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = torch.nn.Linear(4, 8)
        self.head = torch.nn.Linear(8, c)

    def forward(self, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        features = torch.tanh(self.body(x))
        return xent.linear_cross_entropy(features, self.head.weight, y, linear_bias=self.head.bias, **options)


def rows_spread(kind: str) -> None:
    """Uneven rows, ignored rows and class weights under DDP and FSDP2: the mean is that of all rows."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    size, c = dist.get_world_size(), 6
    x, y = torch.randn(17, 4), torch.randint(c, (17,))
    y[[0, 1, 16]] = -100
    cw = torch.rand(c) + 0.5
    sizes = {2: (2, 15), 3: (2, 0, 15)}[size]  # the first rank has only ignored rows
    mine = here(sizes)
    for options in ({}, {"weight": cw, "label_smoothing": 0.1}):
        whole = Probe(c)
        one = whole(x, y, **options)
        one.backward()
        for by in ("data_group", "denominator"):
            model: torch.nn.Module = Probe(c)
            if kind == "ddp":
                model = DistributedDataParallel(model)
            else:
                fully_shard(model)
            if by == "data_group":
                loss = model(x[mine], y[mine], data_group=dist.group.WORLD, **options)
            else:  # the divisor of all rows, over the ranks that the gradients are averaged over
                divisor = (cw[y[y >= 0]].sum() if "weight" in options else (y >= 0).sum()) / size
                loss = model(x[mine], y[mine], denominator=divisor, **options)
            loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total)
            close(total / size, one.detach())
            for p, e in zip(model.parameters(), whole.parameters(), strict=True):
                g = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                close(g, e.grad)
    theta = torch.randn(4, requires_grad=True)

    def learnt(rows: slice, group: Any) -> Tensor:
        s = torch.sigmoid(x[rows] @ theta)
        z = x[rows] @ torch.ones(4, c)
        return xent.cross_entropy(z, y[rows], sample_weight=s, data_group=group)

    (one_theta,) = grad(learnt(slice(None), None), [theta])
    (g,) = grad(learnt(mine, dist.group.WORLD), [theta])
    dist.all_reduce(g)
    close(g / size, one_theta)
    compiled = torch.compile(
        lambda z: 2 * xent.cross_entropy(z, y, data_group=dist.group.WORLD), backend="eager"
    )
    z = torch.randn(17, c)
    close(compiled(z), 2 * xent.cross_entropy(z, y))
    nothing = xent.cross_entropy(torch.zeros(0, 3, requires_grad=True), y[:0], data_group=dist.group.WORLD)
    assert nothing.item() == 0.0


def both(shape: tuple[int, int]) -> None:
    """Rows over one dimension of a mesh, classes over the other; the gradients of both kinds are right."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("rows", "classes"))
    across, along = mesh["rows"], mesh["classes"]
    c, cw = 7, torch.rand(7) + 0.5
    x, w, y = torch.randn(9, 4), torch.randn(c, 4), torch.randint(c, (9,))
    y[2] = -100
    part, place = across.get_local_rank(), along.get_local_rank()
    mine = cut({1: (9,), 2: (3, 6), 3: (2, 0, 7)}[shape[0]], part)
    classes = cut({1: (7,), 2: (5, 2), 3: (3, 0, 4)}[shape[1]], place)
    whole = [t.clone().requires_grad_() for t in (x, w)]
    xent.linear_cross_entropy(*whole, y, weight=cw, label_smoothing=0.1).backward()
    features, head = x[mine].clone().requires_grad_(), w[classes].clone().requires_grad_()
    options: dict[str, Any] = {
        "weight": cw[classes],
        "label_smoothing": 0.1,
        "group": along,
        "data_group": across,
    }
    loss = xent.linear_cross_entropy(features, head, y[mine], **options)
    loss.backward()
    dist.all_reduce(head.grad, group=across.get_group())  # what DDP does over the rows
    close(head.grad / shape[0], whole[1].grad[classes])
    close(features.grad / shape[0], whole[0].grad[mine])


def beside_a_graph() -> None:
    """torch.compile ends its graph before a head that is spread, and begins another behind it."""
    classes = here(CASE[dist.get_world_size()])
    x, w, y = torch.randn(5, 3), torch.randn(101, 3), torch.randint(101, (5,))

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return 2 * xent.linear_cross_entropy(torch.tanh(x), w, y, group=dist.group.WORLD)

    mine = w[classes].clone().requires_grad_()
    found = torch.compile(loss, backend="eager")(x, mine)
    whole = w.clone().requires_grad_()
    one = 2 * xent.linear_cross_entropy(torch.tanh(x), whole, y)
    all_close([found, *grad(found, [mine])], [one, grad(one, [whole])[0][classes]])


def learnt() -> None:
    """Gradients of a probability target, by columns, and of sample weights, which ranks share."""
    classes = here(CASE[dist.get_world_size()])
    z, q, s = torch.randn(6, 101), torch.rand(6, 101), torch.rand(6)
    options: dict[str, Any] = {"label_smoothing": 0.1, "softcap": 4.0, "z_loss": 1e-2}
    whole = [t.clone().requires_grad_() for t in (z, q, s)]
    mine = [t.clone().requires_grad_() for t in (z[:, classes], q[:, classes], s)]
    one = xent.cross_entropy(*whole[:2], sample_weight=whole[2], **options)
    spread = xent.cross_entropy(*mine[:2], sample_weight=mine[2], group=dist.group.WORLD, **options)
    dz, dq, ds = grad(one, whole, create_graph=True)
    found = grad(spread, mine, create_graph=True)
    all_close([spread, *found], [one, dz[:, classes], dq[:, classes], ds])
    vz, vq = torch.randn(6, 101), torch.randn(6, 101)
    again = grad((dz * vz).sum() + (dq * vq).sum(), whole[:2])
    part = (found[0] * vz[:, classes]).sum() + (found[1] * vq[:, classes]).sum()
    all_close(grad(part, mine[:2]), [t[:, classes] for t in again])


def sparse_and_sure() -> None:
    """Class weights enter no divisor of a sparse target; a sure row's gradient keeps its digits."""
    classes, group = here(CASE[dist.get_world_size()]), dist.group.WORLD
    z, cw = torch.randn(6, 101, dtype=torch.float64), torch.rand(101, dtype=torch.float64) + 0.5
    for k in (1, 3):
        indices = torch.rand(6, 101).argsort(1)[:, :k]
        target = xent.TopKTarget(indices, torch.rand(6, k, dtype=torch.float64))
        one = xent.cross_entropy(z, target, cw)
        close(xent.cross_entropy(z[:, classes], target, cw[classes], group=group), one)
    z = torch.full((2, 101), -90.0, dtype=torch.float64)
    z[0, 0] = z[1, 100] = 0.0
    y = torch.tensor([0, 100])
    for smoothing in (1e-3, 1e-10):
        whole, mine = z.clone().requires_grad_(), z[:, classes].clone().requires_grad_()
        (g,) = grad(xent.cross_entropy(whole, y, label_smoothing=smoothing), [whole])
        (found,) = grad(xent.cross_entropy(mine, y, label_smoothing=smoothing, group=group), [mine])
        torch.testing.assert_close(found, g[:, classes], rtol=1e-14, atol=0.0)
    # second derivatives of rows that are sure of another class, which lies on one of the ranks
    v = torch.randn_like(z)
    for wrong in (torch.tensor([100, 0]), torch.full((2, 101), 0.01, dtype=torch.float64)):
        whole, mine = z.clone().requires_grad_(), z[:, classes].clone().requires_grad_()
        part = wrong if wrong.dim() == 1 else wrong[:, classes]
        (g,) = grad(xent.cross_entropy(whole, wrong), [whole], create_graph=True)
        (found,) = grad(xent.cross_entropy(mine, part, group=group), [mine], create_graph=True)
        (again,) = grad((g * v).sum(), [whole])
        (spread,) = grad((found * v[:, classes]).sum(), [mine])
        torch.testing.assert_close(spread, again[:, classes], rtol=1e-12, atol=0.0)


def shapes() -> None:
    """One row, none, none that counts; several positions; half types; features under autocast."""
    sizes = CASE[dist.get_world_size()]
    classes, group = here(sizes), dist.group.WORLD
    w = torch.randn(101, 3, 4)
    for batch in ((), (0,), (2, 5)):
        x, y = torch.randn(*batch, 4), torch.randint(101, (*batch, 3))
        for ignored in (False, True):
            y = torch.full_like(y, -100) if ignored else y
            whole = [t.clone().requires_grad_() for t in (x, w)]
            mine = [t.clone().requires_grad_() for t in (x, w[classes])]
            one = xent.linear_cross_entropy(*whole, y)
            spread = xent.linear_cross_entropy(*mine, y, group=group)
            all_close([spread], [one])
            dx, dw = grad(one, whole)
            all_close(grad(spread, mine), [dx, dw[classes]])
    x, y = torch.randn(5, 4), torch.randint(101, (5,))
    half = xent.linear_cross_entropy(x.bfloat16(), w[:, 0].bfloat16(), y)
    found = xent.linear_cross_entropy(x.bfloat16(), w[classes, 0].bfloat16(), y, group=group)
    assert found.dtype == torch.bfloat16
    assert found == half
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(
            xent.linear_cross_entropy(x, w[classes, 0], y, group=group),
            xent.linear_cross_entropy(x, w[:, 0], y),
        )
    module = xent.nn.LinearCrossEntropyLoss(4, classes.stop - classes.start, label_smoothing=0.1)
    with torch.no_grad():
        module.linear.weight.copy_(w[classes, 0])
    close(module(x, y, group=group).detach(), xent.linear_cross_entropy(x, w[:, 0], y, label_smoothing=0.1))
    z = x @ w[:, 0].t()
    close(xent.nn.CrossEntropyLoss()(z[:, classes], y, group=group), xent.cross_entropy(z, y))


def sharded_layers() -> str:
    """FSDP2 over the layer of a head: gathered where something around it is sharded too, else an error.

    A layer whose classes torch's tensor parallelism spreads says its group.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.body = torch.nn.Linear(4, 4)
            self.head = xent.nn.LinearCrossEntropyLoss(4, 7, bias=True)

        def forward(self, x: Tensor, y: Tensor, **options: Any) -> Tensor:
            return self.head(self.body(x), y, **options)

    x, y = torch.randn(12, 4), torch.randint(7, (12,))
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    for way in ("layer", "group", "head"):
        whole, model = Model(), Model()
        for module in {
            "layer": [model.head.linear],
            "group": [[model.body, model.head.linear]],
            "head": [model.head],
        }[way]:
            fully_shard(module)
        fully_shard(model)
        steps = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (whole, model)]
        for _ in range(3):
            whole(x, y).backward()
            model(x[mine], y[mine], data_group=dist.group.WORLD).backward()
            for p, e in zip(model.parameters(), whole.parameters(), strict=True):
                close(p.grad.full_tensor(), e.grad)
            for step in steps:
                step.step()
                step.zero_grad()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    spread = Model()
    parallelize_module(spread, mesh, {"head.linear": ColwiseParallel()})
    close(spread(x, y).detach(), Model()(x, y).detach())
    alone = Model()
    fully_shard(alone.head.linear)
    try:
        alone(x, y)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def language_models() -> None:
    """The loss of a language model under DDP and FSDP2, of all rows' tokens, and an adapter under both."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from integrations.models import batch, gemma2, made, peft, trained
    from xent.integrations.transformers import causal_lm_loss

    size = dist.get_world_size()
    ids, labels = batch(6)
    mine = slice(dist.get_rank(), None, size)
    items = (labels[:, 1:] != -100).sum() / size  # of which the wrappers average the gradients

    def parallel(model: torch.nn.Module) -> torch.nn.Module:
        return DistributedDataParallel(model)

    def sharded(model: torch.nn.Module) -> torch.nn.Module:
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    def freed(model: torch.nn.Module) -> torch.nn.Module:
        fully_shard(model.lm_head)
        return fully_shard(model, reshard_after_forward=True)

    def adapted() -> torch.nn.Module:
        torch.manual_seed(0)
        return peft()

    def untied() -> torch.nn.Module:
        torch.manual_seed(0)
        return gemma2(tie_word_embeddings=False)

    for make, wrap in (
        (lambda: made("Llama"), parallel),
        (lambda: made("Llama"), sharded),
        (lambda: made("Gemma-2"), sharded),
        (untied, freed),
        (adapted, parallel),
    ):
        whole = make().eval()
        whole(input_ids=ids, labels=labels).loss.backward()
        model = wrap(make().eval())
        for _ in range(2):
            loss = causal_lm_loss(model, ids[mine], labels[mine], num_items_in_batch=items)
            loss.backward()
            for p, e in zip(trained(model), trained(whole), strict=True):
                g = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                torch.testing.assert_close(g, e.grad, rtol=1e-4, atol=1e-5)
                p.grad = None


def sharded_both_ways() -> None:
    """FSDP2 over the rows of a head that is placed by its classes: what a model in two dimensions has."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "classes"))
    c, x, y = 7, torch.randn(9, 4), torch.randint(7, (9,))
    mine = cut((3, 6), mesh["rows"].get_local_rank())
    whole = Probe(c)
    one = whole(x, y)
    one.backward()
    model = Probe(c)
    for name in ("weight", "bias"):
        placed = distribute_tensor(getattr(model.head, name).detach(), mesh["classes"], [Shard(0)])
        setattr(model.head, name, torch.nn.Parameter(placed))
    fully_shard(model, mesh=mesh["rows"])
    loss = model(x[mine], y[mine], data_group=mesh["rows"])
    loss.backward()
    close(model.head.weight.grad.full_tensor(), whole.head.weight.grad)
    close(model.head.bias.grad.full_tensor(), whole.head.bias.grad)
    close(model.body.weight.grad.full_tensor(), whole.body.weight.grad)
