"""Arrow tables in files: written once, atomically, and mapped into memory ever after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pera_lightning.errors import DataError, shorten
from pera_lightning.files import atomic_path

if TYPE_CHECKING:
    import datasets


def cache_folder() -> Path:
    """Where tokenised examples are cached: beside the cache of datasets, so ``HF_HOME`` moves both."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "pera_lightning"


def kept(path: Path, write: Callable[[Path], None]) -> datasets.Dataset:
    """Reads the table in an Arrow file, which is written first where it is missing.

    Args:
        path: the file.
        write: called with a path beside it to write to.
    """
    import datasets
    import pyarrow as pa

    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:  # several processes may write the same
                write(temporary)
        return datasets.Dataset.from_file(str(path))  # mapped, so that processes share its memory
    except OSError as error:
        what = f"tokenised examples cannot be kept in {path.parent} ({error})"
        raise DataError(f"{what}: make room, or choose another cache_dir") from error
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is damaged ({shorten(str(error))}); delete it, and it is made again") from error
