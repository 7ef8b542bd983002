"""Every law runs at every place: each backend, on each device that there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from table import PLACES, at

MARKED = [pytest.param(p, marks=[pytest.mark.cuda] if p.device == "cuda" else []) for p in PLACES]


@pytest.fixture(autouse=True, params=MARKED, ids=str)
def place(request: pytest.FixtureRequest) -> Iterator[None]:
    with at(request.param):
        yield
