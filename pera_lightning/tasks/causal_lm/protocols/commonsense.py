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
class AnswerFormat:
    """How the examples of a set are answered.

    Args:
        pattern: regular expression of an answer in generated text.
        options: the answer words of each example; empty if examples differ and have to say theirs.
    """

    pattern: str
    options: tuple[str, ...] = ()


_ANSWERS = "answer1|answer2|answer3|answer4|answer5"

SETS: dict[str, AnswerFormat] = {  # in the order of the papers' tables
    "boolq": AnswerFormat("true|false", ("true", "false")),
    "piqa": AnswerFormat("solution1|solution2", ("solution1", "solution2")),
    "social_i_qa": AnswerFormat(_ANSWERS, ("answer1", "answer2", "answer3")),
    "hellaswag": AnswerFormat("ending1|ending2|ending3|ending4", ("ending1", "ending2", "ending3", "ending4")),
    "winogrande": AnswerFormat("option1|option2", ("option1", "option2")),
    "ARC-Easy": AnswerFormat(_ANSWERS),  # ARC has questions of 3, 4 and 5 answers
    "ARC-Challenge": AnswerFormat(_ANSWERS),
    "openbookqa": AnswerFormat(_ANSWERS, ("answer1", "answer2", "answer3", "answer4")),
}

_FORMAT = re.compile(r"Answer format:([^\n]*)\s*\Z")
_SENTENCE = "the correct answer is "


def options(example: Example) -> tuple[str, ...]:
    """The answer words of an example: those its instruction ends with, or else those of its set.

    Raises:
        DataError: if neither says them, or the instruction's are not a list of different words.
    """
    where = f"example {example.id} of {example.set}"
    found = _FORMAT.search(example.instruction)
    if found is None:
        if example.set in SETS and SETS[example.set].options:
            return SETS[example.set].options
        raise DataError(
            f"{where}: its options are unknown; end the instruction with a line like 'Answer format: answer1/answer2'"
        )
    words = tuple(word.strip() for word in found[1].split("/"))
    if len(words) < 2 or not all(words) or len(set(words)) < len(words):
        raise DataError(f"{where}: {found[0].strip()!r} has no options; write different words with slashes between")
    return words


def check_example(example: Example) -> None:
    """Raises `DataError` if the answer is not one of the options."""
    words = options(example)
    if example.answer not in words:
        raise DataError(
            f"example {example.id} of {example.set}: answer {example.answer!r} is none of its options "
            f"{', '.join(words)}; correct the example or leave it out"
        )


def first_match(text: str, example: Example) -> str | None:
    """The first answer word in a text, case-sensitive: by the pattern of the example's set, or else its options."""
    if example.set in SETS:
        pattern = SETS[example.set].pattern
    else:  # longest first, or answer1 would be read in answer12
        pattern = "|".join(re.escape(word) for word in sorted(options(example), key=len, reverse=True))
    found = re.search(pattern, text)
    return found[0] if found else None


def first_match_of_response(text: str, example: Example) -> str | None:
    """`first_match` before any further response marker: LLM-Adapters cuts the whole text at these markers."""
    return first_match(text.partition("### Response:")[0], example)


def whole_answer(text: str, example: Example) -> str | None:
    """The option that a text is, after at most the words "the correct answer is "; None for anything else."""
    word = text.strip().removeprefix(_SENTENCE).strip()
    return word if word in options(example) else None


def answer_sentence(option: str) -> str:
    """What a model that was trained on these sets says for an option."""
    return f"{_SENTENCE}{option}"


LLM_ADAPTERS = register(
    Protocol(
        name="llm_adapters",
        task=TASK,
        origin=(
            "LLM-Adapters' code, which AuroRA follows: both templates, loss on the whole text, 256 tokens a row, 32 "
            "new tokens, 4 beams, first match. Ours, not in its code: padding is masked while generating (it passes no "
            "attention mask, so that its answers depend on the batch), and a row's input is used in evaluation too."
        ),
        training_prompt=prompts.llm_adapters_training,
        evaluation_prompt=prompts.llm_adapters_evaluation,
        response=prompts.output,
        loss_on="all",
        bos="tokenizer",
        max_length=256,
        decoding=Decoding(max_new_tokens=32, num_beams=4),
        extract=first_match_of_response,
        options=options,
        check=check_example,
        summarise=accuracy_summary,
        main_metric="accuracy",
    )
)

HIRA = register(
    Protocol(
        name="hira",
        task=TASK,
        origin=(
            "HiRA's code, which PERA used too: one template, BOS and EOS added, loss on the answer, 16 new tokens, 4 "
            "beams, LLM-Adapters' extraction. Ours, not in the paper: 512 tokens a row, beams without sampling (its "
            "script samples within the beams by default, at temperature 0.1), and the template's form with an input."
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

STRICT = register(
    replace(
        HIRA,
        name="strict",
        origin=(
            "Ours, in no paper: HiRA's template and loss, greedy decoding of 16 tokens, and the whole text has to be "
            "an option of the row, with or without 'the correct answer is' in front."
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
