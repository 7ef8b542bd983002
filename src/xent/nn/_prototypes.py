"""Classes without labels: prototypes learnt by swapped, balanced assignments.

    z = cos(x, w)        q(x) = Sinkhorn(z(x)/ε), columns of equal mass        p(x) = softmax(z(x)/τ)

    L = mean over pairs of views a ≠ b of  −⟨q(x_a), log p(x_b)⟩

Each view is to predict the assignment of another view of the same thing. The balance of the assignments is
what keeps all rows from falling onto one prototype. They are targets, held constant: gradients go through p
alone. ε and τ scale the same cosines, so ε/τ says how much surer the targets are than the predictions: an
argument, not a constant of the method. Source: Caron et al., "Unsupervised learning of visual features by
contrasting cluster assignments", 2020.
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
    """Prototypes over features of length 1, taught by the balanced assignments of other views.

    Args:
        in_features: D.
        num_prototypes: K.
        temperature: τ of the predictions.
        epsilon: ε of the assignments. Below τ they are surer than the predictions, which they sharpen;
            towards 0 each row has one prototype.
        iterations: of Sinkhorn's scaling, in every assignment. Rows sum to 1 exactly, columns nearly.

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
        """Directions spread evenly: their lengths do not matter."""
        nn.init.normal_(self.prototypes, std=self.prototypes.shape[1] ** -0.5)

    def extra_repr(self) -> str:
        k, d = self.prototypes.shape
        return (
            f"in_features={d}, num_prototypes={k}, temperature={self.temperature}, epsilon={self.epsilon}, "
            f"iterations={self.iterations}"
        )

    def cosines(self, input: Tensor) -> Tensor:
        """Return the cosines of features (..., D) with each prototype, (..., K); 0 of a row of zeros."""
        return cosines(input, self.prototypes)

    def predict(self, input: Tensor) -> Tensor:
        """The nearest prototype of features (..., D): (...) int64."""
        return self.cosines(input).argmax(-1)

    @torch.no_grad()
    def assign(self, input: Tensor) -> sinkhorn.Assignment:
        """Balanced assignment of features (N, D), without gradient: a plan (N, K) with rows of sum 1."""
        return sinkhorn.assign(
            self.cosines(input), epsilon=self.epsilon, max_iterations=self.iterations, tolerance=None
        )

    def forward(self, *views: Tensor, assigned: int = 2) -> Tensor:
        """The loss of swapped assignments.

        Args:
            views: two or more, (N, D) each: features of the same N things seen differently.
            assigned: how many of them, the first ones, are assigned; each is predicted from all the others.

        Returns:
            A scalar, in nats.
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
