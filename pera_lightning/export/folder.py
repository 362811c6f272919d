"""Output folders that are whole or not there: written beside their final name and renamed at the end."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from glob import escape
from pathlib import Path

from pera_lightning.errors import CheckpointError, ConfigurationError, listed, megabytes

# One of these is in every folder that is exported, in formats of this package, peft, transformers, timm or diffusers.
MARKERS = ("adapter_config.json", "config.json", "model_index.json", "pytorch_lora_weights.safetensors")
# And nothing but files that end so, and the folders of a diffusers pipeline, which hold such files.
_ENDINGS = (".json", ".safetensors", ".txt", ".jinja", ".model", ".md")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def output_folder(path: str | Path, *, overwrite: bool = False, needed: int = 0) -> Iterator[Path]:
    """A fresh folder to write into, which gets the name `path` when the context ends without an error.

    It lies beside `path`, on the same disk. After an error nothing is left of it; what a process that was killed has
    left is removed by the next one. A folder that is overwritten is there until the new one is complete.

    Args:
        path: the folder's name; parents are made.
        overwrite: whether an empty folder or an earlier export of that name is replaced.
        needed: bytes that are going to be written, about.

    Yields:
        The folder to write into.

    Raises:
        ConfigurationError: where `path` exists, or must not be replaced.
        CheckpointError: where the disk has no room, or the folder cannot be made.
    """
    check_output_folder(path, overwrite=overwrite)
    target = Path(path).resolve()  # of a link, what it points to is replaced
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _tidy(target)
        _check_room(path, target, needed)
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target)))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror}): give another --output") from None
    lock = os.open(made, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks have no locks
            flock(lock, LOCK_EX)  # held while this process lives, see `_tidy`
        try:
            yield made
            _finish(made)
            check_output_folder(path, overwrite=overwrite)  # it may have been made meanwhile
            _rename(made, target)
        except Exception as error:
            if not _is_full(error):
                raise
            shutil.rmtree(made, ignore_errors=True)  # so that its room counts as free
            raise CheckpointError(_no_room(path, target, needed)) from None
    finally:
        os.close(lock)
        shutil.rmtree(made, ignore_errors=True)


def check_output_folder(path: str | Path, *, overwrite: bool = False, apart: Iterable[str | Path] = ()) -> None:
    """Raises `ConfigurationError` where `output_folder` would refuse `path`; to be told before the work is done.

    Args:
        path: as for `output_folder`.
        overwrite: likewise.
        apart: files and folders that are read, and that `path` must neither be, hold, nor lie in.
    """
    if not str(path).strip():
        raise ConfigurationError(f"{str(path)!r} is no name of a folder: give another --output")
    target = Path(path).resolve()
    for other in (Path(other).resolve() for other in apart if Path(other).exists()):
        if target.is_relative_to(other) or other.is_relative_to(target):
            raise ConfigurationError(
                f"{path} and {other}, which is read, are or hold one another: give another --output"
            )
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigurationError(f"{path} is a file: give another --output")
    if not overwrite:
        raise ConfigurationError(f"{path} exists; give another --output, or --overwrite")
    here, home = Path.cwd().resolve(), Path.home().resolve()
    if any(folder.is_relative_to(target) for folder in (here, home)):
        raise ConfigurationError(f"{path} holds the working directory or the home: it is not overwritten")
    names = sorted(entry.name for entry in target.iterdir())
    foreign = [entry.name for entry in sorted(target.iterdir()) if not _exported(entry)]
    if "adapter.safetensors" in names:
        raise ConfigurationError(
            f"{path} is an adapter folder of this package: delete it first, or give another --output"
        )
    weights = list(target.rglob("*.safetensors"))
    if names and (foreign or not weights or not any(marker in names for marker in MARKERS)):
        what = listed(foreign or names, 3)
        raise ConfigurationError(f"{path} is no earlier export, it holds {what}: it is not overwritten; give another")


def _exported(entry: Path) -> bool:
    """Whether an entry of a folder may come from an export."""
    if entry.is_symlink():
        return False
    if entry.is_file():
        return entry.name.endswith(_ENDINGS)
    inside = (entry.parent / "model_index.json").is_file()
    return inside and all(file.is_file() and file.name.endswith(_ENDINGS) for file in entry.iterdir())


def _tidy(target: Path) -> None:
    """Removes what processes that were killed have left of `target`, and puts back what they had set aside."""
    aside = _aside(target)
    if aside.exists():
        if target.exists():
            shutil.rmtree(aside)
        else:  # killed between the two renames
            aside.rename(target)
    for folder in target.parent.glob(f"{escape(_prefix(target))}????????"):
        with suppress(OSError):  # a living process writes it, or another one has removed it
            handle = os.open(folder, os.O_RDONLY)
            try:
                flock(handle, LOCK_EX | LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _prefix(target: Path) -> str:
    return f".{target.name}.writing-"


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _check_room(path: str | Path, target: Path, needed: int) -> None:
    if shutil.disk_usage(target.parent).free < needed:
        raise CheckpointError(_no_room(path, target, needed))


def _finish(folder: Path) -> None:
    """Gives folder and files the usual permissions, which temporary ones lack, and syncs the files to the disk."""
    mask = os.umask(0)
    os.umask(mask)
    for entry in [folder, *folder.rglob("*")]:
        entry.chmod((0o777 if entry.is_dir() else 0o666) & ~mask)
        if entry.is_file():
            handle = os.open(entry, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _rename(made: Path, target: Path) -> None:
    if not target.exists():
        made.rename(target)
        return
    aside = _aside(target)
    target.rename(aside)
    try:
        made.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full; Rust's (safetensors) says it in its text only."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    found = re.search(r"\(os error (\d+)\)", str(error))
    return found is not None and int(found[1]) in _FULL


def _no_room(path: str | Path, target: Path, needed: int) -> str:
    free = megabytes(shutil.disk_usage(target.parent).free)
    size = f"it needs about {megabytes(needed)}, and its" if needed else "its"
    return f"{path} could not be written: {size} disk has {free} free; make room, or give another --output"
