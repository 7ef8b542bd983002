"""The merge of row statistics is associative and commutative, and has an identity."""

from __future__ import annotations

import math

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from xent._core.ops import InPlaceOps
from xent._core.statistics import Statistics, summarise

logit = st.floats(-1e300, 1e300) | st.floats(-50, 50) | st.just(-math.inf)
mass = st.floats(0, 2) | st.just(0.0)
tile = st.lists(st.tuples(logit, mass), min_size=1, max_size=6)


def of(entries: list[tuple[float, float]]) -> Statistics:
    z, t = (torch.tensor([column], dtype=torch.float64) for column in zip(*entries, strict=True))
    return summarise(InPlaceOps(), z, t, None)[1]


def agree(a: Statistics, b: Statistics, entries: list[tuple[float, float]]) -> None:
    """Equal up to the rounding of a few differences of logits.

    A product below the normal numbers rounds to a multiple of the smallest number: by half of it
    for each entry and each merge.
    """
    assert torch.equal(a.m, b.m)
    least = 2 * len(entries) * math.ulp(0.0)
    torch.testing.assert_close(a.r, b.r, rtol=1e-14, atol=least)
    torch.testing.assert_close(a.a, b.a, rtol=1e-14, atol=least)
    finite = [(z, t) for z, t in entries if z > -math.inf]
    reach = sum(t * (float(a.m) - z) for z, t in finite) if finite else 0.0
    torch.testing.assert_close(a.d, b.d, rtol=0.0, atol=1e-14 * reach + least)


@given(tile, tile)
def test_merge_is_commutative(x, y):
    agree(of(x).merge(of(y)), of(y).merge(of(x)), x + y)


@given(tile, tile, tile)
def test_merge_is_associative(x, y, z):
    a, b, c = of(x), of(y), of(z)
    agree(a.merge(b).merge(c), a.merge(b.merge(c)), x + y + z)


@given(tile)
def test_merge_has_an_identity(x):
    nothing = Statistics.identity(1, torch.get_default_device())
    agree(of(x).merge(nothing), of(x), x)
    agree(nothing.merge(of(x)), of(x), x)


@given(tile, tile)
def test_merge_is_the_statistics_of_the_union(x, y):
    agree(of(x).merge(of(y)), of(x + y), x + y)


@given(st.lists(tile, min_size=2, max_size=5))
@example([[(0.0, 0.0)], [(-2.225073858507e-311, 0.5), (-2.225073858507e-311, 0.25)]])
def test_any_number_of_sets_at_once_is_their_merge(tiles):
    """One maximum and one sum, as processes have them."""
    parts = [of(entries) for entries in tiles]
    m = torch.stack([part.m for part in parts]).amax(0)
    first, *others = (part.shares(m) for part in parts)
    for share in others:
        first = first + share
    entries = [entry for tile in tiles for entry in tile]
    agree(first.at(m, None), of(entries), entries)


def test_the_larger_set_keeps_its_digits():
    """r of a confident row survives a merge in either order: 1 + r would lose it."""
    top = of([(0.0, 1.0)])
    far = of([(-40.0, 0.0), (-41.0, 0.0)])
    exact = math.exp(-40) + math.exp(-41)
    for merged in (top.merge(far), far.merge(top)):
        assert math.isclose(float(merged.r), exact, rel_tol=1e-15)
