"""The solvers of SoftmaxRegression and scikit-learn, each asked for a gradient of 1e-10; float64, one thread.

    OMP_NUM_THREADS=1 python benchmarks/newton.py

`gradient` is the largest component of the mean objective's gradient in (W, b), computed here for all alike;
`above` the mean objective's distance from the lowest one that any of them reached.
"""

from __future__ import annotations

import time
import warnings

import numpy as np
from scipy.special import logsumexp
from sklearn.datasets import load_digits, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import xent

MOST = 20_000


def judged(model: object, x: np.ndarray, y: np.ndarray, strength: float) -> tuple[float, float]:
    """Mean objective and the largest component of its gradient."""
    rows = len(x)
    z = x @ model.coef_.T + model.intercept_
    partition = logsumexp(z, axis=1, keepdims=True)
    value = float(np.mean(partition[:, 0] - z[np.arange(rows), y]))
    value += float((model.coef_**2).sum()) / (2 * strength * rows)
    p = np.exp(z - partition)
    p[np.arange(rows), y] -= 1
    to_w = p.T @ x / rows + model.coef_ / (strength * rows)
    return value, float(max(np.abs(to_w).max(), np.abs(p.mean(0)).max()))


def decaying() -> tuple[np.ndarray, np.ndarray]:
    """3,000 rows of 100 features in 50 classes, the features' covariance falling over ten decades."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 100)) @ (rng.normal(size=(100, 100)) * 10.0 ** (-np.arange(100) / 20))
    z = x @ rng.normal(size=(100, 50))
    return x, (4 * z / z.std() + rng.gumbel(size=z.shape)).argmax(1)


def main() -> None:
    digits, wine = (load(return_X_y=True) for load in (load_digits, load_wine))
    data = {
        "digits": digits,
        "digits, standardised": (StandardScaler().fit_transform(digits[0]), digits[1]),
        "wine": wine,
        "wine, standardised": (StandardScaler().fit_transform(wine[0]), wine[1]),
        "decaying": decaying(),
    }
    print(
        f"{'data':<22}{'C':>7}  {'solver':<26}{'iterations':>10}{'seconds':>9}{'gradient':>10}{'above':>10}"
    )
    for name, (x, y) in data.items():
        for strength in (1.0, 1e4):
            if name == "decaying" and strength > 1:
                continue
            solvers = {
                "xent lbfgs": xent.SoftmaxRegression(
                    strength, solver="lbfgs", stopping="gradient", tol=1e-10, max_iter=MOST
                ),
                "xent newton-cg": xent.SoftmaxRegression(
                    strength, solver="newton-cg", stopping="gradient", tol=1e-10
                ),
                "scikit-learn newton-cg": LogisticRegression(
                    C=strength, solver="newton-cg", tol=1e-10, max_iter=1000
                ),
                "scikit-learn newton-cholesky": LogisticRegression(
                    C=strength, solver="newton-cholesky", tol=1e-10, max_iter=1000
                ),
            }
            lines = []
            for label, model in solvers.items():
                started = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    model.fit(x, y)
                seconds = time.perf_counter() - started
                lines.append((label, int(np.max(model.n_iter_)), seconds, *judged(model, x, y, strength)))
            lowest = min(value for *_, value, _ in lines)
            for label, iterations, seconds, value, gradient in lines:
                print(
                    f"{name:<22}{strength:>7g}  {label:<28}{iterations:>8}{seconds:>9.2f}{gradient:>10.0e}"
                    f"{value - lowest:>10.0e}"
                )


if __name__ == "__main__":
    main()
