"""Batches of examples of similar length, so that little of them is padding."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler

from pera_lightning.data.splits import random_order
from pera_lightning.errors import DataError
from pera_lightning.validation import check_in_range, check_positive_int


class LengthGroupedSampler(DistributedSampler):
    """An order in which each batch has examples of similar length, for ``DataLoader(batch_size=…, sampler=…)``.

    It is a `DistributedSampler` because Lightning wraps any other sampler under DDP and hands its examples to the
    processes one by one, which would tear the groups apart; and so that Lightning calls `set_epoch`.

    The order is a function of seed, epoch and lengths alone. A global batch is that of all processes.

    Args:
        lengths: tokens of each example.
        batch_size: examples in a batch of one process; the same as the loader's.
        num_replicas: number of processes.
        rank: number of this process.
        seed: seed of the order; the same on all processes.
        group: global batches that are sorted together; more means less padding and a less random order.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        group: int = 50,
    ) -> None:
        for value, name in ((batch_size, "batch_size"), (num_replicas, "num_replicas"), (group, "group")):
            check_positive_int(value, name)
        check_in_range(rank, "rank", ge=0, lt=num_replicas, integer=True)
        check_in_range(seed, "seed", ge=0, integer=True)
        self.lengths = checked_lengths(lengths)
        super().__init__(self.lengths, num_replicas=num_replicas, rank=rank, seed=seed)
        self.batch_size, self.group = batch_size, group
        complete, rest = divmod(len(self.lengths), batch_size * num_replicas)  # global batches, and examples left over
        self.num_samples = complete * batch_size + -(-rest // num_replicas)
        self.total_size = self.num_samples * num_replicas  # with the repeated ones

    def global_batches(self) -> list[np.ndarray]:
        """This epoch's examples of all processes, batch by batch; rank r has ``[r::num_replicas]`` of each."""
        size = self.batch_size * self.num_replicas
        random = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
        # 1. All examples in random order, cut into pieces of `group` global batches. The longest goes into the first
        #    piece, and so into the first batch: running out of memory shows in the first step.
        order = random_order(random, len(self.lengths))
        longest = int(np.argmax(self.lengths[order]))
        order[[0, longest]] = order[[longest, 0]]
        pieces = np.arange(len(order)) // (size * self.group)
        # 2. Each piece is sorted by length, longest first; stable, so that equal lengths stay in random order.
        order = order[np.lexsort((-self.lengths[order], pieces))]
        # 3. Cut into global batches, which are shuffled but for the first. The incomplete one comes last, since a
        #    loader cuts the order into batches by counting.
        cut = len(order) // size * size
        complete, rest = order[:cut].reshape(-1, size), order[cut:]
        batches = [*complete[:1], *complete[1:][random_order(random, max(len(complete) - 1, 0))]]
        if len(rest):  # its examples are repeated until all processes have as many
            batches.append(np.resize(rest, -(-len(rest) // self.num_replicas) * self.num_replicas))
        return batches

    def __iter__(self) -> Iterator[int]:
        for batch in self.global_batches():
            yield from batch[self.rank :: self.num_replicas].tolist()  # long and short ones for every process

    def __len__(self) -> int:
        return self.num_samples


def grouped_sampler(lengths: Sequence[int], batch_size: int, trainer: Any) -> LengthGroupedSampler:
    """`LengthGroupedSampler` over the processes of a trainer (one without a trainer), seeded by the run."""
    return LengthGroupedSampler(
        lengths,
        batch_size,
        num_replicas=getattr(trainer, "world_size", 1),
        rank=getattr(trainer, "global_rank", 0),
        seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
    )


def padding_share(lengths: Sequence[int], batches: Iterable[Sequence[int]]) -> float:
    """The share of padding among the tokens of batches of examples, each padded to its longest one."""
    known = checked_lengths(lengths)
    own = [known[np.asarray(batch)] for batch in batches]
    return 1 - sum(int(batch.sum()) for batch in own) / sum(len(batch) * int(batch.max()) for batch in own)


def padding_shares(lengths: Sequence[int], batch_size: int, *, seed: int = 0) -> dict[str, float]:
    """`padding_share` of one process's first epoch, "random" and "grouped" by length."""
    order = random_order(np.random.Generator(np.random.PCG64(seed)), len(lengths))
    random = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    grouped = LengthGroupedSampler(lengths, batch_size, seed=seed).global_batches()
    return {"random": padding_share(lengths, random), "grouped": padding_share(lengths, grouped)}


def checked_lengths(lengths: Sequence[int]) -> np.ndarray:
    """Lengths as an array; raises `DataError` without any, or if one is below 1."""
    known = np.asarray(lengths, dtype=np.int64)
    if not len(known) or known.min() < 1:
        short = f"example {int(known.argmin())} has length {known.min()}" if len(known) else "there are no examples"
        raise DataError(f"{short}; give one or more, each of at least one token")
    return known
