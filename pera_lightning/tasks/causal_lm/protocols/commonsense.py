"""The commonsense protocols: llm_adapters, hira, strict and score.

Papers: LLM-Adapters (arXiv 2304.01933), whose protocol AuroRA follows; HiRA (ICLR 2025), which PERA follows. Both read
the first match of a regular expression, case-sensitive; a text without one counts as wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from pera_lightning.errors import DataError
from pera_lightning.tasks.causal_lm.examples import Example
from pera_lightning.tasks.causal_lm.protocols import prompts
from pera_lightning.tasks.causal_lm.protocols.base import Decoding, Protocol, register
from pera_lightning.tasks.causal_lm.statistics import accuracy_summary

TASK = "commonsense"


@dataclass(frozen=True, slots=True)
class CommonsenseSet:
    """What is known of a set of LLM-Adapters."""

    count: int  # of its test examples in the papers
    options: tuple[str, ...]  # answer words of each example; none if examples differ and have to say theirs
    read: tuple[str, ...] = ()  # words that count as an answer in generated text; by default the options


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{k}" for k in range(1, count + 1))


_ANSWERS = _numbered("answer", 5)  # ARC has questions of 3, 4 and 5 answers
SETS: dict[str, CommonsenseSet] = {  # in the order of the papers' tables
    "boolq": CommonsenseSet(3270, ("true", "false")),
    "piqa": CommonsenseSet(1838, _numbered("solution", 2)),
    "social_i_qa": CommonsenseSet(1954, _numbered("answer", 3), _ANSWERS),
    "hellaswag": CommonsenseSet(10042, _numbered("ending", 4)),
    "winogrande": CommonsenseSet(1267, _numbered("option", 2)),
    "ARC-Easy": CommonsenseSet(2376, (), _ANSWERS),
    "ARC-Challenge": CommonsenseSet(1172, (), _ANSWERS),
    "openbookqa": CommonsenseSet(500, _numbered("answer", 4), _ANSWERS),
}

_FORMAT = re.compile(r"Answer format:([^\n]*)\s*\Z")
_SENTENCE = "the correct answer is "


def options(example: Example) -> tuple[str, ...]:
    """The answer words of an example: those its instruction ends with, or else those of its set.

    Raises:
        DataError: if neither says them, or the instruction's are not a list of different words.
    """
    found = _FORMAT.search(example.instruction)
    if found is None and example.set in SETS and SETS[example.set].options:
        return SETS[example.set].options
    words = tuple(word.strip() for word in found[1].split("/")) if found else ()
    if len(words) < 2 or not all(words) or len(set(words)) < len(words):
        raise DataError(
            f"example {example.id} of {example.set} has no options: end the instruction with a line of different words "
            "like 'Answer format: answer1/answer2'"
        )
    return words


def check_example(example: Example) -> None:
    """Raises `DataError` if the answer is not one of the options."""
    words = options(example)
    if example.answer not in words:
        raise DataError(
            f"example {example.id} of {example.set}: answer {example.answer!r} is not one of its options "
            f"{', '.join(words)}; correct the example or leave it out"
        )


def first_match(text: str, example: Example) -> str | None:
    """The first answer word in a text, case-sensitive: of those of the example's set, or else its options."""
    known = SETS.get(example.set)
    words = options(example) if known is None else known.read or known.options
    # Longest first, or answer1 would be read in answer12.
    found = re.search("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)), text)
    return found[0] if found else None


def first_match_of_response(text: str, example: Example) -> str | None:
    """`first_match` before any further response marker: LLM-Adapters cuts the entire text at these markers."""
    return first_match(text.partition("### Response:")[0], example)


def whole_answer(text: str, example: Example) -> str | None:
    """The option that a text is, after at most the words "the correct answer is "; None for anything else."""
    word = text.strip().removeprefix(_SENTENCE).strip()
    return word if word in options(example) else None


def answer_sentence(option: str) -> str:
    """What a model that was trained on these sets says for an option."""
    return f"{_SENTENCE}{option}"


HIRA = register(
    Protocol(
        name="hira",
        task=TASK,
        origin=(
            "HiRA's code, which PERA used too: one template, loss on the answer, 16 new tokens, 4 beams without "
            "sampling, LLM-Adapters' extraction. Ours: BOS and EOS in training (its code has neither there, and BOS at "
            "test), 512 tokens an example (its code 256 of the prompt and 16 of the answer), and the template's form "
            "with an input."
        ),
        **prompts.HIRA_FORM,
        decoding=Decoding(max_new_tokens=16, num_beams=4),
        extract=first_match,
        options=options,
        check=check_example,
        summarise=accuracy_summary,
        main_metric="accuracy",
    )
)

LLM_ADAPTERS = register(
    replace(
        HIRA,
        name="llm_adapters",
        origin=(
            "LLM-Adapters' code, which AuroRA follows: both templates, loss on the entire text, 256 tokens an example, "
            "32 new tokens, 4 beams, first match. Ours, not in its code: padding is masked while generating (it passes "
            "no attention mask, so that its answers depend on the batch), and an example's input is used in evaluation "
            "too."
        ),
        training_prompt=prompts.llm_adapters_training,
        evaluation_prompt=prompts.llm_adapters_evaluation,
        loss_on="all",
        bos="tokenizer",
        max_length=256,
        decoding=Decoding(max_new_tokens=32, num_beams=4),
        extract=first_match_of_response,
    )
)

STRICT = register(
    replace(
        HIRA,
        name="strict",
        origin=(
            "Ours, in no paper: HiRA's template and loss, greedy decoding of 16 tokens, and the entire text has to be "
            "an option of the example, with or without 'the correct answer is' in front."
        ),
        decoding=Decoding(max_new_tokens=16),
        extract=whole_answer,
    )
)

SCORE = register(
    replace(
        HIRA,
        name="score",
        origin=(
            "Ours, in no paper: HiRA's template and loss; nothing is generated, the option whose sentence 'the correct "
            "answer is X' has the largest summed log-probability is the prediction."
        ),
        decoding=None,
        extract=whole_answer,
        option_response=answer_sentence,
    )
)
