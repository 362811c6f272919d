"""JSON files: one list, or one value a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pera_lightning.errors import DataError
from pera_lightning.files import read_text


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
