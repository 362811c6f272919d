"""The eight commonsense sets in the form of LLM-Adapters, and four protocols: llm_adapters, hira, strict, score.

Papers: LLM-Adapters (arXiv 2304.01933), whose protocol AuroRA follows; HiRA (ICLR 2025), which PERA follows. Both read
the first match of a regular expression, case-sensitive; a text without one counts as wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from pera_lightning.errors import DataError
from pera_lightning.tasks.causal_lm import prompts
from pera_lightning.tasks.causal_lm.examples import Row
from pera_lightning.tasks.causal_lm.protocols import Decoding, Protocol, register
from pera_lightning.tasks.causal_lm.statistics import accuracy_summary

TASK = "commonsense"


@dataclass(frozen=True, slots=True)
class CommonsenseSet:
    """One of the sets.

    Args:
        title: its name in tables.
        test_rows: rows of its test file.
        pattern: regular expression of an answer in generated text.
        options: the answer words of each of its rows; empty where rows differ and have to say theirs.
    """

    title: str
    test_rows: int
    pattern: str
    options: tuple[str, ...]


_ANSWERS = "answer1|answer2|answer3|answer4|answer5"
_ANY: tuple[str, ...] = ()  # ARC has questions of 3, 4 and 5 answers

SETS: dict[str, CommonsenseSet] = {  # in the order of the papers' tables
    "boolq": CommonsenseSet("BoolQ", 3270, "true|false", ("true", "false")),
    "piqa": CommonsenseSet("PIQA", 1838, "solution1|solution2", ("solution1", "solution2")),
    "social_i_qa": CommonsenseSet("SIQA", 1954, _ANSWERS, ("answer1", "answer2", "answer3")),
    "hellaswag": CommonsenseSet(
        "HellaSwag", 10042, "ending1|ending2|ending3|ending4", ("ending1", "ending2", "ending3", "ending4")
    ),
    "winogrande": CommonsenseSet("WinoGrande", 1267, "option1|option2", ("option1", "option2")),
    "ARC-Easy": CommonsenseSet("ARC-e", 2376, _ANSWERS, _ANY),
    "ARC-Challenge": CommonsenseSet("ARC-c", 1172, _ANSWERS, _ANY),
    "openbookqa": CommonsenseSet("OBQA", 500, _ANSWERS, ("answer1", "answer2", "answer3", "answer4")),
}

_FORMAT = re.compile(r"Answer format:([^\n]*)\s*\Z")
_SENTENCE = "the correct answer is "


def options(row: Row) -> tuple[str, ...]:
    """The answer words of a row: those its instruction ends with, or else those of its set.

    Raises:
        DataError: where neither says them, or the instruction's list is no list of different words.
    """
    found = _FORMAT.search(row.instruction)
    if found is None:
        if row.set in SETS and SETS[row.set].options:
            return SETS[row.set].options
        raise DataError(
            f"row {row.id} of {row.set}: its options are unknown; end the instruction with a line such as "
            "'Answer format: answer1/answer2'"
        )
    words = tuple(word.strip() for word in found[1].split("/"))
    if len(words) < 2 or not all(words) or len(set(words)) < len(words):
        raise DataError(
            f"row {row.id} of {row.set}: {found[0].strip()!r} is no list of options; write two or more different "
            "words with slashes between them"
        )
    return words


def check_row(row: Row) -> None:
    """Holds that the answer is one of the options.

    Raises:
        DataError: with the row, its answer and the options.
    """
    words = options(row)
    if row.answer not in words:
        raise DataError(
            f"row {row.id} of {row.set}: answer {row.answer!r} is none of its options {', '.join(words)}; "
            "correct the row or leave it out"
        )


def first_match(text: str, row: Row) -> str | None:
    """The first answer word in a text, case-sensitive; which words, the row's set says, or its options elsewhere."""
    if row.set in SETS:
        pattern = SETS[row.set].pattern
    else:  # longest first, or answer1 would be read in answer12
        pattern = "|".join(re.escape(word) for word in sorted(options(row), key=len, reverse=True))
    found = re.search(pattern, text)
    return found[0] if found else None


def first_match_of_response(text: str, row: Row) -> str | None:
    """`first_match` before any further response marker: LLM-Adapters cuts the whole text at these markers."""
    return first_match(text.partition("### Response:")[0], row)


def whole_answer(text: str, row: Row) -> str | None:
    """The option that a text is, after at most the words "the correct answer is "; None for anything else."""
    word = text.strip().removeprefix(_SENTENCE).strip()
    return word if word in options(row) else None


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
        check=check_row,
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
        check=check_row,
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
