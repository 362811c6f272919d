"""Predictions in the form that GLUE's leaderboard takes: ``index<TAB>prediction`` lines under a head line."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SEPARATORS = re.compile(r"[\t\r\n]+")


def submission(predictions: Iterable[tuple[str, str]]) -> str:
    """The file for pairs of index and prediction as they are to stand there: quotes are characters, as in GLUE's files.

    A tab or line break, which only a class name of one's own files can have, becomes a space.
    """
    lines = (("index", "prediction"), *predictions)
    return "".join("\t".join(_SEPARATORS.sub(" ", field) for field in line) + "\n" for line in lines)
