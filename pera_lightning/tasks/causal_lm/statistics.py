"""Accuracies with their intervals, averages as the papers take them, and the table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from statistics import NormalDist
from typing import Any

from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.training.tables import format_table


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, without continuity correction.

    Args:
        successes: how many of `n` are right.
        n: how many there are.
        confidence: between 0 and 1, both excluded.

    Returns:
        Its ends, within 0 and 1.

    Raises:
        ConfigurationError: where the numbers are no proportion or no confidence.
    """
    if not 0 <= successes <= n or n < 1:
        raise ConfigurationError(f"{successes} of {n} is no proportion; give 0 <= successes <= n and n of at least 1")
    if not 0 < confidence < 1:
        raise ConfigurationError(f"confidence is {confidence}; give a number between 0 and 1, such as 0.95")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    # The last bit of a float must not take an end past 0 or 1, nor keep it from there.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def accuracy_summary(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The accuracy of prediction records.

    Returns:
        ``accuracy`` with the ends of its 95 % Wilson interval ``accuracy_low`` and ``accuracy_high``, ``not_found``
        (the part of texts without an answer; they count as wrong), each 0 to 1.

    Raises:
        DataError: where there are no records.
    """
    if not records:
        raise DataError("there are no predictions to summarise; the test set is empty, give one with rows")
    n = len(records)
    correct = sum(bool(record["correct"]) for record in records)
    low, high = wilson_interval(correct, n)
    return {
        "accuracy": correct / n,
        "accuracy_low": low,
        "accuracy_high": high,
        "not_found": sum(record["prediction"] is None for record in records) / n,
    }


def average(rows: Sequence[Mapping[str, Any]], metric: str = "accuracy") -> float:
    """The mean of a metric over sets, a large set counting no more than a small one.

    Args:
        rows: results of one set each.
        metric: its key in each of them.

    Raises:
        DataError: where there are no rows.
    """
    if not rows:
        raise DataError("there are no sets to average; evaluate at least one")
    return sum(float(row[metric]) for row in rows) / len(rows)


def average_row(rows: Sequence[Mapping[str, Any]], main_metric: str = "accuracy") -> dict[str, float]:
    """What is averaged over sets, each a plain mean as in the papers; without an interval.

    Args:
        rows: results of one set each.
        main_metric: the metric that the protocol reports.

    Returns:
        The main metric, ``not_found``, ``seconds`` and ``tokens_per_second``; less those that a row lacks.
    """
    keys = (main_metric, "not_found", "seconds", "tokens_per_second")
    return {key: average(rows, key) for key in keys if all(key in row for row in rows)}


def answering_seconds(records: Iterable[Mapping[str, Any]]) -> float:
    """How long answering took: the sum of each process's seconds, and of several processes the longest.

    Args:
        records: each with ``seconds`` and the ``rank`` of the process that answered.
    """
    of_rank: dict[int, float] = {}
    for record in records:
        of_rank[record["rank"]] = of_rank.get(record["rank"], 0.0) + record["seconds"]
    return max(of_rank.values(), default=0.0)


def table(rows: Sequence[Mapping[str, Any]], main_metric: str = "accuracy") -> str:
    """Lines up the results of each set, and their average below.

    Args:
        rows: results of one set each: ``set``, ``n``, the metrics, ``seconds``, ``tokens_per_second``. A key that a
            row lacks is left empty.
        main_metric: of the last line, which is the `average_row`.

    Returns:
        Lines without a newline at the end; metrics in the units of the rows, with four decimals.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    first = [key for key in ("set", "n", main_metric) if key in columns]
    last = [key for key in ("seconds", "tokens_per_second") if key in columns]
    columns = [*first, *(key for key in columns if key not in first + last), *last]
    records = [*rows, {"set": "average", **average_row(rows, main_metric)}]
    titles = [key.replace("_", " ") for key in columns]
    return format_table(titles, [[_cell(key, record.get(key)) for key in columns] for record in records])


def _cell(key: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if key == "n":
        return f"{value:.0f}"
    return f"{value:.1f}" if key in ("seconds", "tokens_per_second") else f"{value:.4f}"
