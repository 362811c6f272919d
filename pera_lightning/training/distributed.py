"""What the processes of a run tell each other."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def all_gather_object(value: Any) -> list[Any]:
    """What each process has, by rank; waits for all, so every process must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, value)
    return ranks
