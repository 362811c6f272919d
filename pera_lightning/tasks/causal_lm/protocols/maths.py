"""Word problems (GSM8K after training on MetaMathQA): the last number of the text, compared exactly.

HiRA's script reads the number after "The answer is: " and rounds it to an integer, so that a text in another form is
wrong and 3.4 counts as 3; here any form is read and numbers are equal or not.
"""

from __future__ import annotations

import re
from decimal import Decimal

from pera_lightning.errors import DataError
from pera_lightning.tasks.causal_lm import prompts
from pera_lightning.tasks.causal_lm.examples import Row
from pera_lightning.tasks.causal_lm.protocols import Decoding, Protocol, no_options, register
from pera_lightning.tasks.causal_lm.statistics import accuracy_summary

# A sign only where nothing stands before it that makes it a minus or a range: "10-5" ends in 5.
_SIGN = r"(?:(?<![\w).%$])(?P<before>[-−])\$?|\$(?P<after>[-−])?)?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(rf"{_SIGN}(?P<value>{_DIGITS}(?:\.\d+)?|(?<!\d)\.\d+)(?:/(?P<divisor>0*[1-9]\d*)(?!\.?\d|/))?")


def _value(match: re.Match[str]) -> Decimal:
    number = Decimal(match["value"].replace(",", ""))
    if match["divisor"]:
        number /= Decimal(match["divisor"])
    # A unary minus would round to the 28 digits of the context.
    return number.copy_negate() if match["before"] or match["after"] else number


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None where there is none.

    Thousands may have commas, "$" and a full stop are passed over, a plain fraction such as 3/4 is one number.
    """
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007 - the last one is what counts
        pass
    return _value(last) if last else None


def gold_number(answer: str) -> Decimal:
    """The number of an answer as the files hold it: ``"576.0"``, ``"1,200"``, or a solution ending in ``"#### 72"``.

    Raises:
        DataError: where that is no number.
    """
    match = _NUMBER.fullmatch(answer.rpartition("####")[2].strip())
    if match is None:
        shown = answer if len(answer) <= 60 else f"… {answer[-58:]}"  # a solution's number is at its end
        raise DataError(f"answer {shown!r} is no number; give one such as '72', '576.0' or '... #### 72'")
    return _value(match)


def written(number: Decimal) -> str:
    """A number in its shortest plain form: 576.0 is ``"576"``."""
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def extract(text: str, row: Row) -> str | None:
    """The last number of a generated text, written plainly."""
    number = last_number(text)
    return None if number is None else written(number)


def is_correct(prediction: str | None, row: Row) -> bool:
    """Whether the prediction is the number of the row's answer, however that is written."""
    return prediction is not None and Decimal(prediction) == gold_number(row.answer)


def check_row(row: Row) -> None:
    """Holds that the answer of a test row is a number.

    Raises:
        DataError: with the row and its answer.
    """
    try:
        gold_number(row.answer)
    except DataError as error:
        raise DataError(f"row {row.id} of {row.set}: {error}") from None


LAST_NUMBER = register(
    Protocol(
        name="last_number",
        task="maths",
        origin=(
            "HiRA's template, with BOS and EOS, and loss on the answer. Ours, not in the paper: 512 tokens a row, "
            "greedy decoding of at most 512 tokens, and the last number as the answer, exactly equal (its script "
            "samples within 4 beams by default, reads the number after 'The answer is: ' and rounds it)."
        ),
        **prompts.HIRA_FORM,
        decoding=Decoding(max_new_tokens=512),
        extract=extract,
        options=no_options,
        is_correct=is_correct,
        check=check_row,
        summarise=accuracy_summary,
        main_metric="accuracy",
    )
)
