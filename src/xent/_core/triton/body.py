"""A tile computed by the two kernels; what is kept of it are the inner logits, which the gradient overwrites.

Numbers of a row are torch's in float64, as in the other bodies; the kernels take them in float32. Own classes
are found in the kernels by comparison; their logits and their part of G are few numbers, and torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from xent._core.coefficients import Coefficients
from xent._core.logit_map import TileBuffers
from xent._core.logits import LinearHead, Loaded
from xent._core.ops import cut
from xent._core.problem import Problem
from xent._core.statistics import Statistics, TargetColumns, finite_base, statistics_dtype
from xent._core.tiles.body import Slopes, own_base
from xent._core.tiles.formulas import Tile, at_own_classes, row_factors, target_columns
from xent._core.triton import kernels

MOST_BLOCK = 2048
"""Classes that a program reads at a time."""

WARPS = 8
"""Warps of 32 threads that share a program."""

FACTORS = (torch.float16, torch.bfloat16)


class Dense(NamedTuple):
    """The dense part of a target over a tile, as the kernels take it."""

    kind: int
    probabilities: Tensor | None = None  # (R, T)
    weight: Tensor | None = None  # (T,) float32
    of_row: Tensor | None = None  # (R,) float32
    kept: float = 1.0  # of the probabilities, beside what is uniform
    uniform: float = 0.0


class TritonBody:
    """The computation by two kernels."""

    def whole_rows(
        self, problem: Problem, chunk: slice, loaded: Loaded, buffers: TileBuffers
    ) -> tuple[Statistics, Tile] | None:
        return None

    def summarise(
        self,
        problem: Problem,
        chunk: slice,
        loaded: Loaded,
        classes: slice,
        buffers: TileBuffers,
        absent: float | Tensor,
    ) -> tuple[Statistics, Tile]:
        requested = problem.requested
        u = _inner(problem, loaded, classes, buffers)
        rows, wide = u.shape[0], statistics_dtype(u.device)
        dense = _dense(problem, chunk, classes)
        m, r, e, d, a = (torch.empty(rows, dtype=torch.float32, device=u.device) for _ in range(5))
        k = torch.empty(rows, dtype=torch.int64, device=u.device)
        if rows and u.shape[1]:
            kernels.statistics[(rows,)](
                **_arguments(problem, chunk, loaded, classes, u, dense),
                m_ptr=m,
                r_ptr=r,
                e_ptr=e,
                d_ptr=d,
                a_ptr=a,
                k_ptr=k,
                first=problem.first + classes.start,
                ENTROPY=requested.entropy,
                BLOCK=_block(u.shape[1]),
                num_warps=WARPS,
            )
        if dense.kind == kernels.NONE:
            a = d = torch.zeros((), dtype=wide, device=u.device).expand(rows)
        own, own_z = target_columns(problem.targets, chunk, classes), None
        if own is not None:
            own_z = own.take_from(_own_logits(loaded, u, own, classes), absent).to(wide)
        part = Statistics(
            m.to(wide),
            r.to(wide),
            d.to(wide),
            a.to(wide),
            e.to(wide) if requested.entropy else None,
            k if requested.argmax else None,
        )
        return part, Tile(classes, u, None, loaded.map.gain, part.m, own, own_z, buffers.z)

    def differentiate(
        self,
        problem: Problem,
        chunk: slice,
        loaded: Loaded,
        tile: Tile,
        found: Statistics,
        asked: Coefficients,
    ) -> Slopes:
        return _slopes(problem, chunk, loaded, tile, found, asked, None)

    def revisit(
        self,
        problem: Problem,
        buffers: TileBuffers,
        chunk: slice,
        loaded: Loaded,
        classes: slice,
        found: Statistics,
        asked: Coefficients,
        of_probabilities: Callable[[Tensor], None] | None,
    ) -> Slopes:
        u = _inner(problem, loaded, classes, buffers)
        own, own_z = target_columns(problem.targets, chunk, classes), None
        if own is not None:
            own_z = own.take_from(_own_logits(loaded, u, own, classes), 0.0).to(found.m.dtype)
        tile = Tile(classes, u, None, loaded.map.gain, None, own, own_z, buffers.z)
        return _slopes(problem, chunk, loaded, tile, found, asked, of_probabilities)


TRITON = TritonBody()


def _slopes(
    problem: Problem,
    chunk: slice,
    loaded: Loaded,
    tile: Tile,  # which holds u
    found: Statistics,
    asked: Coefficients,
    of_probabilities: Callable[[Tensor], None] | None,
) -> Slopes:
    """Return G of a tile, over its inner logits where these are not a caller's."""
    u, targets, logits = tile.z, problem.targets, problem.logits
    (rows, width), loss = u.shape, asked.loss
    asked = asked.scaled(tile.gain)
    base = finite_base(own_base(found, torch.float32).float())
    share, entropy = row_factors(
        found, asked, base.to(found.m.dtype) if found.lse_others is not None else found.m
    )
    at_own = None
    if tile.own_z is not None:
        at_own = at_own_classes(targets, chunk, tile.own_z, found, asked).float().contiguous()
    head = isinstance(logits, LinearHead)
    half = logits.factor_dtype if isinstance(logits, LinearHead) and logits.factor_dtype in FACTORS else None
    writes = half is None or (isinstance(logits, LinearHead) and logits.b is not None)
    g = u if head else tile.memory
    if g is None or g.dtype != torch.float32:
        g = torch.empty(rows, width, dtype=torch.float32, device=u.device)
    factor = None if half is None else torch.empty(rows, width, dtype=half, device=u.device)
    dq = None
    if of_probabilities is not None:
        dq = torch.empty(rows, width, dtype=torch.float32, device=u.device)
    dense, block = _dense(problem, chunk, tile.classes), _block(width)
    if rows and width:
        kernels.gradient[(rows, triton.cdiv(width, block))](
            **_arguments(problem, chunk, loaded, tile.classes, u, dense),
            at_own_ptr=u if at_own is None else at_own,
            base_ptr=base,
            share_ptr=share.float(),
            entropy_ptr=base if entropy is None else entropy.float(),
            gamma_ptr=asked.loss.float(),
            loss_ptr=loss.float(),
            log_partition_ptr=found.log_partition.float(),
            g_ptr=g,
            factor_ptr=g if factor is None else factor,
            dq_ptr=g if dq is None else dq,
            ENTROPY=entropy is not None,
            WRITES=writes,
            FACTOR=factor is not None,
            OF_Q=dq is not None,
            BLOCK=block,
            num_warps=WARPS,
        )
    if of_probabilities is not None and dq is not None:
        of_probabilities(dq)
    return g if writes or factor is None else factor, factor


def _inner(problem: Problem, loaded: Loaded, classes: slice, buffers: TileBuffers) -> Tensor:
    """Return u (R, T), whose classes lie side by side."""
    u = problem.logits.inner(problem.ops, loaded, classes, buffers.z)
    return u if u.stride(1) == 1 or u.shape[1] == 1 else u.contiguous()


def _own_logits(loaded: Loaded, u: Tensor, own: TargetColumns, classes: slice) -> Tensor:
    """Return z (R, K) of own classes, of some class where a tile holds none of them."""
    z = loaded.map.at(u.gather(1, own.local).float())
    return z if loaded.map.log_q is None else z - cut(loaded.map.log_q, classes).float()[own.local]


def _dense(problem: Problem, chunk: slice, classes: slice) -> Dense:
    """Return the dense part of the targets over a tile (`Targets.tile`)."""
    t = problem.targets
    if not t.dense:
        return Dense(kernels.NONE)
    weight = None if t.class_weight is None else cut(t.class_weight, classes).float()
    if t.probabilities is not None:
        q = t.probabilities[t.pick(chunk), classes]
        q = q if q.stride(1) == 1 else q.contiguous()
        kept = 1.0 - t.smoothing
        return Dense(kernels.DENSE, q, weight, None, kept, t.uniform if t.smoothing > 0 else 0.0)
    if t.remainder is not None:
        of_row = (cut(t.remainder, chunk)[:, 0] * (1 - t.smoothing) + t.uniform).float()
        return Dense(kernels.ROWS, None, weight, of_row)
    return Dense(kernels.NUMBER, None, weight, None, uniform=t.uniform)


def _arguments(
    problem: Problem, chunk: slice, loaded: Loaded, classes: slice, u: Tensor, dense: Dense
) -> dict[str, Any]:
    """Return what both kernels take; a tensor that is not there is u, which is not read for it."""
    of_map, index = loaded.map, problem.targets.index
    own = None if index is None else cut(index, chunk).contiguous()
    divisor = of_map.divisor
    rows = divisor[:, 0].contiguous() if isinstance(divisor, Tensor) else None
    q = dense.probabilities
    return {
        "u_ptr": u,
        "u_stride": u.stride(0),
        "own_ptr": u if own is None else own,
        "q_ptr": u if q is None else q,
        "q_stride": 0 if q is None else q.stride(0),
        "weight_ptr": u if dense.weight is None else dense.weight,
        "remainder_ptr": u if dense.of_row is None else dense.of_row,
        "divisor_ptr": u if rows is None else rows,
        "log_q_ptr": u if of_map.log_q is None else cut(of_map.log_q, classes).float(),
        "start": classes.start,
        "classes": u.shape[1],
        "own_classes": 0 if own is None else own.shape[1],
        "inner": 1.0 if of_map.softcap is None else of_map.softcap / of_map.scale,
        "softcap": of_map.softcap or 1.0,
        "number": divisor if isinstance(divisor, float) else 1.0,
        "kept": dense.kept,
        "uniform": dense.uniform,
        "CAPPED": of_map.curved,
        "DIVIDES": 0 if divisor is None else 1 if isinstance(divisor, float) else 2,
        "LOG_Q": of_map.log_q is not None,
        "TARGET": dense.kind,
        "WEIGHTED": dense.weight is not None,
    }


def _block(classes: int) -> int:
    return min(MOST_BLOCK, int(triton.next_power_of_2(max(1, classes))))
