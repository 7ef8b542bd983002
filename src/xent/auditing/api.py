"""The audit of predictions in memory, at once or as a stream of batches."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xent._util.text import class_text
from xent.auditing.arrays import Given, named_classes, read
from xent.auditing.form import formed
from xent.auditing.result import AuditResult
from xent.auditing.sweeps import WORST, FirstSweep, SecondSweep
from xent.auditing.threads import threads

if TYPE_CHECKING:
    import pyarrow as pa


def audit(
    probabilities: Any = None,
    *,
    target: Any,
    logits: Any = None,
    log_probabilities: Any = None,
    features: Any = None,
    head: Any = None,
    classes: Sequence[Any] | None = None,
    sample_weight: Any = None,
    ids: Sequence[Any] | None = None,
    renormalize: bool = False,
    sweeps: int = 2,
    worst: int = WORST,
) -> AuditResult:
    r"""Return an audit of a classifier, its mean loss over a data set taken apart.

    The result holds the mean cross-entropy with its interval and its parts: by class, by pair of a class and
    a rival, by calibration and discrimination, by temperature. It also lists the rows of the largest losses
    and the rows whose label looks wrong. Arrays may be NumPy's, torch's (computed on the CPU), data frames or
    lists. The formulas are in :doc:`/explanation/audit`.

    Args:
        probabilities: (N, C), or (N,) of the second of two classes. Rows sum to 1, as for
            :func:`xent.metrics.log_loss`.
        target: (N,) labels, or (N, C) the mass of each class.
        logits, log_probabilities: the predictions in another form, in place of ``probabilities``, of the same
            shapes.
        features: (N, D), in place of ``probabilities``; ``head`` makes logits of them, for some rows at a
            time.
        head: the classifier of ``features``: a weight (C, D), a pair of weight and bias (C,), a module that
            :func:`xent.integrations.head_of` knows, or what that function returns.
        classes: (C,) the labels of the columns. None: the positions 0 to C − 1, or for other labels those
            that occur, sorted.
        sample_weight: s, (N,), not negative.
        ids: (N,) names of the rows, shown in lists of rows.
        renormalize: whether each row of probabilities, whose sum may be off 1 by up to 1e-3, is divided by
            its sum.
        sweeps: the number of passes over the rows, 1 or 2. 1 leaves out what needs a second pass: the best
            temperature and the suspects.
        worst: the number of rows of the largest losses that are kept.

    Returns:
        An :class:`xent.AuditResult`.

    Raises:
        ValueError, TypeError: shapes that do not fit; nan; numbers that are not probabilities; a label that
            is not a class. The message names row, column and value.

    Example:
        >>> import xent
        >>> found = xent.audit([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], target=["no", "yes", "yes"])
        >>> round(found.log_loss, 6), round(found.accuracy, 3), found.per_class[1].name
        (0.414932, 0.667, 'yes')
    """
    if sweeps not in (1, 2):
        raise ValueError(f"sweeps must be 1 or 2, got {sweeps!r}")
    worst = _whole("worst", worst)
    given = read(
        probabilities,
        log_probabilities,
        logits,
        features,
        head,
        target,
        classes,
        sample_weight,
        ids,
        renormalize,
    )
    first, second = FirstSweep(len(given.names), worst), None
    with threads(given.numbers) as each:
        for batch in given.batches(threads=each):
            first.update(batch, each)
        if sweeps == 2:
            second = SecondSweep(first)
            for batch in given.batches(threads=each):
                second.update(batch, each)
    return formed(first, second, given.names, rows=lambda: _row_table(given))


def _row_table(given: Given) -> pa.Table:
    """Return the measures of every row."""
    import pyarrow as pa

    from xent.auditing.row_table import row_table

    tables = [row_table(batch.measured(), given.names, batch.ids, batch.length) for batch in given.batches()]
    return pa.concat_tables(tables)


def _whole(name: str, value: Any) -> int:
    """Return a number of rows; raise a ValueError or TypeError for another value."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number of rows, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, got {value}")
    return int(value)


class Audit:
    """An audit of a stream of batches, or of parts that are merged.

    :meth:`update` adds a batch. :meth:`merge` adds an audit of other rows of the same classes. The best
    temperature and the suspects need a second pass: :meth:`second_sweep` returns an audit that takes the same
    rows once more. :meth:`result` returns the result of the rows so far.

    Args:
        classes: the labels of the classes, or their number C for the labels 0 to C − 1.
        worst: the number of rows of the largest losses that are kept.

    Raises:
        ValueError: fewer than two classes, or a negative ``worst``.
        TypeError: a ``worst`` that is not a whole number.

    Example:
        >>> import numpy as np, xent
        >>> p, y = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), np.array([0, 1, 1])
        >>> audit = xent.Audit(2)
        >>> for rows in (slice(0, 2), slice(2, 3)):
        ...     audit.update(p[rows], target=y[rows])
        >>> round(audit.result().log_loss, 6)
        0.414932
    """

    def __init__(self, classes: Sequence[Any] | int, *, worst: int = WORST) -> None:
        self.classes = named_classes(classes)
        if len(self.classes) < 2:
            raise ValueError(f"an audit needs two classes, got {len(self.classes)}")
        self._first = FirstSweep(len(self.classes), _whole("worst", worst))
        self._second: SecondSweep | None = None
        self._next = 0

    def update(
        self,
        probabilities: Any = None,
        *,
        target: Any,
        logits: Any = None,
        log_probabilities: Any = None,
        features: Any = None,
        head: Any = None,
        sample_weight: Any = None,
        ids: Sequence[Any] | None = None,
        renormalize: bool = False,
        start: int | None = None,
    ) -> None:
        """Add a batch of rows. An error leaves the audit as it was.

        Args:
            probabilities, target, logits, log_probabilities, features, head: as in :func:`audit`.
            sample_weight, ids, renormalize: as in :func:`audit`.
            start: the position of the first row among all rows, from 0. None means that the rows follow those
                before. The bootstrap's blocks and the sample of rows depend on positions.

        Raises:
            ValueError, TypeError: as :func:`audit`.
        """
        given = read(
            probabilities,
            log_probabilities,
            logits,
            features,
            head,
            target,
            self.classes,
            sample_weight,
            ids,
            renormalize,
        )
        at = self._next if start is None else _whole("start", start)
        measures = self._first if self._second is None else self._second
        with threads(given.numbers) as each:
            for _ in given.batches(at, each):  # a fault is found before any row is counted
                pass
            for batch in given.batches(at, each):
                measures.update(batch, each)
        self._next = at + given.predictions.count

    def merge(self, other: Audit) -> None:
        """Add the rows of another audit.

        Args:
            other: an audit of other rows, of the same classes and in the same sweep.

        Raises:
            ValueError: an audit of other classes, of another sweep, or this audit itself.
            TypeError: an object that is not an audit.
        """
        if not isinstance(other, Audit):
            raise TypeError(f"merge takes another Audit, got {type(other).__name__}")
        if other is self:
            raise ValueError("an audit cannot be merged with itself: its rows would count twice")
        if self.classes != other.classes or (self._second is None) != (other._second is None):
            raise ValueError("audits are merged that have the same classes and are in the same sweep")
        if self._second is None or other._second is None:
            self._first.merge(other._first)
        else:
            self._second.merge(other._second)

    def second_sweep(self) -> Audit:
        """Return an audit that takes the same rows once more, for the best temperature and the suspects.

        Returns:
            A new audit. Its :meth:`update` must get all rows of the first sweep before :meth:`result`.

        Raises:
            ValueError: no rows were added yet.
        """
        if not self._first.mean_loss.rows:
            raise ValueError("no rows were given yet; a second sweep follows a first one")
        again = Audit(self.classes, worst=self._first.worst.most)
        again._first, again._second = self._first, SecondSweep(self._first)
        return again

    def result(self) -> AuditResult:
        """Return the result of the rows so far.

        Returns:
            An :class:`xent.AuditResult`, without ``rows``.

        Raises:
            ValueError: no rows were added yet, or the second sweep lacks rows of the first.
        """
        if not self._first.mean_loss.rows:
            raise ValueError("no rows were given yet")
        if self._second is not None and self._second.rows != self._first.mean_loss.rows:
            raise ValueError(
                f"the second sweep has {self._second.rows:,} of the first one's "
                f"{self._first.mean_loss.rows:,} rows; give it all of them, or take the first audit's result"
            )
        return formed(self._first, self._second, [class_text(value) for value in self.classes])
