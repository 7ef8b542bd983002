"""Every law runs at every place: each backend, on each device that there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import xent
from table import PLACES, at
from xent._core.selection import Selection

MARKED = [pytest.param(p, marks=[pytest.mark.cuda] if p.device == "cuda" else []) for p in PLACES]


@pytest.fixture(autouse=True, params=MARKED, ids=str)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    name = request.param.backend
    if name == "triton":
        from xent._core.triton import body

        monkeypatch.setattr(body, "MOST_BLOCK", 4)  # so that a lane of a program has several classes
        # as on a CUDA device, which the interpreter stands for
        monkeypatch.setattr(Selection, "masked_on", {"cpu"})
    with at(request.param):
        yield
        # one that has turned itself off would pass, by the tiles
        assert [backend.missing for backend in xent.backends() if backend.name == name] == [None]
