"""The Fisher information of a linear head, in three versions that are different matrices.

type 2         γ·a·E_{y∼p}[(p − e_y)(p − e_y)ᵀ] ⊗ x xᵀ = γ·a·J ⊗ x xᵀ
Monte Carlo    the same, E estimated from labels drawn once for each row
empirical      γ·(a·p − t)(a·p − t)ᵀ ⊗ x xᵀ, at the targets given
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from xent._core.logits import LinearHead
from xent._core.target import Target
from xent._core.targets import of_one_class
from xent._core.validators import FisherName, valid
from xent.curvature._batches import Batch
from xent.curvature._heads import HeadOperator
from xent.curvature._sampling import content_keys, sample, uniforms
from xent.curvature._tiles import Curvature, Form


class HeadFisher(HeadOperator):
    """The Fisher information of a linear head, as an operator, in one of three versions.

    The versions are different matrices. With e_y the one-hot vector of class y and γ the row's weight they
    are

    * type 2, ``Σ γ·a·E_{y∼p}[(p − e_y)(p − e_y)ᵀ] ⊗ x xᵀ``: the expectation over labels drawn from the model,
      in closed form. It equals the Gauss–Newton matrix.
    * Monte Carlo: the same, estimated from labels drawn from the model for each row.
    * empirical, ``Σ γ·(a·p − t)(a·p − t)ᵀ ⊗ x xᵀ``: outer products of the gradients at the targets given. It
      vanishes where the model fits the targets.

    The methods are those of :class:`HeadHessian`. Source: Kunstner et al., "Limitations of the empirical
    Fisher approximation for natural gradient descent", 2019.

    Args:
        kind: ``"type-2"``, ``"monte-carlo"`` or ``"empirical"``.
        samples: with ``"monte-carlo"``, the number of labels drawn for each row.
        generator: with ``"monte-carlo"``, the source of the seed; None is torch's default generator. The
            labels depend on the seed and on the row: in one tensor on its position, in batches on its
            content. So the matrix is the same however a loader shuffles or splits the rows. In batches, rows
            that are equal in every bit get the same labels.
        features, weight, target: as in :class:`HeadHessian`.
        options: the other arguments of :class:`HeadHessian`. ``z_loss`` must be 0, as it is not part of a
            likelihood.

    Raises:
        ValueError: a ``z_loss``; ``samples`` or ``generator`` with another kind; else as
            :class:`HeadHessian`.
        TypeError, IndexError, RuntimeError, NotImplementedError: as :class:`HeadHessian`.

    Example:
        >>> import torch, xent
        >>> x, w, y = torch.randn(32, 4), torch.randn(3, 4), torch.randint(3, (32,))
        >>> xent.curvature.HeadFisher(x, w, y, kind="empirical").trace().item() > 0
        True
    """

    def __init__(
        self,
        features: Tensor | Iterable[Batch],
        weight: Tensor,
        target: Target = None,
        *,
        kind: FisherName = "type-2",
        samples: int = 1,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        kind, samples = valid("kind", kind), valid("samples", samples)
        generator = valid("generator", generator)
        if valid("z_loss", options.get("z_loss", 0.0)):
            raise ValueError("the Fisher information is that of a likelihood: z_loss must be 0")
        if kind != "monte-carlo" and (samples != 1 or generator is not None):
            raise ValueError(f"samples and generator are of kind='monte-carlo'; kind is {kind!r}")
        self.kind, self.samples, self.seed = kind, samples, 0
        self.form = Form.GAUSS_NEWTON if kind == "type-2" else Form.OUTER
        if kind == "monte-carlo":
            device = "cpu" if generator is None else generator.device
            self.seed = int(torch.randint(1 << 62, (), generator=generator, device=device))
        super().__init__(features, weight, target, **options)

    def _contributions(self, curvature: Curvature) -> Iterator[Curvature]:
        if self.kind != "monte-carlo":
            yield curvature
            return
        problem, found = curvature.problem, curvature.found
        u = uniforms(self._keys(curvature), self.samples, self.seed)
        weight = curvature.weight * found.a / self.samples
        for labels in sample(problem, found, u).unbind(1):
            targets = of_one_class(problem.targets, labels)
            yield Curvature(
                replace(problem, targets=targets),
                replace(found, a=torch.ones_like(found.a)),
                self.form,
                weight,
            )

    def _keys(self, curvature: Curvature) -> Tensor:
        """Return a key for each of the M rows, (M,) int64, which its labels depend on."""
        logits, targets = curvature.problem.logits, curvature.problem.targets
        assert isinstance(logits, LinearHead)
        if not self.source.in_memory:
            return content_keys(
                logits.x if targets.selection.index is None else logits.x[targets.selection.index]
            )
        numbers = torch.arange(targets.selection.n_rows, device=self.device)
        return numbers if targets.selection.index is None else targets.selection.index
