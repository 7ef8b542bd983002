"""The rows of an operator: one tensor of features, or batches that are read in every product.

Both become checked problems of the core, with one divisor for all. An operator belongs to the weight at which
it was made, because it stores the rows' statistics there: a tensor changed in place since then is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from xent._arguments.call import Call, resolve_head
from xent._arguments.options import Options
from xent._arguments.validation import check_tensors, require_tensors
from xent._autograd import transforms
from xent._core.logits import LinearHead, compute_dtype
from xent._core.problem import Problem
from xent._core.target import Target, TopKTarget, tensors_of

Batch: TypeAlias = tuple[Tensor, Target] | tuple[Tensor, Target, Tensor]

OPTIONS = (
    "reduction",
    "class_weight",
    "ignore_index",
    "label_smoothing",
    "sample_weight",
    "z_loss",
    "softcap",
    "temperature",
    "denominator",
    "memory_budget",
)


class Known(NamedTuple):
    """A tensor, and its version counter when the operator was made."""

    name: str
    tensor: Tensor
    version: int


class Source:
    """Problems of a head, one for each batch, the same in every pass.

    Args:
        features, target: (..., D) and its target; or batches and None.
        options: those of the loss; sample weights only with one tensor of features.
    """

    def __init__(
        self,
        features: Tensor | Iterable[Batch],
        weight: Tensor,
        bias: Tensor | None,
        target: Target,
        options: Options,
    ) -> None:
        require_tensors(weight=weight)
        check_tensors(bias=bias)
        if weight.dim() != 2:
            raise ValueError(f"weight must be (C, D), got {tuple(weight.shape)}")
        self.in_memory = isinstance(features, Tensor)
        if isinstance(features, Tensor):
            check_target(target)
            self.batches: Iterable[Any] = [(features, target)]
        else:
            _check_batches(features, target, options)
            self.batches = features
        self.rows_shape = features.shape if isinstance(features, Tensor) else None
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.options = options
        self._known = [
            Known(name, tensor, _version(tensor))
            for name, tensor in (
                ("weight", weight),
                ("bias", bias),
                ("features", features),
                *(("target", t) for t in tensors_of(target)),
                ("sample_weight", options.target.sample_weight),
                ("class_weight", options.target.weight),
            )
            if isinstance(tensor, Tensor)
        ]
        refuse_derivatives(*(known.tensor for known in self._known))
        # so that contributions of batches are summed before they are rounded
        wide = self.weight.dtype if self.in_memory else compute_dtype(self.weight.dtype)
        self._head = self.weight.to(wide), None if self.bias is None else self.bias.to(wide)
        self.scale = self._total_scale()

    def check_unchanged(self) -> None:
        """Raise a RuntimeError that names a tensor changed in place since the operator was made."""
        for name, tensor, version in self._known:
            if _version(tensor) != version:
                raise RuntimeError(
                    f"{name}, or what it is a view of, was changed in place since this operator was made, "
                    "which knows the rows as they were: make a new operator, or make it of a copy"
                )

    def __getstate__(self) -> dict[str, Any]:
        self.check_unchanged()  # the version counters of a copy's tensors start anew
        return self.__dict__ | {"_known": [(known.name, known.tensor) for known in self._known]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        known = [Known(name, tensor, _version(tensor)) for name, tensor in state["_known"]]
        self.__dict__.update(state | {"_known": known})

    def problems(self) -> Iterator[tuple[Problem, Tensor | None]]:
        """Yield each batch's problem and the weights (M,) of its rows."""
        self.check_unchanged()
        w, b = self._head
        for number, call in enumerate(self._calls()):
            (problem,) = call.problems
            self._check_finite(problem, number)
            logits = problem.logits
            assert isinstance(logits, LinearHead)
            yield replace(problem, logits=replace(logits, w=w, b=b)), problem.row_weight

    def _calls(self) -> Iterator[Call]:
        for number, batch in enumerate(self.batches):
            if not isinstance(batch, tuple | list) or not 2 <= len(batch) <= 3:
                size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
                raise TypeError(
                    f"batch {number} must be (features, target) or (features, target, sample_weight), "
                    f"got a {type(batch).__name__}{size}"
                )
            x, target, *s = batch
            options = self.options.with_options(sample_weight=s[0]) if s else self.options
            check_tensors(features=x)
            if not self.in_memory:
                refuse_derivatives(x, *tensors_of(target), *s)
            yield resolve_head(options, x.detach(), self.weight, self.bias, target)

    def _total_scale(self) -> float:
        """Return one over the divisor of all batches together."""
        if self.options.reduction.reduction == "sum" or self.options.reduction.denominator is not None:
            calls = list(self._calls())
            rows = [problem for call in calls for problem in call.problems]
            return float(calls[0].reduction.scale(rows)) if calls else 1.0
        divisor = 0.0
        for call in self._calls():
            (problem,) = call.problems
            scale = float(call.reduction.scale(call.problems))
            empty = problem.targets.count == 0
            divisor += 0.0 if scale == 0.0 or empty else 1.0 / scale
        return 0.0 if divisor == 0.0 else 1.0 / divisor

    def _check_finite(self, problem: Problem, batch: int) -> None:
        x, rows = problem.logits.leaves[0], problem.selection.index
        assert x is not None
        good = (x if rows is None else x[rows]).isfinite().all(1)
        if not good.all():
            at = int(good.logical_not().nonzero()[0])
            row = at if rows is None else int(rows[at])
            where = f"row {row}" if self.in_memory else f"row {row} of batch {batch}"
            raise ValueError(f"the features of {where} are not finite; leave it out with ignore_index")


def check_target(target: object) -> None:
    """Raise an error unless a target is given."""
    if target is None:
        raise ValueError("a target is needed: it says how much each row counts")
    if not isinstance(target, Tensor | TopKTarget):
        raise TypeError(f"target must be a tensor or a TopKTarget, got {type(target).__name__}")


def check_options(of: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a TypeError for an option that would otherwise be ignored."""
    for name in given:
        if name not in known:
            raise TypeError(f"{of} takes no {name}; its options are {', '.join(known)}")


def refuse_derivatives(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError where a tensor that is held constant would get a derivative of 0."""
    if transforms.followed(*tensors) or transforms.batched(*tensors):
        raise NotImplementedError(
            "features, head and targets are held constant here: there is no derivative in them under "
            "torch.func or in forward mode, and no vmap over them; pass tensors from outside, or detached"
        )


def _check_batches(features: object, target: Target, options: Options) -> None:
    if hasattr(features, "__array__"):
        raise TypeError(
            f"features must be a tensor, or batches of them; got {type(features).__name__}: "
            "torch.from_numpy makes it one"
        )
    if not isinstance(features, Iterable):
        raise TypeError(f"features must be a tensor, or batches of them; got {type(features).__name__}")
    if target is not None or options.target.sample_weight is not None:
        raise ValueError("batches bring their targets: (features, target[, sample_weight]) each")
    if iter(features) is features:
        raise TypeError(
            "features must be a tensor, or something that can be gone through again and again (a "
            "list of batches, a DataLoader); an iterator is empty after one pass"
        )


def _version(tensor: Tensor) -> int:
    """Return the version counter of a tensor; 0 in inference mode, where torch keeps none."""
    return 0 if tensor.is_inference() else tensor._version
