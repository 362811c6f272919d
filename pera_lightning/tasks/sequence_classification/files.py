"""Tables of a few columns from CSV, TSV and JSON files, whatever the columns are."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pera_lightning.data.json_files import read_json
from pera_lightning.errors import DataError, closest, listed
from pera_lightning.files import read_text

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
    for suffix in SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    there = listed(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise DataError(f"{folder} has no {split}.jsonl (or .json, .csv, .tsv); it has {there}")


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
    return Columns(str(path), {name: [entry.get(name) for entry in entries] for name in names})


def _separated_columns(path: Path, suffix: str) -> Columns:
    # GLUE's own .tsv has quotes as characters of the text.
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
    reader = csv.reader(io.StringIO(read_text(path)), strict=True, **options)
    rows: list[list[str]] = []
    try:
        for row in filter(None, reader):
            rows.append(row)
            if len(row) != len(rows[0]):  # which the csv module takes, and columns would shift
                raise DataError(
                    f"line {reader.line_num} of {path} has {len(row)} fields, and its header {len(rows[0])}; correct "
                    "the line, or quote fields that hold the separator"
                )
    except csv.Error as error:
        raise DataError(f"{path} is damaged at line {reader.line_num}: {error}") from error
    header = rows.pop(0) if rows else []
    if twice := {name for name in header if header.count(name) > 1}:
        raise DataError(f"{path} has the column {listed(sorted(twice))} twice; rename one")
    return Columns(str(path), {name: [row[k] for row in rows] for k, name in enumerate(header)})
