"""The loss of language models without logits is the models' own: values, gradients, training curves."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

from integrations.models import CLASSES, GROUPED, MODELS, batch, gemma2, gpt2, llama, made, peft, trained
from xent.integrations import _architecture
from xent.integrations.transformers import CausalLMLoss, causal_lm_loss, compute_loss, language_head

EVERY = pytest.mark.parametrize("name", list(MODELS))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    size = max(1e-3, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * size)


def close_gradients(loss: torch.Tensor, model: nn.Module, expected: tuple[torch.Tensor, ...]) -> None:
    """The gradients of a loss in what the model trains."""
    for one, other in zip(torch.autograd.grad(loss, trained(model)), expected, strict=True):
        close(one, other)


@EVERY
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7.0)], ids=["mean", "number", "tensor"])
def test_loss_and_gradients_are_the_models_own(name, items):
    model = made(name).eval()
    ids, labels = batch()
    own = model(input_ids=ids, labels=labels, num_items_in_batch=items).loss
    expected = torch.autograd.grad(own, trained(model))
    found = causal_lm_loss(model, ids, labels, num_items_in_batch=items)
    assert found.dtype == torch.float32
    close(found, own)
    close_gradients(found, model, expected)
    statistics = causal_lm_loss(model, ids, labels, num_items_in_batch=items, return_statistics=True)
    close(statistics.loss, own)
    for one, other in zip(torch.autograd.grad(statistics.loss, trained(model)), expected, strict=True):
        close(one, other)


@EVERY
def test_statistics_are_those_of_the_logits(name):
    model = made(name).eval()
    ids, labels = batch()
    found = causal_lm_loss(model, ids, labels, return_statistics=True)
    logits, target = model(input_ids=ids).logits[:, :-1].double(), labels[:, 1:]
    counted, log_p = target != -100, logits.log_softmax(-1)
    assert isinstance(found, CausalLMLoss)
    assert found.tokens == counted.sum()
    assert found.correct == ((logits.argmax(-1) == target) & counted).sum()
    entropy = -(log_p.exp() * log_p).sum(-1)[counted].sum()
    torch.testing.assert_close(found.entropy_sum.double(), entropy, rtol=1e-5, atol=1e-5)
    assert not found.entropy_sum.requires_grad


@EVERY
def test_a_training_curve_is_the_models_own(name):
    """Five steps of two batches each, whose gradients add up, with AdamW."""
    curves = []
    for fused in (False, True):
        model = made(name).eval()
        optimizer, curve = torch.optim.AdamW(trained(model), lr=1e-2), []
        for _ in range(5):
            ids, labels = batch(4)
            items, total = (labels[:, 1:] != -100).sum(), 0.0
            for part in (slice(0, 2), slice(2, 4)):
                if fused:
                    loss = causal_lm_loss(model, ids[part], labels[part], num_items_in_batch=items)
                else:
                    given = {"input_ids": ids[part], "labels": labels[part], "num_items_in_batch": items}
                    loss = model(**given).loss
                loss.backward()
                total += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(total)
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < curves[0][0]
    close(*curves)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma-2", "PEFT"])
def test_bfloat16_errs_no_more_than_the_models_own(name):
    """Against the model in float64, beside the rounding of the layers below, which both share."""
    model = made(name).eval().to(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    ids, labels = batch(8)
    right = exact(input_ids=ids, labels=labels).loss
    own, found = model(input_ids=ids, labels=labels).loss, causal_lm_loss(model, ids, labels)
    assert found.dtype == torch.float32
    assert abs(found.double() - right) <= abs(own.double() - right) + 1e-2
    every = zip(
        *(
            torch.autograd.grad(loss, trained(m))
            for loss, m in ((found, model), (own, model), (right, exact))
        ),
        strict=True,
    )
    for one, other, wanted in every:
        errors = [(g.double() - wanted).norm() for g in (one, other)]
        assert errors[0] <= 1.5 * errors[1] + 0.01 * wanted.norm()


@pytest.mark.parametrize("name", ["GPT-2", "Gemma-2", "PEFT"])
def test_under_autocast_it_is_the_models_own(name):
    model = made(name).eval()
    ids, labels = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own, found = model(input_ids=ids, labels=labels).loss, causal_lm_loss(model, ids, labels)
    assert found.dtype == torch.float32
    close(found, own, 1e-2)
    expected = torch.autograd.grad(own, trained(model))
    for one, other in zip(torch.autograd.grad(found, trained(model)), expected, strict=True):
        assert (one - other).norm() <= 0.05 * other.norm() + 1e-4


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "PEFT"])
def test_with_gradient_checkpointing(name):
    model = made(name).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids, labels = batch()
    own, found = model(input_ids=ids, labels=labels).loss, causal_lm_loss(model, ids, labels)
    expected = torch.autograd.grad(own, trained(model))
    close(found, own)
    close_gradients(found, model, expected)


@pytest.mark.parametrize("name", ["Llama", "Gemma-2"])
def test_compiled_whole(name):
    """The step as one graph, the model's layers among it."""
    model = made(name).eval()
    ids, labels = batch()
    own = model(input_ids=ids, labels=labels).loss
    expected = torch.autograd.grad(own, trained(model))

    def step(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return causal_lm_loss(model, ids, labels)

    found = torch.compile(step, backend="aot_eager", fullgraph=True)(ids, labels)
    close(found, own)
    close_gradients(found, model, expected)


@pytest.mark.parametrize("name", ["Llama", "PEFT"])
def test_a_compiled_model(name):
    model = made(name).eval()
    ids, labels = batch()
    own = model(input_ids=ids, labels=labels).loss
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for _ in range(3):
        close(causal_lm_loss(compiled, ids, labels), own)
    frames = counter.frame_count
    assert frames > 0
    close(causal_lm_loss(compiled, ids, labels), own)
    assert counter.frame_count == frames  # nothing is compiled anew


def test_shifted_labels_and_further_arguments():
    model = made("Llama").eval()
    ids, labels = batch()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    own = model(input_ids=ids, labels=labels, attention_mask=mask).loss
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    close(causal_lm_loss(model, ids, labels, attention_mask=mask), own)
    close(causal_lm_loss(model, ids, shift_labels=shifted, attention_mask=mask), own)
    embedded = model.get_input_embeddings()(ids)
    close(causal_lm_loss(model, labels=labels, inputs_embeds=embedded, attention_mask=mask), own)


def test_a_prompt_of_peft_is_followed():
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    ids, labels = batch()
    given = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    own = model(**given).loss
    found = causal_lm_loss(model, **given, check_model=False)
    close(found, own)
    (wanted,), (one,) = (torch.autograd.grad(loss, trained(model)) for loss in (own, found))
    close(one, wanted)


def test_a_batch_without_labels_that_count():
    model = made("Llama").eval()
    ids, labels = batch()
    loss = causal_lm_loss(model, ids, torch.full_like(labels, -100))
    assert loss == 0
    loss.backward()
    assert all((p.grad == 0).all() for p in trained(model) if p.grad is not None)
    found = causal_lm_loss(model, ids, torch.full_like(labels, -100), return_statistics=True)
    assert found == (0, 0, 0, 0)


class Tempered(transformers.LlamaForCausalLM):
    """A model that does more behind its head than its config says."""

    def forward(self, *args, labels=None, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 0.5
        if labels is not None:
            found.loss = self.loss_function(found.logits, labels, self.vocab_size)
        return found


def test_a_model_that_does_more_is_an_error_with_both_numbers():
    model = Tempered(llama().config)
    ids, labels = batch()
    with pytest.raises(
        ValueError, match=r"the loss of Tempered is \d\.\d+ on 9 tokens.* is \d\.\d+"
    ) as error:
        causal_lm_loss(model, ids, labels)
    assert "\n" not in str(error.value)
    causal_lm_loss(model, ids, labels, check_model=False)


def test_a_softcap_that_small_logits_hide_is_noticed():
    """Logits near 0 pass a softcap of 30 unchanged to 1e-5; made larger they do not."""
    model = gemma2(final_logit_softcapping=30.0, initializer_range=1e-3)
    model.config.final_logit_softcapping = None
    original = type(model).forward

    class Hidden(type(model)):
        def forward(self, *args, labels=None, **kwargs):
            self.config.final_logit_softcapping = 30.0
            found = original(self, *args, labels=labels, **kwargs)
            self.config.final_logit_softcapping = None
            return found

    model.__class__ = Hidden
    ids, labels = batch()
    with pytest.raises(ValueError, match="its hidden states multiplied by"):
        causal_lm_loss(model, ids, labels)


def test_the_check_changes_nothing():
    model = made("Llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    ids, labels = batch()
    causal_lm_loss(model, ids, labels, check_model=False)
    plain = torch.get_rng_state()
    torch.set_rng_state(before)
    causal_lm_loss(model, ids, labels)
    assert (torch.get_rng_state() == plain).all()
    assert [module.training for module in model.modules()] == modes
    assert not model.lm_head._forward_pre_hooks
    assert "forward" not in model.__dict__


def test_it_is_checked_once(monkeypatch):
    model, (ids, labels) = made("Llama").eval(), batch()
    calls = []
    compare = _architecture._compare
    monkeypatch.setattr(_architecture, "_compare", lambda *given: calls.append(1) or compare(*given))
    for _ in range(3):
        causal_lm_loss(model, ids, labels)
    assert len(calls) == 2


def test_the_head_of_a_model():
    assert language_head(made("Cohere"))["logit_scale"] == 0.25
    assert language_head(made("Granite"))["logit_scale"] == 0.25
    assert language_head(made("Gemma-2"))["softcap"] == 2.0
    assert language_head(made("Phi"))["linear_bias"] is not None
    with pytest.raises(TypeError, match="has no head"):
        language_head(llama().model)


def t5() -> nn.Module:
    sizes = {"vocab_size": CLASSES, "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def experts() -> nn.Module:
    model = llama()
    model.config.output_router_logits = True
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (t5, ValueError, "T5ForConditionalGeneration is an encoder-decoder"),
        (experts, ValueError, "set config.output_router_logits = False"),
        (lambda: nn.Linear(3, 3), TypeError, "must be a causal language model of Transformers, got Linear"),
        (lambda: peft(use_dora=True), TypeError, "lm_head has an adapter of the variant DoraLinearVariant"),
    ],
)
def test_what_is_not_known_is_an_error(make, error, message):
    ids, labels = batch()
    with pytest.raises(error, match=message):
        causal_lm_loss(make(), ids, labels)


def test_labels_that_are_shifted_stand_before_others():
    model, (ids, labels) = made("Llama").eval(), batch()
    shifted = labels.roll(1, 1)
    own = model(input_ids=ids, labels=labels, shift_labels=shifted).loss
    close(causal_lm_loss(model, ids, labels, shift_labels=shifted), own)
    with pytest.raises(ValueError, match="pass labels, or shift_labels"):
        causal_lm_loss(gpt2(), ids)


def test_another_index_is_ignored():
    model, (ids, labels) = made("Llama").eval(), batch()
    other = labels.clamp(min=0)
    own = model(input_ids=ids, labels=other, ignore_index=0).loss
    close(causal_lm_loss(model, ids, other, ignore_index=0), own)
    close(causal_lm_loss(model, ids, other, ignore_index=0, return_statistics=True).loss, own)


@pytest.mark.parametrize("how", ["argument", "config", "fused"])
def test_the_balancing_loss_of_experts_is_no_silent_loss(how):
    from xent.integrations.trl import add_fused_lm_head

    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**GROUPED, **sizes)).eval()
    ids, labels = batch()
    close(causal_lm_loss(model, ids, labels), model(input_ids=ids, labels=labels).loss)
    given = {"output_router_logits": True} if how != "config" else {}
    model.config.output_router_logits = how == "config"
    if how == "fused":
        add_fused_lm_head(model)
        given["fused_lm_head"] = True

    def loss() -> torch.Tensor:
        if how == "fused":
            return model(input_ids=ids, labels=labels, **given)
        return causal_lm_loss(model, ids, labels, **given)

    with pytest.raises(ValueError, match="adds the balancing loss of its experts"):
        loss()


def test_a_model_that_casts_before_its_head():
    sizes = {"vocab_size": CLASSES, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).bfloat16().eval()
    ids, labels = batch()
    own = model(input_ids=ids, labels=labels).loss
    close(causal_lm_loss(model, ids, labels), own, 1e-2)


def test_a_configuration_that_changes_is_compared_again():
    model, (ids, labels) = made("Llama").eval(), batch()
    causal_lm_loss(model, ids, labels)
    model.config.final_logit_softcapping = 1.0  # which this model does not read
    with pytest.raises(ValueError, match="the loss of LlamaForCausalLM is"):
        causal_lm_loss(model, ids, labels)


@pytest.mark.parametrize("kind", ["LoRA", "prompt"])
def test_mixed_precision_around_an_adapter(tmp_path, kind):
    """Accelerate's forward is then that of the wrapper."""
    from peft import PromptTuningConfig, get_peft_model

    def make() -> nn.Module:
        torch.manual_seed(0)
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return peft() if kind == "LoRA" else get_peft_model(llama(), prompt)

    curves = [
        torch.tensor(logged(trainer, str(tmp_path), make, bf16=True))
        for trainer in (transformers.Trainer, Trainer)
    ]
    torch.testing.assert_close(*curves, rtol=2e-2, atol=2e-2)


def test_a_wrapper_without_the_models_forward_is_an_error():
    from peft import AdaptionPromptConfig, get_peft_model

    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
    model, (ids, labels) = get_peft_model(llama(), config).eval(), batch()
    with pytest.raises(TypeError, match="does not call the forward of the LlamaForCausalLM"):
        causal_lm_loss(model, ids, labels, check_model=False)


@pytest.mark.parametrize("statistics", [False, True])
def test_numbers_of_items(statistics):
    model, (ids, labels) = made("Llama").eval(), batch()
    options = {"return_statistics": statistics}
    for wrong in (0, -1.0):
        with pytest.raises(ValueError, match="num_items_in_batch must be positive"):
            causal_lm_loss(model, ids, labels, num_items_in_batch=wrong, **options)
    found = causal_lm_loss(model, ids, labels, num_items_in_batch=torch.tensor([7]), **options)
    assert (found.loss if statistics else found).shape == ()


def test_tokens_without_a_batch():
    ids, labels = batch()
    with pytest.raises(ValueError, match=r"input_ids must be \(batch, tokens\), got \(9,\)"):
        causal_lm_loss(llama(), ids[0], labels[0])
    with pytest.raises(TypeError, match="model is a DataParallel"):
        causal_lm_loss(nn.DataParallel(llama()), ids, labels)
    electra = transformers.ElectraForCausalLM(
        transformers.ElectraConfig(
            vocab_size=CLASSES, hidden_size=8, embedding_size=16, num_hidden_layers=1, num_attention_heads=1
        )
    )
    with pytest.raises(TypeError, match="ElectraForCausalLM does more between its base model and its head"):
        causal_lm_loss(electra, ids, labels, check_model=False)


class Trainer(transformers.Trainer):
    compute_loss = compute_loss


def logged(kind: type, folder: str, make=lambda: made("Llama"), **options) -> list[float]:
    torch.manual_seed(0)
    ids, labels = batch(16)
    rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
        **options,
    )
    trainer = kind(make(), arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*curve, trainer.evaluate()["eval_loss"]]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-5), ({"bf16": True}, 1e-2), ({"gradient_checkpointing": True}, 1e-5)],
    ids=["float32", "bfloat16", "checkpointing"],
)
def test_the_trainer_of_transformers(tmp_path, options, tolerance):
    """Five steps of two accumulated batches, and an evaluation, against the trainer as it is."""
    curves = [
        torch.tensor(logged(kind, str(tmp_path), **options)) for kind in (transformers.Trainer, Trainer)
    ]
    assert len(curves[0]) == 6
    torch.testing.assert_close(*curves, rtol=tolerance, atol=tolerance)


def test_the_trainer_gathers_statistics(tmp_path):
    ids, labels = batch(4)
    rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    found = {}

    def metrics(prediction):
        correct, entropy, tokens = prediction.predictions
        found["accuracy"], found["entropy"] = correct.sum() / tokens.sum(), entropy.sum() / tokens.sum()
        found["tokens"] = tokens.sum()
        return {}

    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(made("Llama"), arguments, eval_dataset=rows, compute_metrics=metrics)
    trainer.evaluate()
    assert found["tokens"] == (labels[:, 1:] != -100).sum()
    whole = causal_lm_loss(trainer.model, ids, labels, return_statistics=True)
    assert found["accuracy"] == pytest.approx((whole.correct / whole.tokens).item())
    assert found["entropy"] == pytest.approx((whole.entropy_sum / whole.tokens).item(), rel=1e-5)


def test_a_trainer_that_needs_logits_is_an_error(tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[])
    trainer = Trainer(made("Llama"), arguments)
    ids, labels = batch()
    with pytest.raises(ValueError, match="label_smoothing_factor needs logits"):
        trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": labels})
