"""One rank of several jobs, one after the other, each ``xent`` as a person would type it.

Started R times by ``test_ranks``, with RANK and WORLD_SIZE: importing torch once for many jobs is what keeps
the tests short. Reads jobs from the file named, a JSON object a line: arguments, port, and what is to happen:

    touch   a file to make at the first iteration
    die     (rank, chunk, signal): what this rank sends itself before it computes that chunk of
            predictions, or of an audit
    fail    (rank, evaluation): this rank has an error of ours in that evaluation of the objective
    other   (rank, arguments): what this rank is started with instead
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from pathlib import Path

from click.testing import CliRunner

from xent.auditing.sweeps import FirstSweep
from xent.cli import commands, fit, fit_job
from xent.data.model_file import Model
from xent.linear_model.objective import Objective
from xent.linear_model.solvers import Solver, register_solver
from xent.report import predictions


def endless(objective, theta, max_iter, after_iteration):
    """Go down a little, again and again: a solver that ends only when it is stopped."""
    while True:
        theta = theta - 0.1 * objective(theta)[1]
        after_iteration(theta)


register_solver(Solver("endless", endless))


def run(job: dict) -> dict:
    rank = int(os.environ["RANK"])
    os.environ["MASTER_PORT"] = str(job["port"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(fit_job, "draw", lambda *_: []))  # a second each
        if "touch" in job:
            stack.enter_context(replaced(fit, "_bar", touching(Path(job["touch"]))))
        if job.get("die", [-1])[0] == rank:
            die = before(job["die"][1], lambda: os.kill(os.getpid(), job["die"][2]), Model.log_proba)
            stack.enter_context(replaced(Model, "log_proba", die))
            die = before(job["die"][1], lambda: os.kill(os.getpid(), job["die"][2]), FirstSweep.update)
            stack.enter_context(replaced(FirstSweep, "update", die))
        if "die" in job:
            stack.enter_context(replaced(predictions, "CHUNK", 40))
        if job.get("fail", [-1])[0] == rank:
            failing = before(job["fail"][1], lambda: 1 / 0, Objective._loss_and_gradient)
            stack.enter_context(replaced(Objective, "_loss_and_gradient", failing))
        arguments = job["arguments"]
        if job.get("other", [-1])[0] == rank:
            arguments = job["other"][1]
        done = CliRunner().invoke(commands.cli, arguments)
    raised = None if isinstance(done.exception, SystemExit) else repr(done.exception)
    return {"code": done.exit_code, "out": done.stdout, "err": done.stderr, "raised": raised}


@contextlib.contextmanager
def replaced(where: object, name: str, value: object):
    was = getattr(where, name)
    setattr(where, name, value)
    yield
    setattr(where, name, was)


def touching(path: Path):
    @contextlib.contextmanager
    def bar(*_):
        yield lambda now: path.touch()

    return bar


def before(number: int, act, function):
    """The function, which acts before it is called for that time, counted from 0."""
    seen = 0

    def counted(*given):
        nonlocal seen
        if seen == number:
            act()
        seen += 1
        return function(*given)

    return counted


if __name__ == "__main__":
    # a file of its own: libraries print to stdout, in the middle of a long line too
    with Path(f"{sys.argv[1]}.{os.environ['RANK']}").open("w", buffering=1) as said:
        for line in Path(sys.argv[1]).read_text().splitlines():
            said.write(json.dumps(run(json.loads(line))) + "\n")
            gc.collect()  # a traceback holds the connections, which end with the process otherwise
