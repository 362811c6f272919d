"""Rows dealt out to the processes of a run so that each counts once, and all have as many batches.

A sampler that repeats rows to come out even makes a mean count them twice; one that does not leaves processes with
fewer batches, and where forward passes exchange parameters (FSDP) the others would wait for them forever. Here what
is left over is filled with rows that carry no label, which losses and metrics leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

from torch.utils.data import DistributedSampler

Row = TypeVar("Row", bound=tuple)


class DealtRows:
    """One process's share of rows: every `world`-th, and as many items as any other process has.

    Args:
        rows: all rows, at least one.
        rank: of this process.
        world: processes.
        blank: called with the last row, gives what fills up: the same without a label. At the top of a module, so that
            the workers of a loader can be given it.
    """

    def __init__(self, rows: Sequence[Any] | Any, rank: int, world: int, blank: Callable[[Any], Any]) -> None:
        self.rows, self.rank, self.world, self.blank = rows, rank, world, blank

    def __len__(self) -> int:
        return -(-len(self.rows) // self.world)

    def __getitem__(self, number: int) -> Any:
        own = number * self.world + self.rank
        return self.rows[own] if own < len(self.rows) else self.blank(self.rows[len(self.rows) - 1])


def dealt(rows: Sequence[Any] | Any, trainer: Any, blank: Callable[[Any], Any]) -> dict[str, Any]:
    """The arguments `dataset` and `sampler` of a loader over this process's share of rows, in a fixed order.

    Args:
        rows: as for `DealtRows`.
        trainer: knows the processes; without one there is a single one.
        blank: as for `DealtRows`.
    """
    rank, world = getattr(trainer, "global_rank", 0), getattr(trainer, "world_size", 1)
    share = DealtRows(rows, rank, world, blank)
    # Of a kind that Lightning does not deal out again.
    return {"dataset": share, "sampler": DistributedSampler(share, num_replicas=1, rank=0, shuffle=False)}


def in_order(ranks: Sequence[Sequence[Row]]) -> list[Row]:
    """What processes made of rows that were dealt out to them: each row once, in the order the rows had.

    Args:
        ranks: of each process, what it made of each of its rows, beginning with the row's id; what fills up has the id
            of a row that is there already.
    """
    return list({made[0]: made for dealt in zip_longest(*ranks) for made in dealt if made is not None}.values())
