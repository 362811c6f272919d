"""Accuracies with their intervals, averages as the papers take them, and the table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from statistics import NormalDist
from typing import Any

from pera_lightning.errors import DataError


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, without continuity correction: its ends, within 0 and 1."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)  # 1.96 for 95 %
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    # The last bit of a float must not take an end past 0 or 1, nor keep it from there.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def accuracy_summary(predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The accuracy of the predictions of a set.

    Returns:
        ``accuracy`` with the ends of its 95 % Wilson interval ``accuracy_low`` and ``accuracy_high``, ``not_found``
        (the share of texts without an answer; they count as wrong), each 0 to 1.

    Raises:
        DataError: without predictions.
    """
    if not predictions:
        raise DataError("there are no predictions to summarise: the test set is empty")
    n = len(predictions)
    correct = sum(bool(one["correct"]) for one in predictions)
    low, high = wilson_interval(correct, n)
    return {
        "accuracy": correct / n,
        "accuracy_low": low,
        "accuracy_high": high,
        "not_found": sum(one["prediction"] is None for one in predictions) / n,
    }


def average_of(sets: Sequence[Mapping[str, Any]], main_metric: str = "accuracy") -> dict[str, float]:
    """Averages over one set or more as the papers do: plain means, a large set counting no more than a small one.

    Returns:
        The main metric, ``not_found``, ``seconds`` and ``tokens_per_second``; less those that a set lacks.
    """
    keys = (main_metric, "not_found", "seconds", "tokens_per_second")
    return {key: sum(float(one[key]) for one in sets) / len(sets) for key in keys if all(key in one for one in sets)}


def evaluation_seconds(predictions: Iterable[Mapping[str, Any]]) -> float:
    """How long the questions took: the sum of each process's seconds, and of several processes the longest."""
    of_rank: dict[int, float] = {}
    for one in predictions:
        of_rank[one["rank"]] = of_rank.get(one["rank"], 0.0) + one["seconds"]
    return max(of_rank.values(), default=0.0)


def table(sets: Sequence[Mapping[str, Any]], main_metric: str = "accuracy") -> str:
    """Lines up the results of each set, and their average below.

    Args:
        sets: each ``set``, ``n``, metrics, ``seconds``, ``tokens_per_second``; a key that one lacks is left empty.
        main_metric: of the last line, which is `average_of` the sets.

    Returns:
        Lines without a newline at the end; metrics in the units of the sets, with four decimals.
    """
    from pera_lightning.training.tables import format_table  # protocols import this file, and load no library

    # The main metric first, the times last, all other metrics as they come.
    columns = list(dict.fromkeys(key for one in sets for key in one))
    first = [key for key in ("set", "n", main_metric) if key in columns]
    last = [key for key in ("seconds", "tokens_per_second") if key in columns]
    columns = [*first, *(key for key in columns if key not in first + last), *last]
    lines = [*sets, {"set": "average", **average_of(sets, main_metric)}]
    titles = [key.replace("_", " ") for key in columns]
    return format_table(titles, [[_cell(key, one.get(key)) for key in columns] for one in lines])


def _cell(key: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if key == "n":
        return f"{value:.0f}"
    return f"{value:.1f}" if key in ("seconds", "tokens_per_second") else f"{value:.4f}"
