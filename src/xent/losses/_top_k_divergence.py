"""The divergence of each row from a teacher of k classes, the others counted as one: of k + 1 classes.

    t = (q_1, ..., q_k, Q̄)        p = (p_1, ..., p_k, P̄)        P̄ = Σ p of the other classes, summed itself

A teacher whose remainder is dropped has Q̄ = 0: classes without target mass add to a divergence what one of
their summed p adds.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from xent._arguments.call import Call
from xent._autograd import one_head
from xent._core.problem import Problem
from xent._core.statistics import RequestedOutputs
from xent._core.target import TopKTarget
from xent.losses._divergence_rows import Settings, check_probabilities, reduced, rows


def as_bucket(target: TopKTarget, beta: float) -> TopKTarget:
    """Return the target as one with a bucket, for the divergence of a β.

    Raises:
        ValueError: a remainder that is spread; one that is dropped, in reverse.
    """
    if target.remainder == "bucket":
        return target
    if target.remainder == "spread":
        raise ValueError(
            "a teacher whose remainder is spread has a mass for every class: pass remainder='bucket' or "
            "'drop', or its dense form to kl_divergence"
        )
    refuse_dropped(target, beta)
    return replace(target, remainder="bucket", rest=torch.zeros_like(target.probabilities[..., 0]))


def refuse_dropped(target: TopKTarget, beta: float) -> None:
    """Raise a ValueError where the divergence from a target without a remainder is infinite."""
    if beta == 1.0 and target.remainder == "drop":
        raise ValueError(
            "the reverse divergence from a TopKTarget whose remainder is dropped is infinite: the other "
            "classes have no mass; pass remainder='bucket'"
        )


def top_k_divergence(call: Call, beta: float, sample_weight: Tensor | None, *, by_t2: bool) -> Tensor:
    """Return the divergence of a call's rows from its target, one with a bucket, as its reduction has it."""
    value = torch.stack([_of_problem(problem, beta, by_t2=by_t2) for problem in call.problems], dim=1)
    return reduced(value.reshape(call.rows_shape), sample_weight, call.reduction.kind).to(call.dtype)


def _of_problem(problem: Problem, beta: float, *, by_t2: bool) -> Tensor:
    """Return the divergence of each of N rows, float64; 0 of one that is left out."""
    assert problem.bucket is not None
    check_probabilities(problem.selection.scatter(problem.bucket.mass))  # whose rows an error counts
    found = one_head.rows(problem.request(RequestedOutputs(log_prob=True, log_rest=True)))
    assert found.log_prob is not None
    assert found.log_rest is not None
    log_p = torch.cat([found.log_prob, found.log_rest[:, None]], dim=1)
    t = problem.selection.masked(torch.cat([problem.bucket.mass, problem.bucket.rest[:, None]], dim=1))
    value = rows(t, log_p, 1.0, Settings(False, log_p.dtype, beta))
    if by_t2:
        each = problem.logits.map.temperature
        value = value * (problem.selection.gather(each) if isinstance(each, Tensor) else each) ** 2
    return problem.selection.scatter(value)
