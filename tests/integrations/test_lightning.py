"""Modules of Lightning train as the same steps by hand do."""

from __future__ import annotations

import functools
import warnings

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import xent
from integrations.models import batch, made, trained
from xent.integrations.lightning import CausalLM, Classifier

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def fitted(module, rows, validation=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, rows, validation)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def test_a_language_model():
    ids, labels = batch(8)
    rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    module = CausalLM(made("Llama").eval(), SGD)
    logged = fitted(module, DataLoader(rows, batch_size=2), DataLoader(rows, batch_size=8))
    by_hand = made("Llama").eval()
    for i in range(0, 8, 2):
        loss = by_hand(input_ids=ids[i : i + 2], labels=labels[i : i + 2]).loss
        loss.backward()
        with torch.no_grad():
            for p in trained(by_hand):
                p -= 0.1 * p.grad
                p.grad = None
    for one, other in zip(trained(module.model), trained(by_hand), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    own = by_hand(input_ids=ids, labels=labels)
    assert logged["val_loss"] == pytest.approx(own.loss.item(), rel=1e-4)
    counted = labels[:, 1:] != -100
    right = (own.logits[:, :-1].argmax(-1) == labels[:, 1:])[counted].float().mean().item()
    assert logged["val_accuracy"] == pytest.approx(right)
    assert {"train_loss", "train_accuracy", "train_entropy", "val_entropy"} <= logged.keys()


def test_a_classifier():
    torch.manual_seed(0)
    x, y = torch.randn(64, 5), torch.randint(3, (64,))
    module = Classifier(nn.Linear(5, 4), xent.nn.LinearCrossEntropyLoss(4, 3), SGD)
    before = torch.nn.functional.cross_entropy(module.head.logits(module.features(x)), y)
    logged = fitted(module, DataLoader(list(zip(x, y, strict=True)), batch_size=8))
    after = torch.nn.functional.cross_entropy(module.head.logits(module.features(x)), y)
    assert after < before
    assert logged["train_loss"] > 0
    assert module(x).shape == (64,)


def test_rows_that_are_ignored_do_not_weigh():
    torch.manual_seed(0)
    x, y = torch.randn(8, 5), torch.tensor([0, -100, -100, -100, 1, 2, 0, 1])
    module = Classifier(nn.Linear(5, 4), xent.nn.LinearCrossEntropyLoss(4, 3), functools.partial(SGD, lr=0.0))
    rows = DataLoader(list(zip(x, y, strict=True)), batch_size=4)
    logged = fitted(module, rows, rows)
    whole = torch.nn.functional.cross_entropy(module.head.logits(module.features(x)), y)
    assert logged["val_loss"] == pytest.approx(whole.item(), rel=1e-5)


def test_a_validation_without_labels_logs_nothing():
    ids, _ = batch(4)
    rows = [{"input_ids": i, "labels": torch.full_like(i, -100)} for i in ids]
    logged = fitted(
        CausalLM(made("Llama"), SGD), DataLoader(rows, batch_size=2), DataLoader(rows, batch_size=2)
    )
    assert logged == {}
