"""The lock of a run's folder: one fit at a time, on one machine or on several that share a disk.

A file that is made in one step (`O_EXCL`, which network disks know too, as they do not all know `flock`) and says who
holds it. A process that was killed leaves it behind: on its own machine the next fit sees that the process is gone; on
another machine it counts as gone when it has not touched the file for ten minutes.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pera_lightning.errors import ConfigurationError

FILE = ".fit.lock"
_BEAT, _SILENT = 60, 600  # seconds: between signs of life, and without one until a holder elsewhere counts as gone

_held: dict[str, str] = {}  # locks of this process: path, and the token in the file
_beating: int | None = None  # the process whose thread touches them


class FolderLock:
    """Keeps other fits out of a folder, from `take` to `release`; one process of a run holds it for all of them."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._token = ""

    def take(self, folder: Path) -> None:
        """Makes the folder and locks it.

        Raises:
            ConfigurationError: where another fit is at work in it, or nothing can be written into it.
        """
        if self.path is not None:
            return
        path, self._token = (folder / FILE).absolute(), secrets.token_hex(8)
        own = {**_this_process(), "token": self._token}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while not _create(path, json.dumps(own)):
                self._take_over(path, own)
        except OSError as error:
            raise ConfigurationError(f"{folder} cannot be written ({error.strerror}): give another folder") from None
        self.path = path
        _held[str(path)] = self._token
        _keep_beating()

    def _take_over(self, path: Path, own: dict[str, Any]) -> None:
        """Removes a lock that was left behind; raises `ConfigurationError` for one that is held."""
        holder, seen = _read(path)
        if holder is None and seen is None:  # released just now
            return
        why = _left_behind(holder or {}, seen or 0.0, own, path)
        if why is None:
            raise ConfigurationError(_in_use(path, holder or {}))
        # By another name first: of two fits that take it over, one could otherwise remove the other's new lock.
        aside = path.with_name(f"{FILE}.{self._token}")
        with suppress(FileNotFoundError):
            path.rename(aside)
            if _read(aside)[0] != holder:
                aside.rename(path)
                return
            aside.unlink()
            print(f"{path.parent}: an earlier fit left it locked ({why}); this one takes it over", flush=True)

    def check(self) -> None:
        """Raises `ConfigurationError` where another fit has taken the folder over meanwhile."""
        if self.path is not None and (holder := _read(self.path)[0] or {}).get("token") != self._token:
            path, self.path = self.path, None
            _held.pop(str(path), None)
            raise ConfigurationError(_in_use(path, holder))

    def release(self) -> None:
        """Gives the folder free."""
        path, self.path = self.path, None
        if path is None:
            return
        _held.pop(str(path), None)
        if (_read(path)[0] or {}).get("token") == self._token:
            path.unlink(missing_ok=True)


def _create(path: Path, text: str) -> bool:
    """Writes a file that does not exist yet; False where it does."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        file.write(text)
    return True


def _read(path: Path) -> tuple[dict[str, Any] | None, float | None]:
    """Who holds a lock (None where that is not yet written), and when the file was touched (None without one)."""
    try:
        # Opened, and not only asked for its time: a network disk then asks its server.
        with path.open(encoding="utf-8", errors="replace") as file:
            text, seen = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None, None
    try:
        holder = json.loads(text)
    except ValueError:
        holder = None
    return holder if isinstance(holder, dict) else None, seen


def _left_behind(holder: dict[str, Any], seen: float, own: dict[str, Any], path: Path) -> str | None:
    """Why the holder of a lock counts as gone, in words; None where it is at work."""
    pid = holder.get("pid")
    if isinstance(pid, int) and (holder.get("host"), holder.get("pids")) == (own["host"], own["pids"]):
        if pid == own["pid"] and holder.get("started") == own["started"]:
            return None if _held.get(str(path)) == holder.get("token") else "by this process"
        started = _started(pid)
        gone = started is None or (holder.get("started") or started) != started  # or the number is another's by now
        return f"its process {pid} has ended" if gone else None
    # A job that SLURM has started again, perhaps on another machine, was alone in its folder.
    job, starts = own["job"]
    before = holder.get("job") or [None, 0]
    if job is not None and before[0] == job and before[1] < starts:
        return f"by this job, {job}, before it was requeued"
    silent = _now(path.parent) - seen
    return f"{holder.get('host')} gave no sign for {silent / 60:.0f} minutes" if silent > _SILENT else None


def _in_use(path: Path, holder: dict[str, Any]) -> str:
    since = holder.get("since", "unknown")
    return (
        f"{path.parent} is in use by another fit (host {holder.get('host', 'unknown')}, process "
        f"{holder.get('pid', 'unknown')}, since {since}): wait for its end, or give this one a folder of its own; if "
        f"it no longer runs, delete {path}"
    )


def _this_process() -> dict[str, Any]:
    """Who this process is to others: host and its table of processes (containers have their own), number, start."""
    try:
        pids: str | None = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        pids = None
    return {
        "host": socket.gethostname(),
        "pids": pids,
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M"),
        "job": [_job(), int(os.environ.get("SLURM_RESTART_COUNT") or 0)],
    }


def _job() -> str | None:
    parts = [os.environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    return ".".join(part for part in parts if part) or None


def _started(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks, "" where it is not known; None where it does not live."""
    try:
        # After the name in parentheses come the state, and as the 20th the start: proc(5).
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # it lives, and is somebody else's
    return ""


def _now(folder: Path) -> float:
    """The time by the clock of the disk, which the times of its files are in."""
    probe = folder / f"{FILE}.{secrets.token_hex(8)}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _keep_beating() -> None:
    """Starts the thread, one a process, that touches its locks."""
    global _beating
    if _beating != os.getpid():  # a forked process has no threads of its parent's
        _beating = os.getpid()
        threading.Thread(target=_beat, name="fit locks", daemon=True).start()


def _beat() -> None:
    while True:
        time.sleep(_BEAT)
        for path in [*_held]:
            with suppress(OSError):
                os.utime(path)
