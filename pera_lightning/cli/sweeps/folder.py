"""A sweep's folder: its lock, `sweep.json` and `sweep.csv`, and the state of the runs in it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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


def read_sweep(folder: Path, keys: Iterable[str]) -> dict[str, Any] | None:
    """Reads what an earlier sweep has written into a folder; None without one.

    Args:
        folder: folder of the sweep.
        keys: keys of the grid; more values and seeds are fine, other keys are not.

    Raises:
        ConfigurationError: for a path that is a file, or a folder that holds other things or a sweep over other keys.
        DataError: where `sweep.json` is damaged.
    """
    if not folder.exists():
        return None
    file = folder / FILE
    if not file.is_file():
        if folder.is_file():
            raise ConfigurationError(f"--output {folder} is a file: give a folder")
        # Besides the lock a sweep that was killed leaves an unfinished sweep.json.
        if others := [path.name for path in folder.iterdir() if not path.name.startswith(".sweep.")]:
            raise ConfigurationError(f"--output {folder} holds no sweep but {listed(sorted(others))}: give another")
        return None
    try:
        sweep = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda name: None)  # NaN of old
        before = dict(sweep["grid"])
        if not all(isinstance(sweep[key], dict) for key in ("reference", "config")):
            raise TypeError("not a sweep's")
        _ = [(record["name"], record["status"]) for record in sweep["runs"]]
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise DataError(f"{file} is damaged, or of something else: give another --output, or remove it") from error
    if before.keys() != {*keys}:
        was, now = (listed(names) or "seeds only" for names in (before, keys))
        raise ConfigurationError(
            f"--output {folder} holds a sweep over {was}, and this one is over {now}: give another --output"
        )
    return sweep


def check_same(folder: Path, sweep: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises `ConfigurationError` where a folder's sweep has other settings than `config`, whatever its paths."""
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
    with os.fdopen(lock):
        try:
            flock(lock, LOCK_EX | LOCK_NB)  # the kernel's: it goes with the last process that holds it
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):  # others: some network disks have no locks
                raise ConfigurationError(
                    f"{folder} is in use by another sweep, or by a run that one left behind: wait for its end, or give "
                    "another --output"
                ) from None
        yield lock


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
    """Writes `sweep.json`, with a summary that is new, and `sweep.csv`; each completely or not at all.

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
    end, begun = written(run / "adapter" / "adapter_config.json"), written(run / "config.yaml")
    return 0 < begun <= end and end >= _last_checkpoint(run)


def is_complete(run: Path, record: Mapping[str, Any] | None) -> bool:
    """Whether a run's results are there, are those that the sweep wrote down, and are newer than its checkpoints."""
    if record is None or record["status"] != COMPLETE or not record["results"]:
        return False
    file = run / record["results"]
    # A test by hand with other words would write other results into the same place.
    same = file.is_file() and digest(file) == record["results_sha256"]
    return same and written(file) >= _last_checkpoint(run)


def find_results(run: Path) -> Path | None:
    """The newest results of a run, of whichever checkpoint, in its folder, else in one that it keeps for a protocol."""
    own = [*run.glob(RESULTS), *run.glob("results-*.json")]
    return max(own or run.glob(f"*/**/{RESULTS}"), key=written, default=None)


def digest(file: Path) -> str:
    """Sha256 (hex) of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def written(file: Path | None) -> int:
    """Nanoseconds at which a file was last written; 0 where it does not exist."""
    return file.stat().st_mtime_ns if file is not None and file.is_file() else 0


def _last_checkpoint(run: Path) -> int:
    return max(map(written, run.glob("checkpoints/*.ckpt")), default=0)
