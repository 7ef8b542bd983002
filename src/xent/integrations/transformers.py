"""The loss of a causal language model of Transformers, from its hidden states and its head: without logits.

    hidden states → scale, softcap of the architecture → −log p of the next token, its entropy, its argmax

The labels are shifted by one, −100 is left out, as in Transformers. A wrapper around the model (DDP, FSDP,
PEFT, `torch.compile`) runs as it would: it is called, and the model inside computes this loss.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from xent._arguments.call import resolve_local_head
from xent._arguments.options import Execution, LogitOptions, Options, ReductionOptions, TargetOptions
from xent._row_statistics import linear_row_statistics
from xent.integrations._architecture import LanguageHead, check, language_head, last_hidden
from xent.integrations._wrappers import causal_lm, forward_replaced, is_hooked

__all__ = ["CausalLMLoss", "causal_lm_loss", "compute_loss", "language_head"]


class CausalLMLoss(NamedTuple):
    """The loss of a batch and what trainers log beside it, over the tokens that count.

    Example:
        >>> import torch, transformers
        >>> from xent.integrations.transformers import causal_lm_loss
        >>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=100)
        >>> model, ids = transformers.GPT2LMHeadModel(config), torch.randint(100, (2, 6))
        >>> found = causal_lm_loss(model, ids, ids, return_statistics=True)
        >>> found.tokens.item()  # five of each row have a next token
        10
    """

    loss: Tensor  # () float32, the mean in nats; differentiable
    correct: Tensor  # () int64, the number of tokens whose most probable class is the label
    entropy_sum: Tensor  # () the sum of the tokens' entropies, nats, without gradient
    tokens: Tensor  # () int64, the number of labels that are not ignored


@overload
def causal_lm_loss(
    model: nn.Module,
    input_ids: Tensor | None = ...,
    labels: Tensor | None = ...,
    *,
    num_items_in_batch: Tensor | float | None = ...,
    shift_labels: Tensor | None = ...,
    return_statistics: Literal[False] = ...,
    ignore_index: int = ...,
    check_model: bool = ...,
    memory_budget: int | None = ...,
    **inputs: Any,
) -> Tensor: ...


@overload
def causal_lm_loss(
    model: nn.Module,
    input_ids: Tensor | None = ...,
    labels: Tensor | None = ...,
    *,
    num_items_in_batch: Tensor | float | None = ...,
    shift_labels: Tensor | None = ...,
    return_statistics: Literal[True],
    ignore_index: int = ...,
    check_model: bool = ...,
    memory_budget: int | None = ...,
    **inputs: Any,
) -> CausalLMLoss: ...


def causal_lm_loss(
    model: nn.Module,
    input_ids: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    num_items_in_batch: Tensor | float | None = None,
    shift_labels: Tensor | None = None,
    return_statistics: bool = False,
    ignore_index: int = -100,
    check_model: bool = True,
    memory_budget: int | None = None,
    **inputs: Any,
) -> Tensor | CausalLMLoss:
    r"""Return the loss of a causal language model of Transformers, without storing the logits.

    The value is that of ``model(input_ids, labels=labels).loss``: the mean of −log p of the next token. It is
    computed from the hidden states of the base model and the weight of the head, with the scale and softcap
    that the architecture's config has. At the first use of a model the function compares its loss with the
    model's own on a few tokens. Adapters of PEFT on the head are taken into account
    (:func:`xent.integrations.head_of`).

    The model runs without a cache of keys and values, as in training, so that packed ``position_ids`` keep
    sequences apart. Under mixed precision by Accelerate, which replaces a forward that is not called here,
    call the function under ``accelerator.autocast()``. Forward hooks of the model and its wrappers get a
    tuple.

    Args:
        model: a causal language model of Transformers, or one wrapped by PEFT, DDP, FSDP or
            ``torch.compile``.
        input_ids: (batch, tokens); or pass ``inputs_embeds=``.
        labels: (batch, tokens), not shifted; −100 is left out.
        num_items_in_batch: a divisor in place of the number of labels that count, as a trainer that
            accumulates gradients passes it.
        shift_labels: labels that are shifted already, in place of ``labels``.
        return_statistics: whether to return correct tokens, entropy and count too, from the same sweep, at
            the cost of one more product.
        ignore_index: the label that is left out.
        check_model: whether to compare with the model's own loss at the first use; not in a graph that is
            being compiled.
        memory_budget: as in :func:`xent.linear_cross_entropy`.
        **inputs: further arguments of the model, such as ``attention_mask`` and ``position_ids``.

    Returns:
        The loss, (), float32, in nats; with ``return_statistics`` a :class:`CausalLMLoss`.

    Raises:
        ValueError: the model's own loss is another (the message has both numbers); a mixture of experts that
            adds its balancing loss; an encoder-decoder; neither ``labels`` nor ``shift_labels``.
        TypeError: a head that computes more than x Wᵀ + b; a wrapper that does not call the model's forward.

    Example:
        >>> import torch, transformers
        >>> from xent.integrations.transformers import causal_lm_loss
        >>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=100)
        >>> model, ids = transformers.GPT2LMHeadModel(config), torch.randint(100, (2, 6))
        >>> loss = causal_lm_loss(model, ids, ids)
        >>> loss.backward()
    """
    if labels is None and shift_labels is None:
        raise ValueError("pass labels, or shift_labels where they are shifted already")
    inner = causal_lm(model)
    if check_model and input_ids is not None and not torch.compiler.is_compiling():
        bare = getattr(model, "_orig_mod", model)  # so that nothing is compiled for a few tokens

        def ours(ids: Tensor, size: float) -> Tensor:
            return _called(bare, inner, input_ids=ids, labels=ids, hidden_factor=size)[0]

        check(bare, inner, input_ids, ours)
    found = _called(
        model,
        inner,
        **inputs if input_ids is None else {"input_ids": input_ids, **inputs},
        labels=labels,
        shift_labels=shift_labels,
        num_items_in_batch=num_items_in_batch,
        return_statistics=return_statistics,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
    )
    return CausalLMLoss(*found) if return_statistics else found[0]


def compute_loss(
    trainer: Any,
    model: nn.Module,
    inputs: dict[str, Any],
    return_outputs: bool = False,
    num_items_in_batch: Tensor | float | None = None,
    *,
    check_model: bool = True,
) -> Any:
    """Return the loss of a batch of ``transformers.Trainer``, as a method for a subclass of it.

    ``compute_loss_func`` of the trainer cannot do this, as it gets logits that exist already.

    Args:
        trainer: the trainer (``self`` of the method).
        model, inputs, return_outputs, num_items_in_batch: as in ``transformers.Trainer.compute_loss``.
        check_model: as in :func:`causal_lm_loss`.

    Returns:
        The loss, (); with ``return_outputs`` a pair of it and a dictionary of ``loss``, ``correct``,
        ``entropy_sum`` and ``tokens``, the last three (1,), which evaluation gathers for ``compute_metrics``.

    Raises:
        ValueError, TypeError: as :func:`causal_lm_loss`; also a trainer with label smoothing or with a
            ``compute_loss_func``.

    Example:
        >>> import transformers
        >>> from xent.integrations.transformers import compute_loss
        >>> class Trainer(transformers.Trainer):
        ...     compute_loss = compute_loss
    """
    for name, what in (("label_smoother", "label_smoothing_factor"), ("compute_loss_func",) * 2):
        if getattr(trainer, name, None) is not None:
            raise ValueError(f"{what} needs logits, which this loss does not form: drop it, or compute_loss")
    accepts = trainer.model_accepts_loss_kwargs
    items = num_items_in_batch if accepts else None
    options: Any = {"num_items_in_batch": items, "return_statistics": return_outputs}
    options["check_model"] = check_model
    with trainer.accelerator.autocast():
        found: Tensor | CausalLMLoss = causal_lm_loss(model, **inputs, **options)
    loss = found.loss if isinstance(found, CausalLMLoss) else found
    if trainer.args.average_tokens_across_devices and items is not None:
        loss = loss * (trainer.accelerator.num_processes // trainer.get_tp_size())
    if not isinstance(found, CausalLMLoss):
        return loss
    return loss, {"loss": loss} | {name: t[None] for name, t in found._asdict().items() if name != "loss"}


def _called(model: Any, inner: Any, **given: Any) -> tuple[Tensor, ...]:
    """Return what `_forward` does, inside everything that a call of the model with its wrappers runs."""
    found: tuple[Tensor, ...]
    if model is inner and not is_hooked(inner):
        found = _forward(inner, **given)
    else:
        with forward_replaced(inner, _forward):
            found = model(**given)
    if not isinstance(found, tuple):
        raise TypeError(
            f"{type(model).__name__} does not call the forward of the {type(inner).__name__} in it, which is "
            "where this loss is made: use the model's own loss"
        )
    return found


def _forward(
    self: Any,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
    return_statistics: bool = False,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    hidden_factor: float = 1.0,
    **inputs: Any,
) -> tuple[Tensor, ...]:
    """Return the loss, and with statistics also correct tokens, the sum of entropies and the count.

    ``hidden_factor`` multiplies the hidden states, to compare with the model's own loss.
    """
    hidden, head = last_hidden(self, inputs), language_head(self)
    hidden = hidden if hidden_factor == 1.0 else hidden * hidden_factor
    if shift_labels is None:  # the last token's own is ignored, which costs no product and no copy
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.to(hidden.device)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden.device).reshape(())
    elif num_items_in_batch is not None and not num_items_in_batch > 0:
        raise ValueError(f"num_items_in_batch must be positive, got {num_items_in_batch}")
    if not return_statistics:
        return (_loss(hidden, head, target, num_items_in_batch, ignore_index, memory_budget),)
    options: Any = {"ignore_index": ignore_index, "memory_budget": memory_budget}
    rows = linear_row_statistics(hidden, target=target, **options, **head)
    assert rows.loss is not None
    assert rows.correct is not None
    tokens = (target != ignore_index).sum()
    divisor = tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return rows.loss.sum() / divisor, rows.correct.sum(), rows.entropy.detach().sum(), tokens


def _loss(
    hidden: Tensor,
    head: LanguageHead,
    target: Tensor,
    denominator: Tensor | float | None,
    ignore_index: int,
    memory_budget: int | None,
) -> Tensor:
    """Return the mean, float32 for half types too, as Transformers has it."""
    options = Options(
        TargetOptions(ignore_index=ignore_index),
        LogitOptions(softcap=head["softcap"], logit_scale=head["logit_scale"]),
        ReductionOptions("mean", denominator),
        Execution(memory_budget=memory_budget),
    )
    call = resolve_local_head(options, hidden, head["linear_weight"], head["linear_bias"], target)
    dtype = torch.float64 if call.dtype == torch.float64 else torch.float32
    return call._replace(dtype=dtype).loss()
