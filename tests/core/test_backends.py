"""Backends: the choice of one, and a new one, as CONTRIBUTING.md registers it."""

import pytest
import torch
from torch.testing import assert_close

import xent
from contributing import run_example
from table import BUCKETS, ROWS, only, problem
from xent._core import backends


@pytest.fixture
def counting():
    names = run_example("A backend")
    yield names["counting"]
    xent.unregister_backend("counting")


def test_the_backends_are_listed():
    assert [info.name for info in xent.backends()] == ["one_tile", "triton", "tiles", "reference"]
    assert all(info.serves for info in xent.backends())


@pytest.mark.parametrize(
    "row", [*(r for r in ROWS if r.loss == "cross_entropy"), *BUCKETS], ids=lambda row: row.name
)
def test_every_backend_computes_every_row_of_the_table(row, counting):
    assert xent.backends()[0].name == "counting"
    found, drawn = {}, problem(row)
    for name in ("counting", "tiles", "one_tile", "reference"):
        with only(name):
            p = drawn.differentiable()
            value, penalty = p.linear(), p.dense(reduction="none")
            (of_x,) = torch.autograd.grad(value, p.x, create_graph=True)
            found[name] = [value, of_x, penalty, *torch.autograd.grad(of_x.square().sum(), (p.x, p.w))]
        if name == "counting":
            assert counting.statistics >= 2
            assert counting.gradients >= 1
    for name in ("counting", "one_tile", "tiles"):
        assert_close(found[name], found["reference"], equal_nan=True)


def test_a_backend_that_does_not_serve_a_problem_leaves_it_to_the_next(counting):
    counting.supports = lambda problem: "not today"
    z = torch.randn(4, 3, requires_grad=True)
    xent.cross_entropy(z, torch.tensor([0, 1, 2, 0])).backward()
    assert (counting.statistics, counting.gradients) == (0, 0)


def test_what_is_no_backend_is_refused():
    with pytest.raises(TypeError, match="must be a Backend"):
        xent.register_backend(object())
    with pytest.raises(ValueError, match="one_tile"):
        xent.unregister_backend("tiles")

    class Nameless(type(backends.registered()[1])):
        name = None

    class Usurper(Nameless):
        name = "tiles"

    with pytest.raises(TypeError, match="Nameless needs a string name"):
        xent.register_backend(Nameless())
    with pytest.raises(ValueError, match="the name 'tiles' is taken"):
        xent.register_backend(Usurper())


def test_a_backend_says_what_this_machine_lacks(counting):
    counting.missing = lambda: "no such device"
    assert xent.backends()[0] == ("counting", counting.serves, "no such device", counting.memory)
    xent.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert counting.statistics == counting.gradients == 0


def test_every_backend_gives_the_same_loss_and_gradient(counting):
    x, w = torch.randn(9, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 4, 5, -100, 1, 2])
    found = {}
    for name in ("counting", "one_tile", "tiles"):
        with only(name):
            leaves = [t.clone().requires_grad_() for t in (x, w)]
            loss = xent.linear_cross_entropy(*leaves, y, label_smoothing=0.1, softcap=3.0, z_loss=1e-3)
            found[name] = [loss, *torch.autograd.grad(loss, leaves)]
    for name in ("counting", "one_tile"):
        assert_close(found[name], found["tiles"])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_option_is_one_field_and_the_place_that_uses_it(reduction):
    names = run_example("An option")
    flooded = names["flooded_cross_entropy"]
    z, y = torch.randn(9, 4, dtype=torch.float64, requires_grad=True), torch.randint(4, (9,))
    loss = torch.nn.functional.cross_entropy(z, y, reduction=reduction)
    level = loss.detach().median().item() + 0.1  # some rows lie below it
    expected = (loss - level).abs() + level
    found = flooded(z, y, flood=level, reduction=reduction)
    assert_close(found, expected)
    assert_close(*(torch.autograd.grad(v.sum(), z, retain_graph=True)[0] for v in (found, expected)))
    assert_close(flooded(z, y, reduction=reduction), loss)
    with pytest.raises(ValueError, match="flood must be at least 0 and finite, got -1"):
        flooded(z, y, flood=-1.0)
    with pytest.raises(TypeError, match="flood must be"):
        flooded(z, y, flood="deep")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_row_loss_is_one_function(reduction):
    names = run_example("A row loss")
    x, w = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (9, 6))
    y = torch.randint(6, (9,))
    rows = torch.nn.functional.cross_entropy(x @ w.t(), y, reduction="none")
    expected = (1 - torch.exp(-0.7 * rows)) / 0.7
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    of_head = names["linear_generalised_cross_entropy"](x, w, y, reduction=reduction)
    assert_close(of_head, expected)
    assert_close(names["generalised_cross_entropy"](x @ w.t(), y, reduction=reduction), expected)
    assert_close(torch.autograd.grad(of_head.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w)))
