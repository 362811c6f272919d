"""Hashes that tell examples apart by what they are, to count those of a test that a checkpoint was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_ENDS = 4096  # bytes of a file's beginning and end that are read; compressed images differ there


def hash_texts(*texts: str) -> int:
    """A hash of 64 bits of an example's texts."""
    return hash_bytes(json.dumps(texts).encode())


def hash_bytes(data: bytes) -> int:
    """A hash of 64 bits of a file's content: its size, beginning and end."""
    ends = data if len(data) <= 2 * _ENDS else data[:_ENDS] + data[-_ENDS:]
    return _number(len(data), ends)


def hash_file(path: Path) -> int:
    """`hash_bytes` of a file, of which no more is read."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if size <= 2 * _ENDS:
            return _number(size, file.read())
        begin = file.read(_ENDS)
        file.seek(-_ENDS, 2)
        return _number(size, begin + file.read())


def _number(size: int, ends: bytes) -> int:
    digest = hashlib.blake2b(size.to_bytes(8, "little") + ends, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def as_array(hashes: Iterable[int]) -> np.ndarray:
    """(n,) int64."""
    return np.fromiter(hashes, dtype=np.int64)


def digest_of(hashes: np.ndarray) -> str:
    """Sha256 of a set of examples, whatever their order."""
    return hashlib.sha256(np.sort(hashes).astype("<i8").tobytes()).hexdigest()
