"""Fixtures: every sweep in one part and in many, and the imports of scikit-learn's tests."""

from __future__ import annotations

import pytest

from xent.metrics import _arrays


def pytest_configure(config):
    config.addinivalue_line("markers", "thread_unsafe: what scikit-learn's tests, imported here, say of some")


@pytest.fixture(params=["one part", "parts of three rows"])
def parts(request, monkeypatch):
    """Everything in one part, and in many."""
    if request.param != "one part":
        monkeypatch.setattr(_arrays, "ROWS", 3)
        monkeypatch.setattr("xent.metrics._labels.ROWS", 5)
