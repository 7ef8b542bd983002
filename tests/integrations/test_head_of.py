"""The layers that `head_of` knows: their loss is that of the logits of a call; all others are errors."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xent
from xent.integrations import head_of

N, D, C = 6, 5, 11
Y = torch.tensor([3, 0, 10, 5, 5, 1])


class Model(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(C, D)
        self.lm_head = nn.Linear(D, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(x)


def adapted(**options: object) -> nn.Module:
    """The head of a model that PEFT has given an adapter, with factors that are not 0."""
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["lm_head"], **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Model(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model.base_model.model.lm_head


def two_adapters() -> nn.Module:
    head = adapted()
    head.update_layer("other", 2, 3, config=peft.LoraConfig(r=2))
    head.set_adapter(["default", "other"])
    return head


def changed(head: nn.Module, method: str, *given: object) -> nn.Module:
    getattr(head, method)(*given)
    return head


def saved(**options: object) -> nn.Module:
    """A head of which PEFT trains a copy."""
    config = {"target_modules": ["embed"], "modules_to_save": ["lm_head"], **options}
    head = adapted(**config)
    with torch.no_grad():
        head.modules_to_save["default"].weight += 1.0
    return head


KNOWN = {
    "linear": lambda: nn.Linear(D, C),
    "without a bias": lambda: nn.Linear(D, C, bias=False),
    "LoRA": adapted,
    "LoRA, rank-stabilised": lambda: adapted(use_rslora=True),
    "LoRA with a bias": lambda: adapted(lora_bias=True),
    "LoRA of dropout, in evaluation": lambda: adapted(lora_dropout=0.5).eval(),
    "LoRA, disabled": lambda: changed(adapted(), "enable_adapters", False),
    "LoRA, merged": lambda: changed(adapted(), "merge"),
    "LoRA, unmerged": lambda: changed(changed(adapted(), "merge"), "unmerge"),
    "LoRA, one of two active": lambda: changed(two_adapters(), "set_adapter", "other"),
    "a copy that is trained": saved,
    "a copy, disabled": lambda: changed(saved(), "enable_adapters", False),
    "a deep copy": lambda: copy.deepcopy(adapted()),
}


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_the_loss_is_that_of_the_logits_of_a_call(make):
    module = make()
    x = torch.randn(N, D, requires_grad=True)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    called, read = F.cross_entropy(module(x), Y), xent.linear_cross_entropy(x, target=Y, **head_of(module))
    torch.testing.assert_close(read, called)
    found = torch.autograd.grad(read, leaves, allow_unused=True)
    expected = torch.autograd.grad(called, leaves, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_an_embedding_is_a_tied_head():
    embedding = nn.Embedding(C, D)
    head = head_of(embedding)
    assert head["linear_weight"] is embedding.weight
    assert head["linear_bias"] is None


def test_float32_adapters_of_a_half_model():
    module = adapted().to(torch.bfloat16)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    x = torch.randn(N, D).bfloat16()
    head = head_of(module)
    loss = xent.linear_cross_entropy(x, target=Y, **head)
    exact = x.double() @ head["linear_weight"].mapped(torch.Tensor.double).to_dense().T
    right = F.cross_entropy(exact + head["linear_bias"].double(), Y)
    torch.testing.assert_close(loss.double(), right, rtol=1e-2, atol=1e-2)
    assert head["linear_weight"].up.dtype == torch.float32


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_bias_of_float32_adapters_of_a_half_model(half):
    module = adapted(lora_bias=True).to(half)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    x = torch.randn(N, D).to(half)
    loss = xent.linear_cross_entropy(x, target=Y, **head_of(module))
    torch.testing.assert_close(loss.float(), F.cross_entropy(module(x).float(), Y), rtol=2e-2, atol=2e-2)


def test_a_forward_that_is_replaced_in_its_class(monkeypatch):
    module = nn.Linear(D, C)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * F.linear(x, self.weight, self.bias))
    with pytest.raises(TypeError, match="has a forward of its own"):
        head_of(module)


def test_another_tuner_is_named_with_its_module():
    model = peft.get_peft_model(Model(), peft.LoHaConfig(target_modules=["lm_head"]))
    with pytest.raises(TypeError, match=r"module is a peft\.tuners\.loha\.layer\.Linear|module is a LoHa"):
        head_of(model.base_model.model.lm_head)


def test_the_module_of_a_loss_knows_an_adapter():
    loss = xent.nn.LinearCrossEntropyLoss(D, C, bias=True)
    layer = adapted()
    loss.linear = layer
    x = torch.randn(N, D)
    torch.testing.assert_close(loss(x, Y), F.cross_entropy(layer(x), Y))
    torch.testing.assert_close(loss.logits(x), layer(x))
    torch.testing.assert_close(loss.log_prob(x, Y), -F.cross_entropy(layer(x), Y, reduction="none"))
    assert (loss.predict(x) == layer(x).argmax(1)).all()


class Quantised(nn.Linear):
    """A quantised layer as libraries have it: a linear layer by its class, with a product of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.round(), self.bias)


def hooked(head: nn.Module) -> nn.Module:
    head.register_forward_hook(lambda *_: None)
    return head


def hooked_inside() -> nn.Module:
    head = adapted()
    hooked(head.lora_A["default"])
    return head


def merged_and_disabled() -> nn.Module:
    head = adapted()
    head.merge()
    head._disable_adapters = True
    return head


class Scaled(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def on_quantised() -> nn.Module:
    head = adapted()
    quantised = Quantised(D, C)
    quantised.load_state_dict(head.base_layer.state_dict())
    head.base_layer = quantised
    return head


UNKNOWN = {
    "several adapters": (two_adapters, "several active adapters, default, other"),
    "DoRA": (lambda: adapted(use_dora=True), "the variant DoraLinearVariant"),
    "dropout": (lambda: adapted(lora_dropout=0.5), "an adapter with dropout"),
    "merged and disabled": (merged_and_disabled, r"call module\.unmerge\(\)"),
    "a hook": (lambda: hooked(adapted()), "module has the hook"),
    "a hook on a copy": (lambda: hooked(saved()), "module has the hook"),
    "a hook inside": (hooked_inside, r"module\.lora_A has the hook"),
    "quantised": (lambda: Quantised(D, C), r"\(Quantised\) has a forward of its own.*dequantise"),
    "quantised below": (on_quantised, r"module\.base_layer \(Quantised\) has a forward of its own"),
    "an embedding that scales": (lambda: Scaled(C, D), "has a forward of its own"),
    "another module": (lambda: nn.Sequential(nn.Linear(D, C)), "module is a Sequential"),
    "a whole model": (Model, "module is a Model"),
    "no module": (lambda: torch.ones(C, D), "module must be a torch.nn.Module, got Tensor"),
}


@pytest.mark.parametrize(("make", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known_is_an_error_that_says_the_way_out(make, message):
    with pytest.raises(TypeError, match=message) as error:
        head_of(make())
    assert "\n" not in str(error.value)
