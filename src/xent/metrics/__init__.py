"""Metrics of predicted probabilities, NumPy or torch in, numbers out; torch and numpy are all they need.

Read in this order: `arrays` (anybody's array, a part at a time), `labels` (which column is a row's own),
`probabilities` (rows that are checked), `comparison` (the sweep over all three), `losses` (the metrics).
"""

from xent.metrics._losses import (
    ClassLoss,
    brier_score,
    d2_log_loss,
    label_entropy,
    log_loss,
    log_loss_per_class,
    log_loss_per_sample,
)

__all__ = [
    "ClassLoss",
    "brier_score",
    "d2_log_loss",
    "label_entropy",
    "log_loss",
    "log_loss_per_class",
    "log_loss_per_sample",
]
