"""Learning-rate schedules as pure functions of the optimizer step."""

from __future__ import annotations

import math

SCHEDULES = ("linear", "cosine", "constant")


def lr_factor(step: int, *, total: float, warmup: int, schedule: str) -> float:
    """The factor on the learning rate, in [0, 1], after `step` of `total` optimizer steps.

    It grows linearly from zero over `warmup` steps, and then falls to zero at `total` ("linear", "cosine") or stays.
    """
    if step < warmup:
        return step / warmup  # 0 in the first step
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))  # a resumed run may go past `total`
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def warmup_length(total: float, *, steps: int, ratio: float) -> int:
    """Warm-up in optimizer steps: `steps`, or the share `ratio` of all, rounded up."""
    return steps or (math.ceil(ratio * total) if ratio else 0)  # one of them is 0, and the total may be infinite
