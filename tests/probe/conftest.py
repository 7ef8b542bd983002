"""One thread a test: the problems are small, and workers whose threads wait for each other are slower."""

from __future__ import annotations

import pytest
import threadpoolctl


@pytest.fixture(autouse=True)
def one_thread():
    with threadpoolctl.threadpool_limits(1):
        yield
