"""Predictions in the form that GLUE's leaderboard takes: ``index<TAB>prediction``, a row each, under a head line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable


def submission(rows: Iterable[tuple[str, str]]) -> str:
    """The file for rows of index and prediction, both as they are to stand there."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(("index", "prediction"))
    writer.writerows(rows)
    return text.getvalue()
