"""A distributed sampler for evaluation: each example counts once, and all processes have as many batches.

`torch.utils.data.DistributedSampler` repeats examples to come out even, and a mean counts them twice. One that does
not leaves processes with fewer batches, and where forward passes exchange parameters (FSDP) the others would wait for
them forever. Here shards are filled up with examples that carry no label, which losses and metrics leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DistributedSampler


class PaddedShard:
    """One process's shard of a dataset: every `world`-th example, and as many as any other process has.

    Args:
        examples: the entire dataset, at least one example.
        rank: number of this process.
        world: number of processes.
        blank: given the last example, returns the same without a label, to fill up with; a function at the top of a
            module, so that the workers of a loader can be given it. By default the last example itself fills up, for
            results that are told apart by their ids.
    """

    def __init__(
        self, examples: Sequence[Any] | Any, rank: int, world: int, blank: Callable[[Any], Any] | None = None
    ) -> None:
        self.examples, self.rank, self.world, self.blank = examples, rank, world, blank

    def __len__(self) -> int:
        return -(-len(self.examples) // self.world)  # rounded up, alike for all processes

    def __getitem__(self, number: int) -> Any:
        own = number * self.world + self.rank  # every `world`-th: shards differ by one example at most
        if own < len(self.examples):
            return self.examples[own]
        last = self.examples[len(self.examples) - 1]  # past the end: what fills up
        return last if self.blank is None else self.blank(last)


def padded_shard(
    examples: Sequence[Any] | Any, trainer: Any, blank: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    """The arguments `dataset` and `sampler` of a loader over this process's `PaddedShard`, in a fixed order."""
    rank, world = getattr(trainer, "global_rank", 0), getattr(trainer, "world_size", 1)
    shard = PaddedShard(examples, rank, world, blank)
    # A DistributedSampler, though over one process: any other Lightning would replace by its own.
    return {"dataset": shard, "sampler": DistributedSampler(shard, num_replicas=1, rank=0, shuffle=False)}
