"""Learning-rate schedules as pure functions of the optimizer step."""

from __future__ import annotations

import math

SCHEDULES = ("linear", "cosine", "constant")


def lr_factor(step: int, *, total: int, warmup: int, schedule: str) -> float:
    """The factor on the learning rate.

    Args:
        step: optimizer steps done.
        total: optimizer steps of the whole run.
        warmup: optimizer steps over which the rate grows linearly from zero.
        schedule: after that, "linear" or "cosine" down to zero at `total`, or "constant".

    Returns:
        A number in [0, 1].
    """
    # Linear from zero, then by the schedule over what remains; a resumed run may go past `total`.
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def warmup_length(total: int, *, steps: int, ratio: float) -> int:
    """Warm-up in optimizer steps: `steps`, or the share `ratio` of all, rounded up."""
    return steps or math.ceil(ratio * total)
