"""The cache of latents and embeddings: a file each, computed once and read ever after.

A file's name is a hash of all that decides its content, and of nothing else: the image's bytes or the prompt's text,
how it is cropped, and the encoders. Each process computes its share of them, so that no two write the same.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pera_lightning.errors import DataError, listed, shorten
from pera_lightning.files import atomic_write
from pera_lightning.training.distributed import all_gather_object

Tensors = dict[str, Tensor]

_FORMAT = 1
_SUFFIX = ".safetensors"


def default_folder() -> Path:
    """Returns the cache's default place, beside the tokenised examples."""
    from pera_lightning.data.cached_tables import cache_folder

    return cache_folder() / "dreambooth"


def image_key(sha256: str, size: tuple[int, int], crop: str, settings: Mapping[str, Any]) -> str:
    """Names the latents of an image."""
    return _key("image", {"sha256": sha256, "size": list(size), "crop": crop}, settings)


def prompt_key(prompt: str, settings: Mapping[str, Any]) -> str:
    """Names the embeddings of a prompt; `settings` as for `image_key`."""
    return _key("prompt", {"text": prompt}, settings)


def _key(kind: str, what: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    # Sorted, so that the order of the settings does not matter; with a format number, so that a later one can differ.
    facts = [_FORMAT, kind, what, dict(settings)]
    return f"{kind}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]}"


def make_folder(folder: Path) -> None:
    """Makes the folder of a cache."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((one for one in (folder, *folder.parents) if one.is_file()), None)
        why = shorten(error.strerror or str(error)) if file is None else f"{file} is a file and no folder"
        raise DataError(f"latents cannot be kept in {folder}: {why}; choose another cache_dir") from error


def write_in_one_step(path: Path, data: bytes) -> None:
    """Writes a file atomically; its folder exists."""
    try:
        atomic_write(path, data)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be written: {reason}; make room, or choose another folder") from error


def read(folder: Path, key: str) -> Tensors | None:
    """Reads what the cache has under a key; None if that is nothing, or a damaged file, which is warned of."""
    from safetensors.torch import load

    path = folder / f"{key}{_SUFFIX}"
    try:
        tensors = load(path.read_bytes())
    except FileNotFoundError:
        return None
    except Exception as error:  # of safetensors, or of a disk
        damage = shorten(str(error))
    else:
        if tensors and all(torch.isfinite(value).all() for value in tensors.values()):
            return tensors
        damage = "no finite values"
    # On whichever rank has this file in its share.
    warnings.warn(f"cached {path} is damaged ({damage}) and is made anew", stacklevel=2)
    return None


def write(folder: Path, key: str, tensors: Tensors) -> None:
    """Keeps float32 tensors under a key, in one step."""
    from safetensors.torch import save

    # A copy: a view of a larger tensor cannot be saved.
    write_in_one_step(folder / f"{key}{_SUFFIX}", save({name: value.clone() for name, value in tensors.items()}))


def together(work: Callable[[], Any]) -> Any:
    """Does a process's share of some work and waits for the others; if one fails, all stop with its reason."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # the others would wait for this process forever
        failure = error
    reasons = all_gather_object(None if failure is None else shorten(str(failure)) or type(failure).__name__)
    if failure is not None:
        raise failure
    if failed := [f"process {rank}: {reason}" for rank, reason in enumerate(reasons) if reason is not None]:
        raise DataError(listed(failed, 1))
    return result


def cached(
    folder: Path, keys: Sequence[str], make: Callable[[str], Tensors], *, rank: int = 0, world: int = 1
) -> tuple[dict[str, Tensors], int]:
    """Reads what belongs to keys from the cache; computes and keeps what is missing.

    Args:
        folder: the folder of the cache; made.
        keys: keys of `image_key` and `prompt_key`, each once, in the same order in every process.
        make: computes what belongs to a key: float32 tensors on the CPU.
        rank: rank of this process, which computes every `world`-th.
        world: number of processes.

    Returns:
        Tensors by key, and how many this process computed.
    """
    found: dict[str, Tensors] = {}
    computed = 0

    def get(key: str) -> None:
        nonlocal computed
        tensors = read(folder, key)
        if tensors is None:
            tensors = make(key)
            write(folder, key, tensors)
            computed += 1
        found[key] = tensors

    def share() -> None:
        make_folder(folder)
        for key in keys[rank::world]:
            get(key)

    together(share)
    # What other processes computed; on a machine that does not see their files it is computed here too.
    for key in keys:
        if key not in found:
            get(key)
    return found, computed
