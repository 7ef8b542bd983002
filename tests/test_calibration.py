"""The best temperature: the derivative is 0 there and no other is better, for logits of any scale."""

from __future__ import annotations

import contextlib
import math
import warnings
from itertools import pairwise

import mpmath
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import xent
from xent import _calibration
from xent._calibration_inputs import read_held_out
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


# Arrays, lists and labels of other libraries

KINDS = {
    "array": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "rows of tensors": list,
    "read-only": lambda t: read_only(t.numpy()),
    "backwards": lambda t: t.flip(0).numpy()[::-1],
    "big-endian": lambda t: t.numpy().astype(t.numpy().dtype.newbyteorder(">")),
    "columns": lambda t: np.asfortranarray(t.numpy()),
    "data frame": lambda t: pd.DataFrame(t.numpy()) if t.ndim == 2 else pd.Series(t.numpy()),
}
NAMES = {
    "text": ["zwei", "eins", "", "drei"],
    "objects": np.array(["zwei", "eins", "", "drei"], dtype=object),
    "whole": np.array([7, -3, 2**40, 0]),
    "small": np.array([3, 200, 1, 0], dtype=np.uint8),
    "float": [2.0, 0.0, 1.0, 5.0],
    "positions": [0, 1, 2, 3],
    "tensor": torch.tensor([7, -3, 2, 0]),
}


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def labelled(names, y):
    """Return labels as arrays of the names' type, or as a tensor."""
    return names[y] if isinstance(names, torch.Tensor) else np.asarray(names)[y.numpy()]


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_and_lists_are_as_tensors(kind):
    as_kind = KINDS[kind]
    z, y = drawn(rows=50, classes=4)
    q = 0.7 * torch.nn.functional.one_hot(y, 4) + 0.3 * torch.rand(50, 4, dtype=torch.float64)
    s = torch.randint(0, 3, (50,)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for target in (y, q):
            for options in ({}, {"sample_weight": s}):
                given = {name: as_kind(value) for name, value in options.items()}
                found = xent.fit_temperature(as_kind(z), as_kind(target), **given)
                assert type(found) is float
                assert found == xent.fit_temperature(z, target, **options)
        ignored = torch.where(torch.arange(50) % 3 == 0, 9, y)
        assert xent.fit_temperature(as_kind(z), as_kind(ignored), ignore_index=9) == xent.fit_temperature(
            z, ignored, ignore_index=9
        )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, np.int16, "bfloat16"])
def test_arrays_of_any_type(dtype):
    z, y = drawn(rows=50, classes=4)
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    rounded = z.numpy().astype(dtype)
    same = torch.from_numpy(rounded.astype(np.float64))
    for integers in (np.uint16, np.int64, object):
        assert xent.fit_temperature(rounded, y.numpy().astype(integers)) == xent.fit_temperature(same, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_computed_in_float64(dtype):
    z, y = drawn(rows=50, classes=2, dtype=dtype)
    assert xent.fit_temperature(z, y) == xent.fit_temperature(z.double(), y)
    s = z[:, 1] - z[:, 0]
    assert xent.fit_temperature(s, y) == xent.fit_temperature(s.double(), y)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("as_list", [False, True])
def test_labels_are_the_positions_of_their_classes(kind, as_list):
    names = NAMES[kind]
    z, y = drawn(rows=60, classes=4)
    expected = xent.fit_temperature(z, y)
    labels = labelled(names, y)
    given = labels.tolist() if as_list else labels
    assert xent.fit_temperature(z, given, classes=names) == expected
    assert xent.fit_temperature(z.numpy(), given, classes=list(names)) == expected
    order = torch.tensor([2, 0, 3, 1])
    moved = np.asarray(names)[order.numpy()]
    assert xent.fit_temperature(z[:, order], given, classes=moved) == pytest.approx(expected, rel=1e-14)
    deep = z.reshape(3, 20, 4).movedim(-1, 1)
    assert xent.fit_temperature(deep, labels.reshape(3, 20), classes=names) == expected
    s = torch.rand(60, dtype=torch.float64)
    assert xent.fit_temperature(z, given, classes=names, sample_weight=s.numpy()) == xent.fit_temperature(
        z, y, sample_weight=s
    )


@pytest.mark.parametrize("container", [torch.as_tensor, np.asarray, list])
@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ([0, 1], None),
        ([False, True], None),
        ([False, True], [False, True]),
        ([-1, 1], [-1, 1]),
        ([1, 0], [1, 0]),
        ([1.0, 0.0], [1, 0]),
        (["yes", "no"], ["yes", "no"]),
    ],
)
def test_one_logit_a_row_is_that_of_two_classes(names, classes, container):
    z, y = drawn(rows=60, classes=2)
    s = z[:, 1] - z[:, 0]
    expected = xent.fit_temperature(torch.stack([torch.zeros_like(s), s], dim=1), y)
    labels = [names[c] for c in y.tolist()]
    labels = labels if isinstance(labels[0], str) else container(labels)
    given = s if container is torch.as_tensor else container(s.numpy())
    assert xent.fit_temperature(given, labels, classes=classes) == expected
    weight = torch.rand(60, dtype=torch.float64)
    assert xent.fit_temperature(s, labels, classes=classes, sample_weight=weight) == check_best(
        torch.stack([torch.zeros_like(s), s], dim=1), y, sample_weight=weight
    )


def test_one_row_is_still_one_row():
    """Logits (C,) with a label or with probabilities, of which there are as many, are no binary logits."""
    z, t = torch.tensor([3.0, 1.0, -1.0]), torch.tensor([0.7, 0.2, 0.1])
    found = check_best(z[None], t[None])
    assert xent.fit_temperature(z.tolist(), t.tolist()) == pytest.approx(found, rel=1e-6)
    with pytest.raises(NoBestTemperature) as raised:
        xent.fit_temperature(z, "a", classes=["a", "b", "c"])
    assert raised.value.limit == 0.0
    with pytest.raises(NoBestTemperature):
        xent.fit_temperature(z.numpy(), np.str_("a"), classes=["a", "b", "c"])


def test_rows_left_out_may_have_no_label():
    z, y = drawn(rows=30, classes=4)
    kept = torch.arange(30) % 4 != 0
    expected = xent.fit_temperature(z[kept], y[kept])
    for names in (np.array([10, 20, 30, 40]), np.array(["a", "b", "c", "d"], dtype=object)):
        for ignored, options in (
            (-100, {}),
            (-100, {"ignore_index": None}),
            (20_000, {"ignore_index": 20_000}),
        ):
            labels = names[y.numpy()]
            labels[~kept.numpy()] = ignored
            before = labels.copy()
            assert xent.fit_temperature(z, labels, classes=names, **options) == expected
            assert (labels == before).all()
    chosen = torch.where(kept, y, 2).numpy()  # a class may be what is left out
    assert xent.fit_temperature(z, chosen, classes=range(4), ignore_index=2) == xent.fit_temperature(
        z, chosen, ignore_index=2
    )


def test_no_rows_are_none_with_labels_too():
    with pytest.warns(UserWarning, match="no row counts"):
        assert xent.fit_temperature(np.empty((0, 2)), np.empty(0, dtype="U1"), classes=["a", "b"]) == 1.0


@pytest.mark.parametrize("shape", [(3, 2), (3,)])
@pytest.mark.parametrize(("target", "classes"), [([0, 1, 0], None), (["a", "b", "a"], ["a", "b"])])
def test_arrays_go_to_the_device_of_the_logits(shape, target, classes):
    given = read_held_out(torch.empty(shape, device="meta"), target, classes, -100, np.ones(3))
    assert {each.device.type for each in (given.logits, given.target, given.sample_weight)} == {"meta"}
    assert given.logits.shape == (3, 2)


def test_the_caller_s_arrays_are_left_alone():
    z, y = (value.numpy() for value in drawn(rows=30, classes=4))
    y[::5] = -100
    before = z.copy(), y.copy()
    for options in ({}, {"classes": [0, 1, 2, 3]}, {"classes": [3, 1, 2, 0]}):
        xent.fit_temperature(z, y, **options)
        assert (z == before[0]).all()
        assert (y == before[1]).all()


Z32 = np.arange(6.0).reshape(3, 2) % 4


@pytest.mark.parametrize(
    ("logits", "target", "options", "kind", "said"),
    [
        (
            Z32,
            ["a", "b", "c"],
            {"classes": ["a", "b"]},
            ValueError,
            "target is 'c' at row 2, .*leave the row out",
        ),
        (Z32, [0, 1, 5], {"classes": [0, 1]}, ValueError, r"target is 5 at row 2, .* classes \[0, 1\]"),
        (Z32, [0, 1, -1], {"classes": [0, 1]}, ValueError, "target is -1 at row 2"),
        (
            Z32,
            ["0", "1", "0"],
            {"classes": [0, 1]},
            ValueError,
            "target is '0' at row 0, .*as the labels are",
        ),
        (Z32, [0, 1, None], {"classes": [0, 1]}, ValueError, "target is None at row 2"),
        (Z32, [0, 1, 0.5], {"classes": [0, 1]}, ValueError, "target is 0.5 at row 2"),
        (
            Z32,
            ["a", "b"],
            {"classes": ["a", "b"]},
            ValueError,
            r"must have shape \(3,\), a label for each row",
        ),
        (Z32, [["a"]] * 3, {"classes": ["a", "b"]}, ValueError, r"must have shape \(3,\)"),
        (
            Z32,
            ["a"] * 3,
            {"classes": ["a", "b", "c"]},
            ValueError,
            "the 2 columns of the logits.*got 3 labels",
        ),
        (Z32[:, 0], ["a"] * 3, {"classes": ["a"]}, ValueError, "the 2 columns of the logits.*got 1 labels"),
        (Z32, ["a"] * 3, {"classes": [["a", "b"]]}, ValueError, r"got shape \(1, 2\)"),
        (Z32, ["a"] * 3, {"classes": "ab"}, TypeError, "classes must be .* a list, got str"),
        (Z32, ["a"] * 3, {"classes": ["a", "a"]}, ValueError, "classes names 'a' twice; give each"),
        (Z32, [0, 1, -100], {"classes": [-100, 1]}, ValueError, "classes names -100, .*another ignore_index"),
        (Z32, Z32, {"classes": ["a", "b"]}, ValueError, "leave classes out"),
        (
            Z32,
            xent.TopKTarget(torch.zeros(3, 1).long(), torch.ones(3, 1)),
            {"classes": [0, 1]},
            ValueError,
            "leave",
        ),
        (Z32, [0, 1, 0], {"classes": [0, 1], "ignore_index": "a"}, TypeError, "ignore_index must be"),
        (Z32, ["a", "b", "a"], {}, TypeError, "target holds text, .*pass classes="),
        (Z32, np.array(["a", 1, None], dtype=object), {}, TypeError, "target holds values of object"),
        (Z32, [[0, 1]] * 3, {}, TypeError, "holds probabilities and must be floating"),
        (Z32, [0, 1], {}, ValueError, r"target must have shape \(3,\)"),
        (Z32, [0, 1, 2], {}, IndexError, r"target 2 at row 2 is outside 0\.\.1"),
        (Z32[:, 0], [0, 1, 2], {}, IndexError, r"target 2 at row 2 is outside 0\.\.1"),
        (
            Z32[:, 0],
            [0, 1],
            {},
            ValueError,
            r"logits of shape \(3,\) are one a row.* target has 2 labels; give",
        ),
        ([[1.0, 2.0], [1.0]], [0, 1], {}, ValueError, "logits is no array"),
        ([["a", "b"]], [0], {}, TypeError, "logits must hold real numbers"),
        (Z32 * 1j, [0, 1, 0], {}, TypeError, "logits must hold real numbers"),
        (None, [0, 1, 0], {}, TypeError, "logits must be a tensor, an array or a list, got NoneType"),
        ({"a": 1}, [0, 1, 0], {}, TypeError, "logits must be .* got dict"),
        (Z32, None, {}, TypeError, "target must be"),
        (np.ma.masked_less(Z32, 1), [0, 1, 0], {}, TypeError, "logits is an array with masked entries"),
        (Z32, [0, 1, 0], {"sample_weight": [1, 1]}, ValueError, "sample_weight"),
        (Z32, [0, 1, 0], {"sample_weight": "abc"}, TypeError, "sample_weight must be"),
        (1.0, [0], {}, ValueError, "logits need a class dimension"),
        ("abc", [0], {}, TypeError, "logits must be .* got str"),
        (Z32, "a", {}, TypeError, "target holds text"),
        (torch.ones(3, 2).long(), [0, 1, 0], {}, TypeError, "logits must be of a floating type"),
    ],
)
def test_bad_arrays_and_labels_are_named(logits, target, options, kind, said):
    with pytest.raises(kind, match=said) as raised:
        xent.fit_temperature(logits, target, **options)
    assert "\n" not in str(raised.value)
