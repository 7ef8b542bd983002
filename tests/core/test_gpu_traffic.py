"""The cost of the torch tiles on a GPU, on paper: operations launched a tile, and bytes moved a logit.

Counted on a CPU, with the chunks of a GPU, from the operations that touch a whole tile.
`docs/explanation/gpu.md` has the model that these numbers enter.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import xent
from table import only
from xent._core import plan, problem

N, D, C = 128, 16, 3000
FEW = ("gather", "scatter")  # which touch an entry a row


class Traffic(TorchDispatchMode):
    """Count operations on tensors of a tile's size, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.others = self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = op(*args, **kwargs)
        written = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor) and t.numel() == N * C]
        read = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.numel() == N * C]
        aliases = op.is_view or "empty" in op._schema.name or "detach" in op._schema.name
        if aliases or not (read or written):
            return made
        if "mm" in op._schema.name:
            self.products += 1
        elif not any(name in op._schema.name for name in FEW):
            self.others += 1
            self.bytes += sum(t.element_size() for t in read) + sum(t.element_size() for t in written)
        return made


@pytest.mark.parametrize(
    ("options", "launched", "moved"),
    [
        ({}, 5, 28),  # the largest, the softmax, the largest of that, the sum of the others, times a number
        ({"label_smoothing": 0.1}, 6, 36),  # the largest, less it, ⟨t, z⟩, exp, the sum, the gradient
        ({"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4}, 12, 88),
    ],
    ids=["plain", "smoothed", "every"],
)
def test_operations_and_bytes_of_the_torch_tiles(monkeypatch, options, launched, moved):
    monkeypatch.setattr(problem, "grain_of", lambda device: plan.GPU)
    torch.manual_seed(0)
    x, w = torch.randn(N, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    y = torch.randint(C, (N,))
    with only("tiles"), Traffic() as found:
        xent.linear_cross_entropy(x, w, y, memory_budget=1 << 28, **options).backward()
    assert found.products == 3
    assert (found.others, found.bytes) == (launched, moved)
