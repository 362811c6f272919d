"""Predictions in the form that GLUE's leaderboard takes: ``index<TAB>prediction``, a row each, under a head line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TypeVar

Value = TypeVar("Value")


def in_order(ranks: Sequence[Sequence[tuple[str, Value]]]) -> dict[str, Value]:
    """Rows that were dealt out to processes in turn, each once, in the order they had.

    Args:
        ranks: of each process id and value of its rows; what fills up has the id of a row that is there already.
    """
    return {row[0]: row[1] for dealt in zip_longest(*ranks) for row in dealt if row is not None}


def submission(rows: Iterable[tuple[str, str]]) -> str:
    """The file for rows of index and prediction, both as they are to stand there."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(("index", "prediction"))
    writer.writerows(rows)
    return text.getvalue()
