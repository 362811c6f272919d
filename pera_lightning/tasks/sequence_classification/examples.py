"""Examples of one or two texts and a label, made of the columns of a table and checked."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pera_lightning.data.batching import IGNORE
from pera_lightning.errors import ConfigurationError, DataError, listed, shorten
from pera_lightning.tasks.sequence_classification.files import Columns
from pera_lightning.tasks.sequence_classification.tasks import CUSTOM, GLUETask

_INDEX = "idx"  # what GLUE calls its row numbers
_NUMBER = re.compile(r"[-+]?\d{1,300}(\.\d*)?")  # Python refuses to read many more digits
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can say it, UTF-8 and tokenizers cannot


@dataclass(frozen=True)
class Examples:
    """Checked examples of a split.

    Attributes:
        texts: one or two lists, n texts each.
        labels: (n,) int64, or float32 for regression; `IGNORE` for unknown ones.
        ids: n different names; row numbers, if the source has no ``idx``.
        empty: number of pairs of which one text is empty.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray
    ids: list[str]
    empty: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labelled(self) -> bool:
        """Whether every example has a label."""
        return not (self.labels == IGNORE).any()


def to_examples(columns: Columns, task: GLUETask, *, label_column: str, unlabelled: bool) -> Examples:
    """Makes the examples of a table, whose texts and labels are those that a task needs.

    Args:
        columns: the table.
        task: the task, which says what columns are needed and what labels are allowed.
        label_column: name of the column of labels.
        unlabelled: whether labels may be missing or -1, as in GLUE's test sets.

    Raises:
        DataError: naming the first row that cannot be used, what it has and what is allowed.
    """
    if not len(columns):
        raise DataError(f"{columns.source} has no rows; give at least one")
    texts, empty = _texts(columns, task)
    if unlabelled and label_column not in columns.values:
        labels = np.full(len(columns), IGNORE)
    else:
        values = columns.column(label_column, "label_column")
        known = {name: k for k, name in enumerate(task.class_names)}
        own = task.name == CUSTOM  # names are looked up; GLUE's labels are numbers
        label = partial(_label, source=columns.source, task=task, known=known if own else None, unlabelled=unlabelled)
        labels = np.array([label(value, number) for number, value in enumerate(values)])
    labels = labels.astype(np.float32 if task.regression else np.int64)
    return Examples(texts, labels, _ids(columns), empty)


def class_names_of(columns: Columns, label_column: str) -> list[str]:
    """The classes in a table of training examples: numbers in their order, else names in theirs.

    Raises:
        DataError: for labels that are missing, fractions, or all the same.
    """
    labels = []
    for number, value in enumerate(columns.column(label_column, "label_column")):
        label = _canonical(value)
        if isinstance(label, float):
            raise DataError(
                f"row {number} of {columns.source}: label {value!r} is a fraction and no class; regression=True "
                "predicts numbers"
            )
        if label is None or label == -1:
            own = "if it is a class, number classes from 0 or give them names; else " if label == -1 else ""
            raise DataError(f"{_unlabelled(number, columns.source, value)}; {own}correct the row or leave it out")
        if _broken(label):
            raise DataError(f"row {number} of {columns.source}: label {_quoted(value)} {_BROKEN}; correct it")
        labels.append(label)
    # Numbers stay in their order, so that the classes of somebody's 0, 1, 2 are 0, 1, 2; one name makes all names.
    found = {*labels}
    numbers = all(isinstance(label, int) for label in found)
    names = [str(label) for label in (sorted(found) if numbers else sorted(found, key=str))]
    if len(names) < 2:
        raise DataError(
            f"{columns.source}: all rows have the label {names[0]!r}; classifying needs two classes or more"
        )
    # A column of texts, taken for classes: most labels would differ.
    if not numbers and len(names) > 100 and len(names) > len(labels) // 2:
        raise DataError(
            f"{columns.source}: {len(names)} different labels in {len(labels)} rows of column {label_column!r}, such "
            f"as {shorten(names[0])[:40]!r}; name the column of classes by label_column"
        )
    return names


def _texts(columns: Columns, task: GLUETask) -> tuple[tuple[list[str], ...], int]:
    """The texts by column, and how many pairs lack one of theirs.

    Such pairs of GLUE are counted and kept: published rows are taken as they are, or results would not compare.
    """
    texts = [columns.column(name, "text_columns") for name in task.text_columns]
    lenient = task.name != CUSTOM  # one text of a pair may be empty, both may not
    empty = 0
    for number, row in enumerate(zip(*texts, strict=True)):
        blank = [isinstance(text, str) and not text.strip() for text in row]
        empty += any(blank)
        for name, text, nothing in zip(task.text_columns, row, blank, strict=True):
            if isinstance(text, str) and not (nothing and (not lenient or all(blank))) and not _broken(text):
                continue
            if _broken(text):
                what = f"{_quoted(text)}, which {_BROKEN}"
            else:
                what = "empty" if text is None or nothing else f"{_quoted(text)} and no text"
            raise DataError(f"row {number} of {columns.source}: {name!r} is {what}; correct the row or leave it out")
    return tuple([*column] for column in texts), empty


def _canonical(value: Any) -> int | float | str | None:
    """A label of a file: a whole number however it is written, a fraction, a name, or None where there is none."""
    if isinstance(value, str):
        value = value.strip()
        if value.lower() in ("true", "false"):  # as JSON's booleans are called here: other tools write True
            return value.lower()
        # CSV has no types: what looks like a number is one, so that 1, "1" and 1.0 are the same class.
        if not _NUMBER.fullmatch(value):
            return value or None
        value = float(value) if "." in value else int(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() else value
    return value if isinstance(value, int) or value is None else str(value)


def _label(
    value: Any, number: int, source: str, task: GLUETask, known: Mapping[str, int] | None, unlabelled: bool
) -> int | float:
    """One label as a number, or `IGNORE` for a row that has none and needs none."""
    label = _canonical(value)
    # -1 says "unlabelled" in GLUE's files, but is a value of a regression whose range holds it.
    missing = label is None or (label == -1 and not (task.regression and task.label_range[0] <= -1))
    if missing and unlabelled:
        return IGNORE
    if missing:
        raise DataError(f"{_unlabelled(number, source, value)}; allowed: {task.labels_in_words}")
    where = f"row {number} of {source}: label {_quoted(value)}"
    if task.regression:
        score = _single(label)
        if math.isnan(score):
            raise DataError(f"{where} is no number; allowed: {task.labels_in_words}")
        low, high = task.label_range
        if not math.isfinite(score) or not low <= score <= high:
            raise DataError(f"{where} is out of range; allowed: {task.labels_in_words}")
        if score == IGNORE:
            raise DataError(f"{where} is what stands for a row without label; shift the labels")
        return score
    if isinstance(label, float):
        raise DataError(f"{where} is a number of a regression, and {task.name} has classes: {task.labels_in_words}")
    if known is None:  # GLUE's own: numbers of the classes
        if not isinstance(label, int) or not 0 <= label < task.num_labels:
            raise DataError(f"{where} is none of the classes; allowed: {task.labels_in_words}")
        return label
    if str(label) not in known:
        raise DataError(f"{where} is no class of the training examples; allowed: {listed(known, 12)}")
    return known[str(label)]


def _single(label: float | str) -> float:
    """A label as the float32 that it will be, infinite where that has no room for it; NaN for no number."""
    try:
        with np.errstate(over="ignore"):
            return float(np.float32(float(label)))
    except OverflowError:  # a whole number beyond float64
        return math.inf
    except ValueError:
        return math.nan


_BROKEN = "holds half a character (a lone surrogate)"


def _broken(value: Any) -> bool:
    return isinstance(value, str) and not value.isascii() and _SURROGATE.search(value) is not None


def _quoted(value: Any) -> str:
    """A value of a file for a message."""
    text = shorten(repr(value))
    return text if len(text) <= 40 else f"{text[:40]}…"


def _unlabelled(number: int, source: str, value: Any) -> str:
    return f"row {number} of {source} has no label" + (f" ({value}: unlabelled)" if value not in (None, "") else "")


def _ids(columns: Columns) -> list[str]:
    if _INDEX not in columns.values:
        return [str(number) for number in range(len(columns))]
    seen: dict[str, int] = {}
    for number, value in enumerate(columns.values[_INDEX]):
        first = seen.setdefault(str(value), number)  # the row that had this id before, or this one
        if _broken(value):
            where = f"row {number} of {columns.source}"
            raise DataError(f"{where}: {_INDEX!r} is {_quoted(value)}, which {_BROKEN}; correct it")
        if first != number or value in (None, ""):
            what = "has none" if value in (None, "") else f"has {value}, as row {first} has"
            raise DataError(f"row {number} of {columns.source} {what} in {_INDEX!r}; give each row one of its own")
    return list(seen)


def digest(examples: Examples) -> str:
    """Sha256 of examples, in their order."""
    total = hashlib.sha256()  # of texts, labels and ids, so that results of other data are told apart
    for entry in zip(*examples.texts, examples.labels.tolist(), examples.ids, strict=True):
        total.update(json.dumps(entry).encode())
    return total.hexdigest()


def check_text_columns(text_columns: Sequence[str] | None, columns: Columns) -> list[str]:
    """The text columns that were given.

    Raises:
        ConfigurationError: where none were, listing what there is.
    """
    if not text_columns:
        there = ", ".join(columns.values)
        raise ConfigurationError(
            f"text_columns is not given; name one or two of the columns of {columns.source}: {there}"
        )
    return list(text_columns)
