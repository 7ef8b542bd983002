"""The Jacobian of softmax: laws on any row, accuracy against mpmath, derivatives in every mode."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

import xent
from xent.curvature import SoftmaxJacobian

DOUBLE = torch.float64
INF = math.inf
P = torch.tensor([0.7, 0.2, 0.1], dtype=DOUBLE)
TYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

# rows of every kind: plain, uniform, ties at the top and below, sure, nearly tied, masked, alone
ROWS = {
    "plain": [0.3, -1.2, 2.0, 0.7, -0.1],
    "seven tenths": P.log().tolist(),
    "one": [3.0],
    "two": [1.0, -0.5],
    "equal": [2.0, 2.0, 2.0, 2.0],
    "two first": [1.0, 0.2, 1.0, -3.0],
    "tied below": [2.0, 1.0, 1.0, 0.0],
    "nearly two first": [1.0, 0.2, 1.0 - 2**-20, -3.0],
    "nearly three first": [0.0, -3e-20, -1e-20, -2.0],
    "sure": [0.0, -40.0],
    "sure of three": [-41.0, 0.0, -40.0],
    "scales": [0.0, -3.0, -9.0, -27.0],
    "half and many": [math.log(30.0), *[0.0] * 30],
    "offset": [1e6, 1e6 - 1.0, 1e6 - 3.0],
    "masked": [0.5, -INF, -0.5, 1.0, -INF],
    "all but one masked": [-INF, 0.5, -INF],
}
EACH = pytest.mark.parametrize("z", ROWS.values(), ids=ROWS)

logits = st.lists(
    st.one_of(st.floats(-30, 30), st.sampled_from([0.0, 1.0, -INF])), min_size=1, max_size=9
).filter(lambda z: max(z) > -INF)


def row(z, dtype=DOUBLE):
    return torch.tensor(z, dtype=dtype)


def exact(z):
    """p and J of a row of logits in mpmath, to hundreds of digits."""
    e = [mpmath.exp(mpmath.mpf(v)) if v > -INF else mpmath.mpf(0) for v in row(z).tolist()]
    total = mpmath.fsum(e)
    p = [v / total for v in e]
    n = len(p)
    J = mpmath.matrix(n, n)
    for i in range(n):
        others = mpmath.fsum(p[:i] + p[i + 1 :])
        for j in range(n):
            J[i, j] = p[i] * others if i == j else -p[i] * p[j]
    return p, J


@pytest.fixture(autouse=True)
def precise():
    with mpmath.workdps(120):
        yield


def dense(z):
    """diag(p) − p pᵀ by the textbook, (..., C, C)."""
    p = z.softmax(-1)
    return torch.diag_embed(p) - p[..., None] * p[..., None, :]


def ulps(found, right, dtype, size=None):
    """The largest deviation of numbers, in eps of their own size, or of the one that is given."""
    found, limits = [mpmath.mpf(v) for v in found.double().flatten().tolist()], torch.finfo(dtype)
    sizes = right if size is None else size
    return max(
        float((abs(a - b) - limits.tiny) / (limits.eps * abs(s) + limits.tiny))
        for a, b, s in zip(found, right, sizes, strict=True)
    )


# -- laws ---------------------------------------------------------------------------------------------------


@given(logits)
def test_symmetric_rows_sum_to_zero_and_bounded(z):
    J = SoftmaxJacobian(row(z)).to_dense()
    n = len(z)
    assert torch.equal(J, J.T)
    assert J.sum(1).abs().max() <= 1e-15
    eigenvalues = torch.linalg.eigvalsh(J)
    assert eigenvalues.min() >= -1e-15
    bound = (torch.eye(n, dtype=DOUBLE) - 1 / n) / 2
    assert torch.linalg.eigvalsh(bound - J).min() >= -1e-15


@given(st.lists(st.one_of(st.floats(-5, 5), st.just(-INF)), min_size=1, max_size=8))
def test_rank_is_the_support_less_one(z):
    support = sum(v > -INF for v in z)
    if support:
        J = SoftmaxJacobian(row(z)).to_dense()
        assert torch.linalg.matrix_rank(J, atol=1e-9, hermitian=True) == support - 1


@given(logits, st.data())
def test_dense_is_what_the_operator_does(z, data):
    J = SoftmaxJacobian(row(z))
    n = len(z)
    v = row(data.draw(st.lists(st.floats(-1e3, 1e3), min_size=n, max_size=n)))
    near = dict(rtol=1e-13, atol=1e-12)
    assert_close(J @ torch.eye(n, dtype=DOUBLE), J.to_dense(), rtol=1e-14, atol=1e-16)
    assert_close(J @ v, J.to_dense() @ v, **near)
    assert_close(J.to_dense(), dense(row(z)), rtol=1e-14, atol=1e-15)
    assert_close(J.diagonal(), J.to_dense().diagonal(), rtol=0, atol=0)
    assert_close(J.trace(), J.to_dense().trace(), rtol=1e-15, atol=0)
    assert_close(J @ (v + 1e3), J @ v, rtol=1e-12, atol=1e-12)  # J·1 = 0
    S = J.sqrt()
    assert_close(S @ v, S.to_dense() @ v, **near)
    assert_close(S.T @ v, S.to_dense().T @ v, **near)
    assert_close(S.T.to_dense(), S.to_dense().T, rtol=1e-14, atol=1e-16)
    assert_close(S.T.T @ v, S @ v, rtol=0, atol=0)


@given(logits)
def test_square_root(z):
    J = SoftmaxJacobian(row(z))
    p, S = row(z).softmax(-1), J.sqrt()
    assert_close(S.to_dense() @ S.to_dense().T, J.to_dense(), rtol=0, atol=1e-15)
    assert_close(S @ (S.T @ torch.eye(len(z), dtype=DOUBLE)), J.to_dense(), rtol=1e-12, atol=1e-30)
    assert_close(S.to_dense(), torch.diag(p.sqrt()) - torch.outer(p, p.sqrt()), rtol=0, atol=1e-15)
    assert_close(S @ p.sqrt(), torch.zeros_like(p), rtol=0, atol=1e-15)


@given(st.lists(st.one_of(st.floats(-3, 3), st.just(-INF)), min_size=1, max_size=8))
def test_moore_and_penrose(z):
    if max(z) == -INF:
        return
    J, support = SoftmaxJacobian(row(z)), row(z) > -INF
    A, B = J.to_dense(), J.pseudo_inverse().to_dense()
    near = dict(rtol=1e-11, atol=1e-11)
    assert_close(A @ B @ A, A, **near)
    assert_close(B @ A @ B, B, **near)
    assert_close(A @ B, (A @ B).T, **near)
    assert_close(B @ A, (B @ A).T, **near)
    one = support.to(DOUBLE)
    projection = torch.diag(one) - torch.outer(one, one) / one.sum()
    assert_close(J @ B, projection, **near)
    assert_close(B, torch.linalg.pinv(A, rtol=1e-9, hermitian=True), rtol=1e-7, atol=1e-7)
    v = torch.linspace(-1, 1, len(z), dtype=DOUBLE)
    assert_close(J.pseudo_inverse() @ v, B @ v, **near)
    assert J.pseudo_inverse().T.to_dense().equal(B)


@given(logits, st.floats(1e-12, 1e3), st.data())
def test_solve_and_logdet(z, damping, data):
    n = len(z)
    J = SoftmaxJacobian(row(z))
    v = row(data.draw(st.lists(st.floats(-10, 10), min_size=n, max_size=n)))
    x = J.solve(v, damping)
    p = row(z).softmax(-1)
    size = p * (p @ x.abs() + x.abs()) + damping * x.abs() + v.abs()
    assert (((J @ x) + damping * x - v).abs() <= 1e-14 * size + 1e-300).all()
    right = torch.linalg.slogdet(J.to_dense() + damping * torch.eye(n, dtype=DOUBLE)).logabsdet
    if damping > 1e-6:
        assert_close(J.logdet(damping), right, rtol=1e-9, atol=1e-9)


@given(logits)
def test_top_eigenpair(z):
    J = SoftmaxJacobian(row(z))
    value, vector = J.top_eigenpair()
    low, high = J.eigenvalue_bounds()
    eigenvalues = torch.linalg.eigvalsh(J.to_dense())
    assert_close(value, eigenvalues[-1], rtol=1e-13, atol=2e-16)
    assert low * (1 - 1e-15) <= value <= high * (1 + 1e-15)
    assert_close(vector.norm(), torch.ones((), dtype=DOUBLE), rtol=1e-15, atol=0)
    assert_close(J @ vector, value * vector, rtol=0, atol=1e-15 * float(value) + 1e-300)
    assert vector[row(z).argmax()] > 0
    if (row(z).softmax(-1) > 0).sum() > 1:
        assert abs(vector.sum()) <= 1e-15
        assert value > 0


@given(logits)
def test_eigenvalues_lie_between_neighbouring_probabilities(z):
    p = row(z).softmax(-1).sort(descending=True).values
    eigenvalues = torch.linalg.eigvalsh(SoftmaxJacobian(row(z)).to_dense()).flip(0)
    assert (eigenvalues <= p + 1e-15).all()
    assert (eigenvalues[:-1] >= p[1:] - 1e-15).all()


def test_chain_of_log_and_softmax():
    """−t/p is the loss's derivative in p, a·p − t the one in z."""
    z, t = torch.randn(5, 7, dtype=DOUBLE), torch.randn(5, 7, dtype=DOUBLE)
    p = z.softmax(-1)
    assert_close(SoftmaxJacobian(z) @ (-t / p), t.sum(-1, keepdim=True) * p - t)


def test_equals_autograds_jacobian_of_softmax():
    z = torch.randn(3, 6, dtype=DOUBLE)
    assert_close(SoftmaxJacobian(z).to_dense(), vmap(jacrev(lambda z: z.softmax(-1)))(z))
    loss = vmap(hessian(lambda z: xent.cross_entropy(z, torch.tensor(2))))
    assert_close(SoftmaxJacobian(z).to_dense(), loss(z))


# -- values -------------------------------------------------------------------------------------------------


def test_worked_values():
    J = SoftmaxJacobian(P.log())
    assert J.trace().item() == pytest.approx(0.46, abs=1e-15)
    assert J.top_eigenpair().value.item() == pytest.approx(0.334403065, abs=1e-9)
    gradient = J @ -(torch.tensor([1.0, 0.0, 0.0], dtype=DOUBLE) / P)
    assert gradient.norm().item() == pytest.approx(0.37416574, abs=1e-8)


@TYPES
def test_a_sure_row_keeps_its_digits(dtype):
    J = SoftmaxJacobian(row([0.0, -40.0], dtype))
    tiny = 4.248354255291589e-18
    near = dict(rel=4 * torch.finfo(dtype).eps)
    assert J.diagonal().tolist() == pytest.approx([tiny, tiny], **near)
    assert J.trace().item() == pytest.approx(2 * tiny, **near)
    assert J.top_eigenpair().value.item() == pytest.approx(2 * tiny, **near)
    assert (J @ row([1.0, 0.0], dtype)).tolist() == pytest.approx([tiny, -tiny], **near)
    assert (J @ row([1e4 + 1.0, 1e4], dtype)).tolist() == pytest.approx([tiny, -tiny], **near)
    assert (J.pseudo_inverse() @ row([1.0, -1.0], dtype)).tolist() == pytest.approx(
        [0.5 / tiny, -0.5 / tiny], **near
    )
    assert (J.sqrt() @ row([0.0, 1.0], dtype)).tolist() == pytest.approx(
        [-math.sqrt(tiny), math.sqrt(tiny)], **near
    )
    assert (J.sqrt() @ row([1.0, 0.0], dtype)).tolist() == pytest.approx([tiny, -tiny], **near)


@EACH
@TYPES
def test_digits(z, dtype):
    """Against 120 digits, of the same logits: a few eps of each number, and of the rounding of z − max z."""
    z = row(z, dtype)
    p, J = exact(z.tolist())
    n = len(p)
    found = SoftmaxJacobian(z)
    assert ulps(found.diagonal(), [J[i, i] for i in range(n)], dtype) <= 8
    assert ulps(found.trace(), [mpmath.fsum(J[i, i] for i in range(n))], dtype) <= 8
    assert ulps(found.to_dense(), [J[i, j] for i in range(n) for j in range(n)], dtype) <= 8
    value = max(mpmath.eigsy(J, eigvals_only=True))
    assert ulps(found.top_eigenpair().value, [value], dtype) <= 8
    v = torch.linspace(-1, 2, n, dtype=dtype) ** 3 + 100
    exactly = [mpmath.mpf(x) for x in v.tolist()]
    right = [mpmath.fsum(J[i, j] * (exactly[j] - exactly[i]) for j in range(n)) for i in range(n)]
    size = [mpmath.fsum(abs(J[i, j] * (exactly[j] - exactly[i])) for j in range(n)) for i in range(n)]
    assert ulps(found @ v, right, dtype, size) <= 32


@EACH
@TYPES
def test_digits_of_the_eigenvector(z, dtype):
    z = row(z, dtype)
    p, J = exact(z.tolist())
    if sum(q > 0 for q in p) < 2 or sum(q == max(p) for q in p) > 2:
        pytest.skip("the eigenvector is not the only one")
    values, vectors = mpmath.eigsy(J)
    top = max(range(len(p)), key=lambda i: values[i])
    right = [v if abs(v) > 1e-60 else mpmath.mpf(0) for v in vectors[:, top]]
    sign = mpmath.sign(right[max(range(len(p)), key=lambda i: p[i])])
    found = SoftmaxJacobian(z).top_eigenpair().vector
    assert ulps(found, [sign * v for v in right], dtype) <= 8


def exact_probabilities(z):
    e = [mpmath.exp(mpmath.mpf(v)) for v in z.tolist()]
    total = mpmath.fsum(e)
    return [v / total for v in e]


@TYPES
@pytest.mark.parametrize("damping", [1e-30, 1e-12, 1e-8, 1e-4, 1.0, 1e6])
@pytest.mark.parametrize("kind", ["any", "gradient", "constant"])
def test_digits_of_solve_at_a_thousand_classes(dtype, damping, kind):
    """Each entry to a few eps of its own terms, however small λ is, and where Σ v cancels too.

    The right values are those of the textbook's Sherman and Morrison, in as many digits as that takes.
    """
    z = torch.randn(1000, dtype=DOUBLE).mul(2).to(dtype)
    v = torch.randn(1000, dtype=DOUBLE).to(dtype)
    if kind == "gradient":  # Σ v = 0 exactly, in no order that would let pairs cancel
        v = torch.cat([v[:500], -v[:500]])[torch.randperm(1000)]
    if kind == "constant":
        v = torch.ones_like(v)
    p, exactly = exact_probabilities(z), [mpmath.mpf(x) for x in v.tolist()]
    shifted = [q + mpmath.mpf(damping) for q in p]
    rest = 1 - mpmath.fsum(q * q / s for q, s in zip(p, shifted, strict=True))
    kappa = mpmath.fsum(q * x / s for q, x, s in zip(p, exactly, shifted, strict=True)) / rest
    right = [(x + kappa * q) / s for x, q, s in zip(exactly, p, shifted, strict=True)]
    # what κ is made of: ⟨g, v⟩ as p has rounded, and Σ v to eps²
    terms = (
        abs(kappa)
        + mpmath.fsum(
            (damping * q / s**2 + torch.finfo(dtype).eps) * abs(x)
            for q, x, s in zip(p, exactly, shifted, strict=True)
        )
        / rest
    )
    size = [(abs(x) + terms * q) / s for x, q, s in zip(exactly, p, shifted, strict=True)]
    assert ulps(SoftmaxJacobian(z).solve(v, damping), right, dtype, size) <= 16


@TYPES
@pytest.mark.parametrize("damping", [1e-30, 1e-8, 1e-3, 1.0, 1e6])
def test_digits_of_logdet(dtype, damping):
    z = torch.randn(1000, dtype=DOUBLE).mul(2).to(dtype)
    p = exact_probabilities(z)
    shifted = [q + mpmath.mpf(damping) for q in p]
    rest = 1 - mpmath.fsum(q * q / s for q, s in zip(p, shifted, strict=True))
    logs = [mpmath.log(s) for s in shifted] + [mpmath.log(rest)]
    found = SoftmaxJacobian(z).logdet(damping)
    assert ulps(found, [mpmath.fsum(logs)], dtype, [mpmath.fsum(map(abs, logs)) + 1000 * (damping >= 1)]) <= 4


@EACH
def test_bounds_of_the_largest_eigenvalue(z):
    J = SoftmaxJacobian(row(z))
    low, high = J.eigenvalue_bounds()
    value = J.top_eigenpair().value
    assert low * (1 - 1e-15) <= value <= high * (1 + 1e-15)
    assert high <= 0.5
    assert low >= high / 4


@pytest.mark.parametrize("name", ["one", "two", "equal", "sure", "all but one masked"])
def test_bounds_that_meet(name):
    J = SoftmaxJacobian(row(ROWS[name]))
    low, high = J.eigenvalue_bounds()
    assert_close(low, high, rtol=4e-16, atol=0)
    assert_close(J.top_eigenpair().value, high, rtol=8e-16, atol=0)


def test_two_classes():
    J = SoftmaxJacobian(row([0.3, -0.4]))
    pq = J.diagonal()[0]
    assert_close(J.top_eigenpair().value, 2 * pq)
    assert_close(J.top_eigenpair().vector, row([1.0, -1.0]) / math.sqrt(2.0))
    assert_close(J.to_dense(), pq * row([[1.0, -1.0], [-1.0, 1.0]]))


@pytest.mark.parametrize("z", [[3.0], [0.5, -INF], [0.0, -1000.0]])
def test_all_classes_masked_but_one(z):
    J = SoftmaxJacobian(row(z))
    n = len(z)
    v = torch.arange(1.0, 1 + n, dtype=DOUBLE)
    nothing = torch.zeros(n, dtype=DOUBLE)
    for found in (J @ v, J.diagonal(), J.pseudo_inverse() @ v):
        assert torch.equal(found, nothing)
    for found in (J.sqrt() @ v, J.sqrt().T @ v):
        assert_close(found, nothing, rtol=0, atol=1e-200)  # √p underflows later than p
    assert_close(J.solve(v, 0.5), 2 * v, rtol=4e-16, atol=0)
    assert J.logdet(0.5).item() == pytest.approx(n * math.log(0.5))
    value, vector = J.top_eigenpair()
    assert value == 0
    assert vector.tolist() == [1.0] + [0.0] * (n - 1)
    assert [b.item() for b in J.eigenvalue_bounds()] == [0.0, 0.0]


def test_ties_take_the_first_two():
    value, vector = SoftmaxJacobian(row([-1.0, 2.0, 2.0, 2.0])).top_eigenpair()
    assert value.item() == pytest.approx(row([-1.0, 2.0, 2.0, 2.0]).softmax(0)[1].item(), rel=1e-15)
    assert vector.tolist() == pytest.approx([0, math.sqrt(0.5), -math.sqrt(0.5), 0])


# -- masks, shapes, types -----------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [INF, -INF, math.nan])
def test_masked_classes_do_not_count(junk):
    z, keep = row(ROWS["masked"]), torch.tensor([0, 2, 3])
    J, K = SoftmaxJacobian(z), SoftmaxJacobian(z[keep])
    v = torch.randn(5, dtype=DOUBLE)
    v[[1, 4]] = junk
    gone = torch.zeros(2, dtype=DOUBLE)
    for ours, theirs in (
        (J @ v, K @ v[keep]),
        (J.sqrt() @ v, K.sqrt() @ v[keep]),
        (J.sqrt().T @ v, K.sqrt().T @ v[keep]),
        (J.pseudo_inverse() @ v, K.pseudo_inverse() @ v[keep]),
        (J.diagonal(), K.diagonal()),
        (J.top_eigenpair().vector, K.top_eigenpair().vector),
    ):
        assert_close(ours[keep], theirs)
        assert torch.equal(ours[[1, 4]], gone)
    x = J.solve(v, 0.1)
    assert_close(x[keep], K.solve(v[keep], 0.1))
    assert_close(x[[1, 4]], v[[1, 4]] / 0.1, equal_nan=True)
    assert_close(J.logdet(0.1), K.logdet(0.1) + 2 * math.log(0.1))
    assert_close(torch.stack(J.eigenvalue_bounds()), torch.stack(K.eigenvalue_bounds()))


@pytest.mark.parametrize("bad", [[-INF, -INF], [INF, 0.0], [INF, INF], [0.0, math.nan], [0.0, INF]])
def test_a_row_without_softmax_is_nan_and_no_other(bad):
    z = row([bad, [0.3, -0.3]])
    v = torch.randn(2, 2, dtype=DOUBLE)
    J, K = SoftmaxJacobian(z), SoftmaxJacobian(z[1])
    for f in (
        lambda J, v: J @ v,
        lambda J, v: J.diagonal(),
        lambda J, v: J.trace(),
        lambda J, v: J.to_dense(),
        lambda J, v: J.top_eigenpair().value,
        lambda J, v: J.top_eigenpair().vector,
        lambda J, v: J.eigenvalue_bounds()[0],
        lambda J, v: J.eigenvalue_bounds()[1],
        lambda J, v: J.sqrt() @ v,
        lambda J, v: J.sqrt().T @ v,
        lambda J, v: J.pseudo_inverse() @ v,
        lambda J, v: J.solve(v, 1e-3),
        lambda J, v: J.logdet(1e-3),
    ):
        found = f(J, v)
        assert found[0].isnan().all()
        assert_close(found[1], f(K, v[1]))


def everything(z, v):
    """Return the results of every method of an operator, as (..., anything)."""
    J = SoftmaxJacobian(z)
    vectors = (
        J @ v,
        J.T @ v,
        J.sqrt() @ v,
        J.sqrt().T @ v,
        J.pseudo_inverse() @ v,
        J.solve(v, 0.01),
        J.diagonal(),
        J.top_eigenpair().vector,
    )
    scalars = (J.trace(), J.logdet(0.01), J.top_eigenpair().value, *J.eigenvalue_bounds())
    return torch.cat([*vectors, torch.stack(scalars, -1)], -1)


def test_batches_and_matrices():
    z, v = torch.randn(2, 3, 5, dtype=DOUBLE), torch.randn(2, 3, 5, 4, dtype=DOUBLE)
    J = SoftmaxJacobian(z)
    assert J.shape == (2, 3, 5, 5)
    assert J.T is J
    assert J.sqrt().shape == J.pseudo_inverse().shape == J.shape
    for f in (J.__matmul__, J.sqrt().__matmul__, J.sqrt().T.__matmul__, J.pseudo_inverse().__matmul__):
        assert f(v).shape == v.shape
        assert_close(f(v), torch.stack([f(v[..., k]) for k in range(4)], -1))
    assert_close(J.solve(v, 0.1), torch.stack([J.solve(v[..., k], 0.1) for k in range(4)], -1))
    rows = [everything(z[i, j], v[i, j, :, 0]) for i in range(2) for j in range(3)]
    assert_close(everything(z, v[..., 0]), torch.stack(rows).reshape(2, 3, -1))
    for f in (J, J.sqrt(), J.pseudo_inverse()):
        assert_close(f.to_dense() @ v, f @ v)
    empty = SoftmaxJacobian(torch.zeros(0, 5))
    assert everything(torch.zeros(0, 5), torch.zeros(0, 5)).shape[0] == 0
    assert empty.to_dense().shape == (0, 5, 5)
    assert (J @ v[..., :0]).shape == (2, 3, 5, 0)


def test_no_tensor_of_the_caller_is_changed():
    z, v = torch.randn(3, 5), torch.randn(3, 5)
    before = z.clone(), v.clone()
    everything(z, v)
    assert_close((z, v), before, rtol=0, atol=0)


@HALF
def test_half_types_are_rounded_once(dtype):
    z, v = torch.randn(20, 7).to(dtype), torch.randn(20, 7).to(dtype)
    found = everything(z, v)
    assert found.dtype == dtype
    assert SoftmaxJacobian(z).dtype == dtype
    assert torch.equal(found, everything(z.float(), v.float()).to(dtype))


def test_answers_have_the_type_of_the_logits():
    z = torch.randn(4)
    J = SoftmaxJacobian(z.double())
    assert (J @ z).dtype == DOUBLE
    assert (SoftmaxJacobian(z) @ z.double()).dtype == torch.float32
    assert (SoftmaxJacobian(z.bfloat16()) @ z).dtype == torch.bfloat16
    assert "shape=(4, 4)" in repr(J)


@pytest.mark.parametrize(
    "z", [torch.zeros(3, dtype=torch.int64), [1.0, 2.0], torch.zeros(3, dtype=torch.cfloat)]
)
def test_logits_that_are_no_floating_tensor(z):
    with pytest.raises(TypeError, match="logits must be"):
        SoftmaxJacobian(z)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_logits_without_classes(shape):
    with pytest.raises(ValueError, match=r"logits must have shape \(..., C\) with C ≥ 1, got \("):
        SoftmaxJacobian(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(5,), (3, 4), (1, 5), (5, 3), (3, 4, 2), (3, 5, 2, 1), ()])
def test_a_vector_of_another_shape(shape):
    J = SoftmaxJacobian(torch.zeros(3, 5))
    match = r"v has shape \(.*\): for logits of shape \(3, 5\) it must be \(3, 5\).* or \(3, 5, K\)"
    for f in (J.__matmul__, J.sqrt().__matmul__, J.pseudo_inverse().__matmul__, lambda v: J.solve(v, 1.0)):
        with pytest.raises(ValueError, match=match):
            f(torch.zeros(shape))


def test_a_vector_that_is_no_floating_tensor():
    J = SoftmaxJacobian(torch.zeros(3))
    with pytest.raises(TypeError, match="v must be a tensor, got list"):
        _ = J @ [1.0, 0.0, 0.0]
    with pytest.raises(
        TypeError, match=r"v must be of a floating type.* got torch.int64: .*v.to\(torch.float32\)"
    ):
        _ = J @ torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize("damping", [0, 0.0, -1e-3, INF, math.nan, 1e-50])
def test_damping_that_leaves_it_singular(damping):
    J = SoftmaxJacobian(torch.zeros(3))
    for f in (lambda: J.solve(torch.zeros(3), damping), lambda: J.logdet(damping)):
        with pytest.raises(
            ValueError, match=r"damping must be positive.* got .*singular along the ones vector"
        ):
            f()
    with pytest.raises(TypeError, match=r"damping.item\(\)"):
        J.logdet(torch.tensor(1.0))


# -- derivatives --------------------------------------------------------------------------------------------


def textbook(z, v):
    """`everything` by torch's own dense operations, for rows without ties or masks."""
    J, p = dense(z), z.softmax(-1)
    eye = torch.eye(z.shape[-1], dtype=z.dtype)
    S = torch.diag(p.sqrt()) - p[:, None] * p.sqrt()
    centre = eye - 1 / z.shape[-1]
    inverse = centre @ torch.diag(1 / p) @ centre
    values, vectors = torch.linalg.eigh(J)
    top = vectors[:, -1] * vectors[p.argmax(), -1].detach().sign()
    shifted = J + 0.01 * eye
    order = p.sort(descending=True).values
    p1, p2, n = order[0], order[1], len(z)
    pair = (p1 + p2 - (p1 - p2) ** 2) / 2
    low = torch.maximum(pair, p1 * (1 - p1) * n / (n - 1))
    high = torch.minimum(p1, 2 * p1 * (1 - p1))
    scalars = (J.trace(), torch.logdet(shifted), values[-1], low, high)
    return torch.cat(
        [
            *(J @ v, J @ v, S @ v, S.T @ v, inverse @ v, torch.linalg.solve(shifted, v)),
            *(p * (1 - p), top, torch.stack(scalars)),
        ]
    )


POINTS = pytest.mark.parametrize(
    "z", [[0.3, -1.2, 2.0, 0.7], [2.0, 0.1, -0.3, -0.2], [1.0, 0.9, -2.0, 0.2], [6.0, 0.0, -1.0, 0.5]]
)


@POINTS
def test_derivatives_in_every_mode(z):
    z, v = row(z), torch.randn(4, dtype=DOUBLE)
    tangents = torch.randn(4, dtype=DOUBLE), torch.randn(4, dtype=DOUBLE)
    near = dict(rtol=1e-9, atol=1e-9)
    both = (0, 1)
    assert_close(everything(z, v), textbook(z, v), **near)
    for mode in (jacrev, jacfwd):
        assert_close(mode(everything, both)(z, v), mode(textbook, both)(z, v), **near)
    assert_close(jvp(everything, (z, v), tangents), jvp(textbook, (z, v), tangents), **near)
    for mode in (hessian, lambda f, a: jacrev(jacrev(f, a), a)):
        assert_close(mode(everything, both)(z, v), mode(textbook, both)(z, v), rtol=1e-8, atol=1e-8)
    zs, vs = torch.stack([z, z + v]), torch.stack([v, v])
    assert_close(vmap(everything)(zs, vs), everything(zs, vs), **near)
    assert_close(vmap(jacrev(everything))(zs, vs)[0], jacrev(everything)(z, v), **near)
    leaves = [t.clone().requires_grad_() for t in (z, v)]
    assert torch.autograd.gradcheck(everything, leaves)
    assert torch.autograd.gradgradcheck(everything, leaves)


@pytest.mark.parametrize("z", [[1.0, 1.0, -2.0, 0.2], [2.0, 0.1, 0.1, -1.0], [0.5, 0.5]])
def test_derivatives_at_ties(z):
    """A simple eigenvalue has one where probabilities are equal: numerically, and by perturbation theory."""
    z = row(z).requires_grad_()

    def pair(z):
        value, vector = SoftmaxJacobian(z).top_eigenpair()
        return value, torch.outer(vector, vector)  # without the sign, which changes at a tie

    assert torch.autograd.gradcheck(pair, z)
    value, vector = SoftmaxJacobian(z).top_eigenpair()
    (found,) = torch.autograd.grad(value, z)
    (right,) = torch.autograd.grad(vector.detach() @ dense(z) @ vector.detach(), z)
    assert_close(found, right)
    assert torch.autograd.gradcheck(lambda z: SoftmaxJacobian(z).diagonal(), z)
    assert torch.autograd.gradcheck(lambda z: SoftmaxJacobian(z) @ torch.arange(float(len(z))).double(), z)


def test_derivatives_with_masked_classes():
    z = row(ROWS["masked"])
    v = torch.randn(5, dtype=DOUBLE)
    v[1] = INF
    keep = torch.tensor([0, 2, 3])
    weight = torch.randn(everything(z, v).shape, dtype=DOUBLE)

    def total(z, v):
        J = SoftmaxJacobian(z)
        answers = (J @ v, J.sqrt() @ v, J.sqrt().T @ v, J.pseudo_inverse() @ v, J.diagonal())
        answers += (J.top_eigenpair().vector, J.solve(v, 0.1))
        scalars = J.trace() + J.logdet(0.1) + J.top_eigenpair().value + sum(J.eigenvalue_bounds())
        kept = keep if len(z) == 5 else slice(None)
        return sum((k + 1) * (a[kept] * weight[:3]).sum() for k, a in enumerate(answers)) + scalars

    g = grad(total, (0, 1))
    found, right = g(z, v), g(z[keep], v[keep])
    for ours, theirs in zip(found, right, strict=True):
        assert_close(ours[keep], theirs)
        assert torch.equal(ours[[1, 4]], torch.zeros(2, dtype=DOUBLE))


def test_in_a_graph():
    z, v = torch.randn(3, 5, dtype=DOUBLE, requires_grad=True), torch.randn(3, 5, dtype=DOUBLE)

    def f(z, v):  # a compiler refuses `@` of what it takes for no tensor
        J = SoftmaxJacobian(z)
        operators = J, J.sqrt(), J.sqrt().T, J.pseudo_inverse()
        vectors = [A.__matmul__(v) for A in operators]
        vectors += [J.solve(v, 0.01), J.diagonal(), J.top_eigenpair().vector]
        scalars = (J.trace(), J.logdet(0.01), J.top_eigenpair().value, *J.eigenvalue_bounds())
        return torch.cat([*vectors, torch.stack(scalars, -1)], -1)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    ours, theirs = compiled(z, v), f(z, v)
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours.sum(), z), torch.autograd.grad(theirs.sum(), z))


def test_autocast_changes_nothing():
    z, v = torch.randn(3, 5), torch.randn(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = everything(z, v)
    assert torch.equal(found, everything(z, v))
