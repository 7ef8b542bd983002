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

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "KLDivLoss",
    "LinearCrossEntropyLoss",
    "LinearSoftTripletLoss",
    "MarginLoss",
    "PrototypeHead",
    "SoftTripletLoss",
]
