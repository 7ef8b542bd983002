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
    """The parts of a classifier's loss over a data set.

    Every single measure is an attribute, such as ``result.log_loss``; :doc:`/explanation/audit` lists and
    defines them. ``print(result)`` shows them in sentences.

    Example:
        >>> import xent
        >>> result = xent.audit([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], target=[0, 1, 1])
        >>> round(result.log_loss, 6), result.worst[0].row, result.to_dict()["measures"]["infinite_rows"]
        (0.414932, 3, 0)
    """

    source: str  # the files that hold the rows; empty for arrays
    count: int  # N, the number of rows
    weight: float  # the sum of the rows' weights
    classes: int  # C, the number of classes
    sweeps: int  # the number of passes; 1 is without temperature and suspects
    measures: Measures  # the measures that are one number each
    top_k: dict[int, float]  # the accuracy of the k most probable classes, by k
    per_class: list[ClassMeasures]  # the measures of each class, in the order of the columns
    pairs: list[PairMeasures]  # the loss of each pair of class and rival, largest first
    pairs_remainder: float  # the mean loss in pairs that are not listed, nats
    reliability: list[Point]  # confidence and accuracy of groups of rows
    margins: list[Bar]  # the histogram of the rows' margins
    losses: list[tuple[float, float, float, float]]  # cells: low, high, weight, share of the loss
    bounds: Bounds | None  # the mean triplet bounds of a sample; None where not computed
    worst: list[RowMeasures]  # the rows of the largest losses
    suspect_rows: list[RowMeasures]  # the rows whose label looks wrong
    left_out: list[str]  # the measures that are not there, and why
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
        """The measures of every row, an Arrow table, made by one more pass over the caller's arrays.

        None for a stream of batches, and after pickling.
        """
        return None if self._rows is None else self._rows()

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values.

        Returns:
            A dictionary of the schema in :doc:`/reference/audit-json`.
        """
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
        """Return the result as JSON text, and write it to a file if a path is given.

        Args:
            path: the file to write, or None.

        Returns:
            The text, of the schema in :doc:`/reference/audit-json`.

        Raises:
            OSError: the file cannot be written.
            BadInput: the path is a folder.
        """
        text = json_text(self.to_dict(), indent=1, default=str) + "\n"
        if path is not None:
            check_file(Path(path))
            with atomic_write(Path(path)) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write the result as one self-contained HTML page.

        Args:
            path: the file to write.

        Raises:
            MissingExtra: Jinja or Matplotlib is not installed.
            OSError: the file cannot be written.
        """
        from xent.auditing.page import write_page

        write_page(self, Path(path))

    def __str__(self) -> str:
        from xent.auditing.sentences import sentences

        return "\n".join(sentences(self))

    def _repr_html_(self) -> str:
        from xent.auditing.page import summary_html

        return summary_html(self)
