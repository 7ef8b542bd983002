"""What the identities look like: three figures in the project's style, computed by the functions they show.

Needs the extra ``report``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import xent
from xent import figures
from xent.figures import BLUE, FAINT, VERMILION
from xent.probe.errors import needs
from xent.probe.files import aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(folder: Path) -> list[Path]:
    """All of them as PNG in ``folder``; the paths. Raises ``MissingExtra`` without matplotlib."""
    with needs("report"):
        from matplotlib.figure import Figure
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, paint in FIGURES.items():
        with figures.style():
            figure = Figure()
            paint(figure)
            paths.append(folder / f"{name}.png")
            with aside(paths[-1]) as temporary:
                figures.save(figure, temporary)
    return paths


def cost_of_a_probability(figure: Figure) -> None:
    """−log p against p."""
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
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 5)
    axes.set_xlabel("probability given to what came true")
    figures.titled(axes, "What a probability costs", "−log p in nats: without bound at 0, nothing at 1")


def surrogate(figure: Figure) -> None:
    """L₁ against L₂, which are alike and not the same; L₁ − L₂ against H(p), which are the same."""
    figure.set_size_inches(9.2, 4.3)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.28})
    generator = torch.Generator().manual_seed(1)
    rows, classes = 400, 10
    spread = 4 * torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    z = spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
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
    """Binary cross-entropy against the squared error of σ(s), for a row whose answer is 1."""
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
    axes.set_xlim(-8, 8)
    axes.set_ylim(-1.08, 0.05)
    axes.set_xlabel("logit s of a row whose answer is 1")
    figures.titled(axes, "A row that is wrong and sure still learns", "derivative of the loss in the logit")


FIGURES: dict[str, Callable[[Figure], None]] = {
    "cost-of-a-probability": cost_of_a_probability,
    "surrogate": surrogate,
    "gradients-on-a-logit": gradients_on_a_logit,
}
"""By the name of the file."""


def _name(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    colour: str,
    shift: tuple[float, float] = (0, 0),
    side: str = "left",
) -> None:
    """A name beside what it names; ``shift`` in points."""
    axes.annotate(
        text, (x, y), shift, textcoords="offset points", color=colour, weight="bold", ha=side, zorder=4
    )


def _diagonal(axes: Axes, low: float, high: float) -> None:
    """The line on which both coordinates are equal, in a square of both."""
    from matplotlib.ticker import MaxNLocator

    axes.plot([low, high], [low, high], color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(low, high)
    inside = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(inside)
    axes.set_yticks(inside)
