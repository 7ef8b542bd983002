"""The losses as modules: options at construction, tensors at the call."""

from xent.nn._modules import (
    BCELoss,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    KLDivLoss,
    LinearCrossEntropyLoss,
    LinearSoftTripletLoss,
    MarginLoss,
    SoftTripletLoss,
)
from xent.nn._prototypes import PrototypeHead
from xent.nn._row_losses import FocalLoss, PolyLoss

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "KLDivLoss",
    "LinearCrossEntropyLoss",
    "LinearSoftTripletLoss",
    "MarginLoss",
    "PolyLoss",
    "PrototypeHead",
    "SoftTripletLoss",
]
