"""Reading text, and writing files and folders in full or not at all; without heavy imports, for every layer."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import unicodedata
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pera_lightning.errors import DataError, closest, shorten

if TYPE_CHECKING:
    from PIL import Image

_CHUNK = 1 << 20  # bytes
_ABANDONED = 24 * 3600  # seconds after which an unfinished folder belongs to no living process


def read_text(path: Path) -> str:
    """A file as text; `DataError` where it is missing, no regular file, or not in UTF-8."""
    try:
        require_regular(path)
        return path.read_text(encoding="utf-8-sig")  # a byte order mark does not belong to the text
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def require_regular(path: Path) -> None:
    """Raises `OSError` for what is missing, and for pipes, sockets and devices: reading one could wait for ever."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder, the system's own message says it
        raise OSError("it is a pipe, a socket or a device, and a regular file is needed")


def parse_json(text: str | bytes) -> Any:
    """Parses JSON; every failure is a `ValueError`, also nesting that is too deep and numbers that are too long."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def nfc(text: str) -> str:
    """Composes a name's accents: tools of macOS write "é" as two characters, and it is to be the same name."""
    return unicodedata.normalize("NFC", text)


def closest_beside(path: Path) -> str:
    """Words a suggestion for a path that does not exist, from the names that its folder has; see `closest`."""
    return closest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])


def check_crcs(file: Path | BinaryIO) -> None:
    """Raises `zipfile.BadZipFile` where a record is not what was written: torch compares no CRC when it reads.

    What is no zip archive at all is left to whoever reads it.
    """
    if not _begins_as_zip(file):
        return
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if record.CRC:  # zero where `torch.serialization.set_crc32_options` has turned them off
                with archive.open(record) as content:
                    while content.read(_CHUNK):  # at its end the CRC is compared
                        pass
    if not isinstance(file, Path):
        file.seek(0)


def what_failed(error: Exception) -> str:
    """The kind of an error of reading a file, and what it says, in one line.

    torch's refusals to unpickle advise to read the file with ``weights_only=False``, which would run what it says, and
    name the reason only after that: here the reason alone is given.
    """
    text = shorten(str(error))
    if text.startswith("Weights only load failed"):
        named = re.search(r"GLOBAL (\S+)", text)
        found = f"it asks for {named[1]}" if named else "it holds something else"
        text = f"only tensors and primitives are read, and {found}"
    return f"{type(error).__name__}: {text[:200]}"


def _begins_as_zip(file: Path | BinaryIO) -> bool:
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return _begins_as_zip(opened)
    start = file.read(4)
    file.seek(0)
    return start == b"PK\x03\x04"


def atomic_write(path: Path, data: bytes) -> None:
    """Writes a file, in a folder that exists, so that a reader sees the old content or the new, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` for a library to write to; at the end that file gets the name `path` in one step.

    Its folder exists. After an error nothing is left of it, and a file that was there stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        _sync(temporary)  # else a crash could leave the new name over an empty file
        os.replace(temporary, path)  # one step for every reader
    finally:
        temporary.unlink(missing_ok=True)


def dated_path(folder: Path, name: str, when: float, suffix: str = "") -> Path:
    """A path in a folder that does not exist yet, ``NAME-DATE-TIME``; with a counter where that is taken."""
    dated = f"{name}-{time.strftime('%Y-%m-%d-%H%M', time.localtime(when))}"
    names = (f"{dated}{suffix}" if k == 1 else f"{dated}-{k}{suffix}" for k in count(1))
    return next(path for path in (folder / each for each in names) if not os.path.lexists(path))


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a fresh folder beside `path`; at the end it gets the name `path`, in place of a folder of that name.

    Parents are made. A folder that is replaced is there until the new one is complete. After an error nothing is left
    of the new one; what a killed process has left is removed a day later, when the same folder is written again.
    """
    path = path.resolve()  # of a link, what it points to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, prefix = path.with_name(f".{path.name}.replaced"), f".{path.name}.writing-"
    if aside.exists() and not path.exists():  # a process was killed between the two renames
        aside.rename(path)
    shutil.rmtree(aside, ignore_errors=True)
    for left in path.parent.glob(f"{escape(prefix)}????????"):
        with suppress(FileNotFoundError):  # another process may be writing it, and finish just now
            if left.stat().st_mtime < time.time() - _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
    try:
        yield made
        _finish(made)
        _swap(made, path, aside)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _finish(folder: Path) -> None:
    """Gives folder and files the usual permissions, which some writers leave out, and syncs the files to the disk."""
    mask = os.umask(0)  # the one way to read it is to set it
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
    """An image as a PNG file."""
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=3)  # twice as fast as Pillow's 6, for a tenth more bytes
    return data.getvalue()
