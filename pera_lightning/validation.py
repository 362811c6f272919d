"""Checks of arguments: each raises one line that says what was given and what is allowed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

from pera_lightning.errors import ConfigurationError, UnknownNameError, closest

Function = TypeVar("Function", bound=Callable[..., Any])


def renamed(old: str, new: str) -> Callable[[Function], Function]:
    """Lets a function take the keyword `new` by its old name too, which warns in one line."""

    def decorate(function: Function) -> Function:
        @wraps(function)
        def with_alias(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                if new in kwargs:
                    raise ConfigurationError(f"{old} is the old name of {new}: give {new} alone")
                warnings.warn(f"{function.__name__}: {old}= is now {new}=", FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return with_alias  # type: ignore[return-value]

    return decorate


def check_positive_int(value: Any, name: str) -> None:
    """Raises `ConfigurationError` unless the argument `name` is an integer of at least 1, and not a bool."""
    if not _is_int(value) or value < 1:
        raise ConfigurationError(f"{name}={value!r}: a positive integer is needed")


def check_positive(value: Any, name: str) -> None:
    """Raises `ConfigurationError` unless the argument `name` is a finite number above 0."""
    check_in_range(value, name, gt=0)


def check_in_range(
    value: Any,
    name: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    integer: bool = False,
) -> None:
    """Raises `ConfigurationError` unless the argument `name` is a finite number, or integer, within the bounds given.

    The bounds are those of the operators: `ge` and `le` are allowed themselves, `gt` and `lt` are not.
    """
    # NaN, infinity, True and False are refused whatever the bounds.
    number = _is_int(value) or (not integer and isinstance(value, float) and math.isfinite(value))
    inside = number and (
        (ge is None or value >= ge)
        and (gt is None or value > gt)
        and (le is None or value <= le)
        and (lt is None or value < lt)
    )
    if not inside:
        what = "an integer" if integer else "a number"
        raise ConfigurationError(f"{name}={value!r}: {what}{_range_in_words(ge, gt, le, lt)} is needed")


def check_choice(value: Any, name: str, choices: Sequence[str]) -> None:
    """Raises `UnknownNameError` unless the argument `name` is one of `choices`; the message has the closest of them."""
    if value not in choices:
        one = f"one of {', '.join(choices)}{closest(str(value), choices)}"
        raise UnknownNameError(f"{name}={value!r} does not exist; {one}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # a bool is an int of Python's


def _range_in_words(ge: float | None, gt: float | None, le: float | None, lt: float | None) -> str:
    low, high = ge if ge is not None else gt, le if le is not None else lt
    if low is not None and high is not None:
        return f" in {'(' if ge is None else '['}{low}, {high}{')' if le is None else ']'}"
    if low is not None:
        return f" {'of at least' if ge is not None else 'above'} {low}"
    return "" if high is None else f" {'of at most' if le is not None else 'below'} {high}"
