"""The modules."""

from __future__ import annotations

import pytest
import torch

import xent


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_features", [(), (2, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_loads_the_state_dict_of_torch(bias, out_features, weighted):
    weight = torch.rand(7) + 0.5 if weighted else None
    options = {"bias": bias, "out_features": out_features, "weight": weight}
    theirs = torch.nn.LinearCrossEntropyLoss(5, 7, **options)
    ours = xent.nn.LinearCrossEntropyLoss(5, 7, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 5)
    target = torch.randint(7, (4, *out_features))
    a, b = ours(x, target), theirs(x, target)
    torch.testing.assert_close(a, b)
    a.backward()
    b.backward()
    torch.testing.assert_close(ours.linear.weight.grad, theirs.linear.weight.grad)
    theirs.load_state_dict(ours.state_dict())


def test_cross_entropy_loss_takes_every_option():
    z, target, s = torch.randn(4, 5), torch.tensor([0, 1, -1, 3]), torch.rand(4)
    options = {
        "ignore_index": -1,
        "reduction": "sum",
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "softcap": 10.0,
        "temperature": 2.0,
    }
    weight = torch.rand(5)
    module = xent.nn.CrossEntropyLoss(weight, **options)
    torch.testing.assert_close(
        module(z, target, sample_weight=s), xent.cross_entropy(z, target, weight, sample_weight=s, **options)
    )
    assert "label_smoothing=0.1" in repr(module)
    assert set(module.state_dict()) == {"weight"}
    assert module.double().weight.dtype == torch.float64


def test_denominator_reaches_the_module():
    head = xent.nn.LinearCrossEntropyLoss(3, 4)
    x, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    total = xent.linear_cross_entropy(x, head.linear.weight, target, reduction="sum")
    torch.testing.assert_close(head(x, target, denominator=10), total / 10)


def test_trains_like_the_unfused_pair():
    """Ten steps of Adam on the same data: the same weights."""
    x, target = torch.randn(32, 6), torch.randint(8, (32,))
    pair = torch.nn.Sequential(torch.nn.Linear(6, 8))
    head = xent.nn.LinearCrossEntropyLoss(6, 8, bias=True)
    head.linear.load_state_dict(pair[0].state_dict())
    for module, loss in (
        (pair, lambda: torch.nn.functional.cross_entropy(pair(x), target)),
        (head, lambda: head(x, target)),
    ):
        optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
        for _ in range(10):
            optimiser.zero_grad()
            loss().backward()
            optimiser.step()
    torch.testing.assert_close(head.linear.weight, pair[0].weight, rtol=1e-4, atol=1e-4)


HEADS = {
    "plain": {},
    "everything": {"bias": True, "softcap": 3.0, "temperature": 0.7, "logit_scale": 0.5},
    "positions": {"bias": True, "out_features": (3,), "logit_scale": 0.5},
}


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_what_else_a_head_says(options):
    head = xent.nn.LinearCrossEntropyLoss(5, 6, dtype=torch.float64, **options)
    x = torch.randn(4, 5, dtype=torch.float64)
    z = head.logits(x)
    shape = (4, *options.get("out_features", ()))
    assert z.shape == (4, 6, *shape[1:])
    y = torch.randint(6, shape)
    torch.testing.assert_close(head(x, y), torch.nn.functional.cross_entropy(z, y))
    log_p = z.log_softmax(1)
    torch.testing.assert_close(head.log_prob(x, y), log_p.gather(1, y[:, None])[:, 0])
    several = torch.randint(6, (*shape, 2))
    found = head.log_prob(x, several, return_entropy=True)
    torch.testing.assert_close(found.log_prob, log_p.movedim(1, -1).gather(-1, several))
    torch.testing.assert_close(found.entropy, -(log_p.exp() * log_p).sum(1))
    assert torch.equal(head.predict(x), z.argmax(1))
    p, classes = head.top_k(x, 2)
    torch.testing.assert_close(p, z.softmax(1).movedim(1, -1).topk(2).values)
    assert torch.equal(classes, z.movedim(1, -1).topk(2).indices)


def test_a_head_ties_the_weight_of_an_embedding():
    embedding = torch.nn.Embedding(7, 5)
    bias = torch.nn.Parameter(torch.zeros(7))
    head = xent.nn.LinearCrossEntropyLoss(linear_weight=embedding.weight, linear_bias=bias)
    assert head.linear.weight is embedding.weight
    assert head.linear.bias is bias
    assert (head.num_classes, head.linear.in_features, head.weight) == (7, 5, None)
    model = torch.nn.ModuleDict({"embedding": embedding, "head": head})
    assert len(list(model.parameters())) == 2
    tokens = torch.randint(7, (6,))
    head(embedding(tokens), tokens).backward()
    both = embedding.weight.grad.clone()
    embedding.zero_grad()
    logits = torch.nn.functional.linear(embedding(tokens), embedding.weight, bias)
    torch.nn.functional.cross_entropy(logits, tokens).backward()
    torch.testing.assert_close(both, embedding.weight.grad)
    again = xent.nn.LinearCrossEntropyLoss(5, 7, bias=True)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.linear.weight, embedding.weight)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"linear_bias": torch.nn.Parameter(torch.zeros(3))},
            ValueError,
            "linear_bias goes with linear_weight",
        ),
        (
            {"linear_weight": torch.zeros(3, 2)},
            TypeError,
            "linear_weight must be a torch.nn.Parameter, got Tensor",
        ),
        ({"linear_weight": torch.nn.Parameter(torch.zeros(3))}, ValueError, r"must be \(classes, features\)"),
        ({"in_features": 4}, ValueError, r"in_features is 4, and linear_weight \(3, 2\) has 2"),
        ({"num_classes": 4}, ValueError, r"num_classes is 4, and linear_weight \(3, 2\) has 3"),
        ({"out_features": (2,)}, ValueError, r"3 rows, which out_features \(2,\) do not divide"),
        ({"bias": True}, ValueError, "pass linear_bias beside linear_weight"),
        ({"dtype": torch.float64}, ValueError, "device and dtype are those of linear_weight"),
    ],
)
def test_weights_that_cannot_be_tied(options, kind, message):
    given = {"linear_weight": torch.nn.Parameter(torch.zeros(3, 2))} if "linear_bias" not in options else {}
    with pytest.raises(kind, match=message):
        xent.nn.LinearCrossEntropyLoss(**{**given, **options})


def test_a_forgotten_target_is_named():
    head = xent.nn.LinearCrossEntropyLoss(2, 3)
    with pytest.raises(TypeError, match=r"target is missing.*module\.logits\(input\)"):
        head(torch.zeros(1, 2))
