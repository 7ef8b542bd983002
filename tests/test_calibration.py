"""The best temperature: the derivative is 0 there and no other is better, for logits of any scale."""

from __future__ import annotations

import contextlib
import math
import warnings
from itertools import pairwise

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import xent
from xent import _calibration
from xent._core import reference
from xent.errors import NoBestTemperature


def drawn(rows=300, classes=10, true=1.7, dtype=torch.float64):
    """Return logits that are `true` times too large, and classes drawn from the right ones."""
    z = 3 * torch.randn(rows, classes, dtype=torch.float64)
    return z.to(dtype), torch.distributions.Categorical(logits=z / true).sample()


def loss(z, target, at, **options) -> torch.Tensor:
    return reference.cross_entropy(z.double(), target, temperature=at, **options)


def check_best(z, target, **options) -> float:
    """The derivative in log T is 0 there, the second positive, and no other T on a fine grid is better."""
    found = xent.fit_temperature(z, target, **options)
    assert isinstance(found, float)
    assert 0 < found < math.inf
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    shifted = z.double() - z.double().amax(1, keepdim=True)  # (the divisor of the mean differs by options)
    (first,) = torch.autograd.grad(
        reference.cross_entropy(shifted / (found * x.exp()), target, **options), x, create_graph=True
    )
    (second,) = torch.autograd.grad(first, x)
    assert second > 0
    assert abs(first) <= 1e-12 * max(1.0, float(second))
    best = loss(shifted, target, found, **options)
    for ratio in (*torch.linspace(-7, 7, 401).exp().tolist(), 1 - 1e-3, 1 + 1e-3):
        assert loss(shifted, target, found * ratio, **options) >= best * (1 - 1e-13)
    return found


def exact(z, target) -> float:
    """Newton in 50 digits on Σ ⟨p, z⟩ − z_y = 0."""
    rows = [[mpmath.mpf(v) for v in row] for row in z.double().tolist()]
    with mpmath.workdps(50):

        def slope(beta):
            total = mpmath.mpf(0)
            for row, y in zip(rows, target.tolist(), strict=True):
                e = [mpmath.exp(beta * (v - max(row))) for v in row]
                total += mpmath.fsum(a * v for a, v in zip(e, row, strict=True)) / mpmath.fsum(e) - row[y]
            return total

        low, high = mpmath.mpf("1e-40"), mpmath.mpf("1e40")
        for _ in range(300):
            middle = mpmath.sqrt(low * high)
            low, high = (low, middle) if slope(middle) > 0 else (middle, high)
        return float(1 / low)


# What it finds


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_best_of_drawn_classes(dtype):
    z, y = drawn(dtype=dtype)
    assert check_best(z, y) == pytest.approx(1.7, abs=0.3)


def test_the_simulated_temperature_is_recovered():
    z, y = drawn(rows=100_000, classes=5)
    assert xent.fit_temperature(z, y) == pytest.approx(1.7, rel=0.02)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e4, 1e30])
def test_logits_of_any_scale(scale):
    z, y = drawn(rows=60)
    assert xent.fit_temperature(z * scale, y) == pytest.approx(scale * check_best(z, y), rel=1e-13)
    check_best(z * scale, y)


def test_against_exact_arithmetic():
    z, y = drawn(rows=12, classes=4)
    cases = [
        (z, y),
        (z.float() * 1e4, y),
        # one row wrong by a hair, one right by far: β is 70 times what either says of itself
        (torch.tensor([[0.0, 1e-30], [0.0, 1.0]], dtype=torch.float64), torch.tensor([0, 1])),
        # right by a hair four times: T is 1e-30
        (torch.tensor([[0.0, 1e-30]] * 4 + [[0.0, 1.0]], dtype=torch.float64), torch.tensor([0, 1, 1, 1, 1])),
        # nearly no information: T is large
        (torch.tensor([[0.0, 1.0]] * 9, dtype=torch.float64), torch.tensor([0] * 4 + [1] * 5)),
    ]
    for z, y in cases:
        assert xent.fit_temperature(z, y) == pytest.approx(exact(z, y), rel=2e-14)


def test_two_classes_have_a_closed_form():
    """k of n right at a margin d: d/T = log(k/(n − k))."""
    for margin in (1e-6, 1.0, 40.0, 1e4, 3e38):
        z = torch.tensor([margin, 0.0]).expand(7, 2)
        found = xent.fit_temperature(z, torch.tensor([0] * 5 + [1] * 2))
        assert float(z[0, 0]) / found == pytest.approx(math.log(5 / 2), rel=1e-14)


def test_one_row():
    found = xent.fit_temperature(torch.tensor([3.0, 1.0, -1.0]), torch.tensor([0.7, 0.2, 0.1]))
    assert found == check_best(torch.tensor([[3.0, 1.0, -1.0]]), torch.tensor([[0.7, 0.2, 0.1]]))
    with pytest.raises(NoBestTemperature):  # of one row with a class, there is never a best
        xent.fit_temperature(torch.tensor([3.0, 1.0]), torch.tensor(0))


def test_where_a_fixed_number_of_lbfgs_steps_stops_short():
    """LBFGS on T, learning rate 0.01, 50 iterations, from 1.5."""

    def by_lbfgs(z, y):
        t = torch.full((), 1.5, requires_grad=True)
        optimiser = torch.optim.LBFGS([t], lr=0.01, max_iter=50)

        def closure():
            optimiser.zero_grad()
            value = torch.nn.functional.cross_entropy(z / t, y)
            value.backward()
            return value

        optimiser.step(closure)
        return t.item()

    z, y = drawn(dtype=torch.float32)
    for scale in (1e-6, 1e4):
        ours, theirs = check_best(z * scale, y), by_lbfgs(z * scale, y)
        assert theirs != pytest.approx(ours, rel=0.1)
        assert loss(z * scale, y, ours) < 0.9 * loss(z * scale, y, theirs)


def test_few_passes_over_the_logits(monkeypatch):
    """About six for a network's logits, twenty where rows differ by a factor of 1e60."""
    passes = 0

    def counted(*arguments):
        nonlocal passes
        passes += 1
        return derivatives(*arguments)

    derivatives = _calibration._derivatives
    monkeypatch.setattr("xent._calibration._derivatives", counted)
    xent.fit_temperature(*drawn())
    assert passes <= 7
    for _ in range(200):
        z = torch.randn(5, 4, dtype=torch.float64) * 10 ** (30 * torch.randn(5, 4, dtype=torch.float64))
        t = torch.rand(5, 4, dtype=torch.float64) + torch.nn.functional.one_hot(torch.arange(5) % 4, 4)
        passes = 0
        with contextlib.suppress(NoBestTemperature):
            xent.fit_temperature(z, t)
        assert passes <= 25


def test_a_common_offset_changes_nothing():
    z, y = drawn(rows=50, dtype=torch.float32)
    moved = (z * 64).round() / 64  # so that the sums below are exact
    offset = 1024.0 * torch.arange(50)[:, None]
    assert xent.fit_temperature(moved + offset, y) == xent.fit_temperature(moved, y)
    assert xent.fit_temperature(moved.double() + 2.0**40, y) == xent.fit_temperature(moved, y)


def test_chunks_of_rows_change_nothing(monkeypatch):
    z, y = drawn()
    whole = xent.fit_temperature(z, y)
    for size in (1, 70, 999):
        monkeypatch.setattr("xent._calibration.CHUNK", size)
        assert xent.fit_temperature(z, y) == pytest.approx(whole, rel=1e-14)


def test_float32_extremes():
    z = torch.tensor([[3e38, -3e38, 0.0], [3e38, -3e38, 0.0], [-3e38, 3e38, 1e38]])
    y = torch.tensor([0, 2, 1])
    assert xent.fit_temperature(z, y) / 1e38 == pytest.approx(exact(z.double() / 1e38, y), rel=1e-14)
    tiny = torch.tensor([[1e-45, 0.0]] * 3)  # subnormal
    one = float(tiny[0, 0])
    assert xent.fit_temperature(tiny, torch.tensor([0, 0, 1])) == pytest.approx(one / math.log(2), rel=1e-13)


def test_masked_classes():
    z, y = drawn(rows=80)
    plain = check_best(z, y)
    masked = torch.cat([z, torch.full((80, 2), -math.inf, dtype=z.dtype)], dim=1)
    assert xent.fit_temperature(masked, y) == pytest.approx(plain, rel=1e-14)
    q = torch.nn.functional.one_hot(y, 12).double()
    assert xent.fit_temperature(masked, q) == pytest.approx(plain, rel=1e-14)


# What else a target may be


def test_probabilities_weights_and_ignored_rows():
    z, y = drawn(rows=90)
    q = (2 * torch.randn(90, 10, dtype=torch.float64)).softmax(1) * torch.rand(90, 1, dtype=torch.float64)
    q = 0.3 * q + 0.7 * torch.nn.functional.one_hot(y, 10)
    check_best(z, q)
    s = torch.randint(0, 4, (90,)).double()
    check_best(z, y, sample_weight=s)
    check_best(z, q, sample_weight=s)
    repeated = s.long()
    assert xent.fit_temperature(z, y, sample_weight=s) == pytest.approx(
        xent.fit_temperature(z.repeat_interleave(repeated, 0), y.repeat_interleave(repeated)), rel=1e-14
    )
    ignored = y.clone()
    ignored[::3] = 7
    kept = ignored != 7
    spoiled = z.masked_fill(~kept[:, None], math.nan)  # selected, never multiplied by 0
    assert xent.fit_temperature(spoiled, ignored, ignore_index=7) == check_best(z[kept], ignored[kept])


def test_a_top_k_target_is_the_dense_one():
    z, y = drawn(rows=70)
    p, indices = (torch.nn.functional.one_hot(y, 10) + 0.5 * z.softmax(1)).div(1.5).topk(3)
    for remainder in ("drop", "spread"):
        target = xent.TopKTarget(indices, p, remainder=remainder)
        assert xent.fit_temperature(z, target) == pytest.approx(check_best(z, target.to_dense(10)), rel=1e-14)


def test_targets_of_either_sign():
    z, y = drawn(rows=40)
    t = torch.nn.functional.one_hot(y, 10) + 0.2 * torch.randn(40, 10, dtype=torch.float64).clamp(-1, 1)
    t[0, :4] = torch.tensor([0.3, -0.2, -0.1, 0.0], dtype=torch.float64)
    t[0, 4:] = 0.0
    assert t[0].sum() < 0  # by rounding alone: a mass of nothing, which is allowed
    check_best(z, t)


def test_positions_of_a_map():
    z, y = drawn(rows=24)
    deep = z.reshape(2, 3, 4, 10).movedim(-1, 1)
    assert xent.fit_temperature(deep, y.reshape(2, 3, 4)) == xent.fit_temperature(z, y)


def test_no_graph_is_kept_and_nothing_is_written_to():
    z, y = drawn(rows=30)
    given, before = z.clone().requires_grad_(), z.clone()
    assert xent.fit_temperature(given, y) == xent.fit_temperature(z, y)
    assert torch.equal(z, before)


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(2, 6), st.floats(-12, 12), st.booleans())
def test_any_problem_is_solved_or_named(seed, rows, classes, scale, soft):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, classes, dtype=torch.float64, generator=generator) * 10.0**scale
    target = torch.randint(classes, (rows,), generator=generator)
    if soft:
        target = torch.rand(rows, classes, dtype=torch.float64, generator=generator)
    try:
        found = xent.fit_temperature(z, target)
    except NoBestTemperature as error:
        # the loss only falls: towards the limit each step is no worse than the one before
        steps = torch.linspace(-10, 10, 41) * (1 if error.limit else -1)
        values = [float(loss(z, target, 10.0**scale * math.exp(x))) for x in steps.tolist()]
        assert all(b <= a * (1 + 1e-12) for a, b in pairwise(values))
        return
    best = loss(z, target, found)
    for ratio in (0.1, 0.9, 0.999, 1.001, 1.1, 10.0):
        assert loss(z, target, found * ratio) >= best * (1 - 1e-12)


# No best temperature


def test_separated_logits_have_no_best():
    z = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    with pytest.raises(NoBestTemperature, match="put every target first") as raised:
        xent.fit_temperature(z, torch.tensor([0, 1]))
    assert raised.value.limit == 0.0
    tied = torch.tensor([[1.0, 1.0, 0.0]])  # cannot get below log 2, and does not reach it
    with pytest.raises(NoBestTemperature, match="T goes to 0"):
        xent.fit_temperature(tied, torch.tensor([1]))


def test_anti_informative_logits_have_no_best():
    for y in ([0, 0, 0, 1], [0, 0, 1, 1]):  # worse than nothing; as good as nothing
        with pytest.raises(NoBestTemperature, match="belong together") as raised:
            xent.fit_temperature(torch.tensor([[0.0, 1.0]] * 4), torch.tensor(y))
        assert raised.value.limit == math.inf
    for row in torch.rand(300, 3, dtype=torch.float64):  # every class once: rounding alone is no information
        with pytest.raises(NoBestTemperature) as raised:
            xent.fit_temperature(row.expand(3, 3), torch.tensor([0, 1, 2]))
        assert raised.value.limit == math.inf


@pytest.mark.parametrize(
    ("z", "target", "why"),
    [
        ([[1.0, 1.0], [5.0, 5.0]], [0, 1], "the logits of every row are equal"),
        ([[1.0], [3.0]], [0, 0], "are equal"),
        ([[-math.inf, 2.0]], [1], "are equal"),
        ([[1.0, 2.0]], [-100], "no row counts"),
        ([[1.0, 2.0]], [[0.0, 0.0]], "the same for all of them"),
    ],
)
def test_any_temperature_is_as_good(z, target, why):
    with pytest.warns(UserWarning, match=f"every temperature is as good, .*{why}") as warned:
        assert xent.fit_temperature(torch.tensor(z), torch.tensor(target)) == 1.0
    assert warned[0].filename == __file__


def test_ordinary_fits_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xent.fit_temperature(*drawn())


# Refusals name the row


@pytest.mark.parametrize(
    ("z", "target", "options", "said"),
    [
        ([1.0, math.nan], 0, {}, "row 2 has no softmax"),
        ([1.0, math.inf], 0, {}, "row 2 has no softmax"),
        ([-math.inf, -math.inf], 0, {}, "row 2 has no softmax"),
        ([-math.inf, 1.0], 0, {}, "row 2 has a target on a class that is masked"),
        ([1.7e308, -1.7e308], 0, {}, "row 2 spans more than float64 holds"),
        ([1.0, 2.0], 0, {"sample_weight": [1, 1, -1]}, "row 2 has a sample weight that is negative"),
        (
            [1.0, 2.0],
            0,
            {"sample_weight": [1, 1, math.nan]},
            "row 2 has a sample weight that is negative, infinite or nan",
        ),
        (
            [1.0, 2.0],
            0,
            {"sample_weight": [1, 1, math.inf]},
            "row 2 has a sample weight that is negative, inf",
        ),
        ([1.0, 2.0], [math.nan, 1.0], {}, "row 2 has a target that holds nan or an infinity"),
        ([1.0, 2.0], [math.inf, 1.0], {}, "row 2 has a target that holds nan or an infinity"),
        ([1.0, 2.0], [0.2, -0.3], {}, "row 2 has a target of negative mass"),
    ],
)
@pytest.mark.parametrize("left_out", [False, True])
def test_invalid_rows_are_named(z, target, options, said, left_out):
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], z], dtype=torch.float64)
    soft = isinstance(target, list)
    targets = torch.tensor([[0.5, 0.5], [0.5, 0.5], target] if soft else [0, 1, target], dtype=None)
    options = {name: torch.tensor(value, dtype=torch.float64) for name, value in options.items()}
    if left_out:  # a row before it: the name counts the rows of the caller
        weight = options.get("sample_weight", torch.ones(3, dtype=torch.float64)).clone()
        weight[0] = 0
        options["sample_weight"] = weight
    with pytest.raises(ValueError, match=said):
        xent.fit_temperature(rows, targets, **options)


def test_targets_are_checked_as_by_the_losses():
    z = torch.randn(3, 4)
    with pytest.raises(IndexError, match=r"target 4 at row 1 is outside 0\.\.3"):
        xent.fit_temperature(z, torch.tensor([0, 4, 1]))
    with pytest.raises(ValueError, match="target must have shape"):
        xent.fit_temperature(z, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="floating type"):
        xent.fit_temperature(z.long(), torch.tensor([0, 1, 1]))
