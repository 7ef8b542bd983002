"""Cross-entropy with torch's names, defaults and shapes, of logits and straight from features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xent._arguments.options import (
    Execution,
    LogitOptions,
    Options,
    ReductionOptions,
    TargetOptions,
)
from xent._core.low_rank import LowRank
from xent._core.margin import Margin
from xent._core.target import TopKTarget
from xent._core.validators import ReductionName
from xent.losses._loss import loss_of_head, loss_of_logits

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def cross_entropy(
    input: Tensor,
    target: Tensor | TopKTarget,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    denominator: float | Tensor | None = None,
    check_targets: bool | None = None,
    margin: Margin | float | None = None,
    log_q: Tensor | None = None,
    group: ProcessGroup | DeviceMesh | None = None,
    data_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""Return the softmax cross-entropy of logits and targets, in nats.

    The loss of a row with logits z and target t is ``ℓ = a·lse(z) − ⟨t, z⟩``, where
    ``lse(z) = log Σ_c exp(z_c)`` and ``a = Σ_c t_c``. A class index y stands for the t that is 1 at y and 0
    elsewhere. The reduced loss is ``L = Σ_n s_n·(ℓ_n + λ·lse_n²) / divisor``. :doc:`/explanation/formula`
    derives both.

    The function replaces :func:`torch.nn.functional.cross_entropy`. It computes each loss relative to the
    largest logit of the row. Large logits, confident rows and masked classes (logit −inf) therefore keep
    their digits.

    Args:
        input: logits z, (C,), (N, C) or (N, C, d1, ...).
        target: the target of each row, in one of three forms: class indices of any integer type, (), (N,) or
            (N, d1, ...); probabilities of the shape of ``input``, of any sign and mass, which may require
            gradient; or a :class:`TopKTarget`.
        weight: w, (C,), a factor for each class: the target becomes w∘t, after smoothing. No gradient.
        ignore_index: rows with this target are left out. None means −100.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. For class indices the mean divides by Σ s·w[target]
            over the rows that are not ignored, for probabilities by Σ s. The mean over no rows is 0.
        label_smoothing: ε in [0, 1]; the target becomes (1 − ε)·t + ε/C. Source: Szegedy et al., "Rethinking
            the Inception architecture for computer vision", 2016.
        sample_weight: s, a factor for each row, of the shape of the unreduced loss. A row of weight 0 is left
            out, whatever it holds.
        z_loss: λ; the loss of each row that is not ignored grows by λ·lse². Source: Chowdhery et al., "PaLM",
            2022.
        softcap: k; each logit is first replaced by k·tanh(z/k).
        temperature: T; the logits are divided by it, after the softcap. One number, or a tensor of the shape
            of the unreduced loss with a number for each row. No gradient.
        denominator: the divisor of ``"mean"``, in place of the one above. It serves to accumulate gradients
            over several calls.
        check_targets: None checks targets on a CPU at once and on other devices by an asynchronous assertion.
            True always checks at once, and the error names the row. False does not check: the loss of a row
            whose target is outside the classes is nan.
        margin: a number that is subtracted from the logit of the target's own class, or a :class:`Margin`. It
            acts after the softcap and before the temperature. Class indices only.
        log_q: log Q, (C,), for columns that are a sample of the classes: the logarithm of each class's
            probability of being in the sample. It is subtracted from every logit but that of the target's own
            class, as the last step. The sum over the sample then estimates the sum over all classes without
            bias; its logarithm, and with it the loss, is biased. Class indices only. No gradient.
        group: the processes that share the classes (:doc:`/explanation/scaling`). Every rank (process) passes
            all rows. Of ``input``, of a probability target and of ``weight`` it passes the columns of its own
            classes, a contiguous slice in the order of the ranks, of any size. Class indices count over all
            classes. Every rank gets the same loss. A DTensor placed ``Shard(1)`` brings its own group.
        data_group: the processes that share the rows. ``"mean"`` then divides by the average over the ranks
            of the divisor above. The average of the ranks' losses, and of their gradients as DDP and FSDP
            take it, is then the mean over all rows.

    Returns:
        The loss in nats: a scalar, or for ``"none"`` a tensor of the shape of an index target. Its type is
        that of ``input`` (float32 under autocast).

    Raises:
        IndexError: a target outside 0..C−1; the message names row and value.
        ValueError: shapes or option values that do not fit together.
        TypeError: types that do not fit together.

    Example:
        >>> import torch, xent
        >>> round(xent.cross_entropy(torch.tensor([0.1, 0.12, 0.78]).log(), torch.tensor(2)).item(), 7)
        0.2484614
    """
    options = Options(
        TargetOptions(weight, ignore_index, label_smoothing, sample_weight, bucket=True),
        LogitOptions(softcap, temperature, margin, log_q),
        ReductionOptions(reduction, denominator, z_loss, data_group),
        Execution(check_targets=check_targets, group=group),
    )
    return loss_of_logits(options, input, target)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor | LowRank,
    target: Tensor | TopKTarget,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    denominator: float | Tensor | None = None,
    check_targets: bool | None = None,
    product_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    margin: Margin | float | None = None,
    classes: Tensor | None = None,
    log_q: Tensor | None = None,
    sparse_grad: bool = False,
    normalize: bool = False,
    group: ProcessGroup | DeviceMesh | None = None,
    data_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""Return the softmax cross-entropy of a linear classifier from its features, without storing the logits.

    The value is ``cross_entropy(input @ linear_weight.T + linear_bias, target)``. It is computed in tiles of
    rows × classes, so that no (N, C) tensor of logits exists. For ``"mean"`` and ``"sum"`` the gradient is
    formed in the forward pass: three matrix products in all where ``memory_budget`` holds 128 rows of logits,
    else four. Ignored rows are left out before the products. An input or a weight that requires no gradient
    costs no product for one.

    Args:
        input: features x, (..., D), with any number of leading batch dimensions.
        linear_weight: W, (C, D); or (C, d1, ..., D), one classifier for each position; or a :class:`LowRank`.
        target: class indices of any integer type, (..., d1, ...); or probabilities (..., C, d1, ...); or a
            :class:`TopKTarget`.
        linear_bias: b, (C,), or (C, d1, ...).
        logit_scale: a factor of the logits, applied before the softcap, as some language models have it.
        product_dtype: the type to which the matrix products round their factors. None means the type of
            ``input``, but float32 for half types on a CPU: half products on a CPU round their results too,
            and a loss then errs by 1e-2 instead of 1e-6. ``torch.bfloat16`` is faster on processors that
            multiply it natively; everything but the factors stays float32.
        memory_budget: bytes of working memory, beside inputs, gradients and O(N). The default is 64 MiB on a
            CPU, whatever N and C, and on a CUDA device what :func:`xent.backends` shows. For half types the
            float32 accumulator of a gradient comes on top.
        weight, ignore_index, reduction, label_smoothing, sample_weight: as in :func:`cross_entropy`.
        z_loss, softcap, temperature, denominator, check_targets, margin: as in :func:`cross_entropy`.
        log_q: as in :func:`cross_entropy`; with ``classes`` it is (S,).
        group: the processes that share the classes (:doc:`/explanation/scaling`). Every rank (process) passes
            all rows. Of ``linear_weight``, ``linear_bias``, a probability target and ``weight`` it passes its
            own classes, a contiguous slice in the order of the ranks, of any size. Class indices count over
            all classes. Every rank gets the same loss, the gradient of ``input`` over all classes, and the
            gradient of its own classifiers. A ``linear_weight`` that is a DTensor placed ``Shard(0)`` brings
            its own group.
        data_group: as in :func:`cross_entropy`.
        classes: (S,) different class indices. The softmax and label smoothing run over these classes alone.
            ``target`` and ``weight`` still count over all classes, and every target must be in ``classes``,
            as :func:`sample_classes` ensures.
        sparse_grad: with ``classes``, whether the gradients of weight and bias are sparse tensors of S rows.
            If not, they are dense, with zeros in the other rows.
        normalize: whether each row of ``input`` and of ``linear_weight`` is first scaled to length 1, in
            float32 or float64. Their products are then cosines, and 1/``temperature`` is the scale of the
            logits. Rows may have any finite length; a row of zeros has cosines of 0 and no gradient.

    Returns:
        The loss in nats: a scalar, or for ``"none"`` a tensor of the shape of an index target. Its type is
        that of ``input``. Under autocast it is float32, and the factors of the products have autocast's half
        type.

    Raises:
        IndexError, ValueError, TypeError: as :func:`cross_entropy`.

    Example:
        >>> import torch, xent
        >>> features, classifier = torch.eye(3), torch.tensor([0.1, 0.12, 0.78]).log()[:, None].expand(3, 3)
        >>> round(xent.linear_cross_entropy(features, classifier, torch.tensor([2, 2, 2])).item(), 7)
        0.2484614
    """
    options = Options(
        TargetOptions(weight, ignore_index, label_smoothing, sample_weight, bucket=True),
        LogitOptions(softcap, temperature, margin, log_q, classes, sparse_grad, normalize, logit_scale),
        ReductionOptions(reduction, denominator, z_loss, data_group),
        Execution(product_dtype, memory_budget, check_targets, group),
    )
    return loss_of_head(options, input, linear_weight, linear_bias, target)
