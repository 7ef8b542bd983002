"""One loss to compute: the logits of N rows, their targets, and how; it flattens to tensors and a form.

    problem → (tensors, form)        form.bind(tensors) → problem

Autograd, `vmap` and graphs see the tensors; the form is everything else. The tensors in which a loss is
differentiable, the leaves, come first: probabilities, then those of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from xent._core.bucket import Bucket
from xent._core.collectives import ClassGroup
from xent._core.logit_map import LogitMap
from xent._core.logits import DenseLogits, LinearHead, Logits
from xent._core.margin import TargetShift
from xent._core.matmul import fast_products
from xent._core.ops import BATCHED, TileOps, any_batched, tile_ops
from xent._core.plan import DEFAULT_BUDGET, Footprint, Plan, grain_of
from xent._core.record import record
from xent._core.row_losses import RowLoss
from xent._core.selection import Selection
from xent._core.statistics import LOSS_ONLY, RequestedOutputs, Statistics
from xent._core.targets import ClassSlice, Targets

Tensors = tuple[Tensor | None, ...]

LEAVES_OF_LOGITS = 2  # probabilities, logits; of a head 4, of one with a low-rank term 6


class RowTerms(NamedTuple):
    """The parts of the step from the rows' outputs to a loss, beside the reduction."""

    selection: Selection
    row_weight: Tensor | None  # (M,) float64; None means 1
    shift: TargetShift | None  # of the targets' logits
    row_loss: RowLoss | None  # None means cross-entropy itself
    bucket: Bucket | None = None  # of a target of k classes and the others together

    def rows(self, chunk: slice) -> RowTerms:
        """Return the parts for a chunk of the M rows."""
        if chunk.start == 0 and chunk.stop == self.selection.count:
            return self
        return RowTerms(
            Selection(chunk.stop - chunk.start),
            None if self.row_weight is None else self.row_weight[chunk],
            None if self.shift is None else self.shift.rows(chunk),
            None if self.row_loss is None else self.row_loss.rows(chunk),
            None if self.bucket is None else self.bucket.rows(chunk),
        )


@record
class Problem:
    """The logits of N rows, their targets, and how they become a loss."""

    logits: Logits
    targets: Targets
    budget: int = DEFAULT_BUDGET  # bytes of working memory
    requested: RequestedOutputs = LOSS_ONLY
    ranks: ClassGroup | None = None  # the processes that hold the other classes
    batched: bool = False  # whether vmap has batched a tensor
    row_weight: Tensor | None = None  # as in `RowTerms`
    shift: TargetShift | None = None
    row_loss: RowLoss | None = None
    bucket: Bucket | None = None
    in_graph: bool = False  # whether the sweep is one operator of a graph
    check: bool | None = None  # of targets, by that operator
    weight_elsewhere: bool = False  # whether other processes know what some rows add to the divisor of a mean

    @property
    def ops(self) -> TileOps:
        return tile_ops(batched=self.batched)

    @property
    def selection(self) -> Selection:
        """The rows that count."""
        return self.targets.selection

    @property
    def terms(self) -> RowTerms:
        """The step from the rows' outputs to a loss."""
        return RowTerms(self.targets.selection, self.row_weight, self.shift, self.row_loss, self.bucket)

    @property
    def leaves(self) -> Tensors:
        """The tensors in which the loss is differentiable: probabilities, then those of the logits."""
        return self.targets.probabilities, *self.logits.leaves

    @property
    def first(self) -> int:
        """The first class here, of all."""
        return 0 if self.ranks is None else self.ranks.first

    def resolved(self) -> Problem:
        """Return the problem with its rows selected by index, for code that may look at data."""
        return replace(self, targets=self.targets.resolved())

    def harmless(self, kept: Tensor) -> Problem:
        """Return the problem with zeros in the rows that are not kept (N,), whatever they held."""
        return replace(self, logits=self.logits.select(kept))

    def request(self, requested: RequestedOutputs) -> Problem:
        return replace(self, requested=requested)

    def for_loss(self) -> Problem:
        """Return the problem with the outputs that a shift, a bucket and the divisor of a mean need."""
        shifts, bucket = self.shift is not None, self.bucket is not None
        mass = self.weight_elsewhere or (
            shifts and self.targets.held is not None and self.targets.smoothing > 0
        )
        if not (shifts or mass or bucket):
            return self
        return self.request(RequestedOutputs(log_prob=shifts or bucket, mass=mass, log_rest=bucket))

    def completed(self, found: Statistics) -> Problem:
        """Return the problem with what its targets lack until the statistics of all classes are known."""
        self.check_sent()
        return self if self.ranks is None else replace(self, targets=self.targets.completed(found.a))

    def check_sent(self) -> None:
        """Raise NotImplementedError where `vmap` would have processes send batches of tensors."""
        if self.ranks is not None and self.batched:
            raise NotImplementedError(BATCHED)

    def blocks(self) -> Iterator[slice]:
        """Return the rows whose part of a gradient is finished before that of others is begun."""
        rows, logits = self.targets.count, self.logits
        if self.ranks is None:
            return iter((slice(0, rows),))
        return self.ranks.blocks(rows, logits.depth * logits.dtype.itemsize)

    def plan(self, *, resident: bool, buffers: int = 1, temporaries: int = 0, least_rows: int = 1) -> Plan:
        """Return tiles within the budget.

        `buffers` tile-sized tensors are held at once and `temporaries` come and go; `least_rows` divides the
        fewest rows for which it pays to keep a chunk's tiles.
        """
        logits, targets = self.logits, self.targets
        size = logits.dtype.itemsize
        footprint = Footprint(
            kept=size * (buffers + logits.map.curved),
            scratch=size
            * (temporaries + 2 * self.requested.entropy)  # E log E, and its product with a number
            + self._of_dense_targets(size)
            + logits.bytes_per_logit,
            per_row=logits.bytes_per_row(self.selection.index is not None),
            per_class=logits.bytes_per_class(),
            resident_rows=max(1, logits.least_resident_rows // least_rows),
        )
        if self.batched:
            return Plan.of_all_rows(self.budget, targets.count, targets.n_classes, footprint)
        grain, shape = grain_of(logits.device), (targets.count, targets.n_classes)
        return Plan.within(self.budget, *shape, footprint, resident=resident, grain=grain)

    def _of_dense_targets(self, size: int) -> int:
        """Return bytes an element: a converted tile of t, its product with z, the booleans of a selection."""
        if not self.targets.dense:
            return 0
        return (3 if self.targets.probabilities is not None else 2) * size + 1

    def products(self) -> AbstractContextManager[None]:
        rows, classes = self.logits.shape
        return fast_products(self.logits.device, self.logits.dtype, rows * classes * self.logits.depth)

    def flatten(self) -> tuple[Form, Tensors]:
        """Return the problem of a sweep, without the step from its rows to a loss, as a form and tensors."""
        logits, t = self.logits, self.targets
        of_map, leaves = logits.map, logits.leaves
        temperature = of_map.temperature
        each = temperature if isinstance(temperature, Tensor) else None
        form = Form(
            logits.product_dtype if isinstance(logits, LinearHead) else None,
            1 + len(leaves),
            of_map.softcap,
            1.0 if isinstance(temperature, Tensor) else temperature,
            of_map.scale,
            t.smoothing,
            t.index_checked,
            t.held,
            self.budget,
            self.requested,
            self.ranks,
        )
        rest = (
            *(each, of_map.log_q, t.selection.index, t.selection.mask),
            *(t.index, t.index_mass, t.other_mass, t.class_weight, t.remainder),
        )
        return form, (t.probabilities, *leaves, *rest)


@record
class Form:
    """Everything of a problem that is no tensor."""

    product_dtype: torch.dtype | None
    n_leaves: int  # which says what the logits are
    softcap: float | None
    temperature: float  # 1 where each row has its own
    scale: float
    smoothing: float
    index_checked: bool
    held: ClassSlice | None
    budget: int
    requested: RequestedOutputs
    ranks: ClassGroup | None

    def n_own(self, tensors: Tensors) -> int:
        """Return the number of a row's own classes."""
        index = tensors[self.n_leaves + 4]  # as `flatten` orders them
        return 1 if index is None else index.shape[1]

    @property
    def is_head(self) -> bool:
        return self.n_leaves != LEAVES_OF_LOGITS

    def bind(self, tensors: Tensors, *others: Tensor | None) -> Problem:
        """Return the problem made of the tensors; `others` are further ones that `vmap` may have batched."""
        q, *leaves = tensors[: self.n_leaves]
        each, log_q, chosen, mask, *of_rows = tensors[self.n_leaves :]
        index, index_mass, other_mass, class_weight, remainder = of_rows
        of_map = LogitMap(self.softcap, self.temperature if each is None else each, log_q, self.scale)
        x, *head = leaves
        assert x is not None
        logits: Logits
        if self.is_head:
            w, b, *low_rank = head
            assert w is not None
            logits = LinearHead(x, w, b, of_map, self.product_dtype, *low_rank)
        else:
            logits = DenseLogits(x, of_map)
        targets = Targets(
            logits.shape[1],
            Selection(x.shape[0], chosen, mask),
            index,
            index_mass,
            other_mass,
            self.index_checked,
            q,
            class_weight,
            self.smoothing,
            remainder,
            held=self.held,
        )
        batched = any_batched(*tensors, *others)
        return Problem(logits, targets, self.budget, self.requested, self.ranks, batched)
