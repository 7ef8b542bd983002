"""Modules of Lightning: a language model, and a classifier on any features, trained without logits.

batch → loss, accuracy and entropy of the tokens or rows that count, logged
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from xent import nn as xent_nn
from xent.integrations.transformers import causal_lm_loss

__all__ = ["CausalLM", "Classifier"]

Optimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


class _Trained(LightningModule):
    """A module that logs what its loss knows, with an optimizer."""

    optimizer: Optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the parameters."""
        return self.optimizer(self.parameters())

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss of a batch, which is logged as ``train_loss``."""
        return self._step(batch, "train")

    def validation_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss of a batch, which is logged as ``val_loss``."""
        return self._step(batch, "val")

    def _step(self, batch: Any, stage: str) -> Tensor:
        raise NotImplementedError


class CausalLM(_Trained):
    """A causal language model of Transformers, trained by `causal_lm_loss` without logits.

    Args:
        model: the language model, which PEFT may wrap.
        optimizer: makes the optimizer of parameters; :class:`torch.optim.AdamW` by default.

    A batch is a dictionary with ``input_ids`` and ``labels``, as collators of Transformers make it. Logged
    are ``train_loss`` and ``val_loss``, ``..._accuracy`` and ``..._entropy``, of the tokens that count.

    Example:
        >>> import lightning, torch, transformers
        >>> from xent.integrations.lightning import CausalLM
        >>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=100)
        >>> module = CausalLM(transformers.GPT2LMHeadModel(config))
        >>> ids = torch.randint(100, (2, 6))
        >>> loss = module.training_step({"input_ids": ids, "labels": ids}, 0)
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer = torch.optim.AdamW) -> None:
        super().__init__()
        self.model, self.optimizer = model, optimizer

    def _step(self, batch: dict[str, Any], stage: str) -> Tensor:
        found = causal_lm_loss(self.model, **batch, return_statistics=True)
        count = found.tokens.clamp(min=1)
        values = {"loss": found.loss.detach(), "accuracy": found.correct / count}
        values["entropy"] = found.entropy_sum / count
        _log(self, stage, values, int(found.tokens))
        return found.loss


class Classifier(_Trained):
    """Any module that makes features, and a linear classifier on them, trained without logits.

    Args:
        features: rows of a batch → (N, in_features).
        head: the classifier and its loss, a :class:`xent.nn.LinearCrossEntropyLoss`.
        optimizer: makes the optimizer of parameters; :class:`torch.optim.AdamW` by default.

    A batch is ``(rows, target)``. Logged are ``train_loss`` and ``val_loss``.

    Example:
        >>> import torch, xent
        >>> from xent.integrations.lightning import Classifier
        >>> head = xent.nn.LinearCrossEntropyLoss(in_features=8, num_classes=1000)
        >>> module = Classifier(torch.nn.Linear(20, 8), head)
        >>> loss = module.training_step((torch.randn(4, 20), torch.randint(1000, (4,))), 0)
    """

    def __init__(
        self,
        features: nn.Module,
        head: xent_nn.LinearCrossEntropyLoss,
        optimizer: Optimizer = torch.optim.AdamW,
    ) -> None:
        super().__init__()
        self.features, self.head, self.optimizer = features, head, optimizer

    def forward(self, rows: Any) -> Tensor:
        """Return the most probable class of each row, int64."""
        return self.head.predict(self.features(rows))

    def _step(self, batch: tuple[Any, Tensor], stage: str) -> Tensor:
        rows, target = batch
        loss: Tensor = self.head(self.features(rows), target)
        index: Any = self.head.ignore_index
        ignored = (target == index).sum() if target.dim() == 1 else 0
        _log(self, stage, {"loss": loss.detach()}, len(target) - int(ignored))
        return loss


def _log(module: LightningModule, stage: str, values: dict[str, Tensor], count: int) -> None:
    """Write values by their stage, weighed by a count of tokens or rows, where it and a trainer are there."""
    if module._trainer is not None and count:
        module.log_dict({f"{stage}_{name}": value for name, value in values.items()}, batch_size=count)
