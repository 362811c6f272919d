"""What the processes of a run tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result", bound=tuple)


def all_gather_object(value: Any) -> list[Any]:
    """What each process has, by rank; waits for all, so every process must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, value)
    return ranks


def merge_shards(shards: Sequence[Sequence[Result]]) -> list[Result]:
    """Merges the results of all processes: each example's once, in the order of the dataset.

    Args:
        shards: of each process the results of its examples, each beginning with the example's id; what filled up has
            the id of an example that is there already.
    """
    # Shard r has the examples r, r + world, …: one of each in turn is the order of the dataset.
    in_turn = (result for turn in zip_longest(*shards) for result in turn if result is not None)
    return list({result[0]: result for result in in_turn}.values())  # each id once
