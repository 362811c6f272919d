"""Reading text, and writing files and folders that are whole or not there; without heavy imports, for every layer."""

from __future__ import annotations

import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from pera_lightning.errors import DataError

if TYPE_CHECKING:
    from PIL import Image


def read_text(path: Path) -> str:
    """A file as text.

    Raises:
        DataError: where it is missing, or not in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark does not belong to the text
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from error


def atomic_write(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part.

    Args:
        path: the file; its folder exists.
        data: the content.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` for a library to write to; at the end that file gets the name `path` in one step.

    After an error nothing is left of it, and a file that was there stays.

    Args:
        path: the file; its folder exists.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a fresh folder beside `path`; at the end it gets the name `path`, in place of a folder of that name.

    A folder that is replaced is there until the new one is complete. After an error nothing is left of the new one;
    what a process that was killed has left is removed by the next one.

    Args:
        path: the folder; parents are made.
    """
    path = path.resolve()  # of a link, what it points to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, prefix = path.with_name(f".{path.name}.replaced"), f".{path.name}.writing-"
    if aside.exists() and not path.exists():  # a process was killed between the two renames
        aside.rename(path)
    shutil.rmtree(aside, ignore_errors=True)
    for left in path.parent.glob(f"{escape(prefix)}????????"):
        with _locked(left) as ours:
            if ours:  # else a living process writes it
                shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
    try:
        with _locked(made):
            yield made
            _finish(made)
            _swap(made, path, aside)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a folder as long as this process is in the context; yields whether it could."""
    handle, ours = None, False
    with suppress(ImportError, OSError):  # Windows, a network disk without locks, or another process has it
        from fcntl import LOCK_EX, LOCK_NB, flock

        handle = os.open(folder, os.O_RDONLY)
        flock(handle, LOCK_EX | LOCK_NB)
        ours = True
    try:
        yield ours
    finally:
        if handle is not None:
            os.close(handle)


def _finish(folder: Path) -> None:
    """Gives folder and files the usual permissions, which some writers leave out, and syncs the files to the disk."""
    mask = os.umask(0)
    os.umask(mask)
    for entry in [folder, *folder.rglob("*")]:
        entry.chmod((0o777 if entry.is_dir() else 0o666) & ~mask)
        if entry.is_file():
            _sync(entry)


def _swap(made: Path, path: Path, aside: Path) -> None:
    """Renames `made` to `path`; a folder of that name is set aside until that is done."""
    if path.exists():
        path.rename(aside)
    try:
        made.rename(path)
    except BaseException:
        if aside.exists():
            aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=3)  # twice as fast as Pillow's 6, for a tenth more bytes
    return data.getvalue()
