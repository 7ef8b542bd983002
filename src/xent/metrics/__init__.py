"""Metrics of predicted probabilities: NumPy arrays or torch tensors in, numbers out.

Read in this order: `_arrays` (any array as tensors of a few rows), `_labels` (the column of each row's
label), `_probabilities` (checked rows of probabilities), `_comparison` (the sweep over all three), `_losses`
(the metrics). They need torch and numpy alone.
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
