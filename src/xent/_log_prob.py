"""Log-probabilities of given classes of each row, and the entropy, from one sweep over logits or features.

    log p_j = (z_j − m) − log1p(r)        ∂/∂z = e_j − p
    H = log1p(r) − e/(1 + r)              ∂/∂z = −p∘(log p + H)

The classes of a row are its own tile of the sweep, so that the largest logit is the same number in both terms
and no probability exceeds 1. A class that is there twice in a row is gathered once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from xent._arguments.call import Call, agreed, resolve_local_head, resolve_local_logits
from xent._arguments.options import Execution, LogitOptions, Options, ReductionOptions, TargetOptions
from xent._arguments.validation import is_readable, require_tensors, require_weight
from xent._autograd.one_head import scattered
from xent._core.class_indices import NO_CLASS, holds_integers, widened
from xent._core.logits import compute_dtype
from xent._core.low_rank import LowRank, tensors_of_weight
from xent._core.statistics import RequestedOutputs
from xent._core.target import ChosenClasses, Target
from xent._core.validators import valid

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class LogProb(NamedTuple):
    """Log-probabilities of given classes, and the entropy of each row.

    Example:
        >>> import torch, xent
        >>> found = xent.log_prob(torch.zeros(1, 4), torch.tensor([2]), return_entropy=True)
        >>> [round(value.item(), 6) for value in found]  # −log 4 and log 4
        [-1.386294, 1.386294]
    """

    log_prob: Tensor  # log p of each index, of the shape of the indices, nats; 0 where it is ignored
    entropy: Tensor  # H(p) of each row, nats; 0 where all indices of the row are ignored


@overload
def log_prob(
    input: Tensor,
    indices: Tensor,
    *,
    ignore_index: int | None = ...,
    softcap: float | None = ...,
    temperature: float | Tensor = ...,
    return_entropy: Literal[False] = ...,
    check_targets: bool | None = ...,
    group: ProcessGroup | DeviceMesh | None = ...,
) -> Tensor: ...


@overload
def log_prob(
    input: Tensor,
    indices: Tensor,
    *,
    ignore_index: int | None = ...,
    softcap: float | None = ...,
    temperature: float | Tensor = ...,
    return_entropy: Literal[True],
    check_targets: bool | None = ...,
    group: ProcessGroup | DeviceMesh | None = ...,
) -> LogProb: ...


def log_prob(
    input: Tensor,
    indices: Tensor,
    *,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    check_targets: bool | None = None,
    group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor | LogProb:
    r"""Return the log-probabilities of given classes in each row of logits, in nats.

    The value for class j is ``log p_j = (z_j − m) − log1p(r)``, with m the largest logit of the row and
    ``r = Σ_c exp(z_c − m) − 1``. It is differentiable twice. It is computed in float64 and returned as
    float32 (float64 for float64 logits).

    Args:
        input: logits z, (C,), (N, C) or (N, C, d1, ...).
        indices: the classes, of any integer type. For one class a row: (), (N,) or (N, d1, ...). For k
            classes a row: (k,), (N, k) or (N, k, d1, ...), as ``torch.gather`` takes them; some may be equal.
        ignore_index: an index whose log-probability is 0, without gradient. None means −100.
        softcap, temperature, check_targets, group: as in :func:`xent.cross_entropy`.
        return_entropy: whether the entropy H(p) of each row is returned too, from the same sweep.

    Returns:
        A tensor of the shape of ``indices``, or with ``return_entropy`` a :class:`LogProb`.

    Raises:
        IndexError: an index that is neither a class nor ``ignore_index``.
        ValueError, TypeError: shapes and types that do not fit, as :func:`xent.cross_entropy`.

    Example:
        >>> import torch, xent
        >>> z = torch.tensor([[0.0, 0.0, 1.0]])
        >>> [round(value, 6) for value in xent.log_prob(z, torch.tensor([[2, 0]]))[0].tolist()]
        [-0.551445, -1.551445]
        >>> xent.log_prob(z, torch.tensor([2]), return_entropy=True).entropy.shape
        torch.Size([1])
    """
    options = _options(
        ignore_index, LogitOptions(softcap, temperature), Execution(check_targets=check_targets, group=group)
    )

    def run() -> Tensor | LogProb:
        require_tensors(spread=True, input=input)
        rows = input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size()
        chosen = _Chosen.of(indices, rows, -1 if input.dim() < 2 else 1, options)
        return chosen.found(
            lambda options, target: resolve_local_logits(options, input, target), return_entropy
        )

    return agreed(run, options, input)


@overload
def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor | LowRank,
    indices: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    ignore_index: int | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float | Tensor = ...,
    return_entropy: Literal[False] = ...,
    check_targets: bool | None = ...,
    product_dtype: torch.dtype | None = ...,
    memory_budget: int | None = ...,
    group: ProcessGroup | DeviceMesh | None = ...,
) -> Tensor: ...


@overload
def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor | LowRank,
    indices: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    ignore_index: int | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float | Tensor = ...,
    return_entropy: Literal[True],
    check_targets: bool | None = ...,
    product_dtype: torch.dtype | None = ...,
    memory_budget: int | None = ...,
    group: ProcessGroup | DeviceMesh | None = ...,
) -> LogProb: ...


def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor | LowRank,
    indices: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    check_targets: bool | None = None,
    product_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor | LogProb:
    r"""Return the log-probabilities of given classes under a linear classifier, without storing the logits.

    The value is :func:`log_prob` of ``logit_scale * (input @ linear_weight.T + linear_bias)``, in nats. It
    costs one matrix product. The gradients cost three more, with those of the entropy among them.

    Args:
        input, linear_weight, linear_bias: as in :func:`xent.linear_cross_entropy`.
        logit_scale, product_dtype, memory_budget, group: as in :func:`xent.linear_cross_entropy`.
        indices: the classes, of any integer type. For one class a row: the shape of the unreduced loss. For k
            classes a row: one more dimension, of size k, at the end; some may be equal.
        ignore_index, return_entropy: as in :func:`log_prob`.
        softcap, temperature, check_targets: as in :func:`xent.cross_entropy`.

    Returns:
        A tensor of the shape of ``indices``, or with ``return_entropy`` a :class:`LogProb`.

    Raises:
        IndexError, ValueError, TypeError: as :func:`log_prob` and :func:`xent.linear_cross_entropy`.

    Example:
        >>> import torch, xent
        >>> hidden, head = torch.randn(8, 4), torch.randn(5, 4, requires_grad=True)
        >>> tokens = torch.randint(5, (8,))
        >>> found = xent.linear_log_prob(hidden, head, tokens, return_entropy=True)
        >>> (found.log_prob + 0.01 * found.entropy).mean().backward()
        >>> head.grad.shape
        torch.Size([5, 4])
    """
    options = _options(
        ignore_index,
        LogitOptions(softcap, temperature, logit_scale=logit_scale),
        Execution(product_dtype, memory_budget, check_targets, group),
    )

    def run() -> Tensor | LogProb:
        require_tensors(spread=True, input=input)
        require_weight(spread=True, linear_weight=linear_weight)
        rows = input.shape[:-1] + linear_weight.shape[1:-1]
        chosen = _Chosen.of(indices, rows, -1, options)
        head = (input, linear_weight, linear_bias)
        return chosen.found(
            lambda options, target: resolve_local_head(options, *head, target), return_entropy
        )

    return agreed(run, options, *tensors_of_weight(linear_weight))


def _options(ignore_index: int | None, logits: LogitOptions, execution: Execution) -> Options:
    return Options(TargetOptions(ignore_index=ignore_index), logits, ReductionOptions("none"), execution)


class _Chosen(NamedTuple):
    """The classes of a call, as the sweep takes them."""

    options: Options
    target: Target  # of one class a row, or `ChosenClasses`
    ignored: Tensor | None  # (..., k), of several
    first: Tensor | None  # (..., k) where in its row a class is first, of several
    axis: int | None  # of the k classes; None where there is one and no dimension for it

    @classmethod
    def of(cls, indices: Tensor, rows: torch.Size, axis: int, options: Options) -> _Chosen:
        """Return the classes of rows of a shape; of k classes each the dimension is at an axis."""
        require_tensors(indices=indices)
        if not holds_integers(indices):
            raise TypeError(f"indices must be of an integer type, got {indices.dtype}")
        if indices.shape == rows:
            return cls(options, indices, None, None, None)
        several = indices.dim() == len(rows) + 1
        moved = indices.movedim(axis, -1) if several else indices
        if not several or moved.shape[:-1] != rows or not moved.shape[-1]:
            k = ("k", *rows) if not rows else (*rows, "k") if axis == -1 else (rows[0], "k", *rows[1:])
            raise ValueError(
                f"indices must have shape {tuple(rows)}, or for k classes a row {tuple(k)}, k at least 1; "
                f"got {tuple(indices.shape)}"
            )
        if moved.shape[-1] == 1:
            return cls(options, moved[..., 0], None, None, axis)
        moved = widened(moved)
        ignored = moved == options.target.ignored
        first = _first(moved)
        places = torch.arange(moved.shape[-1], device=moved.device)
        distinct = torch.where(ignored | (first != places), NO_CLASS, moved)
        keep = None
        if not is_readable(ignored) or bool(ignored.any()):
            keep = ignored.logical_not().any(-1).to(torch.float32)
        options = options.with_options(ignore_index=-100, sample_weight=keep)
        return cls(options, ChosenClasses.of(distinct), ignored, first, axis)

    def found(self, resolve: Callable[[Options, Target], Call], return_entropy: bool) -> Tensor | LogProb:
        """Return the log-probabilities in the shape of the indices, and the entropy if it is wanted."""
        wants_entropy = valid("return_entropy", return_entropy)
        call = resolve(self.options, self.target)
        requested = RequestedOutputs(entropy=wants_entropy, log_prob=True)
        rows = [scattered(problem.request(requested)) for problem in call.problems]
        dtype = compute_dtype(call.dtype)
        columns = [found.log_prob for found in rows if found.log_prob is not None]
        value = (columns[0] if len(columns) == 1 else torch.stack(columns, dim=1)).to(dtype)
        value = value.reshape(*call.rows_shape, value.shape[-1])
        if self.first is not None and self.ignored is not None:
            value = torch.where(self.ignored, 0.0, value.gather(-1, self.first))
        value = value[..., 0] if self.axis is None else value.movedim(-1, self.axis)
        if not wants_entropy:
            return value
        entropies = [found.entropy for found in rows if found.entropy is not None]
        return LogProb(value, call.stack(entropies, dtype))


def _first(index: Tensor) -> Tensor:
    """Return where in its row each class is first, (..., k).

    >>> _first(torch.tensor([[7, 3, 7, 3, 1]])).tolist()
    [[0, 1, 0, 1, 4]]
    """
    ordered, order = index.sort(dim=-1, stable=True)
    same = torch.cat(
        [torch.zeros_like(ordered[..., :1], dtype=torch.bool), ordered[..., 1:] == ordered[..., :-1]], -1
    )
    places = torch.arange(index.shape[-1], device=index.device).expand(index.shape)
    start = torch.where(same, 0, places).cummax(-1).values  # of the run of equal classes
    return torch.zeros_like(order).scatter(-1, order, order.gather(-1, start))
