"""The cache of latents and embeddings: a file each, computed once and read ever after.

A file's name is a hash of all that decides its content, and of nothing else: the image's bytes or the prompt's text,
how it is cropped, and the encoders. Each process computes its share of them, so that no two write the same.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


def cache_key(kind: str, content: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Names the latents of an image or the embeddings of a prompt.

    Args:
        kind: "image" or "prompt"; the name begins with it.
        content: what is encoded, as primitives.
        settings: what encodes it, see `Encoders.settings`.
    """
    # Sorted, so that the order of the settings does not matter; with a format number, so that a later one can differ.
    facts = [_FORMAT, kind, dict(content), dict(settings)]
    return f"{kind}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Explains in one line why a file or folder could not be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be written: {reason}; make room, or choose another folder") from error


def read(folder: Path, key: str) -> Tensors | None:
    """Reads what the cache has under a key; None if that is nothing, or a damaged file, which is warned of."""
    from safetensors.torch import load

    path = folder / f"{key}{_SUFFIX}"
    try:
        tensors = load(path.read_bytes())  # float32, on the CPU
    except FileNotFoundError:
        return None
    except Exception as error:  # of safetensors, or of a disk
        damage = shorten(str(error))
    else:
        if tensors and all(torch.isfinite(value).all() for value in tensors.values()):
            return tensors
        damage = "no finite values"
    # On whichever rank has this file in its share.
    warnings.warn(f"cached {path} is damaged ({damage}) and is computed again", stacklevel=2)
    return None


def write(folder: Path, key: str, tensors: Tensors) -> None:
    """Keeps float32 tensors under a key, in one step."""
    from safetensors.torch import save

    path = folder / f"{key}{_SUFFIX}"
    with writing(path):
        atomic_write(path, save({name: value.clone() for name, value in tensors.items()}))  # views cannot be saved


def together(work: Callable[[], Any]) -> Any:
    """Does a process's share of some work and waits for the others; if one fails, all stop with its reason."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # the others would wait for this process forever
        failure = error
    reasons = all_gather_object(None if failure is None else shorten(str(failure)) or type(failure).__name__)
    if failure is not None:
        raise failure  # with its own traceback
    if failed := [f"process {rank}: {reason}" for rank, reason in enumerate(reasons) if reason is not None]:
        raise DataError(listed(failed, 1))
    return result


def cached(
    folder: Path, keys: Sequence[str], make: Callable[[str], Tensors], *, rank: int = 0, world: int = 1
) -> tuple[dict[str, Tensors], int]:
    """Reads what belongs to keys from the cache; computes and keeps what is missing.

    Args:
        folder: the folder of the cache; made.
        keys: keys of `cache_key`, each once, in the same order in every process.
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
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # Every world-th key: the shares of the processes are disjoint.
        for key in keys[rank::world]:
            get(key)

    together(share)
    # What other processes computed; on a machine that does not see their files it is computed here too.
    for key in keys:
        if key not in found:
            get(key)
    return found, computed
