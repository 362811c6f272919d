"""Word problems (GSM8K after training on MetaMathQA): the last number of the text, compared exactly.

HiRA's script reads the number after "The answer is: " and rounds it to an integer, so that a text in another form is
wrong and 3.4 counts as 3; here any form is read and numbers are equal or not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

from pera_lightning.errors import DataError
from pera_lightning.tasks.causal_lm.examples import Example
from pera_lightning.tasks.causal_lm.protocols import prompts
from pera_lightning.tasks.causal_lm.protocols.base import Decoding, Protocol, register
from pera_lightning.tasks.causal_lm.statistics import accuracy_summary

# A sign only where nothing stands before it that makes it a minus or a range: "10-5" ends in 5.
_SIGN = r"(?:(?<![\w).%$])(?P<before>[-−])\$?|\$(?P<after>[-−])?)?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DIVISOR = r"(?:/(?P<divisor>0*[1-9]\d*)(?!\.?\d|/))?"
_NUMBER = re.compile(rf"{_SIGN}(?P<value>{_DIGITS}(?:\.\d+)?|(?<!\d)\.\d+){_DIVISOR}")

# The same as people write them: an en dash as a minus; a space behind the minus where it can be no subtraction and no
# item of a list ("= - 3", "is: - 3"); 1_000, 1'000 and 1 000 (narrow or no-break spaces); 1.000.000,5 with points.
_SPACED = r"(?:(?<=[=:({#][^\S\n])|(?<=[=:({#])|(?<=\sis\s)|\A(?=\S\s\S*\Z))(?P<spaced>[-−–])\s\$?"
_GROUPED = r"\d{1,3}(?P<mark>[,_'’\u00a0\u2009\u202f])\d{3}(?:(?P=mark)\d{3})*(?!\d)"
_POINTS = r"(?P<points>\d{1,3}(?:\.\d{3}){2,})(?!\.?\d)(?:,(?P<decimals>\d+))?"
_WRITTEN = re.compile(
    rf"(?:{_SPACED}|{_SIGN.replace('[-−]', '[-−–]')})"
    rf"(?:{_POINTS}|(?P<value>(?:{_GROUPED}|\d+)(?:\.\d+)?|(?<!\d)\.\d+){_DIVISOR})"
)


def _value(match: re.Match[str]) -> Decimal:
    parts = match.groupdict()
    if points := parts.get("points"):
        number = Decimal(f"{points.replace('.', '')}.{parts['decimals'] or 0}")
    else:
        number = Decimal(re.sub(r"[^\d.]", "", parts["value"]))
    if parts["divisor"]:
        number /= Decimal(parts["divisor"])
    # A unary minus would round to the 28 digits of the context.
    return number.copy_negate() if parts["before"] or parts["after"] or parts.get("spaced") else number


def last_number(text: str) -> Decimal | None:
    """The last number of a text, or None.

    Thousands may have commas, "$" and a full stop are passed over, a plain fraction such as 3/4 is one number.
    """
    found = [*_NUMBER.finditer(text)]
    return _value(found[-1]) if found else None


def last_written_number(text: str) -> Decimal | None:
    """`last_number` of what people write too: ``"= - 3"``, an en dash, ``"1_000"``, ``"1.000.000"``."""
    found = [*_WRITTEN.finditer(text)]
    return _value(found[-1]) if found else None


def gold_number(answer: str) -> Decimal:
    """The number of an answer as the files hold it: ``"576.0"``, ``"1,200"``, or a solution ending in ``"#### 72"``.

    All forms of `last_written_number` are read, by every protocol.

    Raises:
        DataError: for anything else.
    """
    text = _final_answer(answer)
    match = _NUMBER.fullmatch(text) or _WRITTEN.fullmatch(text)
    if match is None:
        shown = answer if len(answer) <= 60 else f"… {answer[-58:]}"  # a solution's number is at its end
        raise DataError(f"answer {shown!r} is not a number; give one such as '72', '576.0' or '... #### 72'")
    return _value(match)


def read_otherwise(protocol: Protocol, examples: Sequence[Example]) -> list[Example]:
    """Examples whose answer, as the file writes it, a protocol does not read as that number in a generated text.

    A model that answers just like the data would be wrong.
    """
    return [one for one in examples if not protocol.is_correct(protocol.extract(_final_answer(one.answer), one), one)]


def _final_answer(answer: str) -> str:
    """What stands after the ``####`` of a solution, or the answer itself."""
    return answer.rpartition("####")[2].strip()


def written(number: Decimal) -> str:
    """A number in its shortest plain form: 576.0 is ``"576"``."""
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def extract(text: str, example: Example) -> str | None:
    """The last number of a generated text, written plainly."""
    number = last_number(text)
    return None if number is None else written(number)


def extract_written(text: str, example: Example) -> str | None:
    """The last number of a generated text as people write them, written plainly."""
    number = last_written_number(text)
    return None if number is None else written(number)


def is_correct(prediction: str | None, example: Example) -> bool:
    """Whether the prediction is the number of the example's answer, however that is written."""
    return prediction is not None and Decimal(prediction) == gold_number(example.answer)


def check_example(example: Example) -> None:
    """Raises `DataError` if the answer of a test example is not a number."""
    try:
        gold_number(example.answer)
    except DataError as error:
        raise DataError(f"example {example.id} of {example.set}: {error}") from None


LAST_NUMBER = register(
    Protocol(
        name="last_number",
        task="maths",
        origin=(
            "HiRA's template, with BOS and EOS, and loss on the answer. Ours, not in the paper: 512 tokens an "
            "example, greedy decoding of at most 512 tokens, and the last number as the answer, exactly equal (its "
            "script takes 4 beams and 200 tokens, reads the number after 'The answer is: ' and rounds it)."
        ),
        **prompts.HIRA_FORM,
        decoding=Decoding(max_new_tokens=512),
        extract=extract,
        is_correct=is_correct,
        check=check_example,
        summarise=accuracy_summary,
        main_metric="accuracy",
    )
)

# A name of its own: what `last_number` reads, and so what its results mean, stays as it is.
LAST_WRITTEN_NUMBER = register(
    replace(
        LAST_NUMBER,
        name="last_written_number",
        origin=(
            "Ours, in no paper: last_number, which reads '= - 3', an en dash as a minus, 1_000, 1'000 and 1.000.000 "
            "too."
        ),
        extract=extract_written,
    )
)
