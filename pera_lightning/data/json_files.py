"""Reading JSON files: one list, or one value a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pera_lightning.errors import DataError
from pera_lightning.files import read_text


def read_json(path: Path) -> list[Any]:
    """The entries of a JSON list, or of a file with one JSON value a line; raises `DataError` for anything else."""
    text = read_text(path)  # the format is told by the content, as names vary
    entries, where = [], ""
    try:
        if text.lstrip().startswith("["):
            entries = json.loads(text)
        else:
            # Not splitlines(), which also splits at characters that JSON lets stand inside a text, such as U+2028.
            for number, line in enumerate(text.split("\n"), start=1):
                where = f", and its line {number} is not JSON"
                entries += [json.loads(line)] if line.strip() else []
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not a JSON list{where}: {error.msg if where else error}") from error
    if not entries:
        raise DataError(f"{path} has no examples; give a file with at least one")
    return entries
