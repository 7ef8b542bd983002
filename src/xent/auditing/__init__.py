"""The audit of a classifier: its loss over a data set, taken apart.

Rows become batches of probabilities with their measures (`rows`), each measure is a class with ``update``,
``merge`` and ``result``, and `sweeps` puts them together.
"""

from __future__ import annotations

from xent.auditing.api import Audit, audit
from xent.auditing.result import AuditResult

__all__ = ["Audit", "AuditResult", "audit"]
