"""Files of features and the fitted model that predicts from them, as batches of rows.

    z = ((x − mean) / scale) Wᵀ + b        features + model + labels  →  Batch, Batch, ...

The logits of some rows exist at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from xent._processes.group import Share
from xent._util.text import class_text, quoted
from xent.auditing.files import Columns, Files, Piece
from xent.data.labels import ClassIndex
from xent.data.model_file import Model, wanted_for
from xent.data.rows import steps
from xent.data.stream import stream
from xent.data.table import Table
from xent.errors import BadInput

LOGITS = 1 << 22
"""Logits of a model that exist at a time."""


class ModelFiles(Files):
    """Files of features, and the model that predicts from them."""

    def __init__(self, paths: Sequence[Path], columns: Columns, model: Model, path: Path) -> None:
        self.paths, self.columns, self.model = paths, columns, model
        self.kind = "logits"
        self.source = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        self.names = [class_text(value) for value in model.classes]
        self._index = ClassIndex(model.classes, model.kind)
        self._kept = None
        label = columns.label or model.label_name
        if label is None:
            raise BadInput(f"{self.source}: the model was fitted on arrays; name the labels with --label")
        self.columns = dataclasses.replace(columns, label=label)
        self._model_wanted = dataclasses.replace(
            wanted_for(model, path, label, columns.layout), weight=columns.weight
        )

    def pieces(self, share: Share) -> Iterator[Piece]:
        """Yield the logits of the rows of a share, some at a time."""
        keep = [] if self.columns.id is None else [self.columns.id]
        model = self.model
        head, bias, mean, scale = (
            torch.from_numpy(np.ascontiguousarray(each))
            for each in (model.weight, model.bias, model.mean, model.scale)
        )
        step = max(1, LOGITS // max(len(self.names), head.shape[1]))
        for part in stream(self.paths, self._model_wanted, keep, share):
            table = model.encoded(part.table)
            if table.codes is None or table.classes is None:
                raise BadInput(f"{table.source}: no row has a label in {quoted(self.columns.label)}")
            codes, _ = self._index.codes(table.codes, table.classes)
            ids = None if self.columns.id is None else part.kept.column(self.columns.id)

            def label_of(row: int, table: Table = table) -> str:
                assert table.codes is not None
                assert table.classes is not None
                return class_text(table.classes[table.codes[row]]) if table.codes[row] >= 0 else ""

            for here, x in steps(table.rows, step):
                x = (x.to(head.dtype) - mean) / scale
                z = torch.addmm(bias, x, head.t())
                if model.temperature != 1:
                    z /= model.temperature
                length = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
                own, first = slice(here.start, here.stop), here.start
                yield Piece(
                    z,
                    codes[own],
                    None,
                    None if table.weight is None else table.weight[own],
                    None if ids is None else ids[own.start : own.stop],
                    length,
                    part.start + first,
                    table.source,
                    table.start + first,
                    lambda row, first=first, label_of=label_of: label_of(first + row),
                )

    def _column(self, position: int) -> str:
        return f"the logit of class {quoted(self.names[position])}"
