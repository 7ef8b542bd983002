"""Processes of one gloo group that run a function of `process_pool_cases` each, all at once.

They are started once and serve until the tests end; a case asserts for itself, on every rank.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

PATIENCE = 40  # seconds for one case


class ProcessPool:
    def __init__(self, size: int) -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            at = str(Path(self.folder.name) / "meeting")
            process = context.Process(target=_serve, args=(rank, size, at, theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, case: str, *arguments: Any) -> list[Any]:
        """The case's answers, by rank; AssertionError with every rank's traceback if any fails."""
        for pipe in self.pipes:
            pipe.send((case, arguments))
        answers, wrong = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(5 if wrong else PATIENCE):  # one that failed leaves the others waiting for it
                wrong.append(f"rank {rank} does not answer")
                continue
            failed, answer = pipe.recv()
            answers.append(answer)
            if failed:
                wrong.append(f"rank {rank}: {answer}")
        if wrong:
            self.close()
            raise AssertionError("\n".join(wrong))
        return answers

    @property
    def serves(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, size: int, at: str, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    import process_pool_cases

    torch.set_num_threads(1)
    limit = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", f"file://{at}", timeout=limit, rank=rank, world_size=size)
    while True:
        try:
            case, arguments = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)  # every rank draws the same
        try:
            pipe.send((False, getattr(process_pool_cases, case)(*arguments)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
