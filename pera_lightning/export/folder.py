"""Output folders of an export: what may be overwritten, and the messages where it may not or the disk is full."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pera_lightning.errors import CheckpointError, ConfigurationError, listed, megabytes
from pera_lightning.files import atomic_directory

# One of these is in every folder that is exported, in formats of this package, peft, transformers, timm or diffusers.
MARKERS = {"adapter_config.json", "config.json", "model_index.json", "pytorch_lora_weights.safetensors"}
# And nothing but files that end so, and the folders of a diffusers pipeline, which hold such files.
_ENDINGS = (".json", ".safetensors", ".txt", ".jinja", ".model", ".md")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def output_folder(path: str | Path, *, overwrite: bool = False, needed: int = 0) -> Iterator[Path]:
    """Yields a fresh folder to write into, which gets the name `path` at the end; see `atomic_directory`.

    Args:
        path: name of the folder; parents are made.
        overwrite: whether an empty folder or an earlier export of that name is replaced.
        needed: bytes that are going to be written, about.

    Raises:
        ConfigurationError: where `path` exists, or must not be replaced.
        CheckpointError: where the disk has no room, or the folder cannot be made.
    """
    check_output_folder(path, overwrite=overwrite)
    writing = False
    try:
        with atomic_directory(Path(path)) as made:
            if shutil.disk_usage(made).free < needed:
                raise OSError(errno.ENOSPC, "")
            writing = True
            yield made
            check_output_folder(path, overwrite=overwrite)  # it may have been made meanwhile
    except Exception as error:
        if _is_full(error):
            free = megabytes(shutil.disk_usage(Path(path).resolve().parent).free)
            size = f"it needs about {megabytes(needed)}, and its" if needed else "its"
            full = f"{path} could not be written: {size} disk has {free} free"
            raise CheckpointError(f"{full}; make room, or give another --output") from None
        if not writing and isinstance(error, OSError):
            raise CheckpointError(f"{path} cannot be written ({error.strerror}): give another --output") from None
        raise


def check_output_folder(path: str | Path, *, overwrite: bool = False, apart: Iterable[str | Path] = ()) -> None:
    """Raises `ConfigurationError` where `output_folder` would refuse `path`; to be told before the work is done.

    Args:
        path: name of the folder.
        overwrite: whether an empty folder or an earlier export of that name is replaced.
        apart: files and folders that are read, and that `path` must neither be, hold, nor lie in.
    """
    if not str(path).strip():
        raise ConfigurationError(f"{str(path)!r} does not name a folder: give another --output")
    # Never over the base, the checkpoint or the data that the command reads.
    target = Path(path).resolve()
    for other in (Path(other).resolve() for other in apart if Path(other).exists()):
        if target.is_relative_to(other) or other.is_relative_to(target):
            lies = f"{path} and {other}, which is read, are or hold one another"
            raise ConfigurationError(f"{lies}: give another --output")
    if not target.exists():
        return
    if not overwrite:
        raise ConfigurationError(f"{path} exists; give another --output, or --overwrite")
    if any(place.resolve().is_relative_to(target) for place in (Path.cwd(), Path.home())):
        raise ConfigurationError(f"{path} holds the working directory or your home folder: give another --output")
    # Overwritten is an earlier export only: nobody's home, photos, code, nor an adapter that was trained.
    entries = sorted(target.iterdir()) if target.is_dir() else [target]
    foreign = [entry.name for entry in entries if not _exported(entry)]
    complete = list(target.rglob("*.safetensors")) and {entry.name for entry in entries} & MARKERS
    if entries and (foreign or not complete):
        what = listed(foreign or [entry.name for entry in entries], 3)
        raise ConfigurationError(f"{path} is not an earlier export, for it holds {what}: give another --output")


def _exported(entry: Path) -> bool:
    """Whether an entry of a folder may come from an export."""
    if entry.is_symlink() or entry.name == "adapter.safetensors":  # what was trained
        return False
    if entry.is_file():
        return entry.name.endswith(_ENDINGS)
    inside = (entry.parent / "model_index.json").is_file()
    return inside and all(file.is_file() and file.name.endswith(_ENDINGS) for file in entry.iterdir())


def _is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full; Rust's (safetensors) says it in its text only."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    found = re.search(r"\(os error (\d+)\)", str(error))
    return found is not None and int(found[1]) in _FULL
