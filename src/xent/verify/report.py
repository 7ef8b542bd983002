"""The run of all identities in every type, and its report."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import xent
from xent.verify.data import batches, read_digits
from xent.verify.registry import IDENTITIES, Deviation, Identity, Setting

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DEFAULT_DTYPES = ("float64", "float32")


@dataclass(frozen=True)
class Outcome:
    """The result of one identity in one type."""

    identity: Identity
    dtype: str
    worst: Deviation
    seconds: float

    @property
    def holds(self) -> bool:
        return self.worst.units <= self.identity.allowed

    def summary(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "holds": self.holds,
            "error": self.worst.units,
            "where": self.worst.where,
            "seconds": round(self.seconds, 4),
        }


@dataclass(frozen=True)
class Report:
    """The results of all identities in all types."""

    outcomes: tuple[Outcome, ...]
    dtypes: tuple[str, ...]
    device: str
    data: tuple[str, ...]
    missing: str | None  # data that was not available, and the extra that brings it
    seconds: float

    @property
    def holds(self) -> bool:
        return all(outcome.holds for outcome in self.outcomes)

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.holds]

    def of(self, identity: Identity) -> list[Outcome]:
        """Return the outcomes of an identity in the order of `dtypes`."""
        return [outcome for outcome in self.outcomes if outcome.identity is identity]

    @property
    def identities(self) -> list[Identity]:
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


def verify(dtypes: Sequence[str] = DEFAULT_DTYPES, device: str = "cpu") -> Report:
    """Check every identity in every type on a device; an exception in one does not end the others."""
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
