"""Rows left out, rows repeated, rows weighted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from table import Problem, close, dtypes, mapped, problem, rows

REDUCED = pytest.mark.parametrize("reduction", ["sum", "mean"])


def select(p: Problem, index: torch.Tensor) -> Problem:
    options = dict(p.options)
    if "sample_weight" in options:
        options["sample_weight"] = options["sample_weight"][index]
    return replace(p, x=p.x[index], target=mapped(p.target, lambda t: t[index]), options=options)


def gradients(p: Problem, **options) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = p.linear(**options)
    return loss.detach(), list(torch.autograd.grad(loss, [p.x, p.w, p.b]))


@rows("leaving_out")
@dtypes()
@REDUCED
def test_ignoring_a_row_equals_leaving_it_out(row, dtype, reduction):
    """By ignore_index, or by a sample weight of 0; nan features of such a row reach nothing."""
    p = problem(row, dtype)
    gone = torch.tensor([1, 4])
    kept = torch.tensor([i for i in range(len(p.x)) if i not in gone])
    shorter = select(p, kept).differentiable()
    if row.target in ("index", "classes"):
        target = p.target.clone()
        target[gone] = -100
        p = replace(p, target=target)
    else:
        weight = p.options.get("sample_weight", torch.ones(len(p.x), dtype=dtype)).clone()
        weight[gone] = 0.0
        p = replace(p, options={**p.options, "sample_weight": weight})
    p.x[gone] = torch.nan
    p = p.differentiable()
    loss, (dx, dw, db) = gradients(p, reduction=reduction)
    short_loss, (short_dx, short_dw, short_db) = gradients(shorter, reduction=reduction)
    close(loss, short_loss)
    close(dw, short_dw)
    close(db, short_db)
    close(dx[kept], short_dx)
    assert not dx[gone].any()
    none = p.linear(reduction="none")
    assert not none[gone].any()


@rows("repetition")
@dtypes()
@REDUCED
def test_weights_equal_repetition(row, dtype, reduction):
    """A row of weight k is k rows."""
    p = problem(replace(row, sample_weight=False), dtype)
    times = torch.tensor([1, 3, 0, 2, 1, 1, 2])
    repeated = select(p, torch.repeat_interleave(torch.arange(len(p.x)), times)).differentiable()
    weighted = replace(p, options={**p.options, "sample_weight": times.to(dtype)}).differentiable()
    loss, (_, dw, db) = gradients(weighted, reduction=reduction)
    expected, (_, expected_dw, expected_db) = gradients(repeated, reduction=reduction)
    close(loss, expected)
    close(dw, expected_dw)
    close(db, expected_db)


@rows("row_order")
@dtypes()
def test_row_order_changes_nothing(row, dtype):
    p = problem(row, dtype)
    order = torch.randperm(len(p.x))
    a, b = p.differentiable(), select(p, order).differentiable()
    close(b.linear(reduction="none"), a.linear(reduction="none")[order])
    _, (dx, dw, _) = gradients(a)
    _, (moved_dx, moved_dw, _) = gradients(b)
    close(moved_dx, dx[order])
    close(moved_dw, dw)


@rows("additive")
@dtypes()
def test_denominator_accumulates(row, dtype):
    """Micro-batches that share one denominator add up to the whole batch."""
    p = problem(row, dtype).differentiable()
    total, (_, dw, _) = gradients(p, reduction="sum")
    parts = [
        gradients(select(p, i).differentiable(), denominator=4.0)
        for i in (torch.arange(0, 3), torch.arange(3, 7))
    ]
    close(sum(loss for loss, _ in parts), total / 4)
    close(sum(g[1] for _, g in parts), dw / 4)
