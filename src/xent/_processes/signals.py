"""Signals to one rank of several: no rank may leave the others in the middle of a sum.

SIGINT (Ctrl-C reaches every rank, and torchrun sends it again) is noted, once, and rank 0 obeys where all can
follow. SIGTERM, which torchrun sends to the rest when a rank ends, is a ``SystemExit``, so that unfinished
files go; to a rank that is ending already, with something to say, it means nothing. Python runs no handler
while a rank waits inside a collective; a thread that the signal wakes then removes them, and ends the process
after a grace.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from xent._util.atomic_write import discard_unfinished
from xent.errors import Terminated

GRACE = 5.0
"""Seconds from SIGTERM to the end of a process that waits; torchrun kills after 30."""


class CtrlC:
    """A Ctrl-C that was pressed and not yet obeyed; it counts once."""

    def __init__(self) -> None:
        self._pressed = self._obeyed = False

    def press(self, *_: object) -> None:
        """Note it; a signal handler."""
        self._pressed = True

    def take(self) -> bool:
        """Return whether it is to be obeyed now."""
        if self._obeyed or not self._pressed:
            return False
        self._obeyed = True
        return True


@contextlib.contextmanager
def handled() -> Iterator[CtrlC]:
    """Handle signals as a rank must, within the block; outside the main thread Python takes none."""
    ctrl_c = CtrlC()
    if threading.current_thread() is not threading.main_thread():
        yield ctrl_c
        return
    left = threading.Event()
    read, write = os.pipe()
    os.set_blocking(write, False)
    threading.Thread(target=_watch, args=(read, left), daemon=True, name="xent-signals").start()
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    handlers = {
        signal.SIGINT: signal.signal(signal.SIGINT, ctrl_c.press),
        signal.SIGTERM: signal.signal(signal.SIGTERM, _end),
    }
    try:
        yield ctrl_c
    except BaseException:
        handlers[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        left.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(write)


def _end(*_: object) -> None:
    raise Terminated


def _watch(read: int, left: threading.Event) -> None:
    while received := os.read(read, 1):
        if received[0] == signal.SIGTERM and not left.wait(GRACE):
            discard_unfinished()
            os._exit(128 + signal.SIGTERM)
    os.close(read)
