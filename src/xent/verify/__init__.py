"""Every identity of the mathematics, checked on this machine: what ``xent verify`` runs.

`definitions`, `derivatives` and `triplets` hold one small function an identity; to add one is to write one.
`registry` says what a deviation is, `data` what the identities are checked on; `report` runs them, `figures`
draws.
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
