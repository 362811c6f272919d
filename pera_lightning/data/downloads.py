"""Single files from the net: complete or not at all, and the same ones at every later load.

Beside each file lies ``<file>.sha256``, one line in the form that ``sha256sum -c`` reads: the published checksum, or
that of the first download where none is published. What differs from it later is refused.
"""

from __future__ import annotations

import hashlib
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from threading import Thread

from pera_lightning.errors import DataError, shorten
from pera_lightning.files import atomic_path, atomic_write

_TIMEOUT = 60  # seconds without a single byte, or for a chunk
_CHUNK = 1 << 16  # bytes
_PAGES = (b"<!doctype html", b"<html")  # how web pages begin


def fetch(url: str, path: Path, *, sha256: str | None = None) -> Path:
    """Downloads a file unless it exists, and holds it to its checksum either way; many processes may do so at once.

    Args:
        url: address of the file.
        path: where it goes.
        sha256: published checksum (hex); without one that of the first download counts.

    Returns:
        `path`.

    Raises:
        DataError: where the file cannot be had or written, or has another checksum.
    """
    if path.is_file():
        return verified(path, sha256=sha256)
    with _writable(path):
        # A part of a download never has the final name, whatever interrupts it.
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            _download(url, path, temporary)
            given = _sha256(temporary)
            expected = sha256 or recorded(path)
            if expected not in (None, given):
                raise DataError(
                    f"{url} has sha256 {given} and {expected} was expected: the file there has changed, or it is "
                    f"damaged; try again, or put the right file at {path}"
                )
            _record(path, given)  # before the file, so that no file is without one
    return path


def verified(path: Path, *, sha256: str | None = None) -> Path:
    """Holds an existing file to its checksum, which is recorded the first time.

    Args:
        path: the file.
        sha256: published checksum (hex); without one the recorded one counts.

    Raises:
        DataError: with both checksums, where they differ.
    """
    try:
        given = _sha256(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    expected = sha256 or recorded(path)
    if expected is None:
        with _writable(path):
            _record(path, given)
    elif given != expected:
        raise DataError(
            f"{path} has sha256 {given} and {expected} was expected: it was changed or damaged; delete it to download "
            f"it again (or, if the new content is meant, delete {record_path(path).name} beside it)"
        )
    return path


def record_path(path: Path) -> Path:
    """The file that holds the checksum of another."""
    return path.with_name(f"{path.name}.sha256")


def recorded(path: Path) -> str | None:
    """The checksum that was recorded for a file, if any."""
    record = record_path(path)
    if not record.is_file():
        return None
    words = record.read_text(encoding="utf-8", errors="replace").split()
    if not words or len(words[0]) != 64:
        raise DataError(f"{record} holds no sha256; delete it, and {path.name} too if you are not sure of that")
    return words[0].lower()  # as hashlib writes them


def _record(path: Path, sha256: str) -> None:
    # Written once: several processes may be here, and a reader is to find it in one piece.
    if recorded(path) != sha256:
        atomic_write(record_path(path), f"{sha256}  {path.name}\n".encode())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, path: Path, temporary: Path) -> None:
    """Writes what the net has into `temporary`."""
    progress, done = _Progress(), Future[None]()
    # In a thread, since a server may take for ever also over its header, byte by byte; one that is given up dies with
    # its socket, or with the process.
    Thread(target=_transfer, args=(url, path, temporary, progress, done), daemon=True).start()
    chunks = 0
    while not wait([done], _TIMEOUT).done:
        if progress.chunks == chunks:
            progress.given_up = True
            raise DataError(
                f"{url} cannot be had (fewer than {_CHUNK >> 10} kB in {_TIMEOUT} seconds, {progress.size} bytes in "
                f"all): try again later, or put the file at {path} by other means"
            )
        chunks = progress.chunks
    done.result()


@dataclass
class _Progress:
    """What a transfer has done so far."""

    chunks: int = 0
    size: int = 0  # bytes
    given_up: bool = False


def _transfer(url: str, path: Path, temporary: Path, progress: _Progress, done: Future[None]) -> None:
    try:
        _copy(url, path, temporary, progress)
        done.set_result(None)
    except BaseException as error:  # of whatever kind, for the thread that waits
        done.set_exception(error)


def _copy(url: str, path: Path, temporary: Path, progress: _Progress) -> None:
    with _readable(url, path):
        response = urllib.request.urlopen(url, timeout=_TIMEOUT)
    if progress.given_up:
        return
    announced = response.length  # bytes; None where the server does not say
    page = response.headers.get_content_type() == "text/html" and path.suffix not in (".html", ".htm")
    # The net's errors become a DataError where they are raised: an OSError that is left is the disk's.
    with response, temporary.open("wb") as file:
        while not progress.given_up:
            with _readable(url, path):
                chunk = response.read(_CHUNK)
            if page or (not file.tell() and chunk.lstrip()[:14].lower().startswith(_PAGES)):
                raise DataError(
                    f"{url} is a web page and not the file: check the address, log in if the network asks for it, or "
                    f"put the file at {path} by other means"
                )
            if not chunk:
                break
            file.write(chunk)
            progress.chunks, progress.size = progress.chunks + 1, file.tell()
    # Reading piece by piece, the library does not notice that bytes are missing.
    if announced is not None and announced != progress.size:
        raise DataError(f"{url}: the download broke off after {progress.size} of {announced} bytes; try again")


@contextmanager
def _readable(url: str, path: Path) -> Iterator[None]:
    """Turns what goes wrong on the net, or with a wrong address, into a `DataError` in words."""
    try:
        yield
    except (OSError, HTTPException, ValueError) as error:  # URLError and timeouts are OSErrors
        what = shorten(str(getattr(error, "reason", None) or error)) or type(error).__name__
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
            what = f"{error.code} {what}"
        raise DataError(
            f"{url} cannot be had ({what}): check the address, try again when it can be reached, or put the file at "
            f"{path} by other means"
        ) from error


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Turns what goes wrong on the disk into a `DataError` in words."""
    try:
        yield
    except OSError as error:
        folder = path.parent
        free = f"; {shutil.disk_usage(folder).free >> 20} MiB are free there" if folder.is_dir() else ""
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}{free}; make room, or choose another cache_dir"
        ) from error
