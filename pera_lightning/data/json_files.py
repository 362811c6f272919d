"""Reading JSON files: one list, or one value a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pera_lightning.errors import DataError
from pera_lightning.files import parse_json, read_text


def read_json(path: Path) -> list[Any]:
    """The entries of a JSON list, or of a file with one JSON value a line; raises `DataError` for anything else."""
    text = read_text(path)  # the format is told by the content, as names vary
    entries, where = [], ""
    try:
        if text.lstrip().startswith("["):
            entries = parse_json(text)
        else:
            # Not splitlines(), which also splits at characters that JSON lets stand inside a text, such as U+2028.
            for number, line in enumerate(text.split("\n"), start=1):
                where = f", and its line {number} is not JSON"
                entries += [parse_json(line)] if line.strip() else []
    except ValueError as error:
        # Of a number of more digits than Python converts it is no JSONDecodeError; its advice is a programmer's.
        what = getattr(error, "msg", None) if where else None
        raise DataError(f"{path} is not a JSON list{where}: {what or str(error).partition(';')[0]}") from error
    if not entries:
        raise DataError(f"{path} has no examples; give a file with at least one")
    return entries
