"""Test examples as token ids: what a model is given, and the options that are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pera_lightning.data.tokenization import encode, encode_pairs
from pera_lightning.tasks.causal_lm.examples import Example
from pera_lightning.tasks.causal_lm.protocols import Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Question:
    """A test example, tokenised."""

    example: Example
    prompt: list[int]  # token ids; those to be continued if the protocol generates
    options: tuple[str, ...] = ()  # answer words, empty if the protocol generates
    candidates: tuple[tuple[list[int], int], ...] = ()  # for each option (ids, start): ids[start:] is scored


class Questions:
    """A batch of questions: not a list, which Lightning would search for tensors to move."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = list(questions)

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[Question]:
        return iter(self.questions)


def make_questions(
    protocol: Protocol, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[Question]:
    """Tokenises test examples by a protocol, in their order; one without a usable answer or options is refused."""
    for one in examples:
        protocol.check(one)
    prompts = [protocol.evaluation_prompt(one) for one in examples]
    encoded = encode(tokenizer, prompts, bos=protocol.bos)
    if protocol.decoding is not None:
        return [Question(one, ids) for one, ids in zip(examples, encoded, strict=True)]
    # All options of all questions in one call, since a call of a tokenizer costs more than a text.
    options = [protocol.options(one) for one in examples]
    pairs = encode_pairs(
        tokenizer,
        [prompt for prompt, words in zip(prompts, options, strict=True) for _ in words],
        [protocol.option_response(word) for words in options for word in words],
        bos=protocol.bos,
        eos=False,
    )
    rest = iter(pairs)  # handed out again, as many to each question as it has options
    return [
        Question(one, ids, words, tuple(next(rest) for _ in words))
        for one, ids, words in zip(examples, encoded, options, strict=True)
    ]
