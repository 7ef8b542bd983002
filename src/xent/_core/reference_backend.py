"""The float64 reference as a backend: all logits at once, gradients by autograd of formulas written out.

    s = z − z_k, k = argmax z        r = Σ_{j≠k} exp(s_j)        lse = z_k + log1p(r)
    ℓ = a·log1p(r) − ⟨t, s⟩          H = log1p(r) − ⟨p, s⟩       log p_y = s_y − log1p(r)

It shares no tile, no buffer and no derivative with the other backends, which is what it is for: the tests
hold them to it. It stands behind the tiles in the registry, so that no call takes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xent._core.backend import Backend, FinishedGradients, Gradients, Wants
from xent._core.class_indices import NO_CLASS
from xent._core.coefficients import Coefficients
from xent._core.logits import LinearHead
from xent._core.problem import Problem
from xent._core.statistics import Statistics


class Reference(Backend):
    """Every formula over all rows and classes at once, in float64."""

    name = "reference"
    serves = "one process on a CPU, in float64 and without limit of memory; for tests, which put it first"

    def supports(self, problem: Problem) -> str | None:
        if problem.logits.device.type != "cpu":
            return f"the tensors are on {problem.logits.device.type}"
        if problem.ranks is not None:
            return "other processes hold some of the classes"
        return "vmap has batched a tensor" if problem.batched else None

    def row_statistics(self, problem: Problem) -> Statistics:
        with torch.no_grad():
            z = _logits(problem, _wide(problem.logits.leaves))
            t = _targets(problem, problem.targets.probabilities)
            k = z.argmax(1)
            s, r = _relative(z, k)
            d, wanted = torch.where(t == 0, 0.0, t * s).sum(1), problem.requested
            entropy = torch.where(s == -torch.inf, 0.0, s * s.exp()).sum(1)
            y = problem.targets.index
            at_y = None if y is None else y.clamp(0, z.shape[1] - 1)
            none = None if y is None else y == NO_CLASS
            good = None if y is None else (((y >= 0) & (y < z.shape[1])) | (y == NO_CLASS)).all(1)
            m = z.gather(1, k[:, None])[:, 0]
            m = m if good is None else torch.where(good, m, torch.nan)
            return Statistics(
                m=m,
                r=torch.where(m == -torch.inf, -1.0, r),
                d=d,
                a=t.sum(1),
                e=entropy if wanted.entropy else None,
                k=k if wanted.argmax else None,
                own=None
                if not wanted.log_prob or at_y is None or none is None
                else z.gather(1, at_y).masked_fill(none, -torch.inf),
                mass=t.gather(1, at_y[:, :1])[:, 0] if wanted.mass and at_y is not None else None,
                lse_own=z.masked_fill(~_own(problem), -torch.inf).logsumexp(1) if wanted.log_rest else None,
                lse_others=z.masked_fill(_own(problem), -torch.inf).logsumexp(1) if wanted.log_rest else None,
            )

    def gradient(
        self, problem: Problem, found: Statistics, coefficients: Coefficients, wants: Wants
    ) -> Gradients:
        q = problem.targets.probabilities
        with torch.enable_grad():
            leaves = [None if t is None else t.detach().double() for t in problem.leaves]
            for leaf, want in zip(leaves, wants, strict=True):
                if leaf is not None:
                    leaf.requires_grad_(want)
            of_q, *of_logits = leaves
            z = _logits(problem, tuple(of_logits))
            t = _targets(problem, None if q is None else of_q)
            s, r = _relative(z, z.argmax(1))
            partition = torch.log1p(r)
            loss = t.sum(1) * partition - torch.where(t == 0, 0.0, t * torch.where(t == 0, 0.0, s)).sum(1)
            total = (coefficients.loss * loss).sum()
            if coefficients.logsumexp is not None:
                total = total + (coefficients.logsumexp * (z.amax(1) + partition)).sum()
            p = s.exp() / (1 + r)[:, None]
            if coefficients.entropy is not None:
                mean = (p * torch.where(p == 0, 0.0, s)).sum(1)
                total = total + (coefficients.entropy * (partition - mean)).sum()
            y = problem.targets.index
            if coefficients.log_prob is not None and y is not None:
                log_p = s.gather(1, y.clamp(min=0)) - partition[:, None]
                total = total + (coefficients.log_prob * log_p).masked_fill(y == NO_CLASS, 0.0).sum()
            if coefficients.log_rest is not None:
                own = _own(problem)
                of_own, others = (z.masked_fill(there, -torch.inf).logsumexp(1) for there in (~own, own))
                log_rest = -torch.logaddexp(of_own - others, torch.zeros_like(others))
                total = total + (coefficients.log_rest * log_rest).sum()
            chosen = [leaf for leaf, want in zip(leaves, wants, strict=True) if want and leaf is not None]
            answers = iter(torch.autograd.grad(total, chosen, allow_unused=True))
        gradients = [
            next(answers) if want and leaf is not None else None
            for leaf, want in zip(leaves, wants, strict=True)
        ]
        return FinishedGradients(tuple(gradients), problem.leaves)


def _own(problem: Problem) -> Tensor:
    """Return which classes are a row's own, (M, C) bool."""
    y = problem.targets.index
    assert y is not None
    there = torch.zeros(y.shape[0], problem.targets.n_classes + 1, dtype=torch.bool)
    return there.scatter(1, torch.where(y == NO_CLASS, problem.targets.n_classes, y), True)[:, :-1]


def _wide(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.double() for t in tensors)


def _logits(problem: Problem, leaves: tuple[Tensor | None, ...]) -> Tensor:
    """Return z of the M rows that count, (M, C) float64."""
    first, *head = leaves
    assert first is not None
    u = problem.selection.gather(first)
    if isinstance(problem.logits, LinearHead):
        w, b, *low_rank = head
        assert w is not None
        u = u @ w.t() if b is None else u @ w.t() + b
        if low_rank:
            low, up = low_rank
            assert low is not None
            assert up is not None
            u = u + problem.selection.gather(low) @ up.t()
    of_map = problem.logits.map
    u = of_map.scale * u
    if of_map.softcap is not None:
        u = of_map.softcap * torch.tanh(u / of_map.softcap)
    temperature = of_map.temperature
    if isinstance(temperature, Tensor):
        temperature = problem.selection.gather(temperature)[:, None]
    u = u / temperature
    return u if of_map.log_q is None else u - of_map.log_q.double()


def _targets(problem: Problem, q: Tensor | None) -> Tensor:
    """Return t of the M rows that count, (M, C) float64."""
    targets = problem.targets
    w = 1.0 if targets.class_weight is None else targets.class_weight
    smooth, uniform = 1 - targets.smoothing, targets.uniform
    if q is not None:
        return w * (targets.selection.gather(q).double() * smooth + uniform)
    t = torch.zeros(targets.count, targets.n_classes, dtype=torch.float64)
    if targets.remainder is not None:
        t = t + targets.remainder
    t = (t * smooth + uniform if targets.index is not None else t) * w
    if targets.index is None:
        return t
    index, mass = targets.index.clamp(0, targets.n_classes - 1), targets.index_mass
    return t.scatter(1, index, torch.ones_like(t[:, : index.shape[1]]) if mass is None else mass)


def _relative(z: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return z − z_k (M, C) and Σ_{j≠k} exp(z_j − z_k) (M,)."""
    top = z.gather(1, k[:, None])
    s = z - top
    return s, s.exp().scatter(1, k[:, None], 0.0).sum(1)
