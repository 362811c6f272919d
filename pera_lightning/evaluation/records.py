"""Predictions on disk: a line each as they come, so that an interrupted evaluation goes on where it stopped.

    predictions/<name>.partial-<key>/rank0.jsonl     while it runs, one file a process
    predictions/<name>/<set>.jsonl                   when it is done, in the order of the data

The key is a hash of all that decides the answers (weights, protocol, rows): predictions of another checkpoint never
mix with these.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


class PartialRecords:
    """The records of one process, and what is there of all of them.

    Args:
        folder: of the predictions.
        name: of the evaluation.
        key: of all that decides the answers.
        rank: of this process.
    """

    def __init__(self, folder: Path, name: str, key: str, rank: int) -> None:
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


def write_records(folder: Path, records: Sequence[Record]) -> list[Path]:
    """Writes a file a set, in the order given, in place of what is there.

    Args:
        folder: for the files.
        records: each with "set".
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_set: dict[str, list[Record]] = {}
    for record in records:
        by_set.setdefault(record["set"], []).append(record)
    paths = []
    for name, rows in by_set.items():
        path = folder / f"{name}.jsonl"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        paths.append(path)
    return paths


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
