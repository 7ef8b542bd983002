"""Digits clustered without labels: prototypes learnt by swapped assignments, beside k-means.

    python examples/digits_without_labels.py [--seeds 5] [--epochs 60] [--figure digits_without_labels.png]

Each of the 1,797 images is seen twice, slightly turned, stretched and shifted; a small network and ten
prototypes learn to predict one view's balanced assignment from the other. Labels only judge the result:
clustering accuracy under the best one-to-one naming of the clusters, and normalised mutual information.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn

import xent


class Scores(NamedTuple):
    accuracy: float
    information: float


class Outcome(NamedTuple):
    """The outcome of one seed."""

    pixels: Scores  # k-means of the images
    features: Scores  # k-means of what the network has learnt
    prototypes: Scores


def judge(labels: np.ndarray, clusters: np.ndarray) -> Scores:
    """labels, clusters (N,)."""
    counts = np.zeros((10, 10), dtype=int)
    np.add.at(counts, (labels, clusters), 1)
    named = linear_sum_assignment(-counts)
    return Scores(counts[named].sum() / len(labels), normalized_mutual_info_score(labels, clusters))


def another_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 1, 8, 8), each turned by up to 15°, stretched by up to 15 %, slanted, shifted by up to a pixel."""
    n = len(images)

    def within(size: float, *shape: int) -> Tensor:
        return (2 * torch.rand(n, *shape, generator=generator) - 1) * size

    angle, stretch, slant, shift = within(0.26), 1 + within(0.15, 2), within(0.15), within(0.2, 2)
    rows = (
        torch.stack([angle.cos() * stretch[:, 0], slant - angle.sin(), shift[:, 0]], dim=1),
        torch.stack([angle.sin(), angle.cos() * stretch[:, 1], shift[:, 1]], dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    seen = F.grid_sample(images, grid, align_corners=False)
    return seen + 0.05 * torch.randn(seen.shape, generator=generator)


def learn(images: Tensor, seed: int, epochs: int) -> tuple[nn.Module, xent.nn.PrototypeHead]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 32)
    )
    head = xent.nn.PrototypeHead(32, 10, temperature=0.2, epsilon=0.05)
    optimiser = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(256)[:-1]:
            views = [another_view(images[batch], generator) for _ in range(2)]
            loss = head(*network(torch.cat(views)).chunk(2))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return network.eval(), head


def compare(seed: int, epochs: int) -> Outcome:
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    network, head = learn(images, seed, epochs)
    with torch.no_grad():
        features = F.normalize(network(images), dim=1)
        nearest = head.predict(features).numpy()
    means = KMeans(10, n_init=10, random_state=seed)
    return Outcome(
        judge(labels, means.fit_predict(pixels)),
        judge(labels, means.fit_predict(features.numpy())),
        judge(labels, nearest),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()
    names = ("k-means, pixels", "k-means, features", "prototypes")
    print("accuracy, normalised mutual information\n")
    print(f"{'seed':4}" + "".join(f"{name:>20}" for name in names))
    outcomes = []
    for seed in range(arguments.seeds):
        outcomes.append(compare(seed, arguments.epochs))
        print(
            f"{seed:4}" + "".join(f"{s.accuracy:13.3f}{s.information:7.3f}" for s in outcomes[-1]), flush=True
        )
    mean = np.mean(outcomes, axis=0)
    print("mean" + "".join(f"{accuracy:13.3f}{information:7.3f}" for accuracy, information in mean))


if __name__ == "__main__":
    main()
