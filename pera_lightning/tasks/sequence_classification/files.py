"""Tables of a few columns from CSV, TSV and JSON files, whatever the columns are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pera_lightning.data.csv_files import read_csv
from pera_lightning.data.folder_files import warn_of_unread
from pera_lightning.data.json_files import read_json
from pera_lightning.errors import DataError, closest, listed

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")


@dataclass(frozen=True)
class Columns:
    """A table as lists, by column."""

    source: str  # names it in messages
    values: Mapping[str, Sequence[Any]]  # all equally long; None where a row has nothing

    def __len__(self) -> int:
        return len(next(iter(self.values.values()), ()))

    def column(self, name: str, argument: str) -> Sequence[Any]:
        """A column; `argument` is what chooses it.

        Raises:
            DataError: for a name that it lacks, listing those that it has.
        """
        if name not in self.values:
            there = f"{', '.join(self.values)}{closest(name, self.values)}"
            raise DataError(f"{self.source} has no column {name!r} ({argument}); it has {there}")
        return self.values[name]


def split_file(folder: Path, split: str) -> Path:
    """The file of a split in a folder: ``train.jsonl``, else one of the other kinds.

    Raises:
        DataError: for a folder that lacks it, listing what it has.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give one with {split}.jsonl, or none to use the hub")
    if found := _of_split(folder, split):
        return found
    there = listed(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise DataError(f"{folder} has no {split}.jsonl (or .json, .csv, .tsv); it has {there}")


def _of_split(folder: Path, split: str) -> Path | None:
    places = (folder / f"{split}{suffix}" for suffix in SUFFIXES)
    return next((path for path in places if path.is_file()), None)


def warn_of_other_files(folder: Path, splits: Iterable[str]) -> None:
    """Warns of files in a folder that belong to none of the splits, or lie beside one of another kind that is read."""
    splits = list(splits)
    read = [_of_split(folder, split) for split in splits]
    others = sorted(path.name for path in folder.iterdir() if path.is_file() and path not in read)
    what = f"{', '.join(splits)} are read, each from the first that is there of {', '.join(SUFFIXES)}"
    warn_of_unread(folder, [name for name in others if not name.startswith(".")], what)


def read_columns(path: Path) -> Columns:
    """The table of a file, by its ending: .csv, .tsv (GLUE's own: quotes are characters) or JSON, a row a line.

    Raises:
        DataError: for a file that is missing, empty, of another kind or ragged.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: rows are read from {', '.join(SUFFIXES)}, not {suffix or 'a file without ending'}")
    columns = _json_columns(path) if suffix.startswith(".json") else _separated_columns(path, suffix)
    if not len(columns):
        raise DataError(f"{path} has no rows; give at least one, and above those of .csv and .tsv a header")
    return columns


def _json_columns(path: Path) -> Columns:
    entries = read_json(path)
    names: dict[str, None] = {}  # of all rows, in the order they turn up: a row may lack what it has no value for
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise DataError(f"row {number} of {path} is {type(entry).__name__}; an object with columns is needed")
        names.update(dict.fromkeys(entry))
    try:
        json.dumps(entries, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can say it; UTF-8 and tokenizers cannot
        raise DataError(f"{path} holds half a character ({error.object[error.start]!r}, a lone surrogate)") from None
    except RecursionError:
        raise DataError(f"{path} is nested too deeply; texts and labels are no lists of lists") from None
    return Columns(str(path), {name: [entry.get(name) for entry in entries] for name in names})


def _separated_columns(path: Path, suffix: str) -> Columns:
    header, rows = read_csv(path, tabs=suffix == ".tsv")
    return Columns(str(path), {name: [row[k] for row in rows] for k, name in enumerate(header)})
