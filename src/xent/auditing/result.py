"""The result of an audit: plain numbers as attributes, as JSON and as a page.

The JSON object is what :doc:`/explanation/audit` describes; `VERSION` is that of its schema.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xent._util.atomic_write import atomic_write, check_file
from xent._util.text import json_text
from xent.auditing.records import Bar, Bounds, ClassMeasures, Measures, PairMeasures, Point, RowMeasures

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1


@dataclasses.dataclass(frozen=True)
class AuditResult:
    """The parts of a classifier's loss; every measure is an attribute, such as ``result.log_loss``.

    ``rows`` is an Arrow table of every row's measures, made by one more sweep over the caller's arrays; None
    where these came as a stream, and of a result that was pickled.
    """

    source: str
    count: int  # rows
    weight: float  # of all rows
    classes: int
    sweeps: int  # 1 without what a second sweep measures
    measures: Measures
    top_k: dict[int, float]  # accuracy by k
    per_class: list[ClassMeasures]
    pairs: list[PairMeasures]  # the heaviest first
    pairs_remainder: float  # nats of the mean loss in other pairs
    reliability: list[Point]
    margins: list[Bar]
    losses: list[tuple[float, float, float, float]]  # ends of a cell, its weight, its share of the loss
    bounds: Bounds | None
    worst: list[RowMeasures]
    suspect_rows: list[RowMeasures]
    left_out: list[str]  # what was not measured, and why
    _rows: Callable[[], pa.Table] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        # the caller's arrays, of which the rows are made, are left behind
        return {**self.__dict__, "_rows": None}

    def __getattr__(self, name: str) -> Any:
        measures = self.__dict__.get("measures")
        if measures is not None and name in Measures.__dataclass_fields__:
            return getattr(measures, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *Measures.__dataclass_fields__})

    @functools.cached_property
    def rows(self) -> pa.Table | None:
        """Every row's measures as an Arrow table; None of a stream."""
        return None if self._rows is None else self._rows()

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values, of the documented schema."""
        return {
            "schema": "xent.audit",
            "version": VERSION,
            "source": self.source,
            "rows": self.count,
            "weight": self.weight,
            "classes": self.classes,
            "sweeps": self.sweeps,
            "measures": dataclasses.asdict(self.measures),
            "top_k": {str(k): value for k, value in self.top_k.items()},
            "per_class": [
                {
                    **each._asdict(),
                    "calibration": None if each.calibration is None else each.calibration._asdict(),
                }
                for each in self.per_class
            ],
            "pairs": [each._asdict() for each in self.pairs],
            "pairs_remainder": self.pairs_remainder,
            "reliability": [each._asdict() for each in self.reliability],
            "margins": [each._asdict() for each in self.margins],
            "losses": [
                dict(zip(("low", "high", "weight", "share"), each, strict=True)) for each in self.losses
            ],
            "bounds": None if self.bounds is None else self.bounds._asdict(),
            "worst": [each._asdict() for each in self.worst],
            "suspects": [each._asdict() for each in self.suspect_rows],
            "left_out": self.left_out,
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the result as JSON, and write it to a file where one is named.

        Raises ``OSError`` where the file cannot be written, ``BadInput`` for a path that is a folder.
        """
        text = json_text(self.to_dict(), indent=1, default=str) + "\n"
        if path is not None:
            check_file(Path(path))
            with atomic_write(Path(path)) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page of HTML.

        Raises ``MissingExtra`` without Jinja and Matplotlib, ``OSError`` where the file cannot be written.
        """
        from xent.auditing.page import write_page

        write_page(self, Path(path))

    def __str__(self) -> str:
        from xent.auditing.sentences import sentences

        return "\n".join(sentences(self))

    def _repr_html_(self) -> str:
        from xent.auditing.page import summary_html

        return summary_html(self)
