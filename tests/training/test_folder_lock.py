"""One fit at a time in a folder: a lock that is held refuses, one that was left behind is taken over."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from pera_lightning.errors import ConfigurationError
from pera_lightning.training import folder_lock
from pera_lightning.training.folder_lock import FILE, FolderLock


def held_by(folder: Path, silent: float = 0, **other) -> Path:
    """A lock of another process, not touched for some seconds; by default of the one that started this one."""
    pid = os.getppid()
    holder = {**folder_lock._this_process(), "pid": pid, "started": folder_lock._started(pid), "token": "x", **other}
    path = folder / FILE
    path.write_text(json.dumps(holder))
    os.utime(path, (time.time() - silent,) * 2)
    return path


def ended() -> int:
    """The number of a process that has ended."""
    if not (pid := os.fork()):
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_a_second_fit_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    first, second = FolderLock(), FolderLock()
    first.take(tmp_path / "run")
    first.take(tmp_path / "run")  # its own
    with pytest.raises(ConfigurationError, match=rf"in use by another fit \(host .*, process {os.getpid()}, since"):
        second.take(tmp_path / "run")
    first.release()
    second.take(tmp_path / "run")
    first.release()  # a second time: not the other's
    assert (tmp_path / "run" / FILE).exists()
    second.release()
    assert not [*(tmp_path / "run").iterdir()]


@pytest.mark.parametrize(
    ("silent", "other"),
    [
        (9999, {}),  # on this machine only the process counts
        # Elsewhere, or in a container on this machine, the numbers mean other processes.
        (300, {"host": "elsewhere", "pid": 2**30}),
        (300, {"pids": "pid:[1]", "pid": 2**30}),
    ],
)
def test_who_is_at_work(tmp_path: Path, silent: float, other: dict) -> None:
    path = held_by(tmp_path, silent, **other)
    with pytest.raises(ConfigurationError, match=f"delete {path}"):
        FolderLock().take(tmp_path)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("silent", "other", "why"),
    [
        (0, {"pid": "ended"}, "has ended"),
        (0, {"started": "1"}, "has ended"),  # the number is another process's by now
        (0, {"pid": os.getpid(), "started": "mine"}, "by this process"),
        (1200, {"host": "elsewhere"}, "elsewhere gave no sign for 20 minutes"),
        (0, {"host": "elsewhere", "job": ["7.0", 0]}, "before it was requeued"),
    ],
)
def test_what_was_left_behind(tmp_path: Path, silent: float, other: dict, why: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    if other.get("pid") == "ended":
        other = {"pid": ended()}
    if other.get("started") == "mine":
        other = {**other, "started": folder_lock._started(os.getpid())}
    held_by(tmp_path, silent, **other)
    lock = FolderLock()
    lock.take(tmp_path)
    assert why in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match="in use"):
        FolderLock().take(tmp_path)
    lock.release()


def test_a_lock_that_is_not_written_yet_is_held(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    with pytest.raises(ConfigurationError, match="in use"):
        FolderLock().take(tmp_path)


def test_who_lost_the_folder_is_told(tmp_path: Path) -> None:
    lock = FolderLock()
    lock.take(tmp_path)
    held_by(tmp_path)
    with pytest.raises(ConfigurationError, match=f"process {os.getppid()}"):
        lock.check()
    lock.release()
    assert (tmp_path / FILE).exists()


def test_a_holder_gives_signs_of_life(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(folder_lock, "_BEAT", 0.01)
    monkeypatch.setattr(folder_lock, "_beating", None)
    lock = FolderLock()
    lock.take(tmp_path)
    os.utime(tmp_path / FILE, (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / FILE).stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / FILE).stat().st_mtime > 0
    lock.release()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"cannot be written .*: give another folder"):
        FolderLock().take(tmp_path / "file" / "run")
