"""The identities of cross-entropy, checked on this machine by ``xent verify``.

`definitions`, `derivatives` and `triplets` hold one small function an identity; a new function is a new
identity. `registry` defines the deviation from an identity, `data` the rows that the identities are checked
on; `report` runs them, `table` prints the result, `figures` and `digits` draw.
"""

from __future__ import annotations

from xent.verify import definitions, derivatives, triplets  # noqa: F401  (they register their identities)
from xent.verify.figures import draw
from xent.verify.registry import IDENTITIES, Deviation, Identity, Setting
from xent.verify.report import DEFAULT_DTYPES, Outcome, Report, verify

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
