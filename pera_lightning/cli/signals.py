"""SIGINT (Ctrl-C) and SIGTERM to a command: one line and no traceback, and what it holds is given free.

A fit that trains takes its own notes of both, see `pera_lightning.training.preemption`; this is for all that comes
before, as imports, data and weights that are loaded, and for the other commands.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """A signal has come; a `SystemExit`, so that no library takes it for an error of its own.

    Attributes:
        name: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)  # as a shell says of a program that a signal ended
        self.name = signal.Signals(number).name


class _Handler:
    """Raises `Stopped`, but while somebody else takes note."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.noted: Callable[[], bool] = lambda: False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a data loader's worker, forked from here
            if number != signal.SIGINT:  # Ctrl-C comes to all of them, and the parent decides what it means
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif not self.noted():
            raise Stopped(number)


@contextmanager
def stopping() -> Iterator[None]:
    """Has the signals raise `Stopped` in the main thread; those that are ignored, as under nohup, stay ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        handler = _Handler()
        for number in _SIGNALS:
            # Of a handler that is not Python's nothing is known: it is left alone.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def leave_to(noted: Callable[[], bool]) -> None:
    """Has the signals raise nothing while `noted` is true."""
    for number in _SIGNALS:
        if isinstance(handler := signal.getsignal(number), _Handler):
            handler.noted = noted
