"""Examples of one or two texts and a label, made of the columns of a table and checked."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pera_lightning.data.batching import IGNORE
from pera_lightning.errors import DataError, listed, shorten
from pera_lightning.files import nfc
from pera_lightning.tasks.sequence_classification.files import Columns
from pera_lightning.tasks.sequence_classification.tasks import CUSTOM, GLUETask

_INDEX = "idx"  # what GLUE calls the numbers of its examples
_NUMBER = re.compile(r"[-+]?\d{1,18}(\.\d*)?")  # longer ones are text: Python refuses to read very many digits
_WHOLE = re.compile(r"[-+]?[0-9]{1,18}")


@dataclass(frozen=True)
class Examples:
    """Checked examples of a split."""

    texts: tuple[list[str], ...]  # one or two lists, n texts each
    labels: np.ndarray  # (n,) int64, or float32 for regression; `IGNORE` for unknown ones
    ids: list[str]  # n different names; numbers from 0, if the source has no ``idx``
    empty: int = 0  # number of pairs of which one text is empty

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labelled(self) -> bool:
        """Whether every example has a label."""
        return not (self.labels == IGNORE).any()


def to_examples(columns: Columns, task: GLUETask, *, label_column: str, unlabelled: bool) -> Examples:
    """Makes the examples of a table, one of each row, whose texts and labels are those that a task needs.

    Args:
        columns: the table.
        task: the task, which says what columns are needed and what labels are allowed.
        label_column: name of the column of labels.
        unlabelled: whether labels may be missing or -1, as in GLUE's test sets.

    Raises:
        DataError: naming the first row that cannot be used, what it has and what is allowed.
    """
    texts, empty = _texts(columns, task)
    values = columns.values.get(label_column)
    if values is None and not unlabelled:
        columns.column(label_column, "label_column")  # which raises
    named = task.name == CUSTOM and not task.regression  # names are looked up; GLUE's labels are numbers
    known = {name if named else k: k for k, name in enumerate(task.class_names)}
    labels = np.full(len(columns), IGNORE, np.float32 if task.regression else np.int64)
    for number, value in enumerate(values or ()):
        label = class_name(value) if named else _number(value)
        # -1 says "unlabelled" in GLUE's files, but is a value of a regression whose range holds it.
        if unlabelled and (
            label in (None, "-1", -1) and not (label == -1 and task.regression and task.label_range[0] <= -1)
        ):
            continue
        found = _score(label, task.label_range) if task.regression else known.get(label)
        if found is None:
            allowed = listed(known, 12) if named else task.labels_in_words
            raise DataError(f"row {number} of {columns.source}: label {_quoted(value)}; allowed: {allowed}")
        labels[number] = found
    return Examples(texts, labels, _ids(columns), empty)


def class_names_of(columns: Columns, label_column: str) -> list[str]:
    """The classes in a table of training examples: whole numbers in their order, else names in theirs.

    Raises:
        DataError: for labels that are missing, fractions of JSON, or all the same.
    """
    labels = []
    for number, value in enumerate(columns.column(label_column, "label_column")):
        label = class_name(value)
        if label in (None, "-1"):
            raise DataError(
                f"row {number} of {columns.source}: label {_quoted(value)} is not a class; number classes from 0 or "
                "give them names, leave unlabelled rows out, or set regression=True to predict numbers"
            )
        labels.append(label)
    # Numbers stay in their order, so that the classes of somebody's 0, 1, 2 are 0, 1, 2; one name makes all names.
    numbers = all(map(_WHOLE.fullmatch, labels))
    names = sorted(set(labels), key=(lambda name: (int(name), name)) if numbers else None)
    if not numbers and all(map(_NUMBER.fullmatch, names)):  # CSV has no types: versions and scores look alike
        rank_zero_warn(
            f"{columns.source}: the labels {listed(names, 4)} are taken as the names of {len(names)} classes; set "
            "regression=True if they are numbers to predict"
        )
    # A column of texts, taken for classes: most labels would differ.
    if len(names) < 2 or (not numbers and len(names) > max(100, len(labels) // 2)):
        raise DataError(
            f"{columns.source}: {len(names)} different labels in {len(labels)} rows of column {label_column!r}, such "
            f"as {_quoted(names[0])}; name a column of two classes or more by label_column"
        )
    return names


def _texts(columns: Columns, task: GLUETask) -> tuple[tuple[list[str], ...], int]:
    """The texts by column, and how many pairs lack one of theirs.

    Such pairs of GLUE are counted and kept: published examples are taken as they are, or results would not compare.
    """
    texts = [columns.column(name, "text_columns") for name in task.text_columns]
    lenient = task.name != CUSTOM  # one text of a pair may be empty, both may not
    empty = 0
    for number, example in enumerate(zip(*texts, strict=True)):
        filled = [isinstance(text, str) and bool(text.strip()) for text in example]
        for name, text, full in zip(task.text_columns, example, filled, strict=True):
            if not full and not (lenient and any(filled) and isinstance(text, str)):
                what = "empty" if not text or isinstance(text, str) else f"{_quoted(text)} and not text"
                raise DataError(
                    f"row {number} of {columns.source}: {name!r} is {what}; correct the row or leave it out"
                )
        empty += not all(filled)
    return tuple([*column] for column in texts), empty


def class_name(value: Any) -> str | None:
    """A label of a file as the name of a class; None for nothing, fractions, lists and objects.

    Text stays as it is but for spaces around it and the form of its Unicode: "01", "1" and "1.10" are three names. Of
    JSON, 1 and 1.0 are "1" (tools write whole numbers as either), true is "true".
    """
    if isinstance(value, str):
        return nfc(value.strip()) or None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int) else None


def _number(value: Any) -> int | float | str | None:
    """A label of a file as a number, however it is written; text that is none stays text, None is nothing."""
    if isinstance(value, str):
        value = value.strip()
        if not _NUMBER.fullmatch(value):
            return value or None
        value = float(value) if "." in value else int(value)
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value if value is None or type(value) is int else str(value)  # a bool is no number here


def _score(label: int | float | str | None, label_range: tuple[float, float]) -> float | None:
    """The label of a regression as the float32 that it will be; None if it is not a number in the range."""
    try:
        with np.errstate(over="ignore"):
            score = float(np.float32(label))
    except (TypeError, ValueError, OverflowError):  # not a number, or one beyond float64
        return None
    # `IGNORE` would stand for an example without label.
    inside = math.isfinite(score) and label_range[0] <= score <= label_range[1] and score != IGNORE
    return score if inside else None


def _quoted(value: Any) -> str:
    """A value of a file for a message."""
    text = shorten(repr(value))
    return text if len(text) <= 40 else f"{text[:40]}…"


def _ids(columns: Columns) -> list[str]:
    values = columns.values.get(_INDEX, range(len(columns)))
    ids = ["" if value is None else str(value) for value in values]
    first: dict[str, int] = {}  # the row that an id stands in first
    for number, name in enumerate(ids):
        if first.setdefault(name, number) != number or not name:
            what = f"{_INDEX}={name}, as row {first[name]} has" if name else f"nothing in {_INDEX!r}"
            raise DataError(f"row {number} of {columns.source} has {what}; give each row one of its own")
    return ids


def digest(examples: Examples) -> str:
    """Sha256 of examples, in their order."""
    total = hashlib.sha256()  # of texts, labels and ids, so that results of other data are told apart
    for entry in zip(*examples.texts, examples.labels.tolist(), examples.ids, strict=True):
        total.update(json.dumps(entry).encode())
    return total.hexdigest()
