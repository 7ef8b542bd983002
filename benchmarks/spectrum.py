"""The distance of Kronecker factors from the Hessian of a softmax regression on scikit-learn's digits.

    python benchmarks/spectrum.py [--figure docs/figures/digits-spectrum.svg]

The digits, standardised, 10 classes × (64 features + bias): 650 parameters, whose Hessian is made whole.
`by curvature` is Kronecker with weighting="curvature", `class blocks` and `diagonal` keep parts of H itself.
`Frobenius` is ‖K − H‖/‖H‖; `subspace` the share of the 18 leading eigenvectors' span that K's have; `log det`
the error of log det(K + λ) a parameter, λ = 1/N being what the fit's own penalty adds.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import xent
from xent.curvature import HeadHessian, HeadKronecker

LEADING = 18  # at W = 0 eigenvalues come in nines


def digits() -> tuple[Tensor, Tensor]:
    features, labels = load_digits(return_X_y=True)
    deviation = features.std(0)
    standardised = (features - features.mean(0)) / np.where(deviation > 0, deviation, 1.0)
    return torch.from_numpy(standardised), torch.from_numpy(labels)


def operators(strength: float) -> dict[str, Tensor]:
    """Dense curvatures (650, 650) at the fit of a strength C, 0 for the start."""
    x, y = digits()
    w, b = torch.zeros(10, 64, dtype=x.dtype), torch.zeros(10, dtype=x.dtype)
    if strength:
        fitted = xent.SoftmaxRegression(strength, solver="newton-cg", tol=1e-10).fit(x.numpy(), y.numpy())
        w, b = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    both = {"bias": b, "wrt": ("weight", "bias")}
    exact = HeadHessian(x, w, y, **both)
    blocks = torch.zeros(10, 65, 10, 65, dtype=x.dtype)
    for c in range(10):
        blocks[c, :, c] = exact.block(c)
    at = torch.arange(650).reshape(10, 65)
    order = torch.cat([at[:, :64].reshape(-1), at[:, 64]])
    factors = HeadKronecker(x, w, y, **both)
    return {
        "exact": exact.to_dense(),
        "Kronecker": factors.to_dense(),
        "corrected": factors.corrected().to_dense(),
        "by curvature": HeadKronecker(x, w, y, weighting="curvature", **both).to_dense(),
        "class blocks": blocks.reshape(650, 650)[order][:, order],
        "diagonal": torch.cat([t.reshape(-1) for t in exact.diagonal()]).diag(),
    }


def quality(exact: Tensor, near: Tensor) -> tuple[float, float, float, float]:
    rows = len(digits()[0])
    frobenius = float((near - exact).norm() / exact.norm())
    trace = round(float(near.trace() / exact.trace()) - 1, 6) + 0.0
    (_, v), (_, u) = torch.linalg.eigh(exact), torch.linalg.eigh(near)
    shared = float((v[:, -LEADING:].t() @ u[:, -LEADING:]).square().sum()) / LEADING
    damped = torch.eye(len(exact), dtype=exact.dtype) / rows
    difference = float((near + damped).logdet() - (exact + damped).logdet()) / len(exact)
    return frobenius, trace, shared, round(difference, 6) + 0.0


def draw(path: str) -> None:
    """Eigenvalues of the fitted Hessian and of its approximations, largest first."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from xent.report import figures

    found = operators(1.0)
    shown = (  # points that a name stands above its curve's end
        ("Kronecker", figures.VERMILION, 9),
        ("corrected", figures.BLUE, -5),
        ("by curvature", figures.GREEN, -2),
        ("exact", figures.INK, 2),
    )
    with figures.style():
        figure = Figure(figsize=(7.6, 4.6))
        axes = figure.add_subplot()
        axes.set_yscale("log")
        rank = 0
        for name, colour, shift in shown:
            values = torch.linalg.eigvalsh(found[name]).flip(0)
            values = values[values > 1e-12 * values[0]].numpy()
            rank = max(rank, len(values))
            wide = name == "exact"
            axes.plot(
                np.arange(1, len(values) + 1),
                values,
                color=colour,
                linewidth=2.8 if wide else 1.8,
                zorder=3 - wide,
            )
            axes.annotate(
                name,
                (len(values), values[-1]),
                (10, shift),
                textcoords="offset points",
                va="center",
                color=colour,
                weight="bold",
                annotation_clip=False,
            )
        axes.set_xlim(0, 650)
        axes.set_ylim(1e-12, 1)
        exponents = {0: "1", -3: "10⁻³", -6: "10⁻⁶", -9: "10⁻⁹", -12: "10⁻¹²"}
        axes.yaxis.set_major_locator(FixedLocator([10.0**k for k in exponents]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: exponents[round(float(np.log10(v)))]))
        axes.axvline(rank, color=figures.FAINT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"rank {rank} of 650: the others are what\nnothing sees, gauge and constant pixels",
            (rank, 1),
            (-8, -6),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="right",
            va="top",
            color=figures.FAINT,
            fontsize=9,
        )
        axes.set_xlabel("eigenvalue, largest first")
        figures.titled(
            axes, "The spectrum of the digits' Hessian", "softmax regression at its minimum, C = 1; log scale"
        )
        figures.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", metavar="PATH", help="draw the spectrum, too")
    asked = parser.parse_args()
    print(f"{'at':<22}{'approximation':<16}{'Frobenius':>10}{'trace':>10}{'subspace':>10}{'log det':>10}")
    for strength, where in ((0.0, "W = 0"), (0.01, "minimum, C = 0.01"), (1.0, "minimum, C = 1")):
        found = operators(strength)
        for name in ("Kronecker", "corrected", "by curvature", "class blocks", "diagonal"):
            frobenius, trace, shared, difference = quality(found["exact"], found[name])
            print(
                f"{where:<22}{name:<16}{frobenius:>10.3f}{trace:>+10.1%}{shared:>10.2f}{difference:>+10.3f}"
            )
    if asked.figure:
        draw(asked.figure)


if __name__ == "__main__":
    main()
