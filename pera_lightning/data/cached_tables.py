"""Arrow tables kept in files: made once, whole or not at all, and mapped into memory ever after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pera_lightning.errors import DataError, shorten
from pera_lightning.files import atomic_path

if TYPE_CHECKING:
    import datasets


def cache_folder() -> Path:
    """Where tokenised rows are kept: beside what the library datasets keeps, so ``HF_HOME`` moves both."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "pera_lightning"


def kept(path: Path, write: Callable[[Path], None]) -> datasets.Dataset:
    """The table in an Arrow file, which is made first where it is not there.

    Args:
        path: of the file.
        write: called with another path beside it, which becomes the file in one step.

    Raises:
        DataError: where the folder cannot be written, or the file is damaged.
    """
    import datasets
    import pyarrow as pa

    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:  # several processes may write the same
                write(temporary)
        return datasets.Dataset.from_file(str(path))
    except (FileExistsError, NotADirectoryError) as error:
        file = next(folder for folder in path.parents if folder.exists())
        raise DataError(
            f"tokenised rows cannot be kept in {path.parent}: {file} is a file and no folder; choose another cache_dir"
        ) from error
    except OSError as error:
        raise DataError(
            f"tokenised rows cannot be kept in {path.parent}: {error.strerror or error}; make room, or choose another "
            "cache_dir"
        ) from error
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is damaged ({shorten(str(error))}); delete it, and it is made again") from error
