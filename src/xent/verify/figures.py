"""Figures of the identities, in the project's style, computed by the functions they show.

Needs the extra ``report``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import xent
from xent._util.atomic_write import atomic_write
from xent.errors import needs
from xent.report import figures
from xent.report.figures import BLUE, FAINT, GREEN, ORANGE, PURPLE, VERMILION
from xent.verify import digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(folder: Path) -> list[Path]:
    """Draw the figures of the identities into a folder, as SVG.

    Args:
        folder: the folder, which is made if it does not exist.

    Returns:
        The paths of the files.

    Raises:
        MissingExtra: Matplotlib, or scikit-learn, whose digits are drawn, is not installed.
        OSError: a file cannot be written.

    Example:
        >>> import tempfile
        >>> from xent.verify import draw
        >>> paths = draw(Path(tempfile.mkdtemp()))
        >>> paths[0].name
        'cost-of-a-probability.svg'
    """
    with needs("report"):
        from matplotlib.figure import Figure
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, paint in FIGURES.items():
        with figures.style():
            figure = Figure()
            paint(figure)
            paths.append(folder / f"{name}.svg")
            with atomic_write(paths[-1]) as temporary:
                figures.save(figure, temporary)
    return paths


def cost_of_a_probability(figure: Figure) -> None:
    """Draw −log p against p."""
    figure.set_size_inches(6.4, 4.0)
    axes = figure.add_subplot()
    p = torch.linspace(0.0, 1.0, 2001, dtype=torch.float64)[1:]
    axes.plot(p, xent.binary_cross_entropy(p, torch.ones_like(p), reduction="none"), color=BLUE)
    for at, what, shift, side in (
        (0.1, "one in ten", (9, 7), "left"),
        (0.5, "a coin", (9, 7), "left"),
        (0.9, "nine in ten", (32, 14), "right"),
    ):
        cost = float(xent.binary_cross_entropy(torch.tensor(at), torch.tensor(1.0)))
        axes.plot(at, cost, "o", color=BLUE, markersize=6)
        _name(axes, at, cost, f"{what}  {cost:.3f}", BLUE, shift, side)
    axes.set(xlim=(0, 1), ylim=(0, 5), xlabel="probability given to what came true")
    figures.titled(axes, "What a probability costs", "−log p in nats: without bound at 0, nothing at 1")


def surrogate(figure: Figure) -> None:
    """Draw cross-entropy against the surrogate, and the difference of both against H(p), which it equals."""
    figure.set_size_inches(9.2, 4.3)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.28})
    generator = torch.Generator().manual_seed(1)
    rows, classes = 400, 10
    scales = 4 * torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    z = scales * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (rows,), generator=generator)
    cross_entropy = xent.cross_entropy(z, y, reduction="none")
    log_free = xent.surrogate_cross_entropy(z, y, reduction="none")
    entropy = xent.entropy(z)
    correlation = float(torch.corrcoef(torch.stack([log_free, cross_entropy]))[0, 1])
    dots = dict(s=14, alpha=0.55, linewidth=0)
    low, high = float(log_free.min()) - 0.5, float(cross_entropy.max()) + 0.5
    _diagonal(left, low, high)
    left.scatter(log_free, cross_entropy, color=VERMILION, **dots)
    left.set_xlabel("log-free surrogate ⟨p − t, z⟩, nats")
    figures.titled(
        left, "Alike, which proves nothing", f"cross-entropy in nats; correlation {correlation:.2f}"
    )
    top = 1.05 * float(entropy.max())
    _diagonal(right, 0.0, top)
    right.scatter(entropy, cross_entropy - log_free, color=BLUE, **dots)
    right.set_xlabel("entropy H(p), nats")
    figures.titled(right, "Their difference is H(p)", "cross-entropy less the surrogate, in nats")


def gradients_on_a_logit(figure: Figure) -> None:
    """Draw the gradients of binary cross-entropy and of the squared error of σ(s) for a target of 1."""
    figure.set_size_inches(6.4, 4.0)
    axes = figure.add_subplot()
    s = torch.linspace(-8, 8, 801, dtype=torch.float64, requires_grad=True)
    one = torch.ones_like(s)
    for loss, colour in (
        (xent.binary_cross_entropy_with_logits(s, one, reduction="sum"), BLUE),
        ((s.sigmoid() - one).square().sum(), VERMILION),
    ):
        (slope,) = torch.autograd.grad(loss, s)
        axes.plot(s.detach(), slope, color=colour)
    _name(axes, -0.2, -0.76, "cross-entropy  σ(s) − 1", BLUE)
    _name(axes, -7.6, -0.37, "squared error  2(σ(s) − 1)σ′(s)", VERMILION)
    axes.set(xlim=(-8, 8), ylim=(-1.08, 0.05), xlabel="logit s of a row whose answer is 1")
    figures.titled(axes, "A row that is wrong and sure still learns", "derivative of the loss in the logit")


def bounds_as_logits_sharpen(figure: Figure) -> None:
    """Draw the bounds at β·z, for a row that is right and for one that is wrong."""
    figure.set_size_inches(9.4, 3.8)
    z = torch.tensor([1.0, 0.62, 0.5, 0.3, 0.1, 0.0, -0.2, -0.4, -0.7, -0.9], dtype=torch.float64)
    beta = torch.linspace(0, 12, 241, dtype=torch.float64)
    right, wrong = figure.subplots(1, 2, gridspec_kw={"wspace": 0.48})
    for axes, y in ((right, 0), (wrong, 1)):
        bounds = xent.triplets.bounds(beta[:, None] * z, torch.full((len(beta),), y))
        axes.fill_between(
            beta, bounds.hardest_low, bounds.hardest_high, color="#F0F0F0", linewidth=0, zorder=0
        )
        for name, (_, colour) in BOUNDS.items():
            line = dict(linewidth=3.0, zorder=3) if name == "loss" else dict(linewidth=1.7)
            axes.plot(beta, getattr(bounds, name), color=colour, **line)
        axes.set(xlim=(0, 12), xlabel="sharpness β of the logits β·z")
    right.set(yscale="log", ylim=(2e-3, 12))
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    wrong.set_ylim(0, 6)
    # the height of each name at the right end of its curve, so that none covers another
    on_right = {"union": 0.036, "loss": 0.0185, "tight": 0.0095, "smooth": 0.0049, "hardest_low": 0.0025}
    on_wrong = {
        "union": 5.15,
        "loss": 4.75,
        "hardest_low": 4.35,
        "tight": 1.25,
        "smooth": 0.85,
        "hinge": 0.45,
    }
    for axes, places in ((right, on_right), (wrong, on_wrong)):
        for name, at in places.items():
            _name(axes, 12, at, *BOUNDS[name], (6, -3))
    _name(right, 4.55, 3.2e-3, *BOUNDS["hinge"], (-4, 0), "right")
    figures.titled(right, "A row that is right", "triplet bounds in nats, log scale; ten classes")
    figures.titled(wrong, "A row that is wrong", "the same in nats; grey: what the hardest allows")


BOUNDS = {
    "union": ("Σ softplus", PURPLE),
    "loss": ("cross-entropy", BLUE),
    "hardest_low": ("hardest alone", FAINT),
    "tight": ("tight", GREEN),
    "smooth": ("smooth", ORANGE),
    "hinge": ("hinge", VERMILION),
}
"""The name and the colour of each curve."""
FIGURES: dict[str, Callable[[Figure], None]] = {
    "cost-of-a-probability": cost_of_a_probability,
    "surrogate": surrogate,
    "gradients-on-a-logit": gradients_on_a_logit,
    "triplet-bounds": bounds_as_logits_sharpen,
    "digits-rivals": digits.rivals,
    "digits-hardest": digits.hardest,
}
"""The drawing functions by the name of the file."""


def _name(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    colour: str,
    shift: tuple[float, float] = (0, 0),
    side: str = "left",
) -> None:
    """Write a name beside the point (x, y), shifted by ``shift`` points."""
    figures.note(axes, text, (x, y), shift, color=colour, weight="bold", ha=side, zorder=4)


def _diagonal(axes: Axes, low: float, high: float) -> None:
    """Draw the line y = x in a square from low to high."""
    from matplotlib.ticker import MaxNLocator

    axes.plot([low, high], [low, high], color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(low, high)
    inside = [tick for tick in ticks if low <= tick <= high]
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal", xticks=inside, yticks=inside)
