import math

import pytest

from pera_lightning.training.schedules import SCHEDULES, lr_factor, warmup_length

HALF = 0.5 * (1 + math.cos(math.pi / 4))


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("linear", 0, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]),
        ("linear", 4, [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]),
        ("constant", 0, [1] * 9),
        ("constant", 2, [0, 0.5, 1, 1, 1, 1, 1, 1, 1]),
        ("cosine", 4, [0, 0.25, 0.5, 0.75, 1, HALF, 0.5, 1 - HALF, 0]),
        ("cosine", 0, [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(9)]),
    ],
)
def test_factors(schedule, warmup, expected):
    factors = [lr_factor(k, total=8, warmup=warmup, schedule=schedule) for k in range(9)]
    assert factors == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (3, 3), (3, 9), (7, 2)])
def test_factors_stay_between_zero_and_one(schedule, total, warmup):
    for step in range(total + 3):  # Lightning asks once more than there are steps
        assert 0 <= lr_factor(step, total=total, warmup=warmup, schedule=schedule) <= 1


@pytest.mark.parametrize(
    ("total", "steps", "ratio", "expected"),
    [(100, 0, 0.0, 0), (100, 7, 0.0, 7), (100, 0, 0.06, 6), (101, 0, 0.06, 7), (3, 0, 0.01, 1), (5, 9, 0.0, 9)],
)
def test_warmup_length(total, steps, ratio, expected):
    assert warmup_length(total, steps=steps, ratio=ratio) == expected
