"""One example of a task: what every protocol reads, whatever file it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pera_lightning.data.json_files import read_json
from pera_lightning.errors import DataError, shorten


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its answer."""

    id: str  # unique in its set; names the example in predictions and messages
    set: str  # the set it belongs to, such as "ARC-Easy"; the extraction of an answer follows it
    instruction: str  # the question as the model sees it
    input: str  # further context; empty in the commonsense files
    output: str  # the text trained on, such as "the correct answer is answer3"
    answer: str  # what a prediction is compared with, such as "answer3"


def to_example(entry: Any, *, number: int, set_name: str, split: str, source: str, needed: Sequence[str]) -> Example:
    """Makes an example of one entry of a file, its id made of set, split and number.

    Args:
        entry: a mapping with "instruction" and mostly "input", "output", "answer".
        number: of the entry in its source, from 0.
        set_name: name of the example's set.
        split: "train" or "test".
        source: names the file in messages.
        needed: fields that must be there.

    Raises:
        DataError: for a needed field that is missing or empty, or any that is not text.
    """
    where = f"example {number} of {source}"
    if not isinstance(entry, Mapping):
        raise DataError(f"{where} is {type(entry).__name__}; an object with {', '.join(needed)} is needed")
    values = {}
    for name in ("instruction", "input", "output", "answer"):
        value = entry.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):  # LLM-Adapters' maths answers
            value = str(value)
        if not isinstance(value or "", str) or (name in needed and not (value or "").strip()):
            shown = shorten(repr(value))[:60] if name in entry else f"missing; there are {', '.join(map(str, entry))}"
            raise DataError(f"{where}: text is needed as {name!r}, which is {shown}; correct it or leave it out")
        values[name] = value or ""
    return Example(id=f"{set_name}/{split}/{number}", set=set_name, **values)


def read_examples(
    path: Path, *, set_name: str, split: str, needed: Sequence[str] = ("instruction", "output")
) -> list[Example]:
    """The examples of a file of JSON or JSON lines; the arguments are those of `to_example`.

    Raises:
        DataError: for a file or example that cannot be used, naming it.
    """
    about = {"set_name": set_name, "split": split, "source": str(path), "needed": needed}
    return [to_example(entry, number=k, **about) for k, entry in enumerate(read_json(path))]


def digest(examples: Iterable[Example]) -> str:
    """Sha256 of examples, in their order."""
    total = hashlib.sha256()
    for one in examples:
        total.update(json.dumps([one.id, one.instruction, one.input, one.output, one.answer]).encode())
    return total.hexdigest()
