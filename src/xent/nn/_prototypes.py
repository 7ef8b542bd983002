"""A prototype head trained without labels, by swapped, balanced assignments.

    z = cos(x, w)        q(x) = Sinkhorn(z(x)/ε), columns of equal mass        p(x) = softmax(z(x)/τ)

    L = mean over pairs of views a ≠ b of  −⟨q(x_a), log p(x_b)⟩

Each view predicts the assignment of another view of the same sample. The balance of the assignments keeps the
rows from collapsing onto one prototype. Assignments are constant targets: gradients flow through p alone. ε
and τ scale the same cosines, so ε/τ sets how much sharper the targets are than the predictions. Source: Caron
et al., "Unsupervised learning of visual features by contrasting cluster assignments", 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xent import sinkhorn
from xent._arguments.validation import require_tensors
from xent._core.directions import cosines
from xent._core.validators import valid
from xent.losses._cross_entropy import linear_cross_entropy


class PrototypeHead(nn.Module):
    """A layer of prototypes, trained without labels on the balanced assignments of other views of a sample.

    A prototype is a vector of length 1, and its score is its cosine z with the features. Each view x_b
    predicts the assignment of another view x_a of the same sample:
    ``L = mean over pairs of views a ≠ b of −⟨q(x_a), log p(x_b)⟩``, with the prediction
    ``p = softmax(z/temperature)`` and the assignment q = :func:`xent.sinkhorn.assign` of z. In an assignment
    every prototype gets the same mass, so that the rows cannot collapse onto one prototype. Assignments are
    constant targets. Source: Caron et al., "Unsupervised learning of visual features by contrasting cluster
    assignments", 2020.

    Args:
        in_features: D, the number of features.
        num_prototypes: K, the number of prototypes.
        temperature: the temperature of the predictions.
        epsilon: ε, the entropy weight of the assignments. With ε below ``temperature`` they are sharper than
            the predictions; as ε goes to 0, each row is assigned to one prototype.
        iterations: the number of Sinkhorn iterations in each assignment. Row sums are exact, column sums
            approximate.
        device, dtype: the device and type of ``prototypes``.

    Attributes:
        prototypes: (K, D), the parameter: a vector for each prototype, of any length.

    Raises:
        ValueError, TypeError: an option outside its values.

    Example:
        >>> import torch, xent
        >>> head = xent.nn.PrototypeHead(16, 10, iterations=100)
        >>> features = torch.randn(64, 16)
        >>> loss = head(features + 0.1 * torch.randn(64, 16), features + 0.1 * torch.randn(64, 16))
        >>> loss.backward()
        >>> bool((head.assign(features).plan.sum(0) - 6.4).abs().max() < 1)  # 64 rows over 10 prototypes
        True
        >>> head.predict(features).shape
        torch.Size([64])
    """

    def __init__(
        self,
        in_features: int,
        num_prototypes: int,
        *,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_prototypes = valid("num_prototypes", num_prototypes)
        in_features = valid("in_features", in_features)
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, in_features, device=device, dtype=dtype))
        self.temperature = valid("temperature", temperature)
        self.epsilon = valid("epsilon", epsilon)
        self.iterations = valid("iterations", iterations)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the prototypes from a normal distribution, so that their directions are uniform."""
        nn.init.normal_(self.prototypes, std=self.prototypes.shape[1] ** -0.5)

    def extra_repr(self) -> str:
        k, d = self.prototypes.shape
        return (
            f"in_features={d}, num_prototypes={k}, temperature={self.temperature}, epsilon={self.epsilon}, "
            f"iterations={self.iterations}"
        )

    def cosines(self, input: Tensor) -> Tensor:
        """Return the cosines of features with each prototype.

        Args:
            input: features, (..., D). A row of zeros has cosines of 0.

        Returns:
            (..., K).
        """
        return cosines(input, self.prototypes)

    def predict(self, input: Tensor) -> Tensor:
        """Return the nearest prototype of each row of features.

        Args:
            input: features, (..., D).

        Returns:
            Positions of prototypes, (...) int64.
        """
        return self.cosines(input).argmax(-1)

    @torch.no_grad()
    def assign(self, input: Tensor) -> sinkhorn.Assignment:
        """Return the balanced assignment of rows to prototypes, without gradient.

        Args:
            input: features, (N, D).

        Returns:
            A :class:`xent.sinkhorn.Assignment` with a plan (N, K).
        """
        return sinkhorn.assign(
            self.cosines(input), epsilon=self.epsilon, max_iterations=self.iterations, tolerance=None
        )

    def forward(self, *views: Tensor, assigned: int = 2) -> Tensor:
        """Return the loss of swapped assignments, in nats.

        Args:
            *views: two or more tensors (N, D): features of different views of the same N samples.
            assigned: the number of views that are assigned, from the first one. Each of these assignments is
                predicted from every other view.

        Returns:
            A scalar.

        Raises:
            ValueError: fewer than two views, views of different shapes, or ``assigned`` above the number of
                views.
        """
        for number, view in enumerate(views):
            require_tensors(spread=False, **{f"views[{number}]": view})
        assigned = valid("assigned", assigned)
        if len(views) < 2 or any(view.shape != views[0].shape for view in views):
            raise ValueError(
                "there must be two views or more, (N, D) each, of the same rows; "
                f"got {', '.join(str(tuple(view.shape)) for view in views) or 'none'}"
            )
        if assigned > len(views):
            raise ValueError(f"assigned must be between 1 and the {len(views)} views, got {assigned}")
        losses = [
            linear_cross_entropy(other, self.prototypes, plan, normalize=True, temperature=self.temperature)
            for i, plan in enumerate(self.assign(view).plan for view in views[:assigned])
            for j, other in enumerate(views)
            if i != j
        ]
        return torch.stack(losses).mean()
