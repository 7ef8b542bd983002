"""Every test starts from the same seed and leaves torch's global settings as it found them."""

from __future__ import annotations

import os

import pytest
import threadpoolctl
import torch
from hypothesis import settings

# CI must give one verdict on one tree; at a desk every run looks somewhere new
settings.register_profile(
    "xent", deadline=None, max_examples=60, print_blob=True, derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("xent")


@pytest.fixture(autouse=True)
def seeded_and_restored():
    torch.manual_seed(0)
    before = _settings()
    yield
    assert _settings() == before, "a global torch setting was changed"


ON_ONE_THREAD = ("auditing", "cli", "data", "linear_model", "processes")
"""Their problems are small, and workers whose threads wait for each other are slower."""


@pytest.fixture(autouse=True)
def one_thread(request):
    if request.path.parent.name not in ON_ONE_THREAD:
        yield
        return
    with threadpoolctl.threadpool_limits(1):
        yield


def _settings() -> tuple:
    return (
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_num_threads(),
    )
