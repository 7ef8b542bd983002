"""The losses as modules: options at construction, tensors at the call."""

from xent.nn._binary import BCELoss, BCEWithLogitsLoss, KLDivLoss
from xent.nn._cross_entropy import CrossEntropyLoss, LinearCrossEntropyLoss
from xent.nn._margin import MarginLoss
from xent.nn._prototypes import PrototypeHead
from xent.nn._row_losses import FocalLoss, LinearFocalLoss, LinearPolyLoss, PolyLoss
from xent.nn._triplets import LinearSoftTripletLoss, SoftTripletLoss

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "KLDivLoss",
    "LinearCrossEntropyLoss",
    "LinearFocalLoss",
    "LinearPolyLoss",
    "LinearSoftTripletLoss",
    "MarginLoss",
    "PolyLoss",
    "PrototypeHead",
    "SoftTripletLoss",
]
