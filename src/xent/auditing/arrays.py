"""Predictions, labels and weights in memory, as batches of rows.

    probabilities, log-probabilities, logits (N, C), or features (N, D) with a head (C, D) → batches

Of features and a head the logits of some rows exist at a time.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xent._core.low_rank import LowRank
from xent._core.matmul import fast_products
from xent._core.validators import valid
from xent._util.text import class_text
from xent.auditing import sweeps
from xent.auditing.kinds import Fault, fault, judged
from xent.auditing.sweeps import Batch
from xent.auditing.threads import Threads
from xent.auditing.tiles import Kind, Memory, Tile
from xent.integrations import head_of
from xent.metrics._arrays import Rows, as_array, read_numbers
from xent.metrics._comparison import read_weight
from xent.metrics._labels import Labels, read_labels

LOGITS = 1 << 25
"""Logits of a head that exist at a time, 128 MiB of float32: products of fewer rows are slower."""


class Predictions:
    """A matrix of predictions of one kind."""

    name = "probabilities"

    def __init__(self, given: Any, kind: Kind, name: str) -> None:
        self.name, self.kind = name, kind
        rows = read_numbers(given, name)
        if len(rows.shape) == 1:
            rows = Rows(rows.source[:, None])
        if len(rows.shape) != 2 or 0 in rows.shape:
            raise ValueError(
                f"{name} must be (N, C), one column for each class, or (N,), of the second of two classes; "
                f"got shape {rows.shape}"
            )
        self.rows = rows
        self.count, columns = rows.shape
        self.classes = max(2, columns)

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield some rows, their numbers (n, C) on the CPU, and the lengths of their features."""
        for here in sweeps.batches(self.count, self.classes):
            yield here, self.rows[here].cpu(), None


class Head:
    """Features (N, D) and the head (C, D) that makes logits of them."""

    name: str = "logits"
    kind: Kind = "logits"

    def __init__(self, features: Any, head: Any) -> None:
        self.features = read_numbers(features, "features")
        weight, bias = _weight_and_bias(head)
        dense = weight.weight if isinstance(weight, LowRank) else weight
        if len(self.features.shape) != 2 or dense.ndim != 2 or dense.shape[1] != self.features.shape[1]:
            raise ValueError(
                f"features must be (N, D) and the head's weight (C, D); got {self.features.shape} and "
                f"{tuple(dense.shape)}"
            )
        self.count, self.classes = self.features.shape[0], len(dense)
        if bias is not None and bias.shape != (self.classes,):
            raise ValueError(
                f"the head's bias must be ({self.classes},), one for each class; got {tuple(bias.shape)}"
            )
        if self.classes < 2:
            raise ValueError("the head has one class; an audit needs two")
        self.low_rank = weight if isinstance(weight, LowRank) else None
        self.weight = _wide(dense)
        self.bias = None if bias is None else _wide(bias).to(self.weight.dtype)

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield some rows, their logits (n, C) on the CPU, and the lengths of their features.

        The logits hold until the next ones come, which take their memory: fresh memory costs as much as a
        fifth of the product.
        """
        step = min(self.count, max(1, LOGITS // self.classes))
        memory = self.weight.new_empty((step, self.classes))
        for start in range(0, self.count, step):
            x = self.features[slice(start, start + step)].to(self.weight)
            z = memory[: len(x)]
            with fast_products(x.device, x.dtype, len(x) * self.weight.numel()):
                torch.mm(x, self.weight.t(), out=z)
            if self.low_rank is not None:
                down, up = (t.detach().to(self.weight) for t in (self.low_rank.down, self.low_rank.up))
                z.addmm_(x @ down.t(), up.t(), alpha=self.low_rank.scale)
            if self.bias is not None:
                z += self.bias
            length = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).cpu()
            z = z.cpu()
            for here in sweeps.batches(len(z), self.classes):
                yield slice(start + here.start, start + here.stop), z[here], length[here]


@dataclasses.dataclass(frozen=True)
class Given:
    """The checked arguments of an audit."""

    predictions: Predictions | Head
    labels: Labels | None  # None where each row has masses of the classes
    masses: Rows | None  # (N, C)
    weight: Rows | None  # (N,)
    names: list[str]  # (C,) the classes as text
    ids: list[Any] | None  # (N,) the caller's names of the rows
    renormalize: bool

    @property
    def numbers(self) -> int:
        """N·C, for threads; 0 of a head, whose products take those of torch."""
        if isinstance(self.predictions, Head):
            return 0
        return self.predictions.count * self.predictions.classes

    def batches(self, start: int = 0, threads: Threads = sweeps.ONE) -> Iterator[Batch]:
        """Yield the rows; ``start`` is the number of the first one."""
        memory = Memory()
        for here, x, length in self.predictions.chunks():

            def of(part: slice, here: slice = here, x: Tensor = x) -> Tile:
                return self._tile(x[part.start - here.start : part.stop - here.start], part, start, memory)

            tiles = list(threads.map(of, sweeps.tiles(here, self.predictions.classes)))
            yield Batch(tiles, None if self.ids is None else self.ids[here], length)

    def _tile(self, x: Tensor, here: slice, start: int, memory: Memory) -> Tile:
        source = self.predictions
        found = judged(x, source.kind, self.renormalize)
        if found.bad is not None:
            row = int(found.bad.nonzero()[0])
            raise ValueError(_described(fault(x, source.kind, row), source.name, start + here.start))
        x = found.x
        mass = None if self.masses is None else self._mass(here, x)
        if mass is not None:
            label = mass.argmax(1)
        else:
            assert self.labels is not None
            label = torch.from_numpy(np.array(self.labels.codes(here)))  # may be read-only
        if self.weight is None:
            weight = torch.ones(len(x), dtype=torch.float64)
        else:
            weight = self.weight[here].cpu().double()
        return Tile(x, found.kind, label, weight, mass, start + here.start, memory, found.top)

    def _mass(self, here: slice, like: Tensor) -> Tensor:
        assert self.masses is not None
        x = self.masses[here].cpu()
        found = judged(x, "probs", self.renormalize)
        if found.bad is not None:
            raise ValueError(_described(fault(x, "probs", int(found.bad.nonzero()[0])), "target", here.start))
        return found.x.to(like)


def read(
    probabilities: Any,
    log_probabilities: Any,
    logits: Any,
    features: Any,
    head: Any,
    target: Any,
    classes: Any,
    sample_weight: Any,
    ids: Any,
    renormalize: bool,
) -> Given:
    """Check the arguments of an audit; raise a ValueError or TypeError that names what does not fit."""
    renormalize = valid("renormalize", renormalize)
    forms = {
        "probabilities": probabilities,
        "log_probabilities": log_probabilities,
        "logits": logits,
        "features": features,
    }
    there = [name for name, value in forms.items() if value is not None]
    if len(there) != 1:
        raise TypeError(
            "give the predictions as one of probabilities, log_probabilities, logits, or features with head; "
            f"got {', '.join(there) or 'none'}"
        )
    if (features is None) != (head is None):
        raise TypeError("features and head go together: the head makes logits of the features")
    if target is None:
        raise TypeError("target is missing: the class of each row, or its masses of the classes")
    kinds: dict[str, Kind] = {"probabilities": "probs", "log_probabilities": "log-probs", "logits": "logits"}
    (name,) = there
    made = Head(features, head) if name == "features" else Predictions(forms[name], kinds[name], name)
    labels, masses, values = _target(target, classes, made.classes)
    count = masses.shape[0] if labels is None and masses is not None else labels.count if labels else 0
    if count != made.count:
        raise ValueError(f"target has {count} rows and the predictions have {made.count}; they must agree")
    names = [class_text(value) for value in values]
    check_order(forms[name], name, names)
    if masses is not None:
        check_order(target, "target", names)
    weight = read_weight(sample_weight, made.count)
    return Given(made, labels, masses, weight, names, _names(ids, made.count), renormalize)


def check_order(given: Any, name: str, names: Sequence[str]) -> None:
    """Raise a ValueError for a data frame whose columns are the classes in another order."""
    columns = getattr(given, "columns", None)
    if columns is None or len(columns) != len(names):
        return
    found = [class_text(column) for column in columns]
    if found != list(names) and {*found} == {*names}:
        raise ValueError(
            f"the columns of {name} are the classes in another order, and columns are read by position: "
            f"give {name}[classes], or classes=list({name}.columns)"
        )


def named_classes(classes: Any) -> list[Any]:
    """Return the classes of a list, or 0 to C − 1 of their number; raise a ValueError for one named twice."""
    # bool is registered as Integral
    if isinstance(classes, numbers.Integral) and not isinstance(classes, bool):  # type: ignore[unreachable]
        return list(range(int(classes)))
    found = list(classes)
    texts = [class_text(value) for value in found]
    if len({*texts}) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise ValueError(f"classes names {twice!r} twice; name each class once")
    return found


def _names(ids: Any, count: int) -> list[Any] | None:
    """Return the caller's names of the rows by their position; raise a ValueError for another number."""
    if ids is None:
        return None
    for method in ("tolist", "to_pylist", "to_list"):
        if hasattr(ids, method):
            ids = getattr(ids, method)()
            break
    if len(ids) != count:
        raise ValueError(f"ids has {len(ids)} entries and the predictions have {count} rows")
    found = list(ids)
    kinds = {type(name) for name in found if name is not None}
    return found if len(kinds) < 2 else [None if name is None else str(name) for name in found]


def _target(target: Any, classes: Any, count: int) -> tuple[Labels | None, Rows | None, list[Any]]:
    """Return labels, or masses of the classes (N, C), and the classes."""
    values = list(range(count)) if classes is None else named_classes(classes)
    if len(values) != count:
        raise ValueError(f"classes has {len(values)} entries and the predictions have {count} classes")
    shape = tuple(target.shape if hasattr(target, "shape") else as_array(target, "target").shape)
    if len(shape) == 2 and shape[1] == count:
        return None, read_numbers(target, "target"), values
    labels = read_labels(target, values if classes is not None else None, name="target")
    if classes is None:
        if labels.values.dtype.kind in "iubf":
            return read_labels(target, np.arange(count), name="target"), None, values
        if len(labels.values) != count:
            raise ValueError(
                f"target holds {len(labels.values)} labels and the predictions have {count} classes; name "
                "those of the columns as classes="
            )
        values = labels.values.tolist()
    return labels, None, values


def _weight_and_bias(head: Any) -> tuple[Any, Tensor | None]:
    """Return weight and bias of a module, of a pair, of a mapping as ``head_of`` returns, or of a weight."""
    if isinstance(head, nn.Module):
        head = head_of(head)
    if isinstance(head, Mapping):
        weight, bias = head["linear_weight"], head.get("linear_bias")
    elif isinstance(head, tuple):
        weight, bias = head
    else:
        weight, bias = head, None
    if not isinstance(weight, LowRank):
        try:
            weight = torch.as_tensor(weight).detach()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                "head must be a weight (C, D), a pair of weight and bias, a module, or what head_of "
                "returns; got "
                f"{type(weight).__name__}"
            ) from None
    return weight, None if bias is None else torch.as_tensor(bias).detach()


def _described(found: Fault, name: str, start: int) -> str:
    if found.column is None:
        return (
            f"{name} sums to {found.value:.9g} at row {start + found.row} {found.what}"
            if found.value > -1
            else (f"{name} is -inf at row {start + found.row} {found.what}")
        )
    return f"{name} is {found.value:.6g} at row {start + found.row}, column {found.column}, {found.what}"


def _wide(x: Tensor) -> Tensor:
    """Return numbers in the type in which products are formed: half types as float32."""
    x = x.detach()
    return x.float() if x.dtype.itemsize < 4 else x
