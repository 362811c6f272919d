"""One row of a task: what every protocol reads, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """A question with its answer.

    Args:
        id: unique in its set; names the row in predictions and messages.
        set: the set it belongs to, such as ``"ARC-Easy"``; the extraction of an answer follows it.
        instruction: the question as the model sees it.
        input: further context; empty in the commonsense files.
        output: the text trained on, such as ``"the correct answer is answer3"``.
        answer: what a prediction is compared with, such as ``"answer3"``.
    """

    id: str
    set: str
    instruction: str
    input: str
    output: str
    answer: str
