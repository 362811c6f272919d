"""Reading CSV and TSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pera_lightning.errors import DataError, listed
from pera_lightning.files import read_text

_LONGEST = 2**31 - 1  # characters of a field; by default the csv module refuses more than 131,072


def read_csv(path: Path, *, tabs: bool = False) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a file; empty lines are passed over, and a file without lines has no header.

    Args:
        path: the file.
        tabs: whether tabs separate the fields and quotes are characters of the text, as in GLUE's own files.

    Raises:
        DataError: for a file that is missing, no UTF-8, ragged or otherwise damaged, or has a column twice.
    """
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    reader = csv.reader(io.StringIO(read_text(path)), strict=True, **options)
    rows: list[list[str]] = []
    try:
        with _long_fields():
            for row in filter(None, reader):
                rows.append(row)
                if len(row) != len(rows[0]):  # which the csv module takes, and columns would shift
                    raise DataError(
                        f"line {reader.line_num} of {path} has {len(row)} fields, and its header {len(rows[0])}; "
                        "correct the line, or quote fields that hold the separator"
                    )
    except csv.Error as error:
        raise DataError(f"{path} is damaged at line {reader.line_num}: {error}") from error
    header = rows.pop(0) if rows else []
    if twice := {name for name in header if header.count(name) > 1}:
        raise DataError(f"{path} has the column {listed(sorted(twice))} twice; rename one")
    return header, rows


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST)  # of the process: other libraries keep theirs
    try:
        yield
    finally:
        csv.field_size_limit(before)
