"""The project's figures, in one style: Okabe and Ito's colours, which colour-blind eyes tell apart; a light
grid; names written beside what they name instead of in a legend.

Needs the extra ``report``. Nothing here touches matplotlib's global state or opens a window.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
"""Colours of the palette by Okabe and Ito."""
INK, FAINT, RULE = "#222222", "#6B6B6B", "#E6E6E6"

STYLE: Any = {
    "figure.dpi": 160,
    "savefig.dpi": 160,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $x_$
    "axes.edgecolor": "#BBBBBB",
    "axes.labelcolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Set the style, inside the block only."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def note(axes: Axes, text: str, at: tuple[float, float], shift: tuple[float, float], **look: Any) -> None:
    """Write a text at a point, shifted by some points of the page."""
    axes.annotate(text, at, shift, textcoords="offset points", **look)


def titled(axes: Axes, title: str, subtitle: str) -> None:
    """Write a title, and under it a fainter line, flush with the axes' left edge."""
    note(axes, title, (0, 1), (0, 26), xycoords="axes fraction", fontsize=13, weight="bold")
    note(axes, subtitle, (0, 1), (0, 10), xycoords="axes fraction", color=FAINT, fontsize=9.5)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format of the suffix, cropped to what is drawn; the same bytes each time."""
    import matplotlib

    undated = {"Date": None} if os.fspath(path).endswith(".svg") else None
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "xent"}):
        warnings.simplefilter("ignore", UserWarning)  # of letters that the font lacks: boxes stand for them
        figure.savefig(path, bbox_inches="tight", pad_inches=0.22, facecolor="white", metadata=undated)


def loss_curve(
    path: str | os.PathLike[str],
    training: np.ndarray,  # (iterations + 1,) nats
    validation: np.ndarray,  # the same, or empty
    label_entropy: float,
) -> None:
    """Draw training and validation loss by iteration, and the loss of knowing only the class frequencies."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    with style():
        figure = Figure(figsize=(7.2, 4.2))
        axes = figure.add_subplot()
        last = max(1, len(training) - 1)
        axes.axhline(label_entropy, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        at_right_edge = axes.get_yaxis_transform()
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        look = dict(xycoords=at_right_edge, ha="right", color=FAINT, fontsize=9.5, bbox=box)
        note(axes, f"class frequencies alone  {label_entropy:#.3g}", (1, label_entropy), (0, 5), **look)
        curves = [("training", training, BLUE)]
        if len(validation):
            curves.append(("validation", validation, VERMILION))
        for _, curve, colour in curves:
            axes.plot(np.arange(len(curve)), curve, color=colour)
            axes.plot(len(curve) - 1, curve[-1], "o", color=colour, markersize=6, clip_on=False, zorder=3)
        # the axis is logarithmic where the losses span a factor; so labels keep apart in its units
        values = np.concatenate([curve for _, curve, _ in curves] + [np.array([label_entropy])])
        low, high = float(values[values > 0].min()), float(values.max())
        logarithmic = high / low > 4
        if logarithmic:
            axes.set_yscale("log")
            low, high = low / 1.35, high * 1.35
            decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
            axes.yaxis.set_major_locator(FixedLocator([m * 10.0**k for k in decades for m in (1, 2, 5)]))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_ylim(low, high)
        else:
            axes.set_ylim(0, high * 1.12)
        axes.set_xlim(0, last)
        axes.grid(False, axis="x")  # the levels are to be read; the iterations need no ruler
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        ends = [float(curve[-1]) for _, curve, _ in curves]
        for (name, _, colour), end, y in zip(curves, ends, _apart(ends, axes, 13), strict=True):
            look = dict(xycoords=at_right_edge, va="center", color=colour, weight="bold")
            note(axes, f"{name}  {end:#.3g}", (1, y), (12, 0), annotation_clip=False, **look)
        axes.set_xlabel("iteration")
        titled(
            axes, "Loss while fitting", "mean cross-entropy in nats" + (", log scale" if logarithmic else "")
        )
        save(figure, path)


def strengths(
    path: str | os.PathLike[str],
    l2: np.ndarray,  # (k,)
    training: np.ndarray,  # (k,) nats
    validation: np.ndarray,  # (k,) nats
    accuracy: np.ndarray,  # (k,) of the validation rows
    chosen: int,  # a position
) -> None:
    """Draw loss and accuracy against the strength of the penalty, and mark the strength chosen."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    with style():
        figure = Figure(figsize=(7.2, 5.6))
        of_loss, of_accuracy = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        strength, least, best = float(l2[chosen]), float(validation[chosen]), 100 * float(accuracy[chosen])
        for axes in (of_loss, of_accuracy):
            axes.axvline(strength, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        for name, curve, colour in (
            ("training", training, BLUE),
            ("validation", validation, VERMILION),
        ):
            of_loss.plot(l2, curve, color=colour, label=name)
        of_loss.plot(strength, least, "o", color=VERMILION, markersize=6, zorder=3)
        of_loss.legend(frameon=False)
        of_loss.set_ylabel("loss (nats)")
        of_accuracy.plot(l2, 100 * accuracy, color=VERMILION)
        of_accuracy.plot(strength, best, "o", color=VERMILION, markersize=6, zorder=3)
        of_accuracy.set_ylabel("accuracy (%)")
        of_accuracy.set_xlabel("strength of the penalty, l2 (stronger to the right)")
        titled(
            of_loss,
            "Strength of the penalty",
            f"l2 {strength:.3g} has the least validation loss: {least:#.3g} nats, accuracy {best:.1f} %",
        )
        save(figure, path)


def reliability(
    path: str | os.PathLike[str],
    curves: Sequence[tuple[str, Sequence[Mapping[str, float]]]],  # a name, and bins as `Evaluation` has them
    of: str,
    error: float,  # of the last curve
) -> None:
    """Draw accuracy against confidence, and how many rows are how sure."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(5.8, 6.2))
        axes, shares = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        axes.plot([0, 100], [0, 100], color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        colours = [FAINT, BLUE][-len(curves) :]
        for (name, bins), colour in zip(curves, colours, strict=True):
            confidence = [100 * each["confidence"] for each in bins]
            accuracy = [100 * each["accuracy"] for each in bins]
            axes.plot(confidence, accuracy, "o-", color=colour, markersize=5, label=name)
        if len(curves) > 1:
            axes.legend(frameon=False)
        axes.set_ylabel("of these rows right (%)")
        axes.set_ylim(0, 104)
        _, bins = curves[-1]
        total = sum(each["weight"] for each in bins)
        shares.bar(
            [50 * (each["from"] + each["to"]) for each in bins],
            [100 * each["weight"] / total for each in bins],
            width=[90 * (each["to"] - each["from"]) for each in bins],
            color=BLUE,
        )
        shares.set_ylabel("rows (%)")
        shares.set_xlabel("probability of the predicted class (%)")
        shares.set_xlim(0, 100)
        titled(
            axes, "Reliability", f"{of}; calibration error {100 * error:.2g} %, on the dashed line it is 0"
        )
        save(figure, path)


def _apart(values: Sequence[float], axes: Axes, points: float) -> list[float]:
    """Return the values, moved on the y axis so that text at them stands ``points`` apart."""
    to_pixels, from_pixels = axes.transData.transform, axes.transData.inverted().transform
    y = [float(to_pixels((0, value))[1]) for value in values]
    if len(y) == 2:
        gap = points * axes.figure.dpi / 72
        lacking = gap - abs(y[0] - y[1])
        if lacking > 0:
            upper = int(y[1] > y[0])
            y[upper] += lacking / 2
            y[1 - upper] -= lacking / 2
    return [float(from_pixels((0, pixel))[1]) for pixel in y]


def confusion(
    path: str | os.PathLike[str],
    counts: np.ndarray,  # (K, K): row true class, column predicted
    rows: np.ndarray,  # (K,) rows of each class, also those predicted as a class that is not shown
    names: Sequence[str],  # K
    of: str,  # "360 validation rows"
    classes: int | None = None,  # how many there are, if more than K
) -> None:
    """Draw which class is taken for which: colour is the share of the true class that goes wrong there.

    The diagonal, which would drown the errors, is grey and says how often the class is got right.
    """
    from matplotlib.figure import Figure

    shown = len(names)
    share = counts / np.maximum(rows, 1)[:, None]  # (K, K)
    wrong = np.where(np.eye(shown, dtype=bool), np.nan, share)

    def right(i: int) -> str:
        of_class = 100 * share[i, i]
        return f"{of_class:.0f}%" if of_class < 99.95 else "100%"

    text = [
        [right(i) if i == j else f"{counts[i, j]}" if counts[i, j] else "" for j in range(shown)]
        for i in range(shown)
    ]
    with style():
        side = float(np.clip(0.46 * shown + 0.6, 3.0, 9.5))
        figure = Figure(figsize=(side + 1.2, side))
        axes = figure.add_subplot()
        pairs(axes, wrong, text, names, "predicted", "share of the true class")
        part = f"; the {shown} most confused of {classes} classes" if classes and classes > shown else ""
        titled(axes, "What is taken for what", f"counts over {of}, grey: share got right{part}")
        save(figure, path)


def pairs(
    axes: Axes,
    share: np.ndarray,  # (K, K), nan where a cell has no colour of its own
    text: Sequence[Sequence[str]],  # (K, K)
    names: Sequence[str],  # K
    across: str,  # what the columns are; the rows are true classes
    unit: str,  # what the colour is a share of
) -> None:
    """Draw a number for each pair of classes, shaded by its share."""
    from matplotlib.colors import LinearSegmentedColormap

    shown = len(names)
    top = max(float(np.nanmax(share)), 1e-12) if np.isfinite(share).any() else 1e-12
    # one hue from white to dark: lightness alone carries the value
    stops = ["#FFFFFF", "#FBD9BF", "#EE9A5B", VERMILION, "#7A2E00"]
    ramp = LinearSegmentedColormap.from_list("errors", stops)
    axes.grid(False)
    axes.set_facecolor("#EDEDED")  # seen through cells that have no colour
    image = axes.imshow(share, cmap=ramp, vmin=0, vmax=top)
    size = float(np.clip(11 - 0.18 * shown, 6, 9.5))
    for i in range(shown):
        for j in range(shown):
            dark = share[i, j] > 0.55 * top
            colour = FAINT if np.isnan(share[i, j]) else "white" if dark else INK
            axes.text(j, i, text[i][j], ha="center", va="center", fontsize=size, color=colour)
    long = max(len(name) for name in names) > 3
    names = [name if len(name) <= 18 else name[:17] + "…" for name in names]
    axes.set_xticks(range(shown), names, rotation=45 if long else 0, ha="right" if long else "center")
    axes.set_xticks(np.arange(-0.5, shown), minor=True)
    axes.set_yticks(np.arange(-0.5, shown), minor=True)
    axes.set_yticks(range(shown), names)
    axes.set_xlabel(across, labelpad=8)
    axes.set_ylabel("true", labelpad=8)
    axes.grid(True, which="minor", color="white" if shown > 30 else RULE, linewidth=0.8)
    axes.tick_params(labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.035, pad=0.04, aspect=28)
    bar.outline.set_visible(False)
    bar.ax.grid(False)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    bar.set_label(unit, color=FAINT, fontsize=9)
