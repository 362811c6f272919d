"""Intervals against independent values, summaries, averages and the table."""

from __future__ import annotations

import pytest

from pera_lightning.errors import DataError
from pera_lightning.tasks.causal_lm.statistics import (
    accuracy_summary,
    average_of,
    evaluation_seconds,
    table,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # from scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
        (0, 10, 0.000000000000, 0.277532799863),
        (10, 10, 0.722467200137, 1.000000000000),
        (1, 10, 0.017876213095, 0.404150026795),
        (50, 100, 0.403831530366, 0.596168469634),
        (3000, 3270, 0.907500793036, 0.926381981784),
        (250, 500, 0.456341265302, 0.543658734698),
    ],
)
def test_wilson_at_95_percent(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))


def test_wilson_by_hand() -> None:
    """The ends are where (share - p)^2 = z^2 p (1 - p) / n."""
    z = 1.6448536269514722  # 90 %
    low, high = wilson_interval(7, 20, confidence=0.9)
    for end in (low, high):
        assert (0.35 - end) ** 2 == pytest.approx(z * z * end * (1 - end) / 20)
    assert low < 0.35 < high


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 10**6), (10**6, 10**6), (1, 3)])
def test_wilson_stays_within_zero_and_one(successes: int, n: int) -> None:
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1


def record(prediction: str | None, correct: bool) -> dict[str, object]:
    return {"id": "0", "set": "boolq", "output": "", "prediction": prediction, "answer": "true", "correct": correct}


def test_the_accuracy_of_predictions() -> None:
    """What was not found is wrong, and counted."""
    records = [record("true", True), record("true", True), record("false", False), record(None, False)]
    summary = accuracy_summary(records)
    low, high = wilson_interval(2, 4)
    assert summary == {"accuracy": 0.5, "accuracy_low": low, "accuracy_high": high, "not_found": 0.25}


def test_no_predictions() -> None:
    with pytest.raises(DataError, match="the test set is empty"):
        accuracy_summary([])


def test_an_average_weighs_sets_alike() -> None:
    assert average_of([{"n": 1000, "accuracy": 0.9}, {"n": 10, "accuracy": 0.5}]) == {"accuracy": pytest.approx(0.7)}
    assert average_of([{"bleu": 2.0}, {"bleu": 4.0}], "bleu") == {"bleu": 3.0}


def test_what_is_averaged() -> None:
    rows = [
        {"set": "a", "n": 9, "bleu": 1.0, "rouge_l": 5.0, "not_found": 0.5, "seconds": 3.0, "tokens_per_second": 10.0},
        {"set": "b", "n": 1, "bleu": 3.0, "rouge_l": 5.0, "not_found": 0.0, "seconds": 1.0, "tokens_per_second": 30.0},
    ]
    assert average_of(rows, "bleu") == {"bleu": 2.0, "not_found": 0.25, "seconds": 2.0, "tokens_per_second": 20.0}
    del rows[1]["not_found"]
    assert "not_found" not in average_of(rows, "bleu")


def test_seconds_are_those_of_the_longest_process() -> None:
    records = [{"rank": rank, "seconds": seconds} for rank, seconds in ((0, 1.0), (1, 2.5), (0, 1.0), (1, 0.25))]
    assert evaluation_seconds(records) == 2.75
    assert evaluation_seconds(iter(records[::2])) == 2.0
    assert evaluation_seconds([]) == 0


def test_a_table() -> None:
    rows = [
        {
            "set": "boolq",
            "n": 3270.0,
            "not_found": 0.0,
            "accuracy": 0.75,
            "seconds": 12.34,
            "tokens_per_second": 1000.0,
        },
        {"set": "ARC-Challenge", "n": 1172, "accuracy": 0.25, "not_found": 0.125, "seconds": 3},
    ]
    assert table(rows) == (
        "set               n  accuracy  not found  seconds  tokens per second\n"
        "boolq          3270    0.7500     0.0000     12.3             1000.0\n"
        "ARC-Challenge  1172    0.2500     0.1250      3.0\n"
        "average                0.5000     0.0625      7.7"
    )


def test_a_table_of_another_metric() -> None:
    assert table([{"set": "convai2", "n": 5, "bleu": 1.5, "rouge_l": 10.0}], main_metric="bleu") == (
        "set      n    bleu  rouge l\nconvai2  5  1.5000  10.0000\naverage     1.5000"
    )
