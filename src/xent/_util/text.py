"""Values as text: a class, an object as JSON, a name in a terminal or a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np


def class_text(value: Any) -> str:
    """Return a class as text, the same whether it came from CSV, Parquet or NumPy."""
    return str(bool(value)).lower() if isinstance(value, (bool, np.bool_)) else str(value)


def printable(text: str) -> str:
    """Return text with control characters, which could steer a terminal, as escapes.

    >>> print(printable("a \\x1b[31mred\\x1b[0m é"))
    a \\x1b[31mred\\x1b[0m é
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(value: Any, most: int = 60) -> str:
    """Return a value as a message quotes it, cut where it is long (a cell with an open quote)."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def counted(count: int, noun: str) -> str:
    """Return a number with what it counts.

    >>> counted(1, "row"), counted(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def json_text(value: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """Return a value as JSON; numbers that are not finite, for which JSON has no word, are null.

    ``default(value)`` stands for a value of another type than JSON's.

    >>> json_text({"loss": float("inf"), "rows": 3})
    '{"loss": null, "rows": 3}'
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=default)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
