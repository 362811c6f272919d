import math

import pytest

from pera_lightning.errors import ConfigurationError, UnknownNameError
from pera_lightning.validation import check_choice, check_in_range, check_positive, check_positive_int


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None])
def test_a_positive_integer(value):
    check_positive_int(1, "rank")
    with pytest.raises(ConfigurationError, match=r"rank=.*: a positive integer is needed"):
        check_positive_int(value, "rank")


@pytest.mark.parametrize("value", [0, -0.5, math.inf, math.nan, False, "1"])
def test_a_positive_number(value):
    check_positive(1e-300, "lr")
    check_positive(3, "lr")
    with pytest.raises(ConfigurationError, match=r"lr=.*: a number above 0 is needed"):
        check_positive(value, "lr")


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "words"),
    [
        ({"ge": 0, "lt": 1}, [0, 0.999], [-1e-9, 1, 1.0], r"a number in \[0, 1\)"),
        ({"gt": 0, "le": 1}, [1, 1e-9], [0, 1.1], r"a number in \(0, 1\]"),
        ({"ge": 0}, [0, 1e9], [-1, math.nan, math.inf], "a number of at least 0"),
        ({"lt": 5}, [4.9, -7], [5], "a number below 5"),
        ({"le": 5}, [5], [5.1], "a number of at most 5"),
        ({"ge": 0, "integer": True}, [0, 7], [0.0, True, -1], "an integer of at least 0"),
    ],
)
def test_a_range(bounds, inside, outside, words):
    for value in inside:
        check_in_range(value, "x", **bounds)
    for value in outside:
        with pytest.raises(ConfigurationError, match=f"x=.*: {words} is needed"):
            check_in_range(value, "x", **bounds)


def test_a_choice_names_what_there_is_and_the_closest():
    check_choice("relu", "activation", ("relu", "tanh"))
    with pytest.raises(UnknownNameError, match=r"activation='relo' does not exist; one of relu, tanh; closest: relu"):
        check_choice("relo", "activation", ("relu", "tanh"))
