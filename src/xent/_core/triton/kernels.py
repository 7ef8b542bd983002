"""Two kernels over the rows of a tile of inner logits u (R, T): its statistics, and G = ∂L/∂u.

    z = k·tanh(κu/k) / T − log Q            the map of `logit_map`, in registers
    statistics   m, r, d, a, e, k           of `statistics`, over the classes that are not a row's own
    gradient     G = g·s∘(share·E − η·E∘log E − γ·t),  E = exp(z − base);  at an own class, what is given

A program has a row. It reads the row once, each lane with statistics of its own, which are merged at the end
by the formula of `Statistics.merge`: nothing is subtracted from a sum, so that sure rows keep their digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE, NUMBER, ROWS, DENSE = 0, 1, 2, 3
"""The dense part of a target: none, a number, a number for each row, or one for each row and class."""


@triton.jit
def _tanh(x):
    """Return tanh x to a unit in the last place (Cephes' polynomial below 0.625)."""
    s = x * x
    p = -5.70498872745e-3 * s + 2.06390887954e-2
    p = (p * s - 5.37397155531e-2) * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * s * p, tl.where(x < 0, -far, far))


@triton.jit
def _logits(
    u_ptr,
    log_q_ptr,
    divisor_ptr,
    row,
    c,
    inside,
    inner,
    softcap,
    number,
    CAPPED: tl.constexpr,
    DIVIDES: tl.constexpr,
    LOG_Q: tl.constexpr,
):
    """Return z of some classes of a row, −inf where there is none, and tanh(κu/k)."""
    z = tl.load(u_ptr + c, mask=inside, other=float("-inf")).to(tl.float32)
    bent = z
    if CAPPED:
        bent = _tanh(z / inner)
        z = bent * softcap
    if DIVIDES == 1:
        z = z / number
    if DIVIDES == 2:
        z = z / tl.load(divisor_ptr + row)
    if LOG_Q:
        z -= tl.load(log_q_ptr + c, mask=inside, other=0.0)
    return z, bent


@triton.jit
def _target(
    q_ptr,
    weight_ptr,
    of_row,
    c,
    inside,
    kept,
    uniform,
    TARGET: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Return the dense part of t of some classes of a row."""
    t = tl.where(inside, 0.0, 0.0) + of_row
    if TARGET == 3:
        t = tl.load(q_ptr + c, mask=inside, other=0.0).to(tl.float32) * kept + uniform
    if WEIGHTED:
        t *= tl.load(weight_ptr + c, mask=inside, other=0.0)
    return tl.where(inside, t, 0.0)


@triton.jit
def _of_row(remainder_ptr, row, uniform, TARGET: tl.constexpr):
    t = 0.0 + uniform
    if TARGET == 2:
        t = tl.load(remainder_ptr + row)
    return t


@triton.jit
def _merge(m1, r1, e1, d1, a1, k1, m2, r2, e2, d2, a2, k2):
    """Return the statistics of the union of two disjoint sets of classes (`Statistics.merge`)."""
    m = tl.maximum(m1, m2)
    s1 = tl.where(m1 == m, 0.0, m1 - m)
    s2 = tl.where(m2 == m, 0.0, m2 - m)
    n1, n2 = tl.exp(s1), tl.exp(s2)
    w1, w2 = 1.0 + r1, 1.0 + r2
    both = (m1 == m).to(tl.float32) + (m2 == m).to(tl.float32) - 1.0
    r = tl.where(m1 == m, r1, n1 * w1) + tl.where(m2 == m, r2, n2 * w2) + both
    e = tl.where(s1 == float("-inf"), 0.0, n1 * (e1 + s1 * w1))
    e += tl.where(s2 == float("-inf"), 0.0, n2 * (e2 + s2 * w2))
    d = d1 + tl.where(a1 == 0.0, 0.0, a1 * s1) + d2 + tl.where(a2 == 0.0, 0.0, a2 * s2)
    k = tl.where(m1 > m2, k1, tl.where(m2 > m1, k2, tl.minimum(k1, k2)))
    return m, r, e, d, a1 + a2, k


@triton.jit
def statistics(
    u_ptr,
    u_stride,
    own_ptr,
    q_ptr,
    q_stride,
    weight_ptr,
    remainder_ptr,
    divisor_ptr,
    log_q_ptr,
    m_ptr,
    r_ptr,
    e_ptr,
    d_ptr,
    a_ptr,
    k_ptr,
    start,
    classes,
    first,
    own_classes,
    inner,
    softcap,
    number,
    kept,
    uniform,
    CAPPED: tl.constexpr,
    DIVIDES: tl.constexpr,
    LOG_Q: tl.constexpr,
    TARGET: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the statistics of each row (R,) over the classes of a tile that are not its own.

    Own classes are counted from the ``start`` of the tile, and the largest one from the ``first`` of all.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    r = tl.full((BLOCK,), -1.0, tl.float32)
    e = tl.zeros((BLOCK,), tl.float32)
    d = tl.zeros((BLOCK,), tl.float32)
    a = tl.zeros((BLOCK,), tl.float32)
    k = tl.zeros((BLOCK,), tl.int32) + 2147483647
    of_row = _of_row(remainder_ptr, row, uniform, TARGET)
    for at in range(0, classes, BLOCK):
        c = at + lane
        inside = c < classes
        z, _ = _logits(
            u_ptr + row * u_stride,
            log_q_ptr,
            divisor_ptr,
            row,
            c,
            inside,
            inner,
            softcap,
            number,
            CAPPED,
            DIVIDES,
            LOG_Q,
        )
        counts = inside
        for own in range(own_classes):
            counts = counts & (c + start != tl.load(own_ptr + row * own_classes + own))
        near = counts & (z != float("-inf"))
        up = near & (z > m)
        far = tl.exp(-tl.abs(z - m))
        below = tl.where(m == float("-inf"), 0.0, m - z)
        if ENTROPY:
            shifted = tl.where(up, far * (e + below * (1.0 + r)), e - below * far)
            e = tl.where(near, shifted, e)
        if TARGET != 0:
            t = _target(
                q_ptr + row * q_stride,
                weight_ptr,
                of_row,
                c,
                inside,
                kept,
                uniform,
                TARGET,
                WEIGHTED,
            )
            t = tl.where(counts, t, 0.0)
            distance = tl.where(z == m, 0.0, z - m)
            d += tl.where(up, tl.where(a == 0.0, 0.0, -a * distance), tl.where(t == 0.0, 0.0, t * distance))
            a += t
        r = tl.where(near, tl.where(up, (r + 1.0) * far, r + far), r)
        k = tl.where(counts & ((z > m) | (k == 2147483647)), c, k)
        m = tl.where(up, z, m)
    m, r, e, d, a, k = tl.reduce((m, r, e, d, a, k), 0, _merge)
    tl.store(m_ptr + row, m)
    tl.store(r_ptr + row, r)
    if ENTROPY:
        tl.store(e_ptr + row, e)
    if TARGET != 0:
        tl.store(d_ptr + row, d)
        tl.store(a_ptr + row, a)
    tl.store(k_ptr + row, k.to(tl.int64) + first)


@triton.jit
def gradient(
    u_ptr,
    u_stride,
    own_ptr,
    at_own_ptr,
    q_ptr,
    q_stride,
    weight_ptr,
    remainder_ptr,
    divisor_ptr,
    log_q_ptr,
    base_ptr,
    share_ptr,
    entropy_ptr,
    gamma_ptr,
    loss_ptr,
    log_partition_ptr,
    g_ptr,
    factor_ptr,
    dq_ptr,
    start,
    classes,
    own_classes,
    inner,
    softcap,
    number,
    kept,
    uniform,
    CAPPED: tl.constexpr,
    DIVIDES: tl.constexpr,
    LOG_Q: tl.constexpr,
    TARGET: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ENTROPY: tl.constexpr,
    WRITES: tl.constexpr,
    FACTOR: tl.constexpr,
    OF_Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write G (R, T) in float32 and in the type of products, and ∂L/∂q, which all are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < classes
    z, bent = _logits(
        u_ptr + row * u_stride,
        log_q_ptr,
        divisor_ptr,
        row,
        c,
        inside,
        inner,
        softcap,
        number,
        CAPPED,
        DIVIDES,
        LOG_Q,
    )
    x = z - tl.load(base_ptr + row)
    p = tl.exp(x)
    g = p * tl.load(share_ptr + row)
    if ENTROPY:
        g -= tl.where(p == 0.0, 0.0, p * x) * tl.load(entropy_ptr + row)
    gamma = tl.load(gamma_ptr + row)
    if TARGET != 0:
        of_row = _of_row(remainder_ptr, row, uniform, TARGET)
        g -= gamma * _target(
            q_ptr + row * q_stride,
            weight_ptr,
            of_row,
            c,
            inside,
            kept,
            uniform,
            TARGET,
            WEIGHTED,
        )
    for own in range(own_classes):
        here = c + start == tl.load(own_ptr + row * own_classes + own)
        g = tl.where(here, tl.load(at_own_ptr + row * own_classes + own), g)
    if CAPPED:
        g *= 1.0 - bent * bent
    place = row * classes + c
    if WRITES:
        tl.store(g_ptr + place, g, mask=inside)
    if FACTOR:
        tl.store(factor_ptr + place, g.to(factor_ptr.dtype.element_ty), mask=inside)
    if OF_Q:
        surprise = (tl.load(log_partition_ptr + row) - x) * kept * tl.load(loss_ptr + row)
        if WEIGHTED:
            surprise *= tl.load(weight_ptr + c, mask=inside, other=0.0)
        tl.store(dq_ptr + place, surprise, mask=inside)
