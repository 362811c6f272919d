"""The errors of this package, and the one helper that suggests names close to a wrong one.

Everything raised on purpose is a `PeraError`: the command line prints its message on one line and exits with 2.
A message says what was given, what exists and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 2000  # characters of a message about a file


class PeraError(Exception):
    """Base class of what this package raises on purpose."""


class ConfigurationError(PeraError, ValueError):
    """A value that is not allowed, or two that do not go together."""


class UnknownNameError(PeraError, ValueError):
    """A name (method, data set, activation …) that does not exist."""


class NoTargetMatched(PeraError, ValueError):
    """A target, slice or trainable module that the model does not have."""


class UnsupportedTarget(PeraError, TypeError):
    """A target that exists but cannot be adapted (not linear, quantised, never called …)."""


class AlreadyInjectedError(PeraError, RuntimeError):
    """The model carries an adapter already, and another one is asked for."""


class UnusedLayerError(PeraError, RuntimeError):
    """Adapted layers whose forward never ran: their adapters change nothing."""


class NotMergeableError(PeraError, RuntimeError):
    """No single matrix equals what the adapter does."""


class CheckpointError(PeraError, RuntimeError):
    """A checkpoint or adapter folder that is damaged, or does not belong to this model and method.

    Its message is one printable line of bounded length, since names and values of a file may hold anything.
    """

    def __init__(self, message: str) -> None:
        line = "".join(letter if letter.isprintable() else "?" for letter in shorten(message))
        super().__init__(line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …")


class DataError(PeraError, ValueError):
    """Data that is missing, empty, broken or unlike what the model was trained on."""


class NonFiniteLossError(PeraError, ArithmeticError):
    """The loss, or what is trained, became NaN or infinite."""


def closest(name: str, existing: Iterable[str]) -> str:
    """Words a suggestion for a misspelt name, ``"; closest: a, b"``, or the empty string where nothing is near."""
    near = difflib.get_close_matches(name, list(existing), n=3, cutoff=0.4)  # difflib's 0.6 misses short names
    return f"; closest: {', '.join(near)}" if near else ""


def listed(names: Iterable[str], most: int = 6) -> str:
    """Joins names for a message, with the rest as a count: ``a, b and 12 more``."""
    names = list(names)
    head = ", ".join(names[:most])
    return head if len(names) <= most else f"{head} and {len(names) - most} more"


def megabytes(size: float) -> str:
    """A number of bytes in words."""
    return f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e9:.3g} GB"


def shorten(text: str) -> str:
    """Folds a message of another library into one line."""
    return " ".join(str(text).split())
