"""The identities of cross-entropy, checked on this machine by ``xent verify``.

`definitions`, `derivatives` and `triplets` hold one small function an identity; a new function is a new
identity. `registry` defines the deviation from an identity, `data` the rows that the identities are checked
on; `report` runs them, `table` prints the result, `figures` and `digits` draw.
"""

from __future__ import annotations

from xent.verify import definitions, derivatives, registry, triplets  # noqa: F401  (they register identities)
from xent.verify import report as _report
from xent.verify.figures import draw
from xent.verify.registry import Deviation, Identity, Setting
from xent.verify.report import Outcome, Report, verify

IDENTITIES = registry.IDENTITIES
"""All identities by name, a dictionary of :class:`Identity`, in the order in which they are registered.

:meta hide-value:
"""
DEFAULT_DTYPES = _report.DEFAULT_DTYPES
"""The names of the types that :func:`verify` checks by default."""

__all__ = [
    "DEFAULT_DTYPES",
    "IDENTITIES",
    "Deviation",
    "Identity",
    "Outcome",
    "Report",
    "Setting",
    "draw",
    "verify",
]
