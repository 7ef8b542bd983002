"""Every law can fail: losses that are nonsense fail the laws that they break, on every row."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import table
from laws import test_derivatives, test_invariance, test_rows, test_values
from table import LOSSES, OTHERS, ROWS, Loss, Row


def row_numbers(loss: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)


def of_logits(spoil: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Loss], Loss]:
    """Spoil a loss by its logits, from which features make it too."""

    def changed(loss: Loss) -> Loss:
        def dense(z: Tensor, target: Any, **options: Any) -> Tensor:
            return spoil(loss.dense(z, target, **options), z)

        def linear(x: Tensor, w: Tensor, b: Tensor, target: Any, **options: Any) -> Tensor:
            options.pop("memory_budget", None)
            z = torch.nn.functional.linear(x, w, b) * options.pop("logit_scale", 1.0)
            return dense(z, target, **options)

        return Loss(dense, None if loss.linear is None else linear, loss.plain)

    return changed


def alone(spoil: Callable[[Tensor], Tensor]) -> Callable[[Loss], Loss]:
    """Spoil a loss from features and not the one from logits."""

    def changed(loss: Loss) -> Loss:
        assert loss.linear is not None
        fused = loss.linear
        return Loss(loss.dense, lambda *given, **options: spoil(fused(*given, **options)), loss.plain)

    return changed


def budgeted(loss: Loss) -> Loss:
    """A value that depends on the budget."""
    assert loss.linear is not None
    fused = loss.linear

    def linear(*given: Any, memory_budget: int | None = None, **options: Any) -> Tensor:
        return fused(*given, **options) * (1 if memory_budget is None else 1 + 1 / memory_budget)

    return Loss(loss.dense, linear, loss.plain)


def writing(loss: Loss) -> Loss:
    """A loss that leaves something in its logits."""

    def dense(z: Tensor, target: Any, **options: Any) -> Tensor:
        value = loss.dense(z, target, **options)
        with torch.no_grad():
            z[0, 0] = 0.0
        return value

    return Loss(dense, loss.linear, loss.plain)


def weights_squared(loss: Loss) -> Loss:
    """A loss that takes each weight twice."""

    def twice(options: dict[str, Any]) -> dict[str, Any]:
        s = options.get("sample_weight")
        return options if s is None else options | {"sample_weight": s.detach() * s}

    fused = loss.linear
    assert fused is not None
    return Loss(loss.dense, lambda *given, **options: fused(*given, **twice(options)), loss.plain)


NONSENSE: dict[str, tuple[Callable[[Loss], Loss], tuple[Callable[..., None], ...]]] = {
    "nothing": (
        of_logits(lambda value, z: value * 0),
        (test_values.test_value_and_gradient_are_those_of_the_plain_formula,),
    ),
    "twice": (
        of_logits(lambda value, z: 2 * value),
        (test_values.test_value_and_gradient_are_those_of_the_plain_formula,),
    ),
    "a constant more": (
        of_logits(lambda value, z: value + 1),
        (test_values.test_value_and_gradient_are_those_of_the_plain_formula,),
    ),
    "twice the gradient": (
        of_logits(lambda value, z: 2 * value - value.detach()),
        (
            test_values.test_value_and_gradient_are_those_of_the_plain_formula,
            test_derivatives.test_gradient_equals_finite_differences,
        ),
    ),
    "the logits' sum": (
        of_logits(lambda value, z: value + z.sum()),
        (test_invariance.test_shift_invariance, test_derivatives.test_gradient_rows_sum_to_zero),
    ),
    "numbers of classes": (
        of_logits(lambda value, z: value + (z * torch.arange(z.shape[1])).sum()),
        (test_invariance.test_class_permutation_equivariance,),
    ),
    "numbers of rows": (
        of_logits(lambda value, z: value * row_numbers(value)),
        (test_rows.test_row_order_changes_nothing,),
    ),
    "upside down": (
        of_logits(lambda value, z: -value - z.square().sum()),
        (test_derivatives.test_convexity_along_segments,),
    ),
    "another from features": (
        alone(lambda value: value * 1.001),
        (test_invariance.test_dense_equals_linear_head,),
    ),
    "another gradient from features": (
        alone(lambda value: 1.001 * value - 0.001 * value.detach()),
        (test_invariance.test_dense_equals_linear_head,),
    ),
    "of the budget": (budgeted, (test_invariance.test_tiling_changes_nothing,)),
    "writing": (writing, (test_invariance.test_inputs_left_untouched,)),
    "weights squared": (
        weights_squared,
        (
            test_rows.test_weights_equal_repetition,
            test_derivatives.test_sample_weight_gradient,
        ),
    ),
    "not accumulating": (
        of_logits(lambda value, z: value + 1),
        (test_rows.test_denominator_accumulates, test_rows.test_ignoring_a_row_equals_leaving_it_out),
    ),
}


def law_of(test: Callable[..., None]) -> list[Row]:
    """The rows that a law runs on."""
    (mark,) = (m for m in test.pytestmark if m.args[0] == "row")  # type: ignore[attr-defined]
    return [parameters.values[0] for parameters in mark.args[1]]


CASES = [
    pytest.param(spoil, test, id=f"{name}-{test.__name__}")
    for name, (spoil, tests) in NONSENSE.items()
    for test in tests
]


@pytest.mark.parametrize(("spoil", "test"), CASES)
def test_nonsense_fails(spoil, test):
    """On every row of the law, of which a failure names the first that passes."""
    for row in law_of(test):
        choices = {
            "row": row,
            "dtype": torch.float64,
            "reduction": "mean",
            "scores": "dense",
            "gradient": "early",
        }
        given = {name: choices[name] for name in inspect.signature(test).parameters}
        with mock.patch.dict(LOSSES, {row.loss: spoil(LOSSES[row.loss])}):
            try:
                test(**given)
            except (AssertionError, RuntimeError):
                continue
        pytest.fail(f"the law holds for nonsense, in row {row.name}")


def test_every_law_is_broken_by_something():
    broken = {test for _, tests in NONSENSE.values() for test in tests}
    for module in (test_values, test_invariance, test_derivatives, test_rows):
        for name, test in vars(module).items():
            if name.startswith("test_") and any(m.args[0] == "row" for m in test.pytestmark):
                assert test in broken, name


def test_an_exemption_from_no_law_is_an_error():
    with pytest.raises(ValueError, match=r"exempt from \['shfit'\], which are no laws"):
        Row("index", exempt={"shfit": "a misspelt law"})
    with pytest.raises(ValueError, match="'shfit' is no law"):
        table.rows("shfit")
    assert all(row.exempt.keys() <= table.LAWS.keys() for row in ROWS + OTHERS)
