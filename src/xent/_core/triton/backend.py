"""The backend of the two kernels: tiles on CUDA devices, or in Triton's interpreter, which computes on a CPU.

Without triton, or without a device for it, the tiles of torch serve what this would; `missing` says why. The
kernels are held against these tiles once on each device before they serve: where they differ by more than
rounding they stay off.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from xent._core.backend import Backend, Gradients, Wants
from xent._core.coefficients import Coefficients
from xent._core.logits import LinearHead
from xent._core.plan import GPU_DEFAULT
from xent._core.problem import Problem
from xent._core.selection import Selection
from xent._core.statistics import Statistics
from xent._core.targets import index_targets
from xent._core.tiles import sweep

MOST_OWN = 256
"""Own classes of a row, each of which every logit is compared with."""

BOUND = 1e-5
"""The largest difference of float32 results of the kernels from those of the tiles, by the largest entry."""


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels: its variable is read when they are made."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class Triton(Backend):
    """Two kernels a tile, between matrix products of torch."""

    name = "triton"
    serves = "logits and heads in float32 and half types, on CUDA devices"
    memory = GPU_DEFAULT

    def __init__(self) -> None:
        self._tried: dict[torch.device, str | None] = {}  # what is wrong on each device

    def missing(self) -> str | None:
        if os.environ.get("XENT_TRITON", "1") == "0":
            return "XENT_TRITON=0 turns it off"
        if not interpreted() and not torch.cuda.is_available():
            return "there is no CUDA device"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install 'xent[cuda]'"
        wrong = [reason for reason in self._tried.values() if reason is not None]
        return wrong[0] if wrong else None

    def supports(self, problem: Problem) -> str | None:
        logits, device = problem.logits, problem.logits.device
        if device.type != ("cpu" if interpreted() else "cuda"):
            return f"the tensors are on {device.type}"
        if logits.dtype != torch.float32:
            return f"the logits are computed in {logits.dtype}"
        if problem.batched:
            return "vmap has batched a tensor"
        if problem.targets.n_own > MOST_OWN:
            return f"a row has more than {MOST_OWN} classes of its own"
        return self.missing() or self._reason(device)

    def row_statistics(self, problem: Problem) -> Statistics:
        return sweep.statistics(problem, _body())

    def gradient(
        self, problem: Problem, found: Statistics, coefficients: Coefficients, wants: Wants
    ) -> Gradients:
        return sweep.gradient(problem, found, coefficients, wants, _body())

    def fused(
        self, problem: Problem, coefficients: Callable[[Statistics, slice], Coefficients], wants: Wants
    ) -> tuple[Statistics, Gradients]:
        return sweep.fused(problem, coefficients, wants, _body())

    def _reason(self, device: torch.device) -> str | None:
        """Return None, or why the kernels do not serve a device; try them where that is not known."""
        if device in self._tried:
            return self._tried[device]
        if torch.compiler.is_compiling() or (
            device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        ):
            return "the kernels have not been tried on this device, and cannot be within a capture or a trace"
        self._tried[device] = None  # the trial is a problem too
        self._tried[device] = reason = _trial(self, device)
        if reason is not None:
            warnings.warn(f"xent computes without Triton on {device}: {reason}", UserWarning, stacklevel=2)
        return reason


def _body() -> Any:
    """Return the kernels, whose module needs triton."""
    return importlib.import_module("xent._core.triton.body").TRITON


def _trial_problem(device: torch.device, dtype: torch.dtype = torch.float32) -> Problem:
    """Return a random head with smoothed targets."""
    generator = torch.Generator().manual_seed(0)
    rows, classes = (4, 20) if interpreted() else (64, 5000)  # the interpreter takes a millisecond a class
    shapes = (rows, 16), (classes, 16), (classes,)
    x, w, b = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes)
    index = torch.randint(classes, (rows,), generator=generator).to(device)
    targets = index_targets(index, classes, Selection(rows), smoothing=0.1, checked=True)
    return Problem(LinearHead(x, w, b), targets)


def _trial(backend: Triton, device: torch.device) -> str | None:
    """Return None where the kernels agree with the tiles on a random head, or what is wrong."""
    problem, wants = _trial_problem(device), (False, True, True, True)

    def results(fused: Callable[..., tuple[Statistics, Gradients]]) -> list[torch.Tensor]:
        def coefficients(found: Statistics, chunk: slice) -> Coefficients:
            return Coefficients(torch.ones_like(found.m))

        found, gradients = fused(problem, coefficients, wants)
        return [found.loss, *(g for g in gradients.finish(None) if g is not None)]

    try:
        found = results(backend.fused)
    except Exception as error:
        said = (str(error).splitlines() or [""])[0][:200]
        return (
            f"its kernels do not run ({type(error).__name__}: {said}); a newer driver or triton may mend it, "
            "and XENT_TRITON=0 turns it off without a word"
        )
    for name, own, expected in zip(("loss", "dx", "dw", "db"), found, results(sweep.fused), strict=True):
        apart, largest = (own - expected).abs(), expected.abs().max().item()
        if not apart.max().item() <= BOUND * largest:
            at = int(apart.nan_to_num(torch.inf).argmax())
            return (
                f"on a random head {name} is {own.flatten()[at].item():.9g} by its kernels and "
                f"{expected.flatten()[at].item():.9g} by the tiles"
            )
    return None
