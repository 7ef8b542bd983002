"""Files of predictions as batches of rows that are never all in memory.

    columns of probabilities, log-probabilities or logits + labels  →  Batch, Batch, ...

A fault of a number or a label is counted to the end of the sweep, and then raised with the first one's place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xent._processes.group import Share
from xent._util.text import class_text, quoted
from xent.auditing import sweeps
from xent.auditing.kinds import Fault, fault, judged
from xent.auditing.sweeps import Batch
from xent.auditing.threads import Threads
from xent.auditing.tiles import Kind, Memory, Tile
from xent.data.batches import as_tensor
from xent.data.labels import ClassIndex, kind_of
from xent.data.layout import PLAIN, Layout, is_compressed, matching
from xent.data.parts import files_of
from xent.data.stream import Part, stream
from xent.data.table import Table, Wanted, some
from xent.errors import BadInput

OWN_COLUMNS = ("prediction", "row_number", "true_label")
"""Columns of a file of predictions that are no class, unless the options name them."""

REPLAYED = 1 << 26
"""Bytes of files up to which a first sweep's rows are kept for a second."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a file of predictions, as the options name them."""

    label: str | None
    kind: Kind = "probs"
    classes: Sequence[str] = ()  # the columns, or of arrays the classes of the columns
    prefix: str | None = None  # of the columns; what follows it is the class
    soft_prefix: str | None = None  # of the columns of the classes' masses
    id: str | None = None
    weight: str | None = None
    positive: str | None = None  # the class whose probability the only column holds
    renormalize: bool = False
    allow_zero: bool = False
    layout: Layout = PLAIN


class Piece(NamedTuple):
    """Some rows of a file."""

    x: Tensor  # (n, columns) predictions
    codes: np.ndarray | None  # (n,) position of the label among the classes, −1 of another
    mass: Tensor | None  # (n, C)
    weight: np.ndarray | None  # (n,)
    ids: Any  # (n,) Arrow
    length: Tensor | None  # (n,) of the features
    start: int  # of the first row among all
    source: str
    row: int  # of the first row in its file
    label_of: Any  # position in the piece -> label as text, for messages


class Faults:
    """The first fault of a file, and how many rows have one."""

    def __init__(self) -> None:
        self.first: str | None = None
        self.rows = 0

    def add(self, text: str, rows: int) -> None:
        """Take the text of the first, and count the rows."""
        self.first = self.first or text
        self.rows += rows

    def take(self, other: Faults) -> None:
        """Add the faults of rows that follow."""
        if other.first is not None:
            self.add(other.first, other.rows)

    def check(self) -> None:
        """Raise ``BadInput`` if there was one."""
        if self.first is not None:
            more = f"; {self.rows:,} rows are bad" if self.rows > 1 else ""
            raise BadInput(self.first + more)


class ArrowIds(Sequence[Any]):
    """Arrow values by position, as plain Python objects."""

    def __init__(self, ids: Any) -> None:
        self.ids = ids

    def __len__(self) -> int:
        """Return their number."""
        return len(self.ids)

    def __getitem__(self, row: Any) -> Any:
        """Return the value of a row."""
        return self.ids[row].as_py()

    def __arrow_array__(self, type: Any = None) -> Any:
        """Return the values as Arrow has them."""
        return self.ids


class Files:
    """Files of predictions with their labels."""

    def __init__(self, paths: Sequence[Path], columns: Columns) -> None:
        self.paths, self.columns = paths, columns
        self.kind = columns.kind
        self.source = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        head = self._head()
        self._arrays = head.width is not None
        self.features, self.names, self.soft = self._chosen(head)
        if len(self.features) == 1:
            self.names = self._two()
        elif columns.positive is not None:
            raise BadInput(
                f"{self.source}: --positive is of a single column, and there are {len(self.features)}; "
                "leave it out"
            )
        self._index = ClassIndex(np.array(self.names), kind_of(np.array(self.names)))
        self._kept: list[Piece] | None = []
        self._order: np.ndarray | None = None

    def _head(self) -> Table:
        """Return the first rows, with every numeric column."""
        named = self.columns
        wanted = Wanted(
            label=named.label,
            weight=named.weight,
            layout=named.layout,
            raw=True,
            missing="impute",
            features=None,
        )
        for part in stream(self.paths, wanted):
            return part.table
        raise BadInput(f"{self.source}: there are no rows")

    def _chosen(self, head: Table) -> tuple[list[str], list[str], list[str]]:
        """Return the columns of the classes, their names, and the columns of the classes' masses."""
        named, there = self.columns, list(head.feature_names)
        if self._arrays:
            if named.prefix is not None or named.soft_prefix is not None or named.id is not None:
                raise BadInput(
                    f"{self.source}: arrays have no columns with names, of which --prefix, --soft-prefix "
                    "and --id are"
                )
            names = list(named.classes) or [str(c) for c in range(len(there))]
            if len(names) != len(there):
                raise BadInput(
                    f"{self.source}: --classes names {len(names)} classes and the array has {len(there)} "
                    "columns"
                )
            return there, names, []
        taken = {named.label, named.id, named.weight}
        soft: list[str] = []
        if named.soft_prefix is not None:
            soft = [name for name in there if name.startswith(named.soft_prefix)]
            if not soft:
                raise BadInput(
                    f"{self.source}: no numeric column starts with {quoted(named.soft_prefix)} "
                    "(--soft-prefix)"
                )
        if named.classes:
            lacking = [name for name in named.classes if name not in there]
            chosen, names = list(named.classes), list(named.classes)
            if lacking:
                self._read_anyway(lacking[0])
        elif named.prefix is not None:
            chosen = [name for name in there if name.startswith(named.prefix) and name not in {*taken, *soft}]
            names = [name[len(named.prefix) :] for name in chosen]
            if not chosen:
                raise BadInput(
                    f"{self.source}: no numeric column starts with {quoted(named.prefix)} (--prefix); "
                    f"there are {some(there)}"
                )
        else:
            chosen = [name for name in there if name not in {*taken, *soft, *OWN_COLUMNS}]
            names = list(chosen)
            if not chosen:
                raise BadInput(
                    f"{self.source}: no numeric column is left for the classes; there are {some(there)}"
                )
        if len({*names}) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise BadInput(f"{self.source}: two columns are of class {quoted(twice)}; name each class once")
        if (
            not named.classes
            and named.prefix is None
            and "probability_1" in chosen
            and "class_1" not in chosen
        ):
            raise BadInput(
                f"{self.source}: holds the most probable classes of each row alone, as `xent predict --top` "
                "writes them; an audit needs the probabilities of all: predict without --top"
            )
        listed = [name for name in chosen if name.endswith("]") and name.split("[")[0] in head.lists]
        if not named.classes and len(listed) == len(chosen) and len(head.lists) == 1:
            names = [str(c) for c in range(len(chosen))]  # one column of lists
        if soft:
            own = {name[len(str(named.soft_prefix)) :] for name in soft}
            if own != {*names}:
                odd = sorted(own ^ {*names})
                raise BadInput(
                    f"{self.source}: the columns of --soft-prefix and of the predictions are of other "
                    f"classes: {some(odd)}"
                )
        return chosen, names, soft

    def _read_anyway(self, name: str) -> None:
        """Raise ``BadInput`` with what a reader says of a column that is not there, or holds no numbers."""
        try:
            for _ in stream(self.paths, Wanted(features=[name], layout=self.columns.layout, raw=True)):
                pass
        except BadInput as error:
            raise BadInput(str(error).replace("--features", "--classes")) from None
        raise BadInput(f"{self.source}: column {quoted(name)} (--classes) is named as something else too")

    def _two(self) -> list[str]:
        """Return the two classes of a single column of predictions."""
        positive = self.columns.positive
        if positive is None:
            raise BadInput(
                f"{self.source}: there is one column of predictions, {quoted(self.features[0])}; say "
                "which class it is of, "
                "as --positive yes, or name the columns of all classes with --classes or --prefix"
            )
        if self.soft:
            raise BadInput(f"{self.source}: --soft-prefix needs a column of predictions for each class")
        found: dict[str, None] = {}
        for part in stream(self.paths, self._wanted()):
            if part.table.classes is not None:
                found |= dict.fromkeys(class_text(value) for value in part.table.classes)
        alike = ClassIndex(np.array([positive]), kind_of(np.array([positive])))
        others = [name for name in found if alike.codes(np.zeros(1, np.int64), np.array([name]))[0][0] < 0]
        own = [name for name in found if name not in others]
        if not own:
            raise BadInput(
                f"{self.source}: --positive {quoted(positive)} is none of the labels {some(list(found))}"
            )
        if len(others) > 1:
            raise BadInput(
                f"{self.source}: --positive is of two classes, and the labels are {some(list(found))}"
            )
        return [others[0] if others else f"not {positive}", own[0]]  # as the labels have it

    def _wanted(self) -> Wanted:
        named = self.columns
        return Wanted(
            label=None if self.soft else named.label,
            features=None if self._arrays else self.features,
            weight=named.weight,
            soft=self.soft,
            layout=named.layout,
            raw=True,
        )

    def pieces(self, share: Share) -> Iterator[Piece]:
        """Yield the rows of a share, some at a time."""
        keep = [] if self.columns.id is None else [self.columns.id]
        for part in stream(self.paths, self._wanted(), keep, share):
            yield self._piece(part)

    def _piece(self, part: Part) -> Piece:
        table = part.table
        features = table.features
        assert isinstance(features, np.ndarray)
        x = torch.from_numpy(features.T).t() if features.flags.f_contiguous else as_tensor(features)
        ids = None if self.columns.id is None else part.kept.column(self.columns.id)
        codes, mass = None, None
        if table.soft is not None:
            if self._order is None:
                assert table.classes is not None
                prefix = len(str(self.columns.soft_prefix))
                place = {name[prefix:]: i for i, name in enumerate(table.classes.tolist())}
                self._order = np.array([place[name] for name in self.names])
            mass = torch.from_numpy(table.soft[:, self._order])
        else:
            assert table.codes is not None
            assert table.classes is not None
            codes, _ = self._index.codes(table.codes, table.classes)

        def label_of(row: int) -> str:
            assert table.codes is not None
            assert table.classes is not None
            return class_text(table.classes[table.codes[row]])

        return Piece(x, codes, mass, table.weight, ids, None, part.start, table.source, table.start, label_of)

    def _column(self, position: int) -> str:
        return f"column {quoted(self.features[position])}"

    def batches(
        self, faults: Faults, share: Share | None = None, threads: Threads = sweeps.ONE
    ) -> Iterator[Batch]:
        """Yield the rows of a share.

        Once there is a fault no more batches come, but the rows of the others are counted.
        """
        pieces = iter(self._kept) if self._kept else self._recorded(self.pieces(share or Share()))
        memory = Memory()
        for piece in pieces:
            for here in sweeps.batches(len(piece.x), len(self.names)):
                parts = [(part, Faults()) for part in sweeps.tiles(here, len(self.names))]

                def of(part: tuple[slice, Faults], piece: Piece = piece) -> Tile | None:
                    return self._tile(piece, *part, memory)

                tiles = [tile for tile in threads.map(of, parts) if tile is not None]
                for _, own in parts:
                    faults.take(own)
                if faults.first is None:
                    ids = None if piece.ids is None else ArrowIds(piece.ids[here.start : here.stop])
                    yield Batch(tiles, ids, None if piece.length is None else piece.length[here])
        faults.check()

    def _recorded(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Yield the pieces, and keep them for a second sweep where the files are small."""
        files = files_of([file for path in self.paths for file in matching(path)])
        small = sum(file.stat().st_size for file in files) <= REPLAYED and not any(map(is_compressed, files))
        kept: list[Piece] = []
        for piece in pieces:
            if small and self._kept is not None:
                kept.append(piece)
            yield piece
        if self._kept is not None:
            self._kept = kept

    def _tile(self, piece: Piece, here: slice, faults: Faults, memory: Memory) -> Tile | None:
        """Return some rows of a piece; None where one is bad."""
        x = piece.x[here]
        found = judged(x, self.kind, self.columns.renormalize)
        where = piece.source
        if found.bad is not None:
            row = int(found.bad.nonzero()[0])
            first = fault(x, self.kind, row)
            faults.add(f"{where}: {self._described(first, piece.row + here.start)}", int(found.bad.sum()))
            return None
        mass = None
        if piece.mass is not None:
            rows = piece.mass[here]
            of_mass = judged(rows, "probs", self.columns.renormalize)
            if of_mass.bad is not None:
                row = int(of_mass.bad.nonzero()[0])
                total = rows[row].sum().item()
                faults.add(
                    f"{where}: row {piece.row + here.start + row + 1}, the masses of --soft-prefix sum to "
                    f"{total:.9g} where those of a row sum to 1",
                    int(of_mass.bad.sum()),
                )
                return None
            mass = of_mass.x.to(found.x)
            label = mass.argmax(1)
        else:
            assert piece.codes is not None
            codes = piece.codes[here]
            if codes.min() < 0:
                row = int(np.flatnonzero(codes < 0)[0])
                faults.add(self._unknown(piece, here.start + row), int((codes < 0).sum()))
                return None
            label = torch.from_numpy(codes)
        if piece.weight is None:
            weight = torch.ones(len(label), dtype=torch.float64)
        else:
            weight = torch.from_numpy(piece.weight[here])
        start = piece.start + here.start
        tile = Tile(found.x, found.kind, label, weight, mass, start, memory, found.top)
        if not self.columns.allow_zero:
            lost = tile.impossible & (weight > 0)
            if lost.any():
                row = int(lost.nonzero()[0])
                name = quoted(self.names[int(label[row])])
                faults.add(
                    f"{where}: row {piece.row + here.start + row + 1} has probability 0 for its class "
                    f"{name}, so that "
                    "the loss is infinite; --allow-zero counts such rows and reports the finite part",
                    int(lost.sum()),
                )
                return None
        return tile

    def _unknown(self, piece: Piece, row: int) -> str:
        return (
            f"{piece.source}: row {piece.row + row + 1}, column {quoted(self.columns.label)} holds "
            f"{quoted(piece.label_of(row))}, which is none of the classes {some(self.names)}"
        )

    def _described(self, found: Fault, start: int) -> str:
        """Return a fault as the part of a message behind the file's name."""
        row = start + found.row + 1
        if found.column is not None:
            text = f"row {row}, {self._column(found.column)} holds {found.value:.6g} {found.what}"
            if self.kind == "logits" or not math.isfinite(found.value):
                return text
            other = "probs" if self.kind == "log-probs" and 0 < found.value <= 1 else "logits"
            return f"{text} (--kind {other}, if these are {'probabilities' if other == 'probs' else other})"
        if self.kind == "logits":
            return f"row {row} holds -inf {found.what}"
        text = f"row {row} sums to {found.value:.9g} {found.what}"
        if abs(found.value - 1) <= 1e-3 and self.kind == "probs" and not self.columns.renormalize:
            return text + "; --renormalize divides each row by its sum"
        if self._arrays or self.columns.classes or self.columns.prefix is not None:
            return text
        return f"{text}; taken are the columns {some(self.features)}: --classes or --prefix names others"
