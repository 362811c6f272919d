"""Checkpoint files that are whole: written so, and told apart from damaged ones."""

from __future__ import annotations

import errno
import io
import pickle
import shutil
import struct
import time
import zipfile
import zlib
from datetime import datetime
from glob import escape
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from pera_lightning.errors import CheckpointError, megabytes, shorten
from pera_lightning.files import atomic_write

# What reading bytes that are no checkpoint raises, in torch, pickle and zipfile.
UNREADABLE = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, zlib.error),
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_STARTED = time.time()


class WholeFilesIO(TorchCheckpointIO):
    """Writes a local file beside its final name, syncs it to the disk and renames it.

    Lightning writes into the system's folder for temporaries and moves the file. Where that folder is on another disk
    the move is a copy, and a process that is killed or a disk that is full leaves a part of it under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        file = local_file(path)
        if file is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(file)
            atomic_write(file, buffer.getbuffer())
        except OSError as error:
            raise CheckpointError(_not_written(file, buffer.getbuffer().nbytes, error)) from None


def with_whole_files(inner: CheckpointIO) -> CheckpointIO:
    """`WholeFilesIO` in the place of Lightning's plain `TorchCheckpointIO`, also within one that wraps it."""
    if type(inner) is TorchCheckpointIO:
        return WholeFilesIO()
    if isinstance(inner, _WrappingCheckpointIO) and type(inner.checkpoint_io) is TorchCheckpointIO:
        inner._checkpoint_io = WholeFilesIO()  # its own setter acts once only
    return inner


def local_file(path: Any) -> Path | None:
    """The path of a file on this machine's file systems; None for ``s3://`` and the like."""
    filesystem, local = url_to_fs(str(path))
    return Path(local) if isinstance(filesystem, LocalFileSystem) else None


def remove_leftovers(file: Path) -> None:
    """Removes what `atomic_write` has left of `file` in an earlier process that was killed while it wrote."""
    for part in file.parent.glob(f".{escape(file.name)}.????????"):
        if part.stat().st_mtime < _STARTED:
            part.unlink(missing_ok=True)


def _not_written(file: Path, size: int, error: OSError) -> str:
    have = ""
    if error.errno in _FULL:
        have = f", its disk has {megabytes(shutil.disk_usage(file.parent).free)} free"
    before = "; the file of that name is the one before, whole" if file.is_file() else ""
    return (
        f"checkpoint {file} of {megabytes(size)} could not be written ({error.strerror}{have}): make room, or choose "
        f"another folder (dirpath of ModelCheckpoint, default_root_dir of the trainer){before}"
    )


def damage(path: Any) -> str | None:
    """What is wrong with the bytes of a local checkpoint, in words; None where nothing is, or nothing can be said.

    torch writes zip archives with a checksum of each tensor, and does not compare it when it reads: flipped bytes
    become other weights in silence. Comparing costs less than reading.
    """
    file = local_file(path)
    if file is None or not file.is_file():
        return None
    try:
        with file.open("rb") as opened:
            if opened.read(2) != b"PK":
                return None
        with zipfile.ZipFile(file) as archive:
            if not any(entry.CRC for entry in archive.infolist()):  # torch was told to leave the checksums out
                return None
            record = archive.testzip()
    except UNREADABLE as error:
        return f"its {file.stat().st_size} bytes are cut short or altered: {shorten(str(error))}"
    return None if record is None else f"{record} is not what was written"


def whole_neighbours(path: Any, most: int = 3) -> str:
    """Names the checkpoints that can be read beside one that cannot, newest first, to end a message with.

    Args:
        path: the one that cannot.
        most: how many are named.
    """
    file = local_file(path)
    if file is None:
        return ""
    found = []
    for other in sorted(file.parent.glob("*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True):
        if other == file or not other.is_file() or damage(other) is not None:
            continue
        try:
            step = torch.load(other, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        except (*UNREADABLE, TypeError):
            continue
        written = datetime.fromtimestamp(other.stat().st_mtime)
        found.append(f"{other.name} ({written:%Y-%m-%d %H:%M}, optimizer step {step})")
        if len(found) == most:
            break
    return f"; give ckpt_path one of {file.parent} that can be read: {', '.join(found)}" if found else ""
