"""Every test of a command works in a folder of its own, on one thread."""

from __future__ import annotations

import pytest
import threadpoolctl


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with threadpoolctl.threadpool_limits(1):
        yield
