"""The temperature of a fitted model, by the validation rows that it has not seen.

p = softmax(z/T)        T minimises the validation rows' loss (Guo et al., 2017)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from xent._calibration import fit_temperature
from xent.data.model_file import Model
from xent.data.table import Table
from xent.errors import NoBestTemperature
from xent.report.evaluation import Evaluation, evaluate
from xent.report.predictions import log_proba


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A temperature, and the validation rows before and after it."""

    temperature: float
    before: Evaluation
    after: Evaluation
    why_not: str = ""  # the reason why the temperature stays 1; empty where it was fitted

    def summary(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "temperature": self.temperature,
            "why_not": self.why_not or None,
            "before": self.before.summary() | {"reliability": self.before.reliability()},
            "after": self.after.summary() | {"reliability": self.after.reliability()},
        }


def calibrated(model: Model, table: Table, rows: np.ndarray, before: Evaluation) -> Calibration:
    """Return the temperature that some rows of a table fix; 1 where no temperature is the best."""
    assert table.codes is not None
    log_p = np.concatenate([part for _, part in log_proba(model, table, rows)])
    target = table.codes[rows] if table.soft is None else table.soft[rows].astype(log_p.dtype)
    weight = None if table.weight is None else torch.from_numpy(table.weight[rows])
    try:
        found = fit_temperature(torch.from_numpy(log_p), torch.from_numpy(target), sample_weight=weight)
    except NoBestTemperature as error:
        return Calibration(1.0, before, before, str(error))
    after = evaluate(dataclasses.replace(model, temperature=found), table, table.codes, rows)
    return Calibration(found, before, dataclasses.replace(after, baseline=before.baseline))
