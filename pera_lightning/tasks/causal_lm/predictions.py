"""Predictions on disk: a line each as they come, so that an interrupted evaluation goes on where it stopped.

    predictions/<name>.partial-<key>/rank0.jsonl     while it runs, one file a process
    predictions/<name>/<set>.jsonl                   when it is done, in the order of the data

<name> is the protocol's for a test and <protocol>_predict for a prediction: neither touches what the other has left.
The key is a hash of all that decides the answers (weights, protocol, examples): predictions of another checkpoint never
mix with these.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pera_lightning.files import atomic_directory

Prediction = Mapping[str, Any]  # of one question: its id, set, stage, output, prediction, answer and so on


class PartialPredictions:
    """The predictions of a test that is not done: those of this process are appended, those of all are read.

    `folder` is that of all predictions of a run, `name` and `key` are those above.
    """

    def __init__(self, folder: Path, name: str, key: str, rank: int) -> None:
        self.name = name
        self.folder = folder / f"{name}.partial-{key[:12]}"
        self.path = self.folder / f"rank{rank}.jsonl"

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Adds predictions, a line each, written through to the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            if file.read(1) not in (b"", b"\n"):  # what the last process had no time to finish stays a line of its own
                file.write(b"\n")
            for one in predictions:
                file.write(json.dumps(one, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All complete predictions in the folder, of every process that wrote there."""
        found = []
        for path in sorted(self.folder.glob("rank*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    one = json.loads(line)
                except ValueError:  # half a line: its question is asked again
                    continue
                if isinstance(one, dict) and "id" in one:
                    found.append(one)
        return found

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def others(self) -> list[Path]:
        """The folders of the same evaluation with other keys, each left behind by an interruption."""
        beside = self.folder.parent.glob(f"{glob.escape(self.name)}.partial-*")
        return sorted(path for path in beside if path != self.folder)


def by_set(predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    """Predictions of each set, in their order."""
    sets: dict[str, list[Prediction]] = {}
    for one in predictions:
        sets.setdefault(one["set"], []).append(one)
    return sets


def unique(predictions: Iterable[Prediction], order: Sequence[str]) -> list[Prediction]:
    """Each question's first prediction, in the order of the ids given; other ids are left out."""
    first: dict[str, Prediction] = {}  # by id
    for one in predictions:
        first.setdefault(one["id"], one)
    return [first[name] for name in order if name in first]


def write_predictions(folder: Path, predictions: Iterable[Prediction], others: Mapping[str, str] | None = None) -> None:
    """Writes a file a set, in the order given, in place of the folder: all in it is of one evaluation.

    A reader sees the old files or the new ones, or for a moment none, see `atomic_directory`.

    Args:
        folder: for the files; what is there goes.
        predictions: each with "set".
        others: name to text of further files.
    """
    with atomic_directory(folder) as new:
        for name, own in by_set(predictions).items():
            lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in own)
            (new / f"{name}.jsonl").write_bytes("".join(lines).encode())
        for name, text in (others or {}).items():
            (new / name).write_bytes(text.encode())
