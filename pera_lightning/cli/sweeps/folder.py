"""A sweep's folder: its lock, `sweep.json` and `sweep.csv`, and the state of the runs in it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any

from pera_lightning.cli.sweeps.choice import best_settings
from pera_lightning.cli.sweeps.plan import Run, differences
from pera_lightning.cli.sweeps.summary import COMPLETE, as_csv, summarise
from pera_lightning.errors import ConfigurationError, DataError, listed
from pera_lightning.files import atomic_write

FILE, TABLE, LOG, LOCK = "sweep.json", "sweep.csv", "sweep.log", ".sweep.lock"
RESULTS = "results.json"


def read_sweep(folder: Path) -> dict[str, Any] | None:
    """Reads what an earlier sweep has written into a folder; None without one.

    Raises:
        ConfigurationError: for a path that is a file, or a folder that holds other things.
        DataError: where `sweep.json` is damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"--output {folder} is a file: give a folder")
    file = folder / FILE
    if not file.is_file():
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".sweep.")) if folder.is_dir() else []
        if others:
            raise ConfigurationError(f"--output {folder} holds no sweep but {listed(others)}: give a new folder")
        return None
    try:
        sweep = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda name: None)  # NaN of old
        if all(isinstance(sweep[key], dict) for key in ("reference", "config", "grid")):
            for record in sweep["runs"]:
                _ = record["name"], record["status"]
            return sweep
    except (ValueError, LookupError, TypeError, OSError):
        pass
    raise DataError(f"{file} is damaged, or of something else: give another --output, or remove it and begin anew")


def check_keys(folder: Path, sweep: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raises `ConfigurationError` where a folder holds a sweep over other keys; more values and seeds are fine."""
    keys = list(keys)
    if set(keys) != set(sweep["grid"]):
        before, now = (listed(names) or "seeds only" for names in (sweep["grid"], keys))
        raise ConfigurationError(
            f"--output {folder} holds a sweep over {before}, and this one is over {now}: give another --output"
        )


def check_same(folder: Path, sweep: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises `ConfigurationError` where a folder holds a sweep with other settings than these.

    Args:
        folder: folder of the sweep, for the message.
        sweep: content of `sweep.json`.
        config: config of the sweep's reference setting, parsed now; contents are compared, not paths or words.
    """
    if found := differences(sweep["config"], config):
        raise ConfigurationError(
            f"--output {folder} holds a sweep with other settings: {listed(found, 3)}; give another --output"
        )


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Makes a folder and keeps other sweeps out of it.

    Yields:
        The lock's file descriptor. A process that inherits it keeps the folder locked while it lives, also where the
        sweep itself has been killed.

    Raises:
        ConfigurationError: where another sweep is at work, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written ({error.strerror}): give another --output") from None
    # The lock is the kernel's: it goes with the last process that holds it, however that ends.
    try:
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):  # others: some network disks have no locks
                owner = os.pread(lock, 100, 0).decode(errors="replace").strip()
                raise ConfigurationError(
                    f"{folder} is in use by another sweep, or by a run that one left behind (process {owner}): wait "
                    "for its end, or end it"
                ) from None
        note_owner(lock, os.getpid())
        yield lock
    finally:
        os.close(lock)


def note_owner(lock: int, *processes: int) -> None:
    """Writes into the lock's file who holds it, for the message of the next sweep."""
    with suppress(OSError):  # a full disk is told where it matters
        os.ftruncate(lock, 0)
        os.pwrite(lock, " ".join(map(str, processes)).encode(), 0)


def new_record(run: Run) -> dict[str, Any]:
    """A run that has not begun, as `sweep.json` holds it."""
    return {
        "name": run.name,
        "seed": run.seed,
        "values": dict(run.values),
        "folder": run.name,
        "status": "waiting",
        "error": None,
        "selection": None,
        "selected_on_test": False,
        "metrics": {},
        "fit_seconds": 0.0,
        "test_seconds": 0.0,
        "trainable_parameters": None,
        "method": None,
        "protocol": {},
        "results": None,
        "results_sha256": None,
    }


def write_sweep(folder: Path, sweep: dict[str, Any]) -> None:
    """Writes `sweep.json`, with a summary that is new, and `sweep.csv`; each whole or not at all.

    Raises:
        DataError: where the disk is full, or the folder gone.
    """
    # Summed up from all runs of the folder, those of earlier sweeps too.
    sweep["summary"] = summarise(sweep["runs"])
    sweep["best"], sweep["best_text"] = best_settings(sweep["summary"])
    try:
        atomic_write(folder / FILE, (json.dumps(sweep, indent=1, allow_nan=False) + "\n").encode())
        atomic_write(folder / TABLE, as_csv(sweep["runs"]).encode())
    except OSError as error:
        raise DataError(
            f"{folder / FILE} cannot be written ({error.strerror}): make room and give the same command again; the "
            "runs so far are kept"
        ) from None


def fit_finished(run: Path) -> bool:
    """Whether the fit of a run's folder came to its end; one that a signal stops exits with 0 too.

    Each fit writes `config.yaml` when it begins, checkpoints while it trains, and the adapter folder at its end only,
    `adapter_config.json` last: where that is the newest of them, the fit is finished.
    """
    end = _written(run / "adapter" / "adapter_config.json")
    begun = _written(run / "config.yaml")
    return None not in (end, begun) and all(end >= time for time in (begun, *_checkpoint_times(run)))  # type: ignore


def is_complete(run: Path, record: Mapping[str, Any] | None) -> bool:
    """Whether a run's results are there, are those that the sweep wrote down, and are newer than its checkpoints."""
    if record is None or record["status"] != COMPLETE or not record["results"]:
        return False
    file = run / record["results"]
    time = _written(file)
    # A test by hand with other words would write other results into the same place.
    if time is None or digest(file) != record["results_sha256"]:
        return False
    return all(time >= written for written in _checkpoint_times(run))


def find_results(run: Path) -> Path | None:
    """The newest `results.json` of a run, in its folder, else in one that it keeps for a protocol."""
    if (run / RESULTS).is_file():
        return run / RESULTS
    return max(run.glob(f"*/**/{RESULTS}"), key=lambda file: file.stat().st_mtime_ns, default=None)


def digest(file: Path) -> str:
    """Sha256 (hex) of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def identity(file: Path | None) -> tuple[int, int] | None:
    """Inode and time of a file, which change when it is written anew with the same content too."""
    if file is None or not file.is_file():
        return None
    found = file.stat()
    return found.st_ino, found.st_mtime_ns


def _written(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.is_file() else None


def _checkpoint_times(run: Path) -> list[int]:
    return [file.stat().st_mtime_ns for file in run.glob("checkpoints/*.ckpt")]
