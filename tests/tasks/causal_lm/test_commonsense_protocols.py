"""The commonsense protocols: prompts byte for byte, options, extraction, and what a results file says of them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from pera_lightning.errors import ConfigurationError, DataError, UnknownNameError
from pera_lightning.tasks.causal_lm.examples import Example
from pera_lightning.tasks.causal_lm.protocols import Decoding, Protocol, protocol, protocols, register
from pera_lightning.tasks.causal_lm.protocols.commonsense import SETS, check_example, options

NAMES = ["llm_adapters", "hira", "strict", "score"]
QUESTION = "Which is it?\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3"
ROW = Example("7", "ARC-Easy", QUESTION, "", "the correct answer is answer2", "answer2")
WITH_INPUT = dataclasses.replace(ROW, instruction="Which is it?", input="It is b.")


def of_set(name: str, instruction: str = "", answer: str = "") -> Example:
    return Example("7", name, instruction, "", "", answer)


LLM_ADAPTERS_TRAINING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
    "\n"
    "                ### Instruction:\n"
    "                Which is it?\n"
    "\n"
    "Answer1: a Answer2: b Answer3: c\n"
    "\n"
    "Answer format: answer1/answer2/answer3\n"
    "                \n"
    "                ### Response:\n"
    "                "
)
LLM_ADAPTERS_EVALUATION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n"
    "\n"
    "                ### Instruction:\n"
    "                Which is it?\n"
    "\n"
    "Answer1: a Answer2: b Answer3: c\n"
    "\n"
    "Answer format: answer1/answer2/answer3\n"
    "\n"
    "                ### Response:\n"
    "                "
)
LLM_ADAPTERS_TRAINING_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. \n"
    "\n"
    "                ### Instruction:\n"
    "                Which is it?\n"
    "                \n"
    "                ### Input:\n"
    "                It is b.\n"
    "                \n"
    "                ### Response:\n"
    "                "
)
LLM_ADAPTERS_EVALUATION_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n"
    "\n"
    "                ### Instruction:\n"
    "                Which is it?\n"
    "\n"
    "                ### Input:\n"
    "                It is b.\n"
    "\n"
    "                ### Response:\n"
    "                "
)
HIRA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
    "\n"
    "### Instruction:\n"
    "Which is it?\n"
    "\n"
    "Answer1: a Answer2: b Answer3: c\n"
    "\n"
    "Answer format: answer1/answer2/answer3\n"
    "\n"
    "### Response:\n"
)
HIRA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.  \n"
    "\n"
    "### Instruction:\n"
    "Which is it?\n"
    "\n"
    "### Input:\n"
    "It is b.\n"
    "\n"
    "### Response:\n"
)


@pytest.mark.parametrize(
    ("row", "training", "evaluation"),
    [
        (ROW, LLM_ADAPTERS_TRAINING, LLM_ADAPTERS_EVALUATION),
        (WITH_INPUT, LLM_ADAPTERS_TRAINING_WITH_INPUT, LLM_ADAPTERS_EVALUATION_WITH_INPUT),
    ],
)
def test_prompts_of_llm_adapters(row: Example, training: str, evaluation: str) -> None:
    one = protocol("commonsense", "llm_adapters")
    assert one.training_prompt(row) == training
    assert one.evaluation_prompt(row) == evaluation


@pytest.mark.parametrize("name", ["hira", "strict", "score"])
@pytest.mark.parametrize(("row", "prompt"), [(ROW, HIRA), (WITH_INPUT, HIRA_WITH_INPUT)])
def test_prompts_of_hira(name: str, row: Example, prompt: str) -> None:
    one = protocol("commonsense", name)
    assert one.training_prompt(row) == prompt
    assert one.evaluation_prompt(row) == prompt


@pytest.mark.parametrize("name", NAMES)
def test_the_response_is_the_output(name: str) -> None:
    assert protocol("commonsense", name).response(ROW) == "the correct answer is answer2"


def test_the_choices_of_each_protocol() -> None:
    chosen = {
        name: (one.loss_on, one.bos, one.max_length, one.decoding) for name, one in protocols("commonsense").items()
    }
    assert chosen == {
        "llm_adapters": ("all", "tokenizer", 256, Decoding(max_new_tokens=32, num_beams=4)),
        "hira": ("answer", "always", 512, Decoding(max_new_tokens=16, num_beams=4)),
        "strict": ("answer", "always", 512, Decoding(max_new_tokens=16, num_beams=1)),
        "score": ("answer", "always", 512, None),
    }


def test_the_sets_in_the_papers_order() -> None:
    papers = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"]
    assert list(SETS) == papers


@pytest.mark.parametrize("name", ["llm_adapters", "hira"])
@pytest.mark.parametrize(
    ("which", "text", "found"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "it is untrue, so false", "true"),  # within a word counts, as in the papers' code
        ("boolq", "False, not true", "true"),  # case-sensitive
        ("boolq", "True", None),
        ("piqa", "solution2 rather than solution1", "solution2"),
        ("piqa", "solution3", None),
        ("social_i_qa", "answer5", "answer5"),  # no option of the set, and found all the same
        ("social_i_qa", "answer6", None),
        ("hellaswag", "\n ending4\nending1", "ending4"),
        ("hellaswag", "ending5", None),
        ("winogrande", "Option1 or option2", "option2"),
        ("ARC-Easy", "answer12", "answer1"),
        ("ARC-Challenge", "Answer1", None),
        ("openbookqa", "", None),
    ],
)
def test_the_first_match_counts(name: str, which: str, text: str, found: str | None) -> None:
    assert protocol("commonsense", name).extract(text, of_set(which)) == found


def test_llm_adapters_reads_up_to_the_next_marker() -> None:
    """Its code splits the whole text at the markers and keeps the piece after the prompt's."""
    text = "none of them\n\n### Response:\nthe correct answer is answer3"
    assert protocol("commonsense", "llm_adapters").extract(text, ROW) is None
    assert protocol("commonsense", "hira").extract(text, ROW) == "answer3"


@pytest.mark.parametrize("name", ["llm_adapters", "hira"])
def test_a_set_of_ones_own_is_read_by_its_options(name: str) -> None:
    row = of_set("mine", "Choose.\nAnswer format: a+/b1/b12")
    extract = protocol("commonsense", name).extract
    assert extract("b12 or b1", row) == "b12"
    assert extract("aa", row) is None, "an option is text, no pattern"
    assert extract("so a+", row) == "a+"


@pytest.mark.parametrize("name", ["strict", "score"])
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the correct answer is answer3", "answer3"),
        (" answer3\n", "answer3"),
        ("  the correct answer is answer1  ", "answer1"),
        ("the correct answer is answer4", None),  # this row has three options
        ("the correct answer is answer3.", None),
        ("answer1 answer2", None),
        ("The correct answer is answer3", None),
        ("Answer3", None),
        ("the correct answer is the correct answer is answer3", None),
        ("the correct answer is", None),
        ("", None),
    ],
)
def test_strict_takes_an_option_and_nothing_else(name: str, text: str, found: str | None) -> None:
    assert protocol("commonsense", name).extract(text, ROW) == found


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (ROW, ("answer1", "answer2", "answer3")),
        (
            of_set("ARC-Challenge", "Q\n\nAnswer format: answer1/answer2/answer3/answer4/answer5"),
            ("answer1", "answer2", "answer3", "answer4", "answer5"),
        ),
        (of_set("boolq", "does the Answer format: x/y matter?\n\nAnswer format: true/false \n"), ("true", "false")),
        (of_set("mine", "Q Answer format: yes / not sure"), ("yes", "not sure")),
        (of_set("boolq", "is it so?"), ("true", "false")),
        (of_set("piqa", "which?"), ("solution1", "solution2")),
        (of_set("social_i_qa", "who?"), ("answer1", "answer2", "answer3")),
        (of_set("hellaswag", "and then"), ("ending1", "ending2", "ending3", "ending4")),
        (of_set("winogrande", "who?"), ("option1", "option2")),
        (of_set("openbookqa", "what?"), ("answer1", "answer2", "answer3", "answer4")),
    ],
)
def test_options(row: Example, found: tuple[str, ...]) -> None:
    assert options(row) == found


@pytest.mark.parametrize(
    "row",
    [
        of_set("mine", "no options"),
        of_set("ARC-Easy", "three, four or five?"),
        of_set("boolq", "Q\nAnswer format: true"),
        of_set("boolq", "Q\nAnswer format: true/"),
        of_set("boolq", "Q\nAnswer format: true/true"),
    ],
)
def test_options_that_are_not_said(row: Example) -> None:
    with pytest.raises(DataError, match=rf"^example 7 of {row.set} has no options: end") as caught:
        options(row)
    assert "\n" not in str(caught.value)


def test_an_answer_that_is_no_option() -> None:
    check_example(ROW)
    wrong = dataclasses.replace(ROW, answer="answer4")
    message = "example 7 of ARC-Easy: answer 'answer4' is not one of its options answer1, answer2, answer3"
    for name in NAMES:
        with pytest.raises(DataError, match=message):
            protocol("commonsense", name).check(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_a_prediction_is_right_where_it_is_the_answer(name: str) -> None:
    is_correct = protocol("commonsense", name).is_correct
    assert [is_correct(word, ROW) for word in ("answer2", "answer1", "Answer2", None)] == [True, False, False, False]


def test_score_compares_the_sentences_it_trained_on() -> None:
    score = protocol("commonsense", "score")
    assert [score.option_response(word) for word in score.options(ROW)] == [
        "the correct answer is answer1",
        "the correct answer is answer2",
        "the correct answer is answer3",
    ]
    assert score.option_response(ROW.answer) == score.response(ROW)


@pytest.mark.parametrize("name", NAMES)
def test_a_description_holds_what_decides_a_result(name: str) -> None:
    one = protocol("commonsense", name)
    said = one.describe()
    assert json.loads(json.dumps(said)) == said
    assert said["name"] == name
    assert said["task"] == "commonsense"
    assert said["origin"] == one.origin
    assert "Ours" in one.origin
    assert (said["loss_on"], said["bos"], said["max_length"]) == (one.loss_on, one.bos, one.max_length)
    assert said["main_metric"] == "accuracy"
    assert "{instruction}" in said["training_prompt"]
    assert "{output}" not in said["training_prompt"]


def test_a_description_of_decoding_and_prompts() -> None:
    said = protocol("commonsense", "llm_adapters").describe()
    assert said["decoding"] == {
        "max_new_tokens": 32,
        "num_beams": 4,
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 0,
    }
    assert said["training_prompt"] != said["evaluation_prompt"]
    assert protocol("commonsense", "score").describe()["decoding"] is None


def test_names_that_do_not_exist() -> None:
    with pytest.raises(
        UnknownNameError, match=r"commonsense protocol='hirra' does not exist; one of .*score; closest: hira"
    ):
        protocol("commonsense", "hirra")
    with pytest.raises(UnknownNameError, match=r"task='math' does not exist; one of commonsense.*; closest: maths"):
        protocol("math", "last_number")


def test_a_name_is_given_once() -> None:
    one = protocol("commonsense", "hira")
    with pytest.raises(ConfigurationError, match="has a protocol 'hira' already"):
        register(one)
    assert isinstance(one, Protocol)


@pytest.mark.parametrize("values", [{"max_new_tokens": 0}, {"max_new_tokens": 4, "num_beams": 0}])
def test_decoding_of_nothing(values: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="=0: a positive integer is needed"):
        Decoding(**values)


def test_a_protocol_costs_no_library() -> None:
    code = (
        "import sys; "
        "from pera_lightning.tasks.causal_lm.protocols import protocol; protocol('dialogue', 'self_persona'); "
        "protocol('maths', 'last_number'); protocol('commonsense', 'score'); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "torchmetrics", "transformers", "sacrebleu", "rouge_score", "nltk", "numpy"} & set(loaded)
