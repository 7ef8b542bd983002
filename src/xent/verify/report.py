"""The run of all identities in every type, and its report."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch

import xent
from xent.verify.data import batches, read_digits
from xent.verify.registry import IDENTITIES, Deviation, Identity, Setting

DtypeName: TypeAlias = Literal["float64", "float32", "bfloat16", "float16"]
DTYPES: dict[DtypeName, torch.dtype] = {name: getattr(torch, name) for name in get_args(DtypeName)}
DEFAULT_DTYPES: tuple[DtypeName, ...] = ("float64", "float32")
"""The types that `verify` checks by default."""


@dataclass(frozen=True)
class Outcome:
    """The result of one identity in one type.

    Example:
        >>> from xent.verify import verify
        >>> outcome = verify(["float64"]).outcomes[0]
        >>> outcome.holds, outcome.dtype
        (True, 'float64')
    """

    identity: Identity  # the identity
    dtype: str  # the name of the type
    worst: Deviation  # the largest deviation
    seconds: float  # the time of the check, s

    @property
    def holds(self) -> bool:
        """True where the largest deviation is within the one allowed."""
        return self.worst.units <= self.identity.allowed

    def summary(self) -> dict[str, Any]:
        """Return the outcome as a dictionary for JSON."""
        return {
            "dtype": self.dtype,
            "holds": self.holds,
            "error": self.worst.units,
            "where": self.worst.where,
            "seconds": round(self.seconds, 4),
        }


@dataclass(frozen=True)
class Report:
    """The results of all identities in all types.

    Example:
        >>> from xent.verify import verify
        >>> report = verify(["float64"])
        >>> report.holds, report.failures
        (True, [])
    """

    outcomes: tuple[Outcome, ...]  # the results, by type and then by identity
    dtypes: tuple[str, ...]  # the names of the types
    device: str  # the device
    data: tuple[str, ...]  # the batches of rows, each with its number of rows
    missing: str | None  # data that was not available, and the extra that brings it
    seconds: float  # the time of the run, s

    @property
    def holds(self) -> bool:
        """True where every identity holds in every type."""
        return all(outcome.holds for outcome in self.outcomes)

    @property
    def failures(self) -> list[Outcome]:
        """The outcomes whose identity does not hold."""
        return [outcome for outcome in self.outcomes if not outcome.holds]

    def of(self, identity: Identity) -> list[Outcome]:
        """Return the outcomes of an identity in the order of ``dtypes``.

        Args:
            identity: the identity.
        """
        return [outcome for outcome in self.outcomes if outcome.identity is identity]

    @property
    def identities(self) -> list[Identity]:
        """The identities that were checked, in order."""
        return list(dict.fromkeys(outcome.identity for outcome in self.outcomes))

    def summary(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
        return {
            "holds": self.holds,
            "versions": versions(),
            "device": self.device,
            "dtypes": list(self.dtypes),
            "data": list(self.data),
            "missing": self.missing,
            "seconds": round(self.seconds, 3),
            "identities": [
                {
                    "name": identity.name,
                    "formula": identity.formula,
                    "section": identity.section,
                    "allowed": identity.allowed,
                    "because": identity.because,
                    "results": [outcome.summary() for outcome in self.of(identity)],
                }
                for identity in self.identities
            ],
        }


def versions() -> dict[str, str]:
    return {
        "xent": xent.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def verify(dtypes: Sequence[DtypeName] = DEFAULT_DTYPES, device: str = "cpu") -> Report:
    """Check every identity in every type on a device.

    The identities are the formulas of cross-entropy, its derivatives and its bounds (:data:`IDENTITIES`). An
    exception in one identity counts as a deviation of inf, and the others are still checked.

    Args:
        dtypes: the names of the types: ``"float64"``, ``"float32"``, ``"bfloat16"`` and ``"float16"``.
        device: the device, as :class:`torch.device` takes it.

    Returns:
        A :class:`Report`.

    Raises:
        KeyError: a name that is not a type.
        RuntimeError: a device that is not there.

    Example:
        >>> from xent.verify import verify
        >>> report = verify(["float64"])
        >>> report.holds, len(report.outcomes) == len(report.identities)
        (True, True)
    """
    began = time.perf_counter()
    table = read_digits()
    in_order = sorted(IDENTITIES.values(), key=lambda identity: identity.section)
    outcomes = []
    where = torch.device(device)
    data: tuple[str, ...] = ()
    for dtype in dtypes:
        setting = Setting(DTYPES[dtype], where, batches(DTYPES[dtype], where, table))
        data = tuple(f"{batch.name}: {len(batch.y):,} rows" for batch in setting.batches)
        outcomes += [_outcome(identity, dtype, setting) for identity in in_order]
    missing = None if table is not None else "digits: scikit-learn comes with pip install 'xent[probe]'"
    return Report(tuple(outcomes), tuple(dtypes), device, data, missing, time.perf_counter() - began)


def _outcome(identity: Identity, dtype: str, setting: Setting) -> Outcome:
    began = time.perf_counter()
    try:
        worst = max(identity.check(setting), key=lambda deviation: deviation.units, default=None)
    except Exception as error:  # an identity that cannot be computed does not hold
        worst = Deviation(math.inf, f"{type(error).__name__}: {error}")
    if worst is None:
        worst = Deviation(math.inf, "nothing was compared")
    return Outcome(identity, dtype, worst, time.perf_counter() - began)
