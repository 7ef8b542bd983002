"""The triplets inside cross-entropy: a row's features, its target's class vector, and each of the others.

    m_j = z_j − z_y        CE = log(1 + Σ_{j≠y} exp m_j)        ∂CE/∂m_j = p_j

`bounds` bounds cross-entropy by triplet losses, `attribution` splits it by rival class, `pair_matrix` adds
the parts up over a data set, and the triplet losses themselves are for training. Each has a twin ``linear_…``
that works from the features of a linear head, without storing the logits.
"""

from __future__ import annotations

from xent.triplets._attribution import Attribution, attribution, linear_attribution
from xent.triplets._bounds import bounds, linear_bounds, linear_margins, margins
from xent.triplets._embedding import triplet_margin_loss
from xent.triplets._losses import (
    linear_smooth_triplet_loss,
    linear_triplet_loss,
    smooth_triplet_loss,
    triplet_loss,
)
from xent.triplets._pairs import Pair, PairMatrix, linear_pair_matrix, pair_matrix
from xent.triplets._sweep import Bounds

__all__ = [
    "Attribution",
    "Bounds",
    "Pair",
    "PairMatrix",
    "attribution",
    "bounds",
    "linear_attribution",
    "linear_bounds",
    "linear_margins",
    "linear_pair_matrix",
    "linear_smooth_triplet_loss",
    "linear_triplet_loss",
    "margins",
    "pair_matrix",
    "smooth_triplet_loss",
    "triplet_loss",
    "triplet_margin_loss",
]
