"""Files written under a temporary name, then renamed: by its final name a file is whole or is not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xent.errors import BadInput

_unfinished: set[Path] = set()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path`` to write to; the file is renamed if the block ends well, else removed.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with atomic_write(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> [entry.name for entry in folder.iterdir()]
    ['a.txt']
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    _unfinished.add(temporary)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 is for secrets
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


@contextlib.contextmanager
def folder(path: Path) -> Iterator[None]:
    """Make the folder, and those above it, for the block; what it made goes again if the block fails."""
    made = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for each in made:
            with contextlib.suppress(OSError):  # something else is in it by now
                each.rmdir()
        raise


def discard_unfinished() -> None:
    """Remove temporary files, before the process ends without unwinding."""
    for temporary in list(_unfinished):
        temporary.unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """Raise ``BadInput`` if a file cannot take the path's place."""
    if path.is_dir():
        raise BadInput(f"cannot write to {path}: it is a directory; name a file")


def check_writable(folder: Path) -> None:
    """Raise ``BadInput`` unless files can be made in ``folder``, or in the nearest one above that exists.

    Called before the work whose results go there. It leaves no trace: the folder itself is made when there is
    something to put into it.
    """
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise BadInput(f"cannot write to {folder}: {nearest} is a file, not a directory; name another place")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        why = error.strerror or str(error)
        raise BadInput(f"cannot write to {folder}: {why} in {nearest}; name another place") from error
