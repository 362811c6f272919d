"""How a benchmark reports: the table for people, JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def report(table: str, result: dict[str, Any], path: Path | None) -> None:
    """Prints both, and writes the JSON where a file is given."""
    text = json.dumps(result, indent=1)
    print(f"{table}\n{text}")
    if path is not None:
        path.write_text(f"{text}\n", encoding="utf-8")
