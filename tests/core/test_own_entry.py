"""The target's own entry of a derivative, where what is added to it is larger by far, against mpmath.

∂L/∂z_y = γ·(a·p_y − t_y) + 2λ·lse·p_y + η·∂H/∂z_y + ∂(log p_y)/∂z_y, each term to its own digits
"""

from __future__ import annotations

import functools

import mpmath
import pytest
import torch

import xent

ROWS = {
    "far below": [1e18, 0.0],
    "far below, with others": [1e18, 0.0, 3.0, -1e18],
    "a common offset": [1e6 + 40.0, 1e6, 1e6 + 3.0],
    "sure of another": [700.0, 0.0, 5.0],
    "sure": [-50.0, 700.0, 3.0],
    "ordinary": [1.0, 0.5, -2.0],
}
OPTIONS = {
    "z-loss": {"z_loss": 0.1},
    "z-loss, smoothing": {"z_loss": 0.1, "label_smoothing": 0.1},
    "smoothing, a tiny class weight": {"label_smoothing": 0.1, "weight": 1e-12},
    "all of them": {"z_loss": 0.1, "label_smoothing": 0.1, "weight": 1e-12},
}


@functools.cache
def known(z, y, name):
    """`exact` of a row and a set of options, once for every way."""
    with mpmath.workdps(60):
        return exact(z, y, **OPTIONS[name])


def exact(z, y, *, z_loss=0.0, label_smoothing=0.0, weight=1.0):
    """Gradient and Hessian of one row's loss in its logits, and the sizes of the terms that make them."""
    z = [mpmath.mpf(float(value)) for value in z]
    n, top = range(len(z)), max(z)
    w = [mpmath.mpf(weight) if j == y else mpmath.mpf(1) for j in n]
    smooth = mpmath.mpf(label_smoothing)
    t = [w[j] * ((1 - smooth) * (j == y) + smooth / len(z)) for j in n]
    e = [mpmath.exp(value - top) for value in z]
    p = [value / sum(e) for value in e]
    q = [sum(p[k] for k in n if k != j) for j in n]  # 1 − p
    alpha = sum(t) + 2 * mpmath.mpf(z_loss) * (top + mpmath.log(sum(e)))
    gradient = [alpha * p[j] - t[j] for j in n]
    hessian = [
        [alpha * p[i] * (q[i] if i == j else -p[j]) + 2 * mpmath.mpf(z_loss) * p[i] * p[j] for j in n]
        for i in n
    ]
    size = [abs(alpha) * p[j] + t[j] for j in n]
    sizes = [
        [abs(alpha) * p[i] * (q[i] if i == j else p[j]) + 2 * mpmath.mpf(z_loss) * p[i] * p[j] for j in n]
        for i in n
    ]
    return gradient, size, hessian, sizes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("way", ["logits", "features", "tiles", "sparse target", "in a graph"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_own_entry(row, name, way, dtype):
    z, y = torch.tensor(row, dtype=dtype), 1
    given = dict(OPTIONS[name])
    if "weight" in given:
        given["weight"] = torch.ones(len(row), dtype=torch.float64).index_fill(
            0, torch.tensor([y]), given["weight"]
        )
    target = torch.tensor([y])
    if way == "sparse target":
        target = xent.TopKTarget(target[:, None], torch.ones(1, 1, dtype=dtype))

    def loss(z):
        if way in ("features", "tiles"):
            budget = 600 if way == "tiles" else None
            return xent.linear_cross_entropy(
                torch.ones(1, 1, dtype=dtype),
                z[:, None],
                target,
                memory_budget=budget,
                reduction="sum",
                **given,
            )
        return xent.cross_entropy(z[None], target, reduction="sum", **given)

    eps = torch.finfo(dtype).eps
    with mpmath.workdps(60):
        gradient, size, hessian, sizes = known(tuple(z.tolist()), y, name)
        if way == "in a graph":
            torch._dynamo.reset()
            loss = torch.compile(loss, backend="eager", fullgraph=True)
            found, second = torch.autograd.grad(loss(z.requires_grad_()), z)[0], None
            z = z.detach()
        else:
            found, second = torch.func.grad(loss)(z), torch.autograd.functional.hessian(loss, z)
            plain = z.clone().requires_grad_()
            loss(plain).backward()
            assert torch.allclose(plain.grad, found, rtol=64 * eps, atol=0)
        for j in range(len(row)):
            # exp(z − m) errs by |z − m| roundings
            bound = 64 * eps * size[j] * (1 + min(700, abs(float(z[j]) - max(row))))
            tiny = (1 + abs(float(size[0]))) * torch.finfo(dtype).tiny
            assert abs(mpmath.mpf(found[j].item()) - gradient[j]) <= bound + tiny, j
        if second is not None:
            for i in range(len(row)):
                for j in range(len(row)):
                    bound = 10_000 * eps * sizes[i][j] + 1e3 * torch.finfo(dtype).tiny
                    assert abs(mpmath.mpf(second[i, j].item()) - hessian[i][j]) <= bound, (i, j)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_own_entry_of_entropy_and_log_prob(dtype):
    """A bonus of 1e20 on the entropy leaves the digits of a log-probability beside it."""
    z = torch.tensor([[800.0, 0.0, 5.0]], dtype=dtype, requires_grad=True)
    found = xent.row_statistics(z, torch.tensor([1]))
    total = found.log_prob.sum() + 1e20 * found.entropy.sum()
    (g,) = torch.autograd.grad(total, z, retain_graph=True)
    assert g[0, 1].item() == 1.0
    (g,) = torch.autograd.grad((found.log_prob + 1e20 * found.logsumexp)[0], z)
    assert g[0, 1].item() == 1.0
