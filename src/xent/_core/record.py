"""Dataclasses whose fields are set once.

A frozen dataclass assigns each field through `object.__setattr__`, which costs six times a plain assignment,
and the loss of a few thousand logits makes a dozen of them. Of a record the type checker sees to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

C = TypeVar("C")


@dataclass_transform(frozen_default=True, eq_default=False)
def record(cls: type[C]) -> type[C]:
    """Make a class a dataclass that is equal to itself alone."""
    return dataclass(eq=False)(cls)
