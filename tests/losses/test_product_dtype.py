"""Products of half factors: asked for, never by default on a CPU, and no less complete than any other."""

import pytest
import torch
import torch.nn.functional as F

import xent

BF16 = torch.bfloat16
SHAPES = ((40, 16), (50, 16), (50,))


@pytest.fixture
def head():
    generator = torch.Generator().manual_seed(11)
    x, w, b = (torch.randn(s, generator=generator).requires_grad_() for s in SHAPES)
    return x, w, b, torch.randint(50, (40,), generator=generator)


def loss(x, w, b, y, **how):
    return xent.linear_cross_entropy(x, w, y, linear_bias=b, **how)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# resident chunks, and tiles that are visited twice
@pytest.mark.parametrize("budget", [1 << 26, 9000])
def test_gradients_err_by_one_rounding_of_the_factors(head, budget):
    *leaves, y = head
    exact = torch.autograd.grad(loss(*leaves, y), leaves)
    half = torch.autograd.grad(loss(*leaves, y, product_dtype=BF16, memory_budget=budget), leaves)
    for a, b in zip(half, exact, strict=True):
        assert a.dtype == torch.float32
        assert 1e-5 < relative(a, b) < 2**-7


def test_half_factors_of_half_inputs_are_not_rounded_again(head):
    """The products are torch's own, so the logits are those of the unfused form."""
    x, w, _, y = head
    x, w = x.to(BF16).detach(), w.to(BF16).detach()
    ours = xent.linear_cross_entropy(x, w, y, reduction="none", product_dtype=BF16)
    torch.testing.assert_close(ours, F.cross_entropy(F.linear(x, w).float(), y, reduction="none").to(BF16))


def test_default_is_full_products_on_a_cpu(head):
    x, w, b, y = (t.detach() for t in head)
    x, w, b = x.to(BF16), w.to(BF16), b.to(BF16)
    exact = F.cross_entropy(F.linear(x.float(), w.float(), b.float()), y)
    assert loss(x, w, b, y) == exact.to(BF16)


def test_every_way_of_differentiating(head):
    *leaves, y = head
    x, w, b = leaves

    def value(w, how):
        return loss(x.detach(), w, b.detach(), y, **how)

    v = torch.randn_like(w)
    size = (torch.autograd.grad(loss(*leaves, y), w)[0].norm() * v.norm()).item()
    for derivative, scale in (
        (lambda how: torch.func.grad(value)(w.detach(), how), None),
        (lambda how: torch.func.jvp(lambda w: value(w, how), (w.detach(),), (v,))[1], size),
        (lambda how: torch.func.vmap(torch.func.grad(value), in_dims=(0, None))(w.detach()[None], how), None),
        (lambda how: torch.func.jvp(lambda w: torch.func.grad(value)(w, how), (w.detach(),), (v,))[1], None),
        (
            lambda how: torch.autograd.grad(torch.autograd.grad(value(w, how), w, create_graph=True), w, v)[
                0
            ],
            None,
        ),
    ):
        half, exact = derivative({"product_dtype": BF16}), derivative({})
        error = (half - exact).norm().item()
        assert 0 < error < 0.02 * (exact.norm().item() if scale is None else scale)


def test_compiled(head):
    *leaves, y = head
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(*leaves, y, product_dtype=BF16), leaves)
    eager = torch.autograd.grad(loss(*leaves, y, product_dtype=BF16), leaves)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_module(head):
    module = xent.nn.LinearCrossEntropyLoss(16, 50, product_dtype=BF16)
    assert "product_dtype=torch.bfloat16" in repr(module)
    x, *_, y = head
    expected = xent.linear_cross_entropy(x, module.linear.weight, y, product_dtype=BF16)
    assert module(x, y) == expected


@pytest.mark.parametrize(
    ("dtype", "asked"), [(torch.float64, BF16), (torch.float32, torch.float16), (BF16, torch.int8)]
)
def test_what_makes_no_sense_is_refused(dtype, asked):
    x, w = torch.zeros(2, 3, dtype=dtype), torch.zeros(4, 3, dtype=dtype)
    with pytest.raises(ValueError, match="product_dtype"):
        xent.linear_cross_entropy(x, w, torch.tensor([0, 1]), product_dtype=asked)
