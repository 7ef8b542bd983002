"""The ranks that torchrun started, over torch.distributed: gloo, on CPUs.

What a rank waits for has a time limit. A rank that ends closes its connections, at which the others, one
after the other, stop waiting: each turns that into a ``RankLost``, one line. Sums are made on rank 0 and sent
out from there, so that every rank computes on with the same bits.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from xent._processes.group import Ranks
from xent._processes.signals import CtrlC, handled
from xent.errors import BadInput, MissingExtra, RankFailed, RankLost

T = TypeVar("T")

_RAISED: tuple[type[BaseException], ...] = (BadInput, MissingExtra, KeyboardInterrupt, MemoryError, OSError)
"""Errors that all ranks raise as what they are; any other is a ``RankFailed`` elsewhere."""


@contextlib.contextmanager
def joined(rank: int, size: int, timeout: float, slices: int) -> Iterator[Ranks]:
    """Connect to the others for the block; raise ``RankLost`` if they do not come in ``timeout`` seconds."""
    with handled() as ctrl_c:
        wait = datetime.timedelta(seconds=timeout)
        try:
            dist.init_process_group("gloo", rank=rank, world_size=size, timeout=wait)
            groups = [
                dist.new_group(list(range(start, start + slices)), timeout=wait) if slices > 1 else None
                for start in range(0, size, slices)
            ]
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise RankLost(
                f"rank {rank}: the {size} ranks did not meet at {where} within {timeout:g} s (--timeout): "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        try:
            yield Joined(rank, size, timeout, slices, groups[rank // slices], ctrl_c)
        finally:
            dist.destroy_process_group()


class Joined(Ranks):
    """Several ranks, connected; methods as in ``Ranks``."""

    def __init__(self, rank: int, size: int, timeout: float, slices: int, group: Any, ctrl_c: CtrlC) -> None:
        self.rank, self.size = rank, size
        self.slice, self.slices = rank % slices, slices
        self._group, self._timeout, self._ctrl_c = group, timeout, ctrl_c

    @property
    def group(self) -> Any:
        return self._group

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankLost(
                f"rank {self.rank}: another rank has ended, or has not answered for {self._timeout:g} s "
                "(--timeout); nothing is half-written"
            ) from error

    # ── arrays ──

    def sum(self, array: Any) -> np.ndarray:
        mine = np.asarray(array, dtype=np.float64)
        total = torch.from_numpy(mine.copy() if self.counts else np.zeros_like(mine))
        with self._waiting():
            dist.reduce(total, dst=0)
            dist.broadcast(total, src=0)
        return total.numpy()

    def sum_to_main(self, array: np.ndarray) -> np.ndarray:
        total = torch.from_numpy(np.array(array, dtype=np.float64))
        with self._waiting():
            dist.reduce(total, dst=0)
        return total.numpy()

    def maximum(self, array: Any) -> np.ndarray:
        largest = torch.from_numpy(np.array(array, dtype=np.float64))
        with self._waiting():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.numpy()

    def concatenate(self, codes: np.ndarray) -> np.ndarray:
        counts = self.gather(len(codes))
        whole = torch.empty(sum(counts), dtype=torch.int64, device="cpu")
        start = 0
        for share, count in enumerate(counts):
            part = whole[start : start + count]
            if share == self.share.index:
                part.copy_(torch.from_numpy(codes))
            if count:
                with self._waiting():
                    dist.broadcast(part, src=share * self.slices)
            start += count
        return whole.numpy()

    def broadcast_array(self, array: np.ndarray) -> np.ndarray:
        sent = torch.from_numpy(np.ascontiguousarray(array))
        if array.size:
            with self._waiting():
                dist.broadcast(sent, src=0)
        return sent.numpy()

    def send(self, array: np.ndarray | None, share: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        source = share * self.slices
        if source != 0:
            buffer = torch.from_numpy(
                np.empty(shape, dtype) if array is None else np.ascontiguousarray(array, dtype)
            )
            with self._waiting():
                if self.rank == source:
                    dist.send(buffer, dst=0)
                elif self.is_main:
                    dist.recv(buffer, src=source)
            return buffer.numpy()
        return np.empty(shape, dtype) if array is None else array

    # ── anything ──

    def gather(self, value: T) -> list[T]:
        return self.all_gather(value)[:: self.slices]

    def all_gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        sent = [value]
        with self._waiting():
            dist.broadcast_object_list(sent, src=0)
        return sent[0]

    # ── errors ──

    def agree(self, error: BaseException | None) -> None:
        failed = torch.tensor([error is not None], dtype=torch.int32, device="cpu")
        with self._waiting():
            dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if not failed.item():
            return
        reports = self.all_gather(None if error is None else _described(error))
        rank, (kind, text) = next((r, found) for r, found in enumerate(reports) if found is not None)
        everywhere = all(found == reports[0] for found in reports)  # it is about the file, not about a rank
        if error is not None and (everywhere or (rank == self.rank and kind is None)):
            raise error
        text = f"rank {rank}: {text}"
        raise RankFailed(text) if kind is None else _RAISED[kind](text)

    @contextlib.contextmanager
    def raise_together(self) -> Iterator[None]:
        error: BaseException | None = None
        try:
            yield
        except RankLost:
            raise
        except (Exception, KeyboardInterrupt) as caught:
            error = caught
        if error is None and self.is_main and self._ctrl_c.take():
            error = KeyboardInterrupt()
        self.agree(error)

    def check_interrupt(self) -> None:
        if self.is_main and self._ctrl_c.take():
            raise KeyboardInterrupt


def _described(error: BaseException) -> tuple[int | None, str]:
    """Return its place in ``_RAISED``, None if it has none, and its message."""
    for kind, raised in enumerate(_RAISED):
        if isinstance(error, raised):
            return kind, str(error) or type(error).__name__
    return None, f"{type(error).__name__}: {error}"
