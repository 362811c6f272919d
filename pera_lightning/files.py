"""Text files read, and files written that are whole or not there; without heavy imports, for every layer."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pera_lightning.errors import DataError

if TYPE_CHECKING:
    from PIL import Image


def read_text(path: Path) -> str:
    """A file as text.

    Raises:
        DataError: where it is missing or no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of the text
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part.

    Args:
        path: the file; its folder exists.
        data: the content.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp's files are private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=3)  # twice as fast as Pillow's 6, for a tenth more bytes
    return data.getvalue()
