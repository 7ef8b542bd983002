"""Two figures of scikit-learn's handwritten digits: the loss by pair of classes, and the hardest triplets.

The logits are a linear classifier's on rows that it was not fitted on (five folds).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

import xent
from xent.errors import needs
from xent.report import figures
from xent.report.figures import FAINT

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Predictions(NamedTuple):
    """The digits and the logits of the classifier."""

    pixels: np.ndarray  # (N, 8, 8)
    logits: Tensor  # (N, 10)
    y: Tensor  # (N,)


@cache
def predictions() -> Predictions:
    """Return the digits and cross-validated logits; computed once."""
    with needs("probe"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import cross_val_predict
    X, y = load_digits(return_X_y=True)
    model = xent.SoftmaxRegression(C=0.1)
    logits = cross_val_predict(model, X, y, cv=5, method="decision_function")
    return Predictions(X.reshape(-1, 8, 8), torch.from_numpy(logits), torch.from_numpy(y))


def rivals(figure: Figure) -> None:
    """Draw the pair matrix: the share of the whole loss by digit and rival."""
    _, logits, y = predictions()
    pairs = xent.triplets.pair_matrix(logits, y)
    share = (pairs.matrix / pairs.loss.sum()).numpy()
    text = [[f"{100 * v:.1f}" if v >= 0.0005 else "" for v in row] for row in share]
    figure.set_size_inches(6.4, 5.2)
    axes = figure.add_subplot()
    shade = np.where(np.eye(10, dtype=bool), np.nan, share)
    figures.pairs(axes, shade, text, [str(c) for c in range(10)], "rival", "share of all loss")
    mean_loss = float(pairs.loss.sum() / pairs.count.sum())
    figures.titled(
        axes, "Who carries whose loss", f"per cent of {mean_loss:.3f} nats a row, over {len(y):,} digits"
    )


def hardest(figure: Figure) -> None:
    """Draw the five rows with the largest loss of the hardest triplet."""
    pixels, logits, y = predictions()
    bounds = xent.triplets.bounds(logits, y)
    worst = bounds.hardest_low.topk(5).indices
    attribution = xent.triplets.attribution(logits[worst], y[worst], 1)
    figure.set_size_inches(13.9, 4.2)
    classes, shares = attribution.classes[:, 0], attribution.shares[:, 0]
    for axes, n, rival, share in zip(figure.subplots(1, 5), worst.tolist(), classes, shares, strict=True):
        axes.imshow(pixels[n], cmap="gray_r", vmin=0, vmax=16)
        axes.set_axis_off()
        axes.set_title(f"a {int(y[n])}; rival {int(rival)}", fontsize=11, weight="bold", loc="left")
        lines = (
            f"loss {float(bounds.loss[n]):.2f} nats",
            f"hardest triplet {float(bounds.hardest_low[n]):.2f}",
            f"its share {100 * float(share):.1f} %",
        )
        axes.text(-0.5, 8.1, "\n".join(lines), va="top", color=FAINT, fontsize=9, linespacing=1.4)
