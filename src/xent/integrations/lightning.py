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
        """Return the loss of a batch, which is logged as ``train_loss``.

        Args:
            batch: as the class describes it.
            index: the number of the batch.

        Returns:
            The loss, (), in nats.
        """
        return self._step(batch, "train")

    def validation_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss of a batch, which is logged as ``val_loss``.

        Args:
            batch: as the class describes it.
            index: the number of the batch.

        Returns:
            The loss, (), in nats.
        """
        return self._step(batch, "val")

    def _step(self, batch: Any, stage: str) -> Tensor:
        raise NotImplementedError


class CausalLM(_Trained):
    """A Lightning module that trains a causal language model of Transformers, without stored logits.

    The loss is :func:`xent.integrations.transformers.causal_lm_loss`. A batch is a dictionary with
    ``input_ids`` and ``labels``, as the collators of Transformers make it. The module logs ``train_loss`` and
    ``val_loss``, ``..._accuracy`` and ``..._entropy``, over the tokens that count.

    Args:
        model: the language model, which PEFT may wrap.
        optimizer: a function from parameters to their optimiser; :class:`torch.optim.AdamW` by default.

    Raises:
        ValueError, TypeError: in a step, as :func:`xent.integrations.transformers.causal_lm_loss`.

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
    """A Lightning module that trains any model of features with a linear classifier, without stored logits.

    A batch is ``(rows, target)``. The module logs ``train_loss`` and ``val_loss``.

    Args:
        features: a module from the rows of a batch to features, (N, in_features).
        head: the classifier and its loss, a :class:`xent.nn.LinearCrossEntropyLoss`.
        optimizer: a function from parameters to their optimiser; :class:`torch.optim.AdamW` by default.

    Raises:
        IndexError, ValueError, TypeError: in a step, as :func:`xent.linear_cross_entropy`.

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
        """Return the most probable class of each row.

        Args:
            rows: the rows of a batch, without targets.

        Returns:
            Class indices, (N,) int64.
        """
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
