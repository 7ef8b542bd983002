"""The options that losses share, in four groups, each validated once when it is made.

    target     which class a row has, and how much it counts      logits    how the logits are made
    reduction  how rows become a loss                             execution how it is computed

Only what differs from its default is validated. `Options.of` sorts options by name into their groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xent._arguments.validation import check_tensors, is_readable
from xent._autograd import transforms
from xent._core.margin import Margin
from xent._core.record import record
from xent._core.validators import ReductionName, as_number, valid


def _tensor(name: str, value: Any) -> Any:
    check_tensors(spread=True, **{name: value})
    return value


def _temperature(name: str, t: Any) -> float | Tensor:
    """Return a number where the value is one that can be read, else a tensor for each row."""
    if not isinstance(t, Tensor) or (t.numel() == 1 and is_readable(t)):
        number: float = valid(name, t)
        return number
    check_tensors(temperature=t)
    if not t.is_floating_point():
        raise TypeError(f"a temperature for each row must be floating, got {t.dtype}")
    if t.requires_grad or transforms.followed(t):
        raise ValueError("temperature takes no gradient: pass temperature.detach()")
    return t


def _margin(name: str, value: object) -> Margin:
    """Return a margin, of which a number is the cosine's."""
    if isinstance(value, Margin):
        return value
    as_number(name, value, "a number or a xent.Margin")
    return Margin(valid(name, value))


def _denominator(name: str, value: Any) -> float | Tensor | None:
    """Return the divisor that replaces that of a mean: a number where it can be read, else a tensor ()."""
    if isinstance(value, Tensor) and value.numel() == 1 and not is_readable(value):
        if value.requires_grad or transforms.followed(value):
            raise ValueError("denominator takes no gradient: pass denominator.detach()")
        return value.reshape(())
    number: float | None = valid(name, value)
    return number


class _Group:
    """A group of options: for each that is validated its name, its default, and how."""

    validated: tuple[tuple[str, Any, Callable[[str, Any], Any]], ...] = ()

    def __post_init__(self) -> None:
        for name, default, validate in self.validated:
            value = getattr(self, name)
            if value is default or (
                default is not None and type(value) is type(default) and value == default
            ):
                continue
            object.__setattr__(self, name, validate(name, value))


@record
class TargetOptions(_Group):
    """The options of a row's target and of its weight."""

    weight: Tensor | None = None  # (C,)
    ignore_index: int | None = -100
    label_smoothing: float = 0.0
    sample_weight: Tensor | None = None  # of the shape of the unreduced loss
    bucket: bool = False  # whether the loss knows what a TopKTarget's bucket is

    validated = (
        ("weight", None, _tensor),
        ("ignore_index", -100, valid),
        ("label_smoothing", 0.0, valid),
        ("sample_weight", None, _tensor),
    )

    @property
    def ignored(self) -> int:
        return -100 if self.ignore_index is None else self.ignore_index


@record
class LogitOptions(_Group):
    """The options of the logits that enter the softmax."""

    softcap: float | None = None
    temperature: float | Tensor = 1.0  # a number, or a tensor of the shape of the unreduced loss
    margin: Margin | float | None = None
    log_q: Tensor | None = None  # (C,)
    classes: Tensor | None = None  # (S,)
    sparse_grad: bool = False
    normalize: bool = False
    logit_scale: float = 1.0  # before the softcap

    validated = (
        ("logit_scale", 1.0, valid),
        ("softcap", None, valid),
        ("temperature", 1.0, _temperature),
        ("margin", None, _margin),
        ("log_q", None, _tensor),
        ("sparse_grad", False, valid),
        ("normalize", False, valid),
    )


@record
class ReductionOptions(_Group):
    """The options of the step from rows to a loss."""

    reduction: ReductionName = "mean"
    denominator: float | Tensor | None = None
    z_loss: float = 0.0
    data_group: Any = None  # a torch.distributed process group whose ranks share the rows

    validated = (
        ("reduction", "mean", valid),
        ("denominator", None, _denominator),
        ("z_loss", 0.0, valid),
    )


@record
class Execution(_Group):
    """The options of how a loss is computed."""

    product_dtype: torch.dtype | None = None
    memory_budget: int | None = None
    check_targets: bool | None = None
    group: Any = None  # a torch.distributed process group whose ranks share the classes

    validated = (
        ("product_dtype", None, valid),
        ("memory_budget", None, valid),
        ("check_targets", None, valid),
    )


class Options(NamedTuple):
    """The four groups."""

    target: TargetOptions = TargetOptions()
    logits: LogitOptions = LogitOptions()
    reduction: ReductionOptions = ReductionOptions()
    execution: Execution = Execution()

    @classmethod
    def of(cls, **given: Any) -> Options:
        """Return the options of the names given, which need not say of which group they are."""
        return cls().with_options(**given)

    def with_options(self, **given: Any) -> Options:
        """Return the options with others in place of some."""
        changed: dict[str, dict[str, Any]] = {}
        for name, value in given.items():
            if name not in GROUP_OF:
                raise TypeError(f"there is no option {name!r}; the options are {', '.join(sorted(GROUP_OF))}")
            changed.setdefault(GROUP_OF[name], {})[name] = value
        return self._replace(
            **{group: replace(getattr(self, group), **new) for group, new in changed.items()}
        )

    @property
    def on_one_process(self) -> bool:
        return self.execution.group is None and self.reduction.data_group is None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the options that may be tensors, None for the others."""
        t = self.logits.temperature
        return (
            *(self.target.weight, self.target.sample_weight, self.logits.classes, self.logits.log_q),
            t if isinstance(t, Tensor) else None,
        )


GROUP_OF = {
    field.name: group
    for group, kind in (
        ("target", TargetOptions),
        ("logits", LogitOptions),
        ("reduction", ReductionOptions),
        ("execution", Execution),
    )
    for field in fields(kind)
}
