"""Predictions on disk: a line each as they come, so that an interrupted evaluation goes on where it stopped.

    predictions/<name>.partial-<key>/rank0.jsonl     while it runs, one file a process
    predictions/<name>/<set>.jsonl                   when it is done, in the order of the data

<name> is the protocol's for a test and <protocol>_predict for a prediction: neither touches what the other has left.
The key is a hash of all that decides the answers (weights, protocol, rows): predictions of another checkpoint never
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

Record = Mapping[str, Any]


class PartialRecords:
    """The records of one process, and what is there of all of them.

    Args:
        folder: of the predictions.
        name: of the evaluation, see above.
        key: of all that decides the answers.
        rank: of this process.
    """

    def __init__(self, folder: Path, name: str, key: str, rank: int) -> None:
        self.name = name
        self.folder = folder / f"{name}.partial-{key[:12]}"
        self.path = self.folder / f"rank{rank}.jsonl"

    def append(self, records: Iterable[Record]) -> None:
        """Adds records, each a line, written through to the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if file.tell() and not _ends_line(self.path):
                file.write(b"\n")  # what the last process had no time to finish stays a line of its own, left out
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All whole records in the folder, of every process that wrote there."""
        found = []
        for path in sorted(self.folder.glob("rank*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # half a line: its question is asked again
                    continue
                if isinstance(record, dict) and "id" in record:
                    found.append(record)
        return found

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def others(self) -> list[Path]:
        """The folders beside of the same evaluation with other keys, each left behind by an interruption."""
        beside = self.folder.parent.glob(f"{glob.escape(self.name)}.partial-*")
        return sorted(path for path in beside if path != self.folder)


def write_records(folder: Path, records: Sequence[Record], others: Mapping[str, str] | None = None) -> list[Path]:
    """Writes a file a set, in the order given, in place of the whole folder: all in it is of one evaluation.

    A reader sees the old files or the new ones, or for a moment none, see `atomic_directory`.

    Args:
        folder: for the files; what is there goes.
        records: each with "set".
        others: name to text of further files.
    """
    by_set: dict[str, list[Record]] = {}
    for record in records:
        by_set.setdefault(record["set"], []).append(record)
    texts = dict(others or {})
    for name, rows in by_set.items():
        texts[f"{name}.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with atomic_directory(folder) as new:
        for name, text in texts.items():
            (new / name).write_bytes(text.encode())
    return [folder / f"{name}.jsonl" for name in by_set]


def unique(records: Iterable[Record], order: Sequence[str]) -> list[Record]:
    """Each question's first record, in the order of the ids given; ids that are not there are left out."""
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record["id"], record)
    return [first[one] for one in order if one in first]


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
