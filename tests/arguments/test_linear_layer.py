"""A layer that computes more than x Wᵀ + b when it is called is an error; any other is read as it is."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import xent

D, C = 5, 7
HEADS = {
    "cross-entropy": lambda: xent.nn.LinearCrossEntropyLoss(D, C, bias=True),
    "triplets": lambda: xent.nn.LinearSoftTripletLoss(D, C, bias=True),
}


class Adapter(nn.Module):
    """A wrapper with the base's weight, as adapters have it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(D, 2, bias=False), nn.Linear(2, C, bias=False)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    @property
    def in_features(self):
        return self.base.in_features

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Called(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Hidden(nn.Linear):
    def _call_impl(self, *args, **kwargs):
        return 3 * super()._call_impl(*args, **kwargs)


class Tagged(torch.Tensor):
    """A tensor with a name of its own and no operation."""


class Quantised(torch.Tensor):
    """A weight whose products are its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def own_forward(linear):
    linear.forward = lambda x: 2 * F.linear(x, linear.weight, linear.bias)
    return linear


def quantised_weight(linear):
    weight = linear.weight.detach().as_subclass(Quantised)
    del linear.weight
    linear.weight = weight
    return linear


def with_hook(register):
    def change(linear):
        getattr(linear, register)(lambda *_: None)
        return linear

    return change


def old_weight_norm(linear):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(linear)


def like(kind):
    def change(linear):
        other = kind(D, C)
        other.load_state_dict(linear.state_dict())
        return other

    return change


CHANGED = {
    "adapter": (Adapter, "is a Adapter .* merge an adapter"),
    "own forward": (like(Scaled), "has a forward of its own"),
    "own call": (like(Called), "is a Called"),
    "own call implementation": (like(Hidden), "is a Hidden"),
    "patched forward": (own_forward, "has a forward of its own"),
    "dynamically quantised": (
        lambda linear: torch.ao.nn.quantized.dynamic.Linear(D, C),
        "dequantise a quantised layer",
    ),
    "quantisation-aware": (
        lambda linear: torch.ao.nn.qat.Linear(D, C, qconfig=torch.ao.quantization.get_default_qat_qconfig()),
        "has a forward of its own",
    ),
    "quantised weight": (quantised_weight, "linear.weight is a Quantised"),
    "sequential": (nn.Sequential, "is a Sequential"),
    "compiled wrapper": (lambda linear: torch.compile(linear, backend="eager"), "is a OptimizedModule"),
    "lazy": (lambda linear: nn.LazyLinear(C), "has the hook"),
    "pruned": (
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
        r"prune.remove\(linear, 'weight'\)",
    ),
    "pruned bias": (
        lambda linear: prune.random_unstructured(linear, "bias", 0.5),
        r"remove\(linear, 'bias'\)",
    ),
    "old weight norm": (old_weight_norm, "parametrizations.weight_norm"),
    "old spectral norm": (nn.utils.spectral_norm, "parametrizations.spectral_norm"),
    "forward hook": (with_hook("register_forward_hook"), "has the hook"),
    "forward pre-hook": (with_hook("register_forward_pre_hook"), "has the hook"),
    "backward hook": (with_hook("register_full_backward_hook"), "has the hook"),
    "backward pre-hook": (with_hook("register_full_backward_pre_hook"), "has the hook"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")  # which a layer of torch's calls
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("change", "says"), CHANGED.values(), ids=CHANGED)
def test_a_layer_that_does_more_is_an_error(change, says, head):
    loss = head()
    loss.linear = change(loss.linear)
    with pytest.raises(TypeError, match=says) as error:
        loss(torch.randn(3, D), torch.tensor([0, 1, 2]))
    assert "\n" not in str(error.value)
    assert "pass its logits to xent.cross_entropy" in str(error.value)


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


class Alike(nn.Linear):
    """A subclass that computes what its base does."""


def parametrised(linear):
    parametrize.register_parametrization(linear, "weight", Doubled())
    return linear


def pruned_for_good(linear):
    prune.l1_unstructured(linear, "weight", 0.5)
    return prune.remove(linear, "weight")


def compiled_in_place(linear):
    linear.compile(backend="eager")
    return linear


def tagged(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Tagged))
    return linear


KEPT = {
    "tagged": tagged,
    "itself": lambda linear: linear,
    "subclass": like(Alike),
    "parametrised": parametrised,
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned for good": pruned_for_good,
    "compiled in place": compiled_in_place,
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT)
def test_a_layer_that_does_not_is_read(change):
    head = HEADS["cross-entropy"]()
    head.linear = change(head.linear)
    x, y = torch.randn(3, D, requires_grad=True), torch.tensor([0, 1, 2])
    for step in range(2):  # a second step sees what the first one changed
        parameters = [x, *head.parameters()]
        right = torch.autograd.grad(F.cross_entropy(head.linear(x), y), parameters)
        found = torch.autograd.grad(head(x, y), parameters)
        for g, e in zip(found, right, strict=True):
            torch.testing.assert_close(g, e)
        with torch.no_grad():
            for parameter, g in zip(head.parameters(), found[1:], strict=True):
                parameter -= 0.1 * g
        state = {name: 2 * value for name, value in head.state_dict().items()}
        head.load_state_dict(state)
        torch.testing.assert_close(head(x, y), F.cross_entropy(head.linear(x), y), msg=f"step {step}")


def test_hooks_of_all_modules_are_ignored():
    head = HEADS["cross-entropy"]()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        head(torch.randn(3, D), torch.tensor([0, 1, 2])).backward()
    finally:
        handle.remove()


def test_hooks_on_the_loss_run():
    head, seen = HEADS["cross-entropy"](), []
    head.register_forward_hook(lambda *_: seen.append(1))
    head(torch.randn(3, D), torch.tensor([0, 1, 2]))
    assert seen == [1]


@pytest.mark.parametrize("change", [KEPT["itself"], KEPT["parametrised"]])
def test_layers_in_a_graph(change):
    head = HEADS["cross-entropy"]()
    head.linear = change(head.linear)
    x, y = torch.randn(3, D), torch.tensor([0, 1, 2])
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y), head(x, y))


def test_a_layer_of_another_size_is_named():
    head = HEADS["cross-entropy"]()
    head.linear = nn.Linear(D, C + 2)
    with pytest.raises(ValueError, match="set num_classes"):
        head(torch.randn(3, D), torch.tensor([0, 1, 2]))
    head.num_classes = C + 2
    head(torch.randn(3, D), torch.tensor([0, 1, 8])).backward()


def test_a_layer_without_a_weight_is_named():
    head = HEADS["cross-entropy"]()
    head.linear.weight = None
    with pytest.raises(TypeError, match=r"linear\.weight must be a tensor, got None"):
        head(torch.randn(3, D), torch.tensor([0, 1, 2]))
