"""Single files from the net: whole or not at all, and the same ones at every later load.

Beside each file lies ``<file>.sha256``, one line in the form that ``sha256sum -c`` reads: the published checksum, or
that of the first download where none is published. What differs from it later is refused.
"""

from __future__ import annotations

import hashlib
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

from pera_lightning.errors import ConfigurationError, DataError, shorten
from pera_lightning.files import atomic_path, atomic_write

_TIMEOUT = 60  # seconds without a single byte
_CHUNK = 1 << 20  # bytes


def fetch(url: str, path: Path, *, sha256: str | None = None) -> Path:
    """Downloads a file unless it is there, and holds it to its checksum either way.

    Any number of processes may do so at once.

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
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            given = _download(url, path, temporary)
            expected = sha256 or recorded(path)
            if expected is not None and given != expected:
                raise DataError(
                    f"{url} has sha256 {given} and {expected} was expected: the file there has changed, or it is "
                    f"damaged; try again, or put the right file at {path}"
                )
            _record(path, given)  # before the file, so that no file is without one
    return path


def verified(path: Path, *, sha256: str | None = None) -> Path:
    """Holds an existing file to its checksum, which is recorded where there is none yet.

    Args:
        path: the file.
        sha256: published checksum (hex); without one the recorded one counts.

    Raises:
        DataError: with both checksums, where they differ.
    """
    try:
        with path.open("rb") as file:
            given = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    expected = sha256 or recorded(path)
    if expected is None:
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
    try:
        words = record.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{record} cannot be read: {shorten(str(error))}") from error
    if not words or len(words[0]) != 64:
        raise DataError(f"{record} holds no sha256; delete it, and {path.name} too if you are not sure of that")
    return words[0].lower()


def _record(path: Path, sha256: str) -> None:
    if recorded(path) != sha256:
        with _writable(path):
            atomic_write(record_path(path), f"{sha256}  {path.name}\n".encode())


def _download(url: str, path: Path, temporary: Path) -> str:
    """Writes what the net has into `temporary`; gives its sha256."""
    total, size = hashlib.sha256(), 0
    with _readable(url, path):
        response = urllib.request.urlopen(url, timeout=_TIMEOUT)
    with response, _writable(path), temporary.open("wb") as file:
        for chunk in _chunks(response, url, path):
            total.update(chunk)
            size += file.write(chunk)
    # Reading piece by piece, the library does not notice that bytes are missing.
    announced = response.headers.get("Content-Length")
    if announced is not None and int(announced) != size:
        raise DataError(f"{url}: the download broke off after {size} of {announced} bytes; try again")
    return total.hexdigest()


def _chunks(response: HTTPResponse, url: str, path: Path) -> Iterator[bytes]:
    while True:
        with _readable(url, path):
            chunk = response.read(_CHUNK)
        if not chunk:
            return
        yield chunk


@contextmanager
def _readable(url: str, path: Path) -> Iterator[None]:
    """Turns what goes wrong on the net into a `DataError` in words."""
    host = urlsplit(url).netloc or url
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            raise DataError(f"{url} does not exist (404); put the file at {path}") from error
        what = f"{error.code} {shorten(str(error.reason))}"
        raise DataError(f"{url} cannot be had ({what}); try again later, or put the file at {path}") from error
    except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = shorten(str(getattr(error, "reason", None) or error) or type(error).__name__)
        raise DataError(
            f"{host} cannot be reached ({reason}); go online, or put {url} at {path} by other means"
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"{url} is no URL ({shorten(str(error))}); give one such as https://…") from error


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
