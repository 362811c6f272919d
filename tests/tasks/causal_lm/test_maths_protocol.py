"""The maths protocol: its prompt, and numbers in and out of text."""

from __future__ import annotations

from decimal import Decimal

import pytest

from pera_lightning.errors import DataError
from pera_lightning.tasks.causal_lm.examples import Example
from pera_lightning.tasks.causal_lm.protocols import Decoding, protocol
from pera_lightning.tasks.causal_lm.protocols.maths import gold_number, last_number, written

LAST_NUMBER = protocol("maths", "last_number")


def answered(answer: str) -> Example:
    return Example("3", "gsm8k", "How many?", "", "Two. #### 2", answer)


def test_the_prompt_and_the_choices() -> None:
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
        "\n"
        "### Instruction:\n"
        "How many?\n"
        "\n"
        "### Response:\n"
    )
    row = answered("2")
    assert LAST_NUMBER.training_prompt(row) == LAST_NUMBER.evaluation_prompt(row) == expected
    assert LAST_NUMBER.response(row) == "Two. #### 2"
    assert LAST_NUMBER.options(row) == ()
    assert (LAST_NUMBER.loss_on, LAST_NUMBER.bos, LAST_NUMBER.max_length) == ("answer", "always", 512)
    assert LAST_NUMBER.decoding == Decoding(max_new_tokens=512, num_beams=1)
    assert "Ours" in LAST_NUMBER.origin


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is: 72", "72"),
        ("12 and 30 make 42.", "42"),
        ("576.0", "576"),
        ("3.50", "3.5"),
        ("costs $1,234,567.80.", "1234567.8"),
        ("1,200 eggs", "1200"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("one of 7, 8, and 9, then", "9"),
        ("-5", "-5"),
        ("is −5", "-5"),
        ("-$5", "-5"),
        ("$-5.50", "-5.5"),
        ("(-3)", "-3"),
        ("10-4", "4"),
        ("from 5-10", "10"),
        ("x-2", "2"),
        ("(8)-2", "2"),
        (".5 of it", "0.5"),
        ("3/4 of it", "0.75"),
        ("-1/2", "-0.5"),
        ("8/2", "4"),
        ("5/0", "0"),
        ("2/3/4", "0.75"),
        ("1/3.5", "3.5"),
        ("50% of them", "50"),
        ("\\boxed{42}", "42"),
        ("2 * 3 = 6\n\n#### 6\n", "6"),
        ("-0", "0"),
        ("100", "100"),
        ("0.0", "0"),
        ("12345678901234567890123456789012345", "12345678901234567890123456789012345"),
        ("-12345678901234567890123456789012345", "-12345678901234567890123456789012345"),
        ("version 1.2.3", "3"),
        ("no number", None),
        ("", None),
        ("$-., /", None),
    ],
)
def test_the_last_number(text: str, found: str | None) -> None:
    assert LAST_NUMBER.extract(text, answered("1")) == found


@pytest.mark.parametrize(
    ("text", "found", "before"),  # as last_written_number and as last_number read it
    [
        ("x = - 3", "-3", "3"),
        ("The answer is: - 3.5 cm", "-3.5", "3.5"),
        ("The answer is - 3", "-3", "3"),
        ("- 3", "-3", "3"),
        ("\\boxed{- 3}", "-3", "3"),
        ("it is \u20133", "-3", "3"),
        ("pages 5\u201310", "10", "10"),
        ("10 - 3", "3", "3"),
        ("10 \u2013 3", "3", "3"),
        ("We have:\n- 3 apples", "3", "3"),
        ("- 3 apples are left", "3", "3"),
        ("1_000 eggs", "1000", "000"),
        ("1'000'000", "1000000", "000"),
        ("1\u202f000", "1000", "000"),
        ("1 000", "0", "0"),
        ("1.000.000", "1000000", "0"),
        ("1.000.000,50 euros.", "1000000.5", "50"),
        ("1.000", "1", "1"),
        ("1,000.50", "1000.5", "1000.5"),
        ("version 1.2.3", "3", "3"),
        ("3/4 of it", "0.75", "0.75"),
        ("-$5", "-5", "-5"),
    ],
)
def test_numbers_as_people_write_them_have_a_protocol_of_their_own(text: str, found: str, before: str) -> None:
    assert protocol("maths", "last_written_number").extract(text, answered("1")) == found
    assert Decimal(LAST_NUMBER.extract(text, answered("1")) or "nan") == Decimal(before)


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("576", "576.0", True),
        ("576", "576", True),
        ("576.0", "576", True),
        ("1200", "1,200", True),
        ("72", "48/2 = <<48/2=24>>24 clips in May.\n48+24 = 72.\n#### 72", True),
        ("-5", "-5.0", True),
        ("5", "-5", False),
        ("576.1", "576.0", False),
        ("3.0000000000000001", "3", False),
        (None, "3", False),
    ],
)
def test_equal_numbers_are_right_however_written(prediction: str | None, answer: str, right: bool) -> None:
    assert LAST_NUMBER.is_correct(prediction, answered(answer)) is right


def test_a_third_is_a_third_and_no_other_number() -> None:
    found = LAST_NUMBER.extract("1/3", answered("1/3"))
    assert LAST_NUMBER.is_correct(found, answered("1/3"))
    assert not LAST_NUMBER.is_correct(found, answered("3"))
    assert not LAST_NUMBER.is_correct(found, answered("0.3333"))


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("576.0", "576"),
        ("#### 72", "72"),
        ("a 5 b #### 1,080", "1080"),
        (" $20 ", "20"),
        ("-7", "-7"),
        ("1/4", "0.25"),
        ("- 3", "-3"),
        ("#### \u20133", "-3"),
        ("1.000.000", "1000000"),
        ("1_000", "1000"),
    ],
)
def test_gold_numbers(answer: str, number: str) -> None:
    assert gold_number(answer) == Decimal(number)


@pytest.mark.parametrize("answer", ["", "seventy", "#### ", "5 apples", "3 4", "#### 72 or 73"])
def test_answers_that_are_no_number(answer: str) -> None:
    with pytest.raises(DataError, match="is not a number; give one such as") as caught:
        gold_number(answer)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"^example 3 of gsm8k: answer"):
        LAST_NUMBER.check(answered(answer))


def test_an_example_with_a_number_passes() -> None:
    LAST_NUMBER.check(answered("576.0"))


def test_numbers_are_decimals_and_plain() -> None:
    assert last_number("0.1 + 0.2 = 0.3") == Decimal("0.3")
    assert [written(Decimal(text)) for text in ("1E+3", "10", "0.50", "-0.0")] == ["1000", "10", "0.5", "0"]


def test_the_summary_is_accuracy() -> None:
    records = [{"prediction": "1", "correct": True}, {"prediction": None, "correct": False}]
    assert LAST_NUMBER.summarise(records)[LAST_NUMBER.main_metric] == 0.5
