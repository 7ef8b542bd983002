"""What each option of the public functions takes: one table, and one error for a value that does not fit.

    valid("temperature", np.float32(2)) = 2.0        valid("temperature", None) → a TypeError

A name has one meaning in all functions, so it has one row here. Tensors with a value for each row, class or
logit are checked where their shape is known; here it is seen that they are dense tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor


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
        number = value if type(value) is float else _one_number(name, value, "a number")
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

    def __call__(self, name: str, value: Any) -> int | None:
        if value is None and self.optional:
            return None
        number = value if type(value) is int else _one_number(name, value, "a whole number")
        if number % 1 != 0:  # nan and infinities too
            raise TypeError(f"{name} must be a whole number, got {value}")
        if number < self.low:
            raise ValueError(f"{name} must be {self.takes}, got {value}")
        return int(number)


@dataclass(frozen=True)
class OneOf:
    """One of a few names."""

    names: tuple[str, ...]
    optional: bool = False

    def __call__(self, name: str, value: Any) -> str | None:
        if (value is None and self.optional) or (isinstance(value, str) and value in self.names):
            return value
        *most, last = (repr(known) for known in self.names)
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name} must be {', '.join(most)} or {last}, got {_shown(value)}")


@dataclass(frozen=True)
class Flag:
    """True or False."""

    optional: bool = False

    def __call__(self, name: str, value: Any) -> bool | None:
        if value is None and self.optional:
            return None
        # NumPy's bool has the type name bool too, and is none of Python's
        if isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ == "bool"):
            return bool(value)
        also = " or None" if self.optional else ""
        raise TypeError(f"{name} must be True or False{also}, got {_shown(value)}")


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


def _one_number(name: str, value: Any, kind: str) -> float | int:
    """Convert a number of any library to Python's; raise a TypeError for everything else."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(f"{name} takes no gradient: pass {name}.detach()")
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be {kind}, got {_shown(value)}")
        return value.item()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
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
NONNEGATIVE = Number("finite and not negative", 0.0, ends="low")
FINITE = Number("finite")

OPTIONS: dict[str, Validator] = {
    "label_smoothing": Number("between 0 and 1", 0.0, 1.0, ends="both"),
    "z_loss": FINITE,
    "softcap": Number("positive and finite, or None", 0.0, optional=True),
    "temperature": POSITIVE,
    "ignore_index": Whole("a whole number, or None", optional=True),
    "memory_budget": Whole("a positive number of bytes, or None", 1, optional=True),
    "reduction": OneOf(("none", "sum", "mean")),
    "check_targets": Flag(optional=True),
    # assignments
    "scores": Values("floating-point number"),
    "mask": Values("bool", optional=True),
    "row_marginal": Values("number", optional=True),
    "column_marginal": Values("number", optional=True),
    "start": Pair(optional=True),
    "epsilon": POSITIVE,
    "row_relaxation": Number("positive, or None", 0.0, ends="high"),
    "column_relaxation": Number("positive, or None", 0.0, ends="high"),
    "max_iterations": Whole("at least 1", 1),
    "tolerance": Number("positive and finite, or None", 0.0, optional=True),
    "differentiate": OneOf(("implicit", "unroll")),
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
