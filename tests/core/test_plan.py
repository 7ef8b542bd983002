"""Tiles fill the budget and never exceed it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xent._core.plan import CPU, DEFAULT_BUDGET, FEWEST_ROWS, GPU, MIB, Footprint, Plan, default_budget

footprints = st.builds(
    Footprint,
    kept=st.integers(4, 16),
    scratch=st.integers(0, 33),
    per_row=st.integers(0, 20_000),
    per_class=st.integers(0, 20_000),
    resident_rows=st.sampled_from([1, 256]),
)


@given(
    budget=st.integers(1, 1 << 28),
    rows=st.integers(0, 100_000),
    classes=st.integers(1, 2_000_000),
    footprint=footprints,
    gradient=st.booleans(),
    grain=st.sampled_from([CPU, GPU]),
)
def test_a_plan_stays_within_its_budget_and_covers_everything(
    budget, rows, classes, footprint, gradient, grain
):
    f = footprint
    try:
        plan = Plan.within(budget, rows, classes, f, resident=gradient, grain=grain)
    except ValueError:
        assert budget < f.kept + f.scratch + f.per_row + f.per_class
        return
    held = classes if plan.resident else plan.class_tile
    used = (
        plan.row_chunk * (held * f.kept + plan.class_tile * f.scratch + f.per_row)
        + plan.class_tile * f.per_class
    )
    assert used <= budget
    if rows < 10_000:
        covered = [i for s in plan.row_chunks(rows) for i in range(s.start, s.stop)]
        assert covered == list(range(rows))
    widths = [s.stop - s.start for s in plan.class_tiles(classes)] if classes < 10_000 else [plan.class_tile]
    assert min(widths) >= 1
    if classes < 10_000:
        assert sum(widths) == classes


def test_the_default_budget_keeps_256_rows_of_65536_classes():
    f = Footprint(kept=4, scratch=0, per_row=0, per_class=0, resident_rows=256)
    plan = Plan.within(64 * MIB, 8192, 65536, f, resident=True)
    assert plan.resident
    assert plan.row_chunk == 256
    assert not Plan.within(64 * MIB, 8192, 65537, f, resident=True).resident


def test_a_narrow_budget_keeps_rows_before_classes():
    f = Footprint(kept=4, scratch=0, per_row=0, per_class=0, resident_rows=256)
    plan = Plan.within(FEWEST_ROWS * 100 * 4, 1000, 10_000, f, resident=False)
    assert plan.row_chunk >= FEWEST_ROWS
    with pytest.raises(ValueError, match="holds not even one row"):
        Plan.within(3, 1000, 10_000, f, resident=False)


@pytest.mark.parametrize(
    ("shape", "budget", "rows"),
    [
        ((8192, 128_256), 2048 * 128_256 * 6, 2048),  # the default
        ((8192, 128_256), 4 << 30, 4096),
        ((5000, 128_256), 2048 * 128_256 * 6, 1792),  # three chunks of 14 × 128 rows, not of 1,667
        ((16384, 248_320), 2048 * 248_320 * 6, 2048),
        ((300, 50_257), 512 * MIB, 300),
    ],
)
def test_chunks_of_a_gpu_fill_its_products(shape, budget, rows):
    """One product of all classes, of 1,024 to 4,096 rows that its tiles divide."""
    f = Footprint(kept=4, scratch=2, per_row=0, per_class=0, resident_rows=128)
    plan = Plan.within(budget, *shape, f, resident=True, grain=GPU)
    assert plan.resident
    assert (plan.row_chunk, plan.class_tile) == (rows, shape[1])


def test_the_default_budget_of_a_gpu(monkeypatch):
    cuda, free, capturing = torch.device("cuda"), [80 << 30], [False]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 << 30))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 30)
    assert default_budget(cuda, 1000) == 512 * MIB
    assert default_budget(cuda, 128_256) == 2048 * 128_256 * 6
    free[0] = 4 << 30
    assert default_budget(cuda, 128_256) == 1 << 30
    capturing[0] = True
    assert default_budget(cuda, 128_256) == 2048 * 128_256 * 6
    capturing[0] = False
    free[0] = 0
    assert default_budget(cuda, 128_256) == default_budget(torch.device("cpu"), 128_256) == DEFAULT_BUDGET
