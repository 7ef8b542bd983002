"""Tiles fill the budget and never exceed it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xent._core.plan import FEWEST_ROWS, MIB, Footprint, Plan

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
)
def test_a_plan_stays_within_its_budget_and_covers_everything(budget, rows, classes, footprint, gradient):
    f = footprint
    try:
        plan = Plan.within(budget, rows, classes, f, resident=gradient)
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
