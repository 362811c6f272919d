"""Test rows as token ids: what a model is given, and the options that are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pera_lightning.data.tokenization import encode, encode_pairs
from pera_lightning.tasks.causal_lm.examples import Row
from pera_lightning.tasks.causal_lm.protocols import Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Question:
    """One test row.

    Attributes:
        row: as read.
        prompt: token ids; those to be continued where the protocol generates.
        options: answer words, empty where the protocol generates.
        candidates: for each option (ids, start): ids[start:] is scored.
    """

    row: Row
    prompt: list[int]
    options: tuple[str, ...] = ()
    candidates: tuple[tuple[list[int], int], ...] = ()


class Questions:
    """A batch of questions: no collection, so that nobody takes it apart to look for tensors to move."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = list(questions)

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[Question]:
        return iter(self.questions)


def make_questions(protocol: Protocol, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Question]:
    """Tokenises test rows by a protocol.

    Args:
        protocol: gives prompts and options.
        tokenizer: of the model.
        rows: in any order, which is kept.

    Raises:
        DataError: for a row without a usable answer or options.
    """
    for row in rows:
        protocol.check(row)
    prompts = [protocol.evaluation_prompt(row) for row in rows]
    encoded = encode(tokenizer, prompts, bos=protocol.bos)
    if protocol.decoding is not None:
        return [Question(row, ids) for row, ids in zip(rows, encoded, strict=True)]
    options = [protocol.options(row) for row in rows]
    pairs = encode_pairs(
        tokenizer,
        [prompt for prompt, words in zip(prompts, options, strict=True) for _ in words],
        [protocol.option_response(word) for words in options for word in words],
        bos=protocol.bos,
        eos=False,
    )
    rest = iter(pairs)
    return [
        Question(row, ids, words, tuple(next(rest) for _ in words))
        for row, ids, words in zip(rows, encoded, options, strict=True)
    ]
