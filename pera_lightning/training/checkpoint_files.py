"""Checkpoint files that are complete or not there, whatever interrupts their writing, and read as they were written."""

from __future__ import annotations

import io
import time
import urllib.request
from concurrent.futures import Future, wait
from glob import escape
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO

from pera_lightning.errors import CheckpointError, megabytes
from pera_lightning.files import atomic_write
from pera_lightning.training import _lightning_internals as internals

_STARTED = time.time()
_CHUNK = 1 << 20  # bytes
_TIMEOUT, _PATIENCE, _SLOWEST = 30, 60, 10_000  # seconds without a byte; seconds until a rate counts; bytes a second
_LOOK = 1  # seconds between looks at the rate


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local file beside its final name, syncs it to the disk and renames it.

    Lightning writes into the system's folder for temporaries and moves the file. Where that folder is on another disk
    the move is a copy, and a process that is killed or a disk that is full leaves a part of it under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        file = local_file(path)
        if file is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        # In memory first: adapters are small, and the size is known where the disk is full.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(file)  # of an earlier process that was killed while writing
            atomic_write(file, buffer.getbuffer())
        except OSError as error:
            raise CheckpointError(_not_written(file, buffer.getbuffer().nbytes, error)) from None


def with_atomic_writes(inner: CheckpointIO) -> CheckpointIO:
    """`AtomicCheckpointIO` in the place of Lightning's plain `TorchCheckpointIO`, also within one that wraps it."""
    if type(inner) is TorchCheckpointIO:  # a subclass writes as its author meant it
        return AtomicCheckpointIO()  # Lightning's default, written in one step
    internals.replace_wrapped_io(inner, TorchCheckpointIO, AtomicCheckpointIO())
    return inner


def local_file(path: Any) -> Path | None:
    """The path of a file on this machine's file systems; None for ``s3://`` and the like."""
    filesystem, local = url_to_fs(str(path))
    return Path(local) if isinstance(filesystem, LocalFileSystem) else None


def is_url(path: Any) -> bool:
    """Whether a checkpoint is to be had from a web server."""
    return str(path).startswith(("http://", "https://"))


def fetched(url: str) -> io.BytesIO:
    """What is at a URL now, in memory; `CheckpointError` where it cannot be had in full and in bounded time."""
    content, done, begun = io.BytesIO(), Future[str | None](), time.monotonic()
    # In a thread: a server may take for ever over its header and over the sizes of chunks too, byte by byte, where
    # urllib waits inside of one call. One that is given up ends with its socket, or with the process.
    Thread(target=_transfer, args=(url, content, done), daemon=True).start()
    try:
        while not wait([done], _LOOK).done:
            seconds = time.monotonic() - begun
            if seconds > _PATIENCE and content.tell() < _SLOWEST * seconds:
                raise TimeoutError(f"{megabytes(content.tell())} in {seconds:.0f} seconds")
        announced = done.result()
    except Exception as error:  # of sockets, of HTTP, of addresses
        # Of HTTP's errors the text has the number, and the reason alone may say nothing.
        said = error if isinstance(error, HTTPError) else getattr(error, "reason", None) or error
        what = f"{type(error).__name__}: {said}"
        raise CheckpointError(f"checkpoint {url} cannot be had ({what}): try again, or download it by itself") from None
    if announced is not None and announced.isdigit() and int(announced) != content.tell():
        raise CheckpointError(f"checkpoint {url}: the download broke off after {content.tell()} of {announced} bytes")
    content.seek(0)
    return content


def _transfer(url: str, content: io.BytesIO, done: Future[str | None]) -> None:
    """Copies what is at a URL into `content`; `done` gets the announced length, or what went wrong."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            while chunk := response.read1(_CHUNK):  # what has come, however little
                content.write(chunk)
            done.set_result(response.headers.get("Content-Length"))
    except BaseException as error:  # of whatever kind, for the thread that waits
        done.set_exception(error)


def remove_leftovers(file: Path) -> None:
    """Removes what writing `file` has left beside it in an earlier process that was killed."""
    # Younger ones may be another process's that writes now.
    for part in file.parent.glob(f".{escape(file.name)}.????????"):
        if part.stat().st_mtime < _STARTED:
            part.unlink(missing_ok=True)


def _not_written(file: Path, size: int, error: OSError) -> str:
    before = "; the file of that name is the one before" if file.is_file() else ""
    return (
        f"checkpoint {file} of {megabytes(size)} could not be written ({error.strerror}): make room, or choose another "
        f"folder (dirpath of ModelCheckpoint, default_root_dir of the trainer){before}"
    )
