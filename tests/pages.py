"""The pages of docs/how-to: their blocks, what these print, and how that is compared with the page.

A page's blocks run in their order, in one folder and one Python process. A ```python block whose first line
is a comment that names a file (`# spread.py`) is written to that file and not run. A ```text block is what
the block before it printed: its standard output, and the standard error too of a block marked ```sh fails.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "how-to"
RUN = ("python", "sh", "sh fails")
FENCED = re.compile(r"^```([^\n]+)\n(.*?)^```$", re.S | re.M)
FILE = re.compile(r"# (\w+\.py)\n")


@dataclass
class Block:
    """A block of code, and the output that the page shows for it."""

    kind: str
    code: str
    output: str | None = None
    printed: str = ""
    said: str = ""  # on stderr
    status: int = 0


def blocks(text: str) -> list[Block]:
    """Return the blocks of a page that run or are files. A text block belongs to the one before it."""
    found: list[Block] = []
    fences = list(FENCED.finditer(text))
    assert text.count("```") == 2 * len(fences), "a fence is not closed, or is indented"
    for fence in fences:
        kind, body = fence[1], fence[2]
        if kind == "text":
            assert found, f"no code before the output {body!r}"
            assert found[-1].output is None, f"a second output: {body!r}"
            found[-1].output = body
        elif not kind.startswith("{"):
            assert kind in RUN, kind
            found.append(Block(kind, body))
    return found


def run(todo: list[Block], folder: Path, timeout: float = 300) -> None:
    """Run blocks in a folder, and note what they print, up to the first that does not end as it should."""
    bin_folder = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": bin_folder + os.pathsep + os.environ["PATH"], "COLUMNS": "100"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # pages print what a CPU does
    log = folder / ".printed.json"
    subprocess.run(
        [sys.executable, __file__, str(log)],
        input=json.dumps([[block.kind, block.code] for block in todo]),
        cwd=folder,
        env=env,
        text=True,
        timeout=timeout,
        check=True,
    )
    for block, result in zip(todo, json.loads(log.read_text()), strict=False):
        block.printed, block.said, block.status = result


def _run_here(log: Path) -> None:
    """Run the blocks that stdin lists, in this process and its folder."""
    import traceback
    import types

    sys.path[0] = ""  # as in an interactive session: modules of this folder

    sys.modules["page"] = types.ModuleType("page")  # a dataclass looks for the module it is of
    results = []
    keep = os.dup(1), os.dup(2)
    paths = [log.with_suffix(suffix) for suffix in (".out", ".err")]
    for kind, code in json.load(sys.stdin):
        for stream, path in zip((1, 2), paths, strict=True):
            to = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(to, stream)
            os.close(to)
        status = 0
        if kind == "python" and (file := FILE.match(code)):
            Path(file[1]).write_text(code)
        elif kind == "python":
            try:
                exec(compile(code, "page", "exec"), sys.modules["page"].__dict__)
            except Exception:
                traceback.print_exc()
                status = 1
        else:
            code = re.sub(r"^pip install .*\n", "", code, flags=re.M)  # it is there
            status = subprocess.run(["bash", "-ec", code], stdin=subprocess.DEVNULL).returncode
        sys.stdout.flush()
        sys.stderr.flush()
        results.append([*(path.read_text() for path in paths), status])
        if (status != 0) != (kind == "sh fails"):
            break
    for stream, original in zip((1, 2), keep, strict=True):
        os.dup2(original, stream)
    log.write_text(json.dumps(results))


# What varies from run to run, whatever its value
VARIES = re.compile(
    r"\d{4}-\d\d-\d\d|\d\d:\d\d(?::\d\d)?"  # dates and times
    r"|(?<![\w.])\d[\d.,]*(?:e[+-]?\d+)?(?=\s?(?:ms|s|seconds?|minutes?|it/s)\b)"  # durations
)
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+(?:,\d{3})*(?:\.\d*)?(?:e[-+]?\d+)?(?!\w)", re.I)


def alike(expected: str, printed: str, relative: float = 0.02) -> bool:
    """Whether a line printed is the one expected: text exactly, but for the width of spaces; numbers nearly.

    Numbers may differ by 2 %, or by 1 in the last digit that is expected; durations and dates in any way.
    """
    expected, printed = (VARIES.sub("~", " ".join(line.split())) for line in (expected, printed))
    if NUMBER.sub("#", expected) != NUMBER.sub("#", printed):
        return False
    for a, b in zip(NUMBER.findall(expected), NUMBER.findall(printed), strict=True):
        x, y = (float(number.replace(",", "").replace("−", "-")) for number in (a, b))
        mantissa, _, exponent = a.lower().partition("e")
        digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        if abs(x - y) > max(relative * abs(x), digit * (1 + 1e-9)):
            return False
    return True


def matches(expected: str, printed: str) -> bool:
    """Whether an output is the one expected, where a line `...` stands for any number of lines."""
    parts: list[list[str]] = [[]]
    for line in expected.rstrip().splitlines():
        if line.strip() == "...":
            parts.append([])
        else:
            parts[-1].append(line)
    lines = printed.rstrip().splitlines()
    if len(parts) == 1:
        return _same(parts[0], lines)
    first, last = parts[0], parts[-1]
    end = len(lines) - len(last)
    if end < len(first) or not _same(first, lines[: len(first)]) or not _same(last, lines[end:]):
        return False
    at = len(first)
    for part in parts[1:-1]:
        while at + len(part) <= end and not _same(part, lines[at : at + len(part)]):
            at += 1
        if at + len(part) > end:
            return False
        at += len(part)
    return True


def _same(expected: list[str], printed: list[str]) -> bool:
    return len(expected) == len(printed) and all(map(alike, expected, printed))


if __name__ == "__main__":
    _run_here(Path(sys.argv[1]))
