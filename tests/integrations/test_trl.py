"""The drop-ins return what TRL's functions of the same names do, and follow adapters that these leave out."""

from __future__ import annotations

import copy

import pytest
import torch
import trl
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as TheirDivergence
from trl.kernels.chunked_logprob import ChunkedLogProbFunction as TheirLogProb
from trl.trainer.utils import add_fused_lm_head as their_fused_lm_head

import xent
from integrations.models import batch, llama, made, peft, trained
from xent.integrations.trl import (
    ChunkedDivergenceFunction,
    ChunkedLogProbFunction,
    add_fused_lm_head,
)

N, C = 7, 50
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def head(width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(s, requires_grad=True) for s in ((N, width), (C, width), (C,)))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("outputs", [OUTPUTS[1:], ("entropy",), ()], ids=["all", "entropy", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_log_probabilities(softcap, outputs, bias):
    x, w, b = head()
    b = b if bias else None
    targets = torch.randint(C, (N,))
    targets[0] = (x @ w.T + (0 if b is None else b)).argmax(1)[0]
    given = (x, w, b, targets, 0.7, 16, softcap, 0.5, outputs)
    found, expected = ChunkedLogProbFunction.apply(*given), TheirLogProb.apply(*given)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    leaves = [t for t in (x, w, b) if t is not None]
    upstream = torch.randn(N)
    losses = []
    for each in (found, expected):
        loss = (each[0] * upstream).sum()
        losses.append(loss if each[1] is None else loss - 0.1 * each[1].sum())
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not any(t.requires_grad for t in found[2:] if t is not None)


def test_log_probabilities_never_exceed_0():
    """Where a token is sure, TRL's difference of two large numbers rounds above 0, and loses its digits."""
    x, w = torch.tensor([[1000.0, 1.0]]), torch.tensor([[3.0, 17.0], [3.0, -3.0]])
    found = ChunkedLogProbFunction.apply(x, w, None, torch.tensor([0]), 1.0, 32, None, 1.0, ())
    assert found.log_probs.item() == pytest.approx(-torch.tensor(-20.0).exp().item(), rel=1e-4)
    assert found.log_probs.item() < 0


def test_log_probabilities_of_half_types_and_autocast():
    x, w, b = (t.detach().bfloat16() for t in head())
    targets = torch.randint(C, (N,))
    found = ChunkedLogProbFunction.apply(x, w, b, targets)
    right = (x.double() @ w.double().T + b.double()).log_softmax(1).gather(1, targets[:, None])[:, 0]
    assert found.log_probs.dtype == torch.float32
    torch.testing.assert_close(found.log_probs.double(), right, rtol=1e-5, atol=1e-5)
    wide = ChunkedLogProbFunction.apply(x, w.float(), b.float(), targets)
    torch.testing.assert_close(wide.log_probs, found.log_probs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ChunkedLogProbFunction.apply(x.float(), w.float(), b.float(), targets)
    torch.testing.assert_close(cast.log_probs, found.log_probs)


def test_an_output_that_there_is_not():
    x, w, b = head()
    with pytest.raises(ValueError, match="outputs holds 'entropies'"):
        ChunkedLogProbFunction.apply(x, w, b, torch.randint(C, (N,)), outputs=("entropies",))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("softcaps", [(None, None), (2.0, None), (None, 3.0), (1.5, 3.0)])
def test_divergences(beta, softcaps):
    x, w, b = head()
    y, v, c = (t.detach() for t in head(5))
    given = (x, w, b, y, v, c, beta, 0.7, 0.5, softcaps[0], 1.5, softcaps[1])
    found, expected = ChunkedDivergenceFunction.apply(*given), TheirDivergence.apply(*given)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not found[1].requires_grad
    upstream = torch.randn(N)
    gradients = (torch.autograd.grad((value * upstream).sum(), [x, w, b]) for value, _ in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_divergences_keep_the_teacher_still():
    x, w, b = head()
    y, v, c = head(5)
    ChunkedDivergenceFunction.apply(x, w, b, y, v, c, 0.5)[0].sum().backward()
    assert (y.grad, v.grad, c.grad) == (None, None, None)
    assert x.grad is not None
    half = [t.detach().bfloat16() for t in (x, w, b, y, v, c)]
    found = ChunkedDivergenceFunction.apply(*half, 0.5)
    assert [t.dtype for t in found] == [torch.float32] * 2


def test_divergences_of_an_adapter():
    x, w, b = head()
    y, v, c = (t.detach() for t in head(5))
    down, up = torch.randn(2, 8), torch.randn(C, 2)
    found, _ = ChunkedDivergenceFunction.apply(x, xent.LowRank(w, down, up), b, y, v, c, 0.5)
    torch.testing.assert_close(found, ChunkedDivergenceFunction.apply(x, w + up @ down, b, y, v, c, 0.5)[0])


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma-2", "Cohere", "Granite"])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_fused_head(name, shifted):
    ids, labels = batch()
    given = {"shift_labels" if shifted else "labels": labels}
    found = []
    for patch in (add_fused_lm_head, their_fused_lm_head):
        model = made(name).eval()
        patch(model, temperature=0.7, outputs=OUTPUTS)
        out = model(input_ids=ids, fused_lm_head=True, num_items_in_batch=torch.tensor(11), **given)
        found.append((out, torch.autograd.grad(out.loss, trained(model))))
    (ours, gradients), (theirs, expected) = found
    assert type(ours) is type(theirs)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_fused_head_leaves_the_forward():
    model = made("Llama").eval()
    ids, labels = batch()
    before = model(input_ids=ids, labels=labels)
    add_fused_lm_head(model)
    after = model(input_ids=ids, labels=labels)
    assert after.loss == before.loss
    assert (after.logits == before.logits).all()
    assert model.generate(ids[:1], max_new_tokens=2, do_sample=False).shape == (1, ids.shape[1] + 2)


def test_a_forward_that_is_a_plain_function():
    """As some wrappers leave it on a model."""
    model, (ids, labels) = made("Llama").eval(), batch()
    method = model.forward
    before = model(input_ids=ids, labels=labels).loss
    model.forward = lambda *args, **inputs: method(*args, **inputs)
    add_fused_lm_head(model)
    assert model(input_ids=ids, labels=labels).loss == before
    torch.testing.assert_close(model(input_ids=ids, labels=labels, fused_lm_head=True).loss, before)


def test_a_copy_of_a_patched_model_is_its_own():
    model, (ids, labels) = made("Llama").eval(), batch()
    add_fused_lm_head(model)
    twin = copy.deepcopy(model)
    before = model(input_ids=ids).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(input_ids=ids).logits, before)
    assert twin(input_ids=ids, labels=labels, fused_lm_head=True).loss > 0


def test_a_fused_head_of_an_adapter():
    """TRL reads the weight below the adapter; here its term is there, with a gradient."""
    ids, labels = batch()
    model = peft().eval()
    own = model(input_ids=ids, labels=labels).loss
    add_fused_lm_head(model)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True).loss
    torch.testing.assert_close(found, own)
    for one, other in zip(*(torch.autograd.grad(loss, trained(model)) for loss in (found, own)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    theirs = peft().eval()
    their_fused_lm_head(theirs.get_base_model())
    assert abs(theirs(input_ids=ids, labels=labels, fused_lm_head=True).loss - own) > 0.01


def test_a_fused_head_in_float32_under_autocast():
    ids, labels = batch()
    model = made("Llama").eval()
    add_fused_lm_head(model, cast_lm_head_to_fp32=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(ids).last_hidden_state.float()
        found = model(input_ids=ids, labels=labels, fused_lm_head=True).loss
    right = torch.nn.functional.cross_entropy(
        (hidden[:, :-1] @ model.lm_head.weight.T).flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_the_trainer_of_trl(tmp_path, loss_type):
    """Three steps of its supervised trainer with either head: the same curve, entropy and accuracy."""
    from datasets import Dataset

    ids, _ = batch(12)
    rows = Dataset.from_dict({"input_ids": ids.tolist()})
    curves = []
    for patch in (None, add_fused_lm_head):
        torch.manual_seed(0)
        arguments = trl.SFTConfig(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            loss_type=loss_type,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = trl.SFTTrainer(llama_for_trl(), arguments, train_dataset=rows, processing_class=tokenizer())
        if patch is not None:
            patch(trainer.model, outputs=("log_probs", "entropy", "is_top1"))
        trainer.train()
        curves.append(
            [
                [entry[key] for key in ("loss", "entropy", "mean_token_accuracy")]
                for entry in trainer.state.log_history
                if "loss" in entry
            ]
        )
    assert len(curves[0]) == 3
    torch.testing.assert_close(*(torch.tensor(curve) for curve in curves), rtol=1e-4, atol=1e-4)


def llama_for_trl() -> torch.nn.Module:
    torch.manual_seed(0)
    return llama()


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(97)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w0", bos_token="w1", eos_token="w2")
