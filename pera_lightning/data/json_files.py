"""Rows of instruction, input, output and answer, as LLM-Adapters' files have them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pera_lightning.errors import DataError, shorten
from pera_lightning.files import read_text
from pera_lightning.tasks.causal_lm.examples import Row


def read_json(path: Path) -> list[Any]:
    """The entries of a JSON list, or of a file with one JSON value a line.

    Raises:
        DataError: where the file is missing, empty or neither.
    """
    text = read_text(path)
    entries = _json_list(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)
    if not entries:
        raise DataError(f"{path} has no rows; give a file with at least one")
    return entries


def _json_list(path: Path, text: str) -> list[Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no JSON list: {error}") from error


def _json_lines(path: Path, text: str) -> list[Any]:
    entries = []
    # Not splitlines(), which also splits at characters that JSON lets stand inside a text, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            entries += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is no JSON list, and its line {number} no JSON: {error.msg}") from error
    return entries


def to_row(entry: Any, *, number: int, set_name: str, split: str, source: str, needed: Sequence[str]) -> Row:
    """One entry as a row, its id made of set, split and number.

    Args:
        entry: a mapping with "instruction" and mostly "input", "output", "answer".
        number: of the entry in its source, from 0.
        set_name: of the row.
        split: "train" or "test".
        source: names the file in messages.
        needed: fields that must be there.

    Raises:
        DataError: for a needed field that is missing or empty, or any that is no text.
    """
    where = f"row {number} of {source}"
    if not isinstance(entry, Mapping):
        raise DataError(f"{where} is no object but {type(entry).__name__}; one with {', '.join(needed)} is needed")
    values = {}
    for name in ("instruction", "input", "output", "answer"):
        value = entry.get(name)
        if value is None and name in needed:
            raise DataError(f"{where} has no {name!r}; it has {', '.join(map(str, entry)) or 'nothing'}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):  # LLM-Adapters' maths answers
            value = str(value)
        if not isinstance(value or "", str):
            raise DataError(f"{where}: {name!r} is {shorten(repr(value))[:60]}; text is needed")
        if name in needed and not value.strip():
            raise DataError(f"{where}: {name!r} is empty; correct the row or leave it out")
        values[name] = value or ""
    return Row(id=f"{set_name}/{split}/{number}", set=set_name, **values)


def read_rows(path: Path, *, set_name: str, split: str, needed: Sequence[str] = ("instruction", "output")) -> list[Row]:
    """The rows of a file.

    Args:
        path: JSON list, or JSON lines.
        set_name: of the rows.
        split: "train" or "test".
        needed: fields that must be there.

    Raises:
        DataError: for a file or row that cannot be used, naming it.
    """
    return [
        to_row(entry, number=k, set_name=set_name, split=split, source=str(path), needed=needed)
        for k, entry in enumerate(read_json(path))
    ]


def digest(rows: Iterable[Row]) -> str:
    """Sha256 of rows, in their order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps([row.id, row.instruction, row.input, row.output, row.answer]).encode())
    return total.hexdigest()
