"""Drop-ins with the contracts of TRL 1.16: token log-probabilities and divergences from hidden states.

    log p_y = z_y − lse(z)      H = −Σ p log p      log Σ p² = lse(2z) − 2 lse(z)      mean z = lse(z) − ℓ

with ℓ the loss of a target that is even over all classes. `add_fused_lm_head` changes the forward of the
model that it is given, as TRL's own does; nothing else is changed. Where TRL reads the weight of a head
alone, an adapter on it is followed here, and what would be left out is an error.
"""

from __future__ import annotations

import functools
import types
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from xent._arguments.call import resolve_local_head
from xent._arguments.options import LogitOptions, Options, ReductionOptions, TargetOptions
from xent._autograd.one_head import RowOutputs, scattered
from xent._core.logits import compute_dtype
from xent._core.low_rank import Weight
from xent._core.statistics import RequestedOutputs
from xent._core.validators import valid
from xent._row_statistics import linear_row_statistics
from xent.integrations._architecture import language_head, last_hidden
from xent.integrations._wrappers import causal_lm, unbound
from xent.losses._linear_divergence import divergence_of_rows

__all__ = ["ChunkedDivergenceFunction", "ChunkedLogProbFunction", "TokenOutputs", "add_fused_lm_head"]

OutputName: TypeAlias = Literal["entropy", "log_sum_sq_probs", "mean_logits", "is_top1"]  # beside log_probs
OUTPUTS: tuple[OutputName, ...] = get_args(OutputName)


class TokenOutputs(NamedTuple):
    """The numbers of each token, in the order in which TRL reads them, float32 but for ``is_top1``.

    Example:
        >>> import torch
        >>> from xent.integrations.trl import ChunkedLogProbFunction
        >>> hidden, head, tokens = torch.randn(8, 4), torch.randn(10, 4), torch.randint(10, (8,))
        >>> found = ChunkedLogProbFunction.apply(hidden, head, None, tokens, outputs=("entropy",))
        >>> found.entropy.shape, found.is_top1 is None
        (torch.Size([8]), True)
    """

    log_probs: Tensor  # log p of the target, nats
    entropy: Tensor | None  # H(p), nats; None where not requested, and so the others
    log_sum_sq_probs: Tensor | None  # log Σ p², without gradient
    mean_logits: Tensor | None  # the mean logit after scale, softcap and temperature, without gradient
    is_top1: Tensor | None  # bool, whether the target is the most probable class


class ChunkedLogProbFunction:
    """The token log-probabilities of TRL's class of this name, without stored logits; called by ``apply``.

    Example:
        >>> import torch
        >>> from xent.integrations.trl import ChunkedLogProbFunction
        >>> hidden, head, tokens = torch.randn(8, 4), torch.randn(10, 4), torch.randint(10, (8,))
        >>> log_probs, entropy, *_ = ChunkedLogProbFunction.apply(hidden, head, None, tokens, 1.0, 32768)
        >>> log_probs.shape
        torch.Size([8])
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Weight,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float = 1.0,
        chunk_size: int | None = None,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[OutputName | Literal["log_probs"], ...] = OUTPUTS,
    ) -> TokenOutputs:
        """Return log p of each target, and other numbers of each token, from one sweep; twice differentiable.

        Args:
            hidden: hidden states, (N, D) or (..., D).
            weight: W, (C, D), or a :class:`xent.LowRank`.
            bias: b, (C,), or None.
            targets: class indices, (N,) or (...). For a target of −100 every output is 0.
            temperature: T; it divides the logits.
            chunk_size: accepted and without effect: working memory is 64 MiB on a CPU.
            final_logit_softcapping: k; logits are replaced by k·tanh(z/k), after the scale.
            logit_scale: a factor of the logits.
            outputs: the names of what is computed beside ``"log_probs"``: of ``"entropy"``,
                ``"log_sum_sq_probs"``, ``"mean_logits"`` and ``"is_top1"``. The second and the third cost a
                sweep each.

        Returns:
            A :class:`TokenOutputs`, a tuple of five, each of the shape of ``targets``.

        Raises:
            ValueError: a name that is not an output; shapes that do not fit, as :func:`xent.linear_log_prob`.

        Example:
            >>> import torch
            >>> from xent.integrations.trl import ChunkedLogProbFunction
            >>> hidden, head, tokens = torch.randn(8, 4), torch.randn(10, 4), torch.randint(10, (8,))
            >>> log_probs, entropy, *_ = ChunkedLogProbFunction.apply(hidden, head, None, tokens, 1.0, 32768)
        """
        unknown = [name for name in outputs if name not in (*OUTPUTS, "log_probs")]
        if unknown:
            raise ValueError(f"outputs holds {unknown[0]!r}; there are log_probs, {', '.join(OUTPUTS)}")
        head = _Head(hidden, _like(weight, hidden), _like(bias, hidden), final_logit_softcapping, logit_scale)
        temperature = valid("temperature", temperature)
        dtype = compute_dtype(hidden.dtype)
        rows = head.rows(targets, temperature, "entropy" in outputs, "is_top1" in outputs)
        assert rows.log_prob is not None
        squares = mean = None
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:
                twice = head.rows(targets, temperature / 2)
                squares = (twice.logsumexp - 2 * rows.logsumexp).to(dtype)
            if "mean_logits" in outputs:
                even = head.rows(targets, temperature, label_smoothing=1.0)
                mean = (even.logsumexp - even.loss).to(dtype)

        def shaped(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.reshape(targets.shape)

        log_probs = rows.log_prob[:, 0].to(dtype).reshape(targets.shape)
        entropy = None if rows.entropy is None else rows.entropy.to(dtype)
        top = None if rows.argmax is None else rows.argmax == targets.reshape(-1)
        return TokenOutputs(log_probs, shaped(entropy), shaped(squares), shaped(mean), shaped(top))


class _Head(NamedTuple):
    """Hidden states and a head."""

    hidden: Tensor
    weight: Weight
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def rows(
        self,
        targets: Tensor,
        temperature: float,
        entropy: bool = False,
        argmax: bool = False,
        label_smoothing: float = 0.0,
    ) -> RowOutputs:
        """Return the outputs of each row, (N,) float64."""
        options = Options(
            TargetOptions(label_smoothing=label_smoothing),
            LogitOptions(self.softcap, temperature, logit_scale=self.logit_scale),
            ReductionOptions("none"),
        )
        call = resolve_local_head(options, self.hidden, self.weight, self.bias, targets)
        (problem,) = call.problems
        return scattered(problem.request(RequestedOutputs(entropy, argmax, log_prob=True)))


class ChunkedDivergenceFunction:
    """The token divergences of TRL's class of this name, without stored logits; called by ``apply``.

    Example:
        >>> import torch
        >>> from xent.integrations.trl import ChunkedDivergenceFunction
        >>> student, teacher = torch.randn(8, 4), torch.randn(8, 6)
        >>> heads = torch.randn(10, 4, requires_grad=True), torch.randn(10, 6)
        >>> found, _ = ChunkedDivergenceFunction.apply(student, heads[0], None, teacher, heads[1], None, 0.5)
        >>> found.shape
        torch.Size([8])
    """

    @staticmethod
    def apply(
        student_hidden: Tensor,
        student_weight: Weight,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Weight,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return each token's divergence and the student's entropy; only the student gets a gradient.

        Args:
            student_hidden, teacher_hidden: hidden states, (..., D); the two D may differ.
            student_weight, teacher_weight: W, (C, D), or a :class:`xent.LowRank`.
            student_bias, teacher_bias: b, (C,), or None.
            beta: β. 0 is KL(teacher ‖ student), 1 is KL(student ‖ teacher). In between it is the generalised
                Jensen–Shannon divergence with the mixture (1 − β)·student + β·teacher.
            temperature: T; it divides both heads' logits, after scale and softcap.
            student_logit_scale, teacher_logit_scale: as ``logit_scale`` of :func:`xent.linear_kl_divergence`.
            student_final_logit_softcapping, teacher_final_logit_softcapping: as its ``softcap``.

        Returns:
            A pair of divergence and entropy, (...) float32 each, in nats. The entropy has no gradient.

        Raises:
            ValueError, TypeError: as :func:`xent.linear_js_divergence`.

        Example:
            >>> import torch
            >>> from xent.integrations.trl import ChunkedDivergenceFunction
            >>> student, teacher = torch.randn(8, 4), torch.randn(8, 6)
            >>> heads = torch.randn(10, 4, requires_grad=True), torch.randn(10, 6)
            >>> found, entropy = ChunkedDivergenceFunction.apply(
            ...     student, heads[0], None, teacher, heads[1], None, 0.5
            ... )
            >>> found.mean().backward()
        """
        student = student_hidden, _like(student_weight, student_hidden), _like(student_bias, student_hidden)
        with torch.no_grad():
            weight, bias = _like(teacher_weight, teacher_hidden), _like(teacher_bias, teacher_hidden)
            teacher = _detached(teacher_hidden), _detached(weight), _detached(bias)
        divergence = divergence_of_rows(
            student,
            teacher,
            beta,
            temperature=temperature,
            logit_scale=(student_logit_scale, teacher_logit_scale),
            softcap=(student_final_logit_softcapping, teacher_final_logit_softcapping),
        )
        with torch.no_grad():
            hidden, weight, bias = student
            rows = linear_row_statistics(
                hidden,
                weight,
                linear_bias=bias,
                temperature=temperature,
                logit_scale=student_logit_scale,
                softcap=student_final_logit_softcapping,
            )
        return divergence, rows.entropy


def add_fused_lm_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[OutputName | Literal["log_probs"], ...] = ("log_probs",),
) -> None:
    """Replace the forward of a model by one without stored logits, as TRL's function of this name does.

    Called with ``fused_lm_head=True`` the model returns TRL's ``FusedCausalLMOutput``. Called without it, its
    forward is what it was. For a trainer of TRL, call the function after the trainer is made, with the
    outputs that the trainer needs.

    Args:
        model: a causal language model of Transformers, which PEFT may wrap.
        temperature: T; it divides the logits.
        cast_lm_head_to_fp32: whether to compute with hidden states and head in float32, outside autocast.
        outputs: as in :meth:`ChunkedLogProbFunction.apply`.

    Raises:
        ValueError: a mixture of experts that adds its balancing loss.
        TypeError: a head that computes more than x Wᵀ + b.

    Example:
        >>> import transformers
        >>> from xent.integrations.trl import add_fused_lm_head
        >>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=100)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> add_fused_lm_head(model, outputs=("log_probs", "entropy"))  # SFTTrainer(model, ...).model
    """
    inner = causal_lm(model)
    language_head(inner)
    own = unbound(inner.forward)

    @functools.wraps(type(inner).forward)  # which `generate` reads the signature of
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return own(self, *args, **kwargs, **{name: t for name, t in given.items() if t is not None})
        return _fused(self, args, kwargs, labels, shift_labels, num_items_in_batch, settings)

    settings = _Settings(temperature, cast_lm_head_to_fp32, outputs)
    inner.forward = types.MethodType(forward, inner)


class _Settings(NamedTuple):
    """The arguments of `add_fused_lm_head`."""

    temperature: float
    cast: bool
    outputs: tuple[OutputName | Literal["log_probs"], ...]


def _fused(
    model: Any,
    args: tuple[Any, ...],
    inputs: dict[str, Any],
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items_in_batch: Tensor | float | None,
    settings: _Settings,
) -> Any:
    """Return TRL's output of a model, from its hidden states."""
    from trl.trainer.utils import FusedCausalLMOutput

    if labels is None and shift_labels is None:
        raise ValueError("pass labels, or shift_labels where they are shifted already")
    hidden, head = last_hidden(model, inputs, *args), language_head(model)
    weight, bias = head["linear_weight"], head["linear_bias"]
    if shift_labels is None:  # the last token of a row has no label, which costs no product and no copy
        assert labels is not None
        targets = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    else:
        targets = shift_labels
    targets = targets.to(hidden.device)
    enabled = torch.is_autocast_enabled(hidden.device.type) and not settings.cast
    with torch.autocast(hidden.device.type, enabled=enabled):
        found = ChunkedLogProbFunction.apply(
            hidden.float() if settings.cast else hidden,
            weight,
            bias,
            targets,
            settings.temperature,
            None,
            head["softcap"],
            head["logit_scale"],
            settings.outputs,
        )
    mask = targets != -100
    if shift_labels is None:
        mask = mask[:, :-1]
        shorter: list[Any] = [None if t is None else t[:, :-1] for t in found]
        found = TokenOutputs(*shorter)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return FusedCausalLMOutput(loss=-found.log_probs.sum() / count, label_mask=mask, **found._asdict())


def _like(t: Any, hidden: Tensor) -> Any:
    """Return a head's tensor in the type of the hidden states, as TRL has it; under autocast as it is."""
    if t is None or torch.is_autocast_enabled(hidden.device.type):
        return t
    if isinstance(t, Tensor):
        return t.to(hidden.dtype)
    return t.mapped(lambda each: each.to(hidden.dtype))


def _detached(t: Any) -> Any:
    if t is None:
        return None
    return t.detach() if isinstance(t, Tensor) else t.mapped(Tensor.detach)
