"""One shared subset S of the classes: softmax over S alone, with the rest estimated where log Q is given.

    Z ≈ e^{z_y} + Σ_{j∈S, j≠y} e^{z_j}/Q(j)        Q(j) = P(j ∈ S)

is unbiased for the sum over all classes. A row's own class is always in its sum, so it is not corrected, and
where the sample happens to hold it too (an accidental hit) it counts once. The loss, a logarithm of an
estimate, is biased low (Jensen), by less the larger the sample. Source: Bengio and Senécal, "Adaptive
importance sampling", 2008; An et al., "Partial FC", 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xent._autograd import transforms
from xent._core.class_indices import holds_integers, widened
from xent._core.statistics import statistics_dtype
from xent._core.validators import valid


@dataclass(frozen=True, eq=False)
class Subset:
    """Classes that stand for all: rows of the classifier, and where a global class lies among them."""

    classes: Tensor  # (S,) int64, different ones
    sorted: Tensor  # (S,)
    order: Tensor  # (S,) where the sorted ones are

    @classmethod
    def of(cls, classes: object, count: int, check: bool | None) -> Subset:
        """Make a subset of `count` classes; raise for the first of (S,) that is no class or a repetition."""
        if not isinstance(classes, Tensor) or classes.dim() != 1 or classes.shape[0] == 0:
            shape = tuple(classes.shape) if isinstance(classes, Tensor) else type(classes).__name__
            raise ValueError(f"classes must be a tensor (S,) of at least one class, got {shape}")
        if not holds_integers(classes):
            raise TypeError(f"classes must be of an integer type, got {classes.dtype}")
        classes = widened(classes)
        ordered, order = classes.sort()
        if _asks(classes, check):
            outside = (ordered[0] < 0) | (ordered[-1] >= count)
            if outside:
                at = int(((classes < 0) | (classes >= count)).nonzero()[0])
                raise IndexError(f"classes[{at}] is {int(classes[at])}, outside 0..{count - 1}")
            twice = (ordered[1:] == ordered[:-1]).nonzero()
            if len(twice):
                raise ValueError(
                    f"classes holds {int(ordered[twice[0, 0]])} twice; a sample with repetitions is "
                    "torch.unique(sample), with the logarithm of each one's chance to be in it as log_q"
                )
        return cls(classes, ordered, order)

    def rows(self, weight: Tensor, *, sparse: bool = False) -> Tensor:
        """Return the subset's rows of a parameter (C, ...): (S, ...)."""
        return _SparseRows.apply(weight, self.classes) if sparse else weight.index_select(0, self.classes)

    def local(self, target: Tensor, ignored: int, check: bool | None) -> Tensor:
        """Return global classes (...) as places in the subset, −100 where they are to be ignored.

        One that is not there is an error that names it, or, where nothing can ask, a place outside.
        """
        size = self.classes.shape[0]
        at = torch.searchsorted(self.sorted, target.contiguous()).clamp(max=size - 1)
        here, kept = self.sorted[at] == target, target != ignored
        if _asks(target, check) and not (here | ~kept).all():
            place = tuple((kept & ~here).nonzero()[0].tolist())
            where = "" if not place else f" at row {place[0]}" if len(place) == 1 else f" at position {place}"
            raise IndexError(
                f"target {int(target[place])}{where} is not among the {size} classes, as all must be: "
                "xent.sample_classes keeps them, torch.cat([classes, target]).unique() adds them"
            )
        found = torch.where(here, self.order[at], size)
        return torch.where(kept, found, -100)


class _SparseRows(torch.autograd.Function):
    """Rows of a parameter of any number of dimensions, whose gradient is sparse (embedding's has two)."""

    @staticmethod
    def forward(weight: Tensor, classes: Tensor) -> Tensor:
        return weight.index_select(0, classes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        weight, classes = inputs
        ctx.shape = weight.shape
        ctx.save_for_backward(classes)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (classes,) = ctx.saved_tensors
        made = torch.sparse_coo_tensor(
            classes[None], upstream, ctx.shape, device=upstream.device, check_invariants=False
        )
        return made, None


def sample_classes(
    target: Tensor,
    num_classes: int,
    num_samples: int,
    *,
    ignore_index: int | None = -100,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return a random subset of the classes for one batch, which holds every class that occurs in the batch.

    The other classes are drawn uniformly without replacement, until the subset has ``num_samples`` classes or
    all. Both results go to :func:`xent.linear_cross_entropy`. With ``classes`` alone the loss is the
    cross-entropy over the subset (Partial FC). With ``log_q`` too it estimates the loss over all classes,
    through ``Z ≈ exp(z_y) + Σ_{j∈S, j≠y} exp(z_j)/Q(j)``, where Q(j) is the probability that class j is in
    the subset S. Sources: Bengio and Senécal, "Adaptive importance sampling", 2008; An et al., "Partial FC",
    2021.

    Args:
        target: class indices of any shape and integer type.
        num_classes: C, the number of all classes.
        num_samples: S, the number of classes in the subset. A batch that holds more classes gives more.
        ignore_index: the target of rows that have no class. None means −100.
        generator: the source of randomness, on the device of ``target``.

    Returns:
        A pair ``(classes, log_q)``. ``classes`` is (S,) int64, ascending. ``log_q`` is (S,), of torch's
        default floating type: the logarithm of each class's probability of being in the subset, 0 for the P
        classes of the batch and log((S − P)/(C − P)) for the others.

    Raises:
        IndexError: a target outside 0..C−1.
        TypeError: a target that is not of an integer type.

    Example:
        >>> import torch, xent
        >>> x, w = torch.randn(32, 16), torch.randn(100_000, 16, requires_grad=True)
        >>> target = torch.randint(100_000, (32,))
        >>> classes, log_q = xent.sample_classes(target, 100_000, 1000)
        >>> loss = xent.linear_cross_entropy(x, w, target, classes=classes, log_q=log_q, sparse_grad=True)
        >>> loss.backward()
        >>> w.grad.is_sparse, w.grad._nnz()
        (True, 1000)
    """
    given: object = target
    if not isinstance(given, Tensor) or not holds_integers(given):
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"target must hold class indices, of an integer type, got {kind}")
    num_classes, num_samples = valid("num_classes", num_classes), valid("num_samples", num_samples)
    ignore_index, generator = valid("ignore_index", ignore_index), valid("generator", generator)
    ignored = -100 if ignore_index is None else ignore_index
    target = widened(target)
    present = torch.unique(target[target != ignored])
    if len(present) and (present[0] < 0 or present[-1] >= num_classes):
        wrong = present[0] if present[0] < 0 else present[-1]
        raise IndexError(f"target {int(wrong)} is outside 0..{num_classes - 1}")
    own, rest = len(present), num_classes - len(present)
    drawn = min(max(num_samples - own, 0), rest)
    # the d-th of the classes that the batch does not hold, without a tensor of all classes: each of the
    # batch's own that lies at or below it moves it up by one
    chosen = _distinct(rest, drawn, generator, present.device)
    gaps = present - torch.arange(own, device=present.device)
    others = chosen + torch.searchsorted(gaps, chosen, right=True)
    classes = torch.cat([present, others])
    log_q = torch.zeros(own + drawn, device=classes.device)
    if drawn:
        log_q[own:] = math.log(drawn / rest)
    classes, order = classes.sort()
    return classes, log_q[order]


def _distinct(count: int, size: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw `size` different numbers of 0..count − 1; memory is O(size) where size is far below count."""
    if size > count // 8:
        return torch.randperm(count, generator=generator, device=device)[:size]
    chosen = torch.empty(0, dtype=torch.int64, device=device)
    while len(chosen) < size:  # an eighth at most is taken, so a draw is new with a chance of 7/8
        more = torch.randint(count, (size - len(chosen),), generator=generator, device=device)
        chosen = torch.cat([chosen, more]).unique()
    return chosen


def log_q_of(log_q: Tensor, columns: int) -> Tensor:
    """Return log_q (S,), checked, in the type of the statistics."""
    if log_q.shape != (columns,):
        raise ValueError(
            f"log_q must have shape ({columns},), one a class that is scored; got {tuple(log_q.shape)}"
        )
    if not log_q.is_floating_point():
        raise TypeError(f"log_q must be floating, got {log_q.dtype}")
    if _asks(log_q, None) and not log_q.isfinite().all():
        at = int(log_q.isfinite().logical_not().nonzero()[0])
        raise ValueError(
            f"log_q[{at}] is {log_q[at].item()}: the logarithm of a class's chance must be finite"
        )
    return log_q.detach().to(statistics_dtype(log_q.device))


def _asks(tensor: Tensor, check: bool | None) -> bool:
    """Return whether data may be read here: on a CPU or with ``check=True``, and where there is data."""
    if check is False or transforms.is_opaque(tensor) or transforms.batched(tensor):
        return False
    return check is True or tensor.device.type == "cpu"
