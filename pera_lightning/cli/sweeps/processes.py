"""The processes of a sweep, one after the other: where their output goes, and what a signal to the sweep does."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pera_lightning.errors import DataError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def program() -> list[str]:
    """The words that start this program again: a script, or a module by ``-m``."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        return [sys.executable, sys.argv[0]]
    return [sys.executable, "-m", spec.name.removesuffix(".__main__")]


class Processes:
    """Runs a process at a time; within the context, a signal is handed to it, and none begins after one.

    The process gets SIGTERM, whatever the signal was: at that a fit saves a checkpoint and ends with 0. It has a
    session of its own, so that Ctrl-C in a terminal reaches the sweep alone. At a second signal it is killed.

    `lock` is that of the sweep's folder, which the processes inherit.
    """

    def __init__(self, lock: int) -> None:
        self.lock = lock
        self.signal: signal.Signals | None = None  # the last that was sent
        self._child: subprocess.Popen | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Processes:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._child is not None and self._child.poll() is None:  # after an error of the sweep itself
            self._kill()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = self.signal is None, signal.Signals(number)  # the second one kills
        if self._child is not None and self._child.poll() is None:
            self._child.terminate() if first else self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            # The group: with several devices the fit has started processes of its own.
            os.killpg(self._child.pid, signal.SIGKILL)  # type: ignore[union-attr]

    def run(self, words: Sequence[str], log: Path) -> int:
        """Runs a command to its end, and gives its exit code, negative for a signal; what it prints goes to `log`."""
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                file.write(f"$ {shlex.join(words)}\n".encode())
                file.flush()
                options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "pass_fds": (self.lock,)}
                self._child = subprocess.Popen(words, start_new_session=True, **options)  # type: ignore[call-overload]
        except OSError as error:
            raise DataError(f"{log} cannot be written, or {words[0]} not started ({error.strerror})") from None
        if self.signal is not None:  # it came before there was a process to hand it to
            self._child.terminate()
        return self._child.wait()


def ended_by(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}{', out of memory?' if name == 'SIGKILL' else ''}"
