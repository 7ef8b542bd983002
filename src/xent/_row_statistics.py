"""Loss, log-probability, entropy and the like of each row, from one sweep over logits or features.

    ℓ = a·lse(z) − ⟨t, z⟩    log p_y    lse(z)    H(p) = lse(z) − ⟨p, z⟩    argmax z    the k largest p

DPO and GRPO need log p_y, a z-loss lse, exploration bonuses and confidence H(p), accuracy the argmax: all of
them are read off the same running statistics, each differentiable where that has meaning.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from xent._arguments.call import (
    Call,
    agreed,
    resolve_head,
    resolve_local_head,
    resolve_local_logits,
    resolve_logits,
)
from xent._arguments.options import Execution, LogitOptions, Options, ReductionOptions, TargetOptions
from xent._arguments.targets import is_index
from xent._autograd import custom_ops, transforms
from xent._autograd.one_head import scattered
from xent._core.logits import compute_dtype
from xent._core.low_rank import LowRank, tensors_of_weight
from xent._core.ops import any_batched
from xent._core.problem import Problem
from xent._core.statistics import RequestedOutputs
from xent._core.target import TopKTarget
from xent._core.tiles import top_k as streaming
from xent._core.validators import as_number, valid
from xent._util import html

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class RowStatistics(NamedTuple):
    """Statistics of each row, of the shape of the unreduced loss; they are 0 in ignored rows.

    Example:
        >>> import torch, xent
        >>> rows = xent.row_statistics(torch.zeros(1, 4))  # without a target
        >>> rows.loss is None, round(rows.entropy.item(), 6), rows.argmax.item()  # log 4
        (True, 1.386294, 0)
    """

    loss: Tensor | None  # ℓ as of reduction="none", nats; None without a target
    log_prob: Tensor | None  # log p of the target's class, nats; None unless the target is a class
    logsumexp: Tensor  # lse(z), nats
    entropy: Tensor  # H(p), nats
    argmax: Tensor  # int64, the lowest class of the largest logit; −1 in ignored rows
    correct: Tensor | None  # bool, whether argmax is the target; None unless the target is a class

    def _repr_html_(self) -> str:
        """Return the statistics of the first rows as a table for a notebook.

        >>> import xent
        >>> rows = xent.row_statistics(torch.zeros(1, 10), torch.tensor([3]))
        >>> "<tr><td>0</td><td>2.303</td><td>-2.303</td>" in rows._repr_html_()
        True
        """
        return html.shown(self, self, self._table)

    def _table(self) -> str:
        columns: dict[str, list[object]] = {
            heading: html.first(value)
            for heading, value in (
                ("loss", self.loss),
                ("log p", self.log_prob),
                ("logsumexp", self.logsumexp),
                ("entropy", self.entropy),
            )
            if value is not None
        }
        classes = html.first(self.argmax)
        columns["argmax"] = ["ignored" if each == -1 else each for each in classes]
        if self.correct is not None:
            correct = html.first(self.correct)
            columns["correct"] = [
                None if each == -1 else right for each, right in zip(classes, correct, strict=True)
            ]
        caption = "Statistics of each row's softmax, in nats; argmax is the class of the largest logit"
        return html.table_by_row(caption, self.logsumexp.shape, columns)


def row_statistics(
    input: Tensor,
    target: Tensor | TopKTarget | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    check_targets: bool | None = None,
    group: ProcessGroup | DeviceMesh | None = None,
) -> RowStatistics:
    r"""Return loss, log-probability, logsumexp, entropy and argmax of each row of logits, from one sweep.

    The statistics are ``ℓ = a·lse(z) − ⟨t, z⟩``, ``log p_y``, ``lse(z) = log Σ_c exp(z_c)``,
    ``H(p) = lse(z) − ⟨p, z⟩`` and the class of the largest logit, with ``p = softmax(z)``. Each field but
    ``argmax`` and ``correct`` is differentiable twice. The fields are computed in float64 and returned as
    float32 (float64 for float64 logits).

    Args:
        input: logits z, (C,), (N, C) or (N, C, d1, ...).
        target: None, or as in :func:`xent.cross_entropy`.
        weight, ignore_index, label_smoothing: as in :func:`xent.cross_entropy`. They change ``loss`` alone,
            but for ignored rows, which are 0 in every field.
        softcap, temperature: as in :func:`xent.cross_entropy`. Every field is of the logits after both.
        check_targets, group: as in :func:`xent.cross_entropy`.

    Returns:
        A :class:`RowStatistics` with fields of shape (), (N,) or (N, d1, ...).

    Raises:
        IndexError, ValueError, TypeError: as :func:`xent.cross_entropy`.

    Example:
        >>> import torch, xent
        >>> rows = xent.row_statistics(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([2]))
        >>> round(rows.log_prob.item(), 6), round(rows.entropy.item(), 6), rows.correct.item()
        (-0.551445, 0.975328, True)
    """
    options = Options(
        TargetOptions(weight, ignore_index, label_smoothing),
        LogitOptions(softcap, temperature),
        ReductionOptions("none"),
        Execution(check_targets=check_targets, group=group),
    )
    return agreed(
        lambda: _row_statistics(resolve_local_logits(options, input, target), options), options, input
    )


def linear_row_statistics(
    input: Tensor,
    linear_weight: Tensor | LowRank,
    target: Tensor | TopKTarget | None = None,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    check_targets: bool | None = None,
    product_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    group: ProcessGroup | DeviceMesh | None = None,
) -> RowStatistics:
    r"""Return the statistics of each row under a linear classifier, without storing the logits.

    The value is :func:`row_statistics` of ``input @ linear_weight.T + linear_bias``. It costs one matrix
    product; the gradients of all fields together cost three more.

    Args:
        input, linear_weight, linear_bias: as in :func:`xent.linear_cross_entropy`.
        logit_scale, product_dtype, memory_budget, group: as in :func:`xent.linear_cross_entropy`.
        target, weight, ignore_index, label_smoothing: as in :func:`row_statistics`.
        softcap, temperature, check_targets: as in :func:`row_statistics`.

    Returns:
        A :class:`RowStatistics` with fields of the shape of the unreduced loss.

    Raises:
        IndexError, ValueError, TypeError: as :func:`xent.linear_cross_entropy`.

    Example:
        >>> import torch, xent
        >>> policy, features = torch.zeros(5, 4, requires_grad=True), torch.randn(8, 4)
        >>> rows = xent.linear_row_statistics(features, policy, torch.randint(5, (8,)))
        >>> (rows.log_prob - 0.01 * rows.entropy).sum().backward()
        >>> policy.grad.shape
        torch.Size([5, 4])
    """
    options = Options(
        TargetOptions(weight, ignore_index, label_smoothing),
        LogitOptions(softcap, temperature, logit_scale=logit_scale),
        ReductionOptions("none"),
        Execution(product_dtype, memory_budget, check_targets, group),
    )
    head = (input, linear_weight, linear_bias)
    return agreed(
        lambda: _row_statistics(resolve_local_head(options, *head, target), options),
        options,
        *tensors_of_weight(linear_weight),
    )


def entropy(
    input: Tensor, *, softcap: float | None = None, temperature: float | Tensor = 1.0, bits: bool = False
) -> Tensor:
    r"""Return the entropy of each row's softmax, in nats.

    The entropy is ``H = −Σ_c p_c·log p_c`` with ``p = softmax(z)``. It is computed as
    ``log1p(r) − e/(1 + r)``, with ``r = Σ_c exp(z_c − m) − 1`` and ``e = Σ_c exp(z_c − m)·(z_c − m)``
    relative to the largest logit m, so it keeps its digits for large logits and confident rows. Source:
    Shannon, "A mathematical theory of communication", 1948.

    Args:
        input: logits z, (C,), (N, C) or (N, C, d1, ...).
        softcap, temperature: as in :func:`xent.cross_entropy`.
        bits: whether the result is divided by log 2.

    Returns:
        (), (N,) or (N, d1, ...), in nats (or bits), of the type of ``input``; differentiable twice.

    Raises:
        ValueError, TypeError: as :func:`xent.cross_entropy`.

    Example:
        >>> import torch, xent
        >>> xent.entropy(torch.tensor([1e8, 1e8]), bits=True).item()
        1.0
    """
    bits = valid("bits", bits)
    call = _without_target(input, softcap, temperature)
    (problem,) = call.problems
    found = scattered(problem.request(RequestedOutputs(entropy=True)))
    assert found.entropy is not None
    return call.stack([found.entropy / math.log(2.0) if bits else found.entropy])


def top_k(
    input: Tensor, k: int, *, softcap: float | None = None, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    r"""Return the k largest probabilities of each row of logits and their classes, largest first.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ...).
        k: the number of classes, at most C.
        softcap, temperature: as in :func:`xent.cross_entropy`.

    Returns:
        A pair of probabilities (..., k), float32 or float64, without gradient, and class indices (..., k),
        int64.

    Raises:
        ValueError, TypeError: a k outside 1..C; else as :func:`xent.cross_entropy`.
        NotImplementedError: a derivative through ``torch.func`` or in forward mode, which would be 0
            silently.

    Example:
        >>> import torch, xent
        >>> probabilities, indices = xent.top_k(torch.tensor([0.1, 0.2, 0.7]).log(), 2)
        >>> indices.tolist()
        [2, 1]
    """
    return _top_k(_without_target(input, softcap, temperature), k)


def linear_top_k(
    input: Tensor,
    linear_weight: Tensor | LowRank,
    k: int,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    product_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return the k largest probabilities of each row under a linear classifier, without storing the logits.

    Args:
        input, linear_weight, linear_bias: as in :func:`xent.linear_cross_entropy`.
        logit_scale, product_dtype, memory_budget: as in :func:`xent.linear_cross_entropy`.
        k, softcap, temperature: as in :func:`top_k`.

    Returns:
        A pair of probabilities (..., k) and class indices (..., k), as :func:`top_k`.
        :meth:`xent.TopKTarget.from_top_k` makes a target of them.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`top_k`.

    Example:
        >>> import torch, xent
        >>> probabilities, indices = xent.linear_top_k(torch.randn(3, 8), torch.randn(1000, 8), 5)
        >>> teacher = xent.TopKTarget(indices, probabilities)
    """
    options = Options.of(
        reduction="none",
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        product_dtype=product_dtype,
        memory_budget=memory_budget,
    )
    return _top_k(resolve_head(options, input, linear_weight, linear_bias, None), k)


def _without_target(input: Tensor, softcap: float | None, temperature: float | Tensor) -> Call:
    options = Options(logits=LogitOptions(softcap, temperature), reduction=ReductionOptions("none"))
    return resolve_logits(options, input, None)


def _row_statistics(call: Call, options: Options) -> RowStatistics:
    target = call.target
    of_class = is_index(target)
    requested = RequestedOutputs(entropy=True, argmax=True, log_prob=of_class)
    found = [scattered(problem.request(requested)) for problem in call.problems]
    dtype = compute_dtype(call.dtype)

    def stacked(name: str) -> Tensor:
        return call.stack([getattr(rows, name) for rows in found], dtype)

    argmax = call.stack([_present(rows.argmax) for rows in found], torch.int64)
    correct = None
    if of_class:
        assert isinstance(target, Tensor)
        correct = (argmax == target) & (target != options.target.ignored)
    return RowStatistics(
        loss=None if target is None else stacked("loss"),
        log_prob=call.stack([_present(rows.log_prob)[:, 0] for rows in found], dtype) if of_class else None,
        logsumexp=stacked("logsumexp"),
        entropy=stacked("entropy"),
        argmax=argmax,
        correct=correct,
    )


def _present(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _top_k(call: Call, k: int) -> tuple[Tensor, Tensor]:
    classes, asked = call.problems[0].targets.n_classes, as_number("k", k, "a whole number")
    if not 1 <= asked <= classes:
        raise ValueError(f"k must be between 1 and the number of classes, {classes}; got {k}")
    k = valid("k", k)
    with torch.no_grad():
        found = [_top_k_of(problem, k) for problem in call.problems]
    shape, dtype = (*call.rows_shape, k), compute_dtype(call.dtype)
    probabilities, indices = (
        columns[0] if len(found) == 1 else torch.stack(columns, dim=1)
        for columns in map(list, zip(*found, strict=True))
    )
    return probabilities.to(dtype).reshape(shape), indices.reshape(shape)


def _top_k_of(problem: Problem, k: int) -> tuple[Tensor, Tensor]:
    if problem.in_graph:
        return custom_ops.top_k(problem, k)
    leaves = problem.logits.leaves
    if transforms.followed(*leaves):  # torch.func would take what has no derivative for a derivative of 0
        raise NotImplementedError("top_k has no derivative: pass tensors that are detached")
    return streaming.top_k(replace(problem, batched=any_batched(*leaves)), k)
