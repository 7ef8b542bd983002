"""Checkpoints of a fit: where each of its stages has come to, in files that are whole or not there.

    checkpoint-000017.safetensors       the arrays and, as JSON, the rest; with the SHA-256 of both

The last two are kept. What they are of, the numbers of the table and the settings, is in them: a fit goes on
from one only if its own are the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xent._processes.group import Ranks
from xent._util.atomic_write import atomic_write
from xent._util.text import class_text, quoted
from xent.data.batches import as_array
from xent.data.rows import blocks
from xent.data.table import Table
from xent.errors import BadInput, needs

FORMAT, VERSION = "xent.checkpoint", 1

PERIOD = 10.0
"""Seconds of work that may be lost, where an iteration does not take longer."""

KEPT = 2
"""Files that are kept: the one before the last is used where the last is damaged."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """The state of a stage."""

    arrays: dict[str, np.ndarray]
    about: dict[str, Any]  # of JSON values


class Stage:
    """A stage of a fit, such as the fit along the path of strengths; without checkpoints it keeps nothing."""

    def __init__(self, name: str, checkpoints: Checkpoints | None = None) -> None:
        self._name, self._checkpoints = name, checkpoints

    @property
    def saved(self) -> Saved | None:
        """The state from which it goes on."""
        return None if self._checkpoints is None else self._checkpoints.stages.get(self._name)

    def keep(self, state: Callable[[], Saved], now: bool = False) -> None:
        """Write a state: at once, or where more than ``PERIOD`` of work could be lost otherwise."""
        if self._checkpoints is not None:
            self._checkpoints.keep(self._name, state, now)


class Checkpoints:
    """The checkpoints of one fit in a folder; rank 0 has them.

    Args:
        folder: is made where it is not there.
        resume: whether the fit goes on from the last one in it.
        say: is called with a line where a checkpoint is damaged or found.
    """

    def __init__(self, folder: Path, resume: bool, say: Callable[[str], None]) -> None:
        self.folder, self._resume, self._say = folder, resume, say
        self.stages: dict[str, Saved] = {}
        self._identity: dict[str, Any] = {}
        self._number = 0
        self._written = self._seen = time.monotonic()

    def open(self, identity: dict[str, Any]) -> None:
        """Read the last whole checkpoint, for a fit of this identity.

        Raises:
            BadInput: there are some and ``resume`` is not set; none of them can be read; the last is of
                other data or settings.
        """
        with needs("probe"):
            import safetensors  # noqa: F401
        self._identity = identity
        for unfinished in self.folder.glob(".checkpoint-*"):  # by a process that was killed as it wrote
            unfinished.unlink(missing_ok=True)
        files = self._files()
        self._number = _number(files[-1]) if files else 0
        if files and not self._resume:
            raise BadInput(
                f"{self.folder}: holds checkpoints of an earlier fit; go on with it by --resume, or name "
                "another folder"
            )
        if self._resume and not files:
            self._say(f"no checkpoint in {self.folder} yet: the fit begins")
        faults = []
        for file in reversed(files):
            try:
                self.stages, of = _read(file)
            except Exception as error:  # whatever is wrong with it, the one before may be whole
                faults.append(f"{file.name}: {' '.join(str(error).split())[:200]}")
                self._say(f"{self.folder / file.name} is damaged and not used: {faults[-1]}")
                continue
            if difference := _difference(of, identity):
                raise BadInput(f"{file}: is a checkpoint of another fit: {difference}; name another folder")
            self._say(f"going on from {file}")
            return
        if faults:
            raise BadInput(
                f"{self.folder}: no checkpoint in it can be read ({faults[0]}); remove them, or name another "
                "folder"
            )

    def keep(self, name: str, state: Callable[[], Saved], now: bool) -> None:
        """Write the state of a stage, where it is due."""
        at = time.monotonic()
        took, self._seen = at - self._seen, at
        if not now and at + took - self._written < PERIOD:
            return
        self.stages[name] = state()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._number += 1
        _write(self.folder / f"checkpoint-{self._number:06}.safetensors", self.stages, self._identity)
        for file in self._files()[:-KEPT]:
            file.unlink(missing_ok=True)
        self._written = self._seen = time.monotonic()

    def _files(self) -> list[Path]:
        """Return the checkpoints in the folder, by their numbers."""
        return sorted(self.folder.glob("checkpoint-[0-9]*.safetensors"), key=_number)


def identity(table: Table, settings: Any, ranks: Ranks) -> dict[str, Any]:
    """Return what a checkpoint is of: the table of all ranks, and the settings, a dataclass.

    The number of iterations is not in it, so that a fit can go on for longer.
    """
    assert table.codes is not None
    assert table.classes is not None
    names = [class_text(value) for value in table.classes]
    about = {
        "rows": int(ranks.sum(table.rows.shape[0])),
        "features": list(table.feature_names),
        "classes": names,
        "checksum of the labels": _sum(
            ranks, _row_weights(table, len(table.codes)) * (table.codes.astype(np.uint64) + np.uint64(1))
        ),
        "checksum of the features": _features(table, ranks),
    }
    given = dataclasses.asdict(settings)
    del given["max_iter"]
    settings_of = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
    return json.loads(json.dumps({**about, **settings_of}))


def _features(table: Table, ranks: Ranks) -> str:
    """Return Σ_rows w_row Σ_columns w_column·bits mod 2⁶⁴, which does not depend on the shares of ranks."""
    columns = _mixed(np.arange(table.rows.shape[1], dtype=np.uint64))
    total = np.zeros((), np.uint64)
    for here, x in blocks(table.rows):
        array = as_array(x)
        bits = array.view(f"u{array.itemsize}").astype(np.uint64)
        bits *= columns
        total += (_row_weights(table, here.stop - here.start, here.start) * bits.sum(axis=1)).sum()
    return _sum(ranks, total)


def _row_weights(table: Table, count: int, start: int = 0) -> np.ndarray:
    first = table.start + start
    return _mixed(np.arange(first, first + count, dtype=np.uint64))


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Return 64 bits for each number, without a pattern (the finalizer of SplitMix64)."""
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _sum(ranks: Ranks, parts: np.ndarray) -> str:
    each = ranks.gather(int(parts.sum(dtype=np.uint64)))
    return f"{sum(each) % 2**64:016x}"


def _difference(was: dict[str, Any], given: dict[str, Any]) -> str | None:
    """Return the first difference between two identities as a clause, None where there is none."""
    for name, value in given.items():
        if name not in was:
            return f"{name} was not known to it"
        if was[name] == value:
            continue
        if isinstance(value, list) and isinstance(was[name], list):
            odd = [each for each in [*was[name], *value] if (each in value) != (each in was[name])]
            return f"its {name} are others" + (
                f", {quoted(odd[0])} for one" if odd else " or in another order"
            )
        if name.startswith("checksum"):
            return f"{name.removeprefix('checksum of ')} hold other values"
        return f"{name} was {was[name]} and is {value}"
    return None


def _number(file: Path) -> int:
    digits = file.stem.removeprefix("checkpoint-")
    return int(digits) if digits.isdecimal() else 0


def _digest(text: str, arrays: dict[str, np.ndarray]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        found.update(np.ascontiguousarray(arrays[name]).data)
    return found.hexdigest()


def _write(path: Path, stages: dict[str, Saved], of: dict[str, Any]) -> None:
    from safetensors.numpy import save

    about = {name: saved.about for name, saved in stages.items()}
    text = json.dumps({"format": FORMAT, "version": VERSION, "of": of, "stages": about})
    arrays = {
        f"{stage}/{name}": np.ascontiguousarray(array)
        for stage, saved in stages.items()
        for name, array in saved.arrays.items()
    }
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(arrays, metadata={"xent": text, "sha256": _digest(text, arrays)}))


def _read(path: Path) -> tuple[dict[str, Saved], dict[str, Any]]:
    """Return the stages in a file, and what they are of; raise whatever is wrong with it."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    text = metadata.get("xent", "")
    if metadata.get("sha256") != _digest(text, arrays):
        raise ValueError("its contents do not have the SHA-256 that it names")
    about = json.loads(text)
    if about["format"] != FORMAT or about["version"] > VERSION:
        raise ValueError(f"it is of format {about['format']}, version {about['version']}")
    stages = {
        stage: Saved({n.partition("/")[2]: a for n, a in arrays.items() if n.startswith(f"{stage}/")}, state)
        for stage, state in about["stages"].items()
    }
    return stages, about["of"]
