"""The values that each option of the public functions takes: one table, and one error for the others.

    valid("temperature", np.float32(2)) = 2.0        valid("temperature", None) → a TypeError

A name has one meaning in all functions, so it has one row here. Tensors with a value for each row, class or
logit are checked where their shape is known; here it is seen that they are dense tensors.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, cast, get_args

import numpy as np
import torch
from torch import Tensor

from xent._core.functorch import followed

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The types that losses are computed of."""

# The names that options take, for signatures and for the table below.
ReductionName: TypeAlias = Literal["none", "sum", "mean"]
TotalName: TypeAlias = Literal["mean", "sum"]  # of a loss that is one number
KlReductionName: TypeAlias = Literal["none", "batchmean", "mean", "sum"]
DirectionName: TypeAlias = Literal["forward", "reverse"]
RemainderName: TypeAlias = Literal["drop", "spread", "bucket"]
GeometryName: TypeAlias = Literal["inner", "cosine", "squared_l2"]
FisherName: TypeAlias = Literal["type-2", "monte-carlo", "empirical"]
WeightingName: TypeAlias = Literal["rows", "curvature"]
CurvatureName: TypeAlias = Literal["gauss-newton", "hessian"]
PreconditionerName: TypeAlias = Literal["class-blocks", "kronecker", "diagonal"]
StoppingName: TypeAlias = Literal["objective", "gradient"]
DifferentiateName: TypeAlias = Literal["implicit", "unroll"]
BalancedName: TypeAlias = Literal["balanced"]
AutoName: TypeAlias = Literal["auto"]


class Validator(Protocol):
    """A kind of value."""

    def __call__(self, name: str, value: Any) -> Any:
        """Return the value as a plain Python object; raise an error that names the option otherwise."""
        ...


@dataclass(frozen=True)
class Number:
    """Real numbers of an interval: Python's, NumPy's, or a tensor of one element."""

    takes: str  # the interval in words, for messages
    low: float = -math.inf
    high: float = math.inf
    ends: Literal["both", "low", "high", "neither"] = "neither"  # which of low and high belong to it
    optional: bool = False  # None passes

    def __call__(self, name: str, value: Any) -> float | None:
        if value is None and self.optional:
            return None
        number = value if type(value) is float else as_number(name, value)
        if isinstance(number, int) and abs(number) > sys.float_info.max:
            raise ValueError(f"{name} must be {self.takes}, got a number beyond the range of a float")
        # comparisons refuse nan too, and a compiler can follow them
        inside = self.low < number < self.high
        if not (
            inside
            or (number == self.low and self.ends in ("both", "low"))
            or (number == self.high and self.ends in ("both", "high"))
        ):
            raise ValueError(f"{name} must be {self.takes}, got {value}")
        return number


@dataclass(frozen=True)
class Whole:
    """Whole numbers of an interval."""

    takes: str
    low: float = -math.inf
    optional: bool = False
    flag: bool = False  # True and False pass, as 1 and 0

    def __call__(self, name: str, value: Any) -> int | None:
        if value is None and self.optional:
            return None
        if self.flag and _is_flag(value):
            return int(value)
        number = value if type(value) is int else as_number(name, value, "a whole number")
        if number % 1 != 0:  # nan and infinities too
            raise TypeError(f"{name} must be a whole number, got {value}")
        if number < self.low:
            raise ValueError(f"{name} must be {self.takes}, got {value}")
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"{name} must fit 64 bits, got {value}")
        return int(number)


@dataclass(frozen=True)
class OneOf:
    """One of a few names."""

    names: tuple[str, ...]
    optional: bool = False

    def __call__(self, name: str, value: Any) -> str | None:
        if (value is None and self.optional) or (isinstance(value, str) and value in self.names):
            return value
        *most, last = (*map(repr, self.names), *(["None"] if self.optional else []))
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name} must be {', '.join(most)} or {last}, got {_shown(value)}")


@dataclass(frozen=True)
class Flag:
    """True or False."""

    optional: bool = False

    def __call__(self, name: str, value: Any) -> bool | None:
        if value is None and self.optional:
            return None
        if _is_flag(value):
            return bool(value)
        also = " or None" if self.optional else ""
        raise TypeError(f"{name} must be True or False{also}, got {_shown(value)}")


@dataclass(frozen=True)
class Instance:
    """An object of a class, or None."""

    kind: type

    def __call__(self, name: str, value: Any) -> Any:
        if value is None or isinstance(value, self.kind):
            return value
        known = f"torch.{self.kind.__name__}"
        raise TypeError(f"{name} must be a {known} or None, got {_shown(value)}")


@dataclass(frozen=True)
class FlagOr:
    """True, False or a word."""

    word: str

    def __call__(self, name: str, value: Any) -> bool | str:
        if isinstance(value, str) and value == self.word:
            return value
        if _is_flag(value):
            return bool(value)
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name} must be True, False or {self.word!r}, got {_shown(value)}")


@dataclass(frozen=True)
class ByClass:
    """A dict with a number for each class, a word or None."""

    word: str
    number: Number

    def __call__(self, name: str, value: Any) -> dict[Any, float] | str | None:
        if value is None or (isinstance(value, str) and value == self.word):
            return value
        if isinstance(value, dict):
            checked = {}
            for key, each in value.items():
                plain = each.detach() if isinstance(each, Tensor) else each
                checked[key] = cast(float, self.number(f"{name}[{key!r}]", plain))
            return checked
        error = ValueError if isinstance(value, str) else TypeError
        raise error(
            f"{name} must be a dict with a number for each class, {self.word!r} or None, got {_shown(value)}"
        )


@dataclass(frozen=True)
class Seed:
    """A source of random numbers: None, a whole number or NumPy's ``RandomState``, as in scikit-learn."""

    def __call__(self, name: str, value: Any) -> Any:
        if value is None or isinstance(value, np.random.RandomState):
            return value
        number = as_number(name, value, "None, a whole number or a RandomState")
        if number % 1 != 0:
            raise TypeError(f"{name} must be None, a whole number or a RandomState, got {value}")
        if not 0 <= number < 2**32:
            raise ValueError(f"{name} must be between 0 and 2**32 - 1, got {value}")
        return int(number)


def _is_flag(value: Any) -> bool:
    # NumPy's bool has the type name bool too, and is none of Python's
    return isinstance(value, bool) or (
        type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    )


@dataclass(frozen=True)
class Values:
    """A dense tensor of real numbers, of floating-point numbers, or of True and False."""

    of: Literal["number", "floating-point number", "bool"]
    optional: bool = False

    def __call__(self, name: str, value: Any) -> Tensor | None:
        if value is None and self.optional:
            return None
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got {_shown(value)}")
        dtype = value.dtype
        fits = {
            "number": dtype != torch.bool and not dtype.is_complex,
            "floating-point number": dtype.is_floating_point,
            "bool": dtype == torch.bool,
        }
        if not fits[self.of]:
            raise TypeError(f"{name} must be a tensor of {self.of}s, got {_shown(value)}")
        return value


@dataclass(frozen=True)
class Pair:
    """Two dense tensors of floating-point numbers."""

    optional: bool = False

    def __call__(self, name: str, value: Any) -> tuple[Tensor | None, ...] | None:
        if value is None and self.optional:
            return None
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise TypeError(f"{name} must be two tensors, got {_shown(value)}")
        return tuple(Values("floating-point number")(f"{name}[{i}]", t) for i, t in enumerate(value))


def as_number(name: str, value: Any, kind: str = "a number") -> float | int:
    """Convert a number of any library to Python's; raise a TypeError for everything else."""
    if isinstance(value, Tensor):
        if value.requires_grad or followed(value):
            raise ValueError(f"{name} takes no gradient: pass {name}.detach()")
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got {_shown(value)}")
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be {kind}, got {_shown(value)}")
        try:
            return value.item()
        except RuntimeError as error:  # no data, or under vmap one number for each of several
            raise TypeError(f"{name} must be one number that can be read, got {_shown(value)}") from error
    if isinstance(value, float):
        return float(value)  # NumPy's is one of Python's, and shows otherwise
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, torch.SymInt | torch.SymFloat):  # a size in a graph that is being made
        return cast(float, value)
    # NumPy's scalars and whatever else has the methods of a number, without a look at their classes
    if hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0 and value.dtype.kind in "iuf":
        number: float | int = value.item()
        return number
    raise TypeError(f"{name} must be {kind}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """Describe a value of the wrong kind in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    if value is None or isinstance(value, str | bool):
        return repr(value)
    return type(value).__name__


POSITIVE = Number("positive and finite", 0.0)
NONNEGATIVE = Number("at least 0 and finite", 0.0, ends="low")
FINITE = Number("finite")

OPTIONS: dict[str, Validator] = {
    "label_smoothing": Number("between 0 and 1", 0.0, 1.0, ends="both"),
    "z_loss": FINITE,
    "logit_scale": POSITIVE,
    "softcap": Number("positive and finite, or None", 0.0, optional=True),
    "temperature": POSITIVE,
    "ignore_index": Whole("a whole number, or None", optional=True),
    "memory_budget": Whole("a positive number of bytes, or None", 1, optional=True),
    "reduction": OneOf(get_args(ReductionName)),
    "check_targets": Flag(optional=True),
    "denominator": Number("positive, or 0 where no row counts", 0.0, ends="low", optional=True),
    "product_dtype": Instance(torch.dtype),
    "sparse_grad": Flag(),
    "normalize": Flag(),
    "bits": Flag(),
    "direction": OneOf(get_args(DirectionName)),
    "beta": Number("between 0 and 1", 0.0, 1.0, ends="both"),
    "scale_by_t2": Flag(),
    "return_entropy": Flag(),
    "target_is_logits": Flag(),
    "log_target": Flag(),
    "clamp": Flag(),
    "remainder": OneOf(get_args(RemainderName)),
    "k": Whole("at least 1", 1),
    # classes
    "num_classes": Whole("at least 1", 1),
    "num_samples": Whole("at least 1", 1),
    "generator": Instance(torch.Generator),
    # margins
    "cosine": FINITE,
    "angle": Number("in radians, from 0 to π/2", 0.0, math.pi / 2, ends="both"),
    "scale": Number("positive, and large enough to divide by", sys.float_info.min, ends="low"),
    # triplets
    "geometry": OneOf(get_args(GeometryName)),
    "top_k": Whole("at least 1", 1),
    "margin": FINITE,
    "p": Number("a number and not nan", ends="both"),
    "eps": FINITE,
    "swap": Flag(),
    "smooth": Flag(),
    # curvature
    "kind": OneOf(get_args(FisherName)),
    "samples": Whole("at least 1", 1),
    "weighting": OneOf(get_args(WeightingName)),
    "corrected": Flag(),
    "curvature": OneOf(get_args(CurvatureName)),
    "preconditioner": OneOf(get_args(PreconditionerName), optional=True),
    "l2": NONNEGATIVE,
    "damping": NONNEGATIVE,
    "tolerance": POSITIVE,
    "max_iterations": Whole("at least 0, or None", 0, optional=True),
    # modules
    "in_features": Whole("at least 0", 0),
    "num_prototypes": Whole("at least 1", 1),
    "iterations": Whole("at least 1", 1),
    "epsilon": POSITIVE,
    "bias": Flag(),
    "assigned": Whole("at least 1", 1),
    "factored": Flag(),
    # the estimator's
    "C": Number("positive, inf for no penalty", 0.0, ends="high"),
    "tol": Number("a number that is not negative", 0.0, ends="both"),
    "max_iter": Whole("a whole number that is not negative", 0),
    "fit_intercept": Flag(),
    "refit": Flag(),
    "stopping": OneOf(get_args(StoppingName)),
    "class_weight": ByClass(get_args(BalancedName)[0], NONNEGATIVE),
    "warm_start": Flag(),
    "random_state": Seed(),
    "verbose": Whole("a whole number that is not negative, or a bool", 0, flag=True),
    # of metrics
    "renormalize": Flag(),
    "scale_by_half": FlagOr(get_args(AutoName)[0]),
    # assignments
    "scores": Values("floating-point number"),
    "mask": Values("bool", optional=True),
    "row_marginal": Values("number", optional=True),
    "column_marginal": Values("number", optional=True),
    "start": Pair(optional=True),
    "row_relaxation": Number("positive, or None", 0.0, ends="high"),
    "column_relaxation": Number("positive, or None", 0.0, ends="high"),
    "differentiate": OneOf(get_args(DifferentiateName)),
}


def valid(name: str, value: Any) -> Any:
    """Return the value of an option as a plain Python object.

    Raises:
        TypeError: the value is of the wrong kind.
        ValueError: it is of the right kind and out of range.

    Example:
        >>> valid("softcap", 30)
        30
        >>> valid("label_smoothing", None)
        Traceback (most recent call last):
            ...
        TypeError: label_smoothing must be a number, got None
    """
    return OPTIONS[name](name, value)
