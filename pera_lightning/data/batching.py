"""Batches of token rows with little padding: grouped by length, or packed into one sequence.

An *example* is a mapping with ``input_ids``, a list of token ids, and ``start``, the index of its first token with a
label: where the answer begins, or 0 where the whole text is learned. Other keys are not looked at. Batches are
dictionaries of int64 tensors. No collator gives an example's first token a label: what stands before it, and would
predict it, is padding or another example. Shapes: B rows, T tokens in a row, K positions. Rows with one label for the
whole are `collate_classified`'s.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DistributedSampler

from pera_lightning.data.splits import random_order
from pera_lightning.errors import ConfigurationError, DataError

Example = Mapping[str, Any]
IGNORE = -100  # the label of a token that is not learned; cross_entropy's default


class LengthGroupedSampler(DistributedSampler):
    """Rows in an order where each batch has rows of similar length, for ``DataLoader(batch_size=…, sampler=…)``.

    It is a `DistributedSampler` because Lightning wraps any other sampler under DDP and deals its rows out to the
    processes one by one, which would tear the groups apart; and so that Lightning calls `set_epoch`.

    A function of seed, epoch and lengths alone: a random order is cut into pieces of `group` global batches (each
    `batch_size` rows a process), each piece is sorted by length and cut into global batches, and these are shuffled.
    The batch with the longest row comes first, so that running out of memory shows in the first step. An incomplete
    batch comes last, so that the loader's batches are these; rows of it are repeated until all processes have as many.

    Args:
        lengths: tokens of each row.
        batch_size: rows in a batch of one process; the same as the loader's.
        num_replicas: processes.
        rank: this process.
        seed: of the order; the same on all processes.
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
        if min(batch_size, num_replicas, group) < 1 or not 0 <= rank < num_replicas or seed < 0:
            given = f"{batch_size=}, {num_replicas=}, {group=}, {rank=}, {seed=}"
            raise ConfigurationError(f"{given}: the first three start at 1, rank and seed at 0; rank < num_replicas")
        self.lengths = _checked(lengths)
        super().__init__(self.lengths, num_replicas=num_replicas, rank=rank, seed=seed)
        self.batch_size, self.group = batch_size, group
        complete, rest = divmod(len(self.lengths), batch_size * num_replicas)
        self.num_samples = complete * batch_size + -(-rest // num_replicas)
        self.total_size = self.num_samples * num_replicas

    def global_batches(self) -> list[np.ndarray]:
        """This epoch's rows of all processes, batch by batch; rank r has rows ``[r::num_replicas]`` of each."""
        size = self.batch_size * self.num_replicas
        random = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
        order = random_order(random, len(self.lengths))
        # In the first piece, the longest row lands in the first batch, and never in the incomplete one.
        longest = int(np.argmax(self.lengths[order]))
        order[[0, longest]] = order[[longest, 0]]
        pieces = np.arange(len(order)) // (size * self.group)
        order = order[np.lexsort((-self.lengths[order], pieces))]  # stable: equal lengths stay in random order
        cut = len(order) // size * size
        complete, rest = order[:cut].reshape(-1, size), order[cut:]
        batches = [*complete[:1], *complete[1:][random_order(random, max(len(complete) - 1, 0))]]
        if len(rest):
            batches.append(np.resize(rest, -(-len(rest) // self.num_replicas) * self.num_replicas))  # goes around
        return batches

    def __iter__(self) -> Iterator[int]:
        for batch in self.global_batches():
            yield from batch[self.rank :: self.num_replicas].tolist()

    def __len__(self) -> int:
        return self.num_samples


def grouped_sampler(lengths: Sequence[int], batch_size: int, trainer: Any) -> LengthGroupedSampler:
    """`LengthGroupedSampler` over the processes of a trainer, seeded by the run.

    Args:
        lengths: tokens of each row.
        batch_size: rows in a batch of one process.
        trainer: knows the processes; without one there is a single one.
    """
    return LengthGroupedSampler(
        lengths,
        batch_size,
        num_replicas=getattr(trainer, "world_size", 1),
        rank=getattr(trainer, "global_rank", 0),
        seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
    )


def padding_share(lengths: Sequence[int], batches: Iterable[Sequence[int]]) -> float:
    """The share of padding among the tokens of batches whose rows are filled up to the longest.

    Args:
        lengths: tokens of each row.
        batches: the rows of each.
    """
    rows = _checked(lengths)
    own = [rows[np.asarray(batch)] for batch in batches]
    return 1 - sum(int(part.sum()) for part in own) / sum(len(part) * int(part.max()) for part in own)


def padding_shares(lengths: Sequence[int], batch_size: int, *, seed: int = 0) -> dict[str, float]:
    """`padding_share` of one process's first epoch, with rows in random order and grouped by length.

    Args:
        lengths: tokens of each row.
        batch_size: rows in a batch.
        seed: of the order.
    """
    order = random_order(np.random.Generator(np.random.PCG64(seed)), len(lengths))
    random = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    grouped = LengthGroupedSampler(lengths, batch_size, seed=seed).global_batches()
    return {"random": padding_share(lengths, random), "grouped": padding_share(lengths, grouped)}


def capacity_for(lengths: Sequence[int], batch_size: int) -> int:
    """The capacity for `pack` at which a sequence has about `batch_size` rows, and the longest row fits."""
    rows = _checked(lengths)
    return max(int(rows.max()), round(batch_size * float(rows.mean())))


def pack(lengths: Sequence[int], capacity: int, *, seed: int = 0) -> list[list[int]]:
    """Packs rows into few sequences: longest rows first, each goes where it leaves the least space.

    Args:
        lengths: tokens of each row.
        capacity: the most tokens of a sequence.
        seed: of the order among equally long rows, and of the sequences; from 0 on.
    """
    rows = _checked(lengths)
    if seed < 0:
        raise ConfigurationError(f"seed is {seed}; give a number from 0 on")
    if rows.max() > capacity:
        over = np.flatnonzero(rows > capacity)
        raise DataError(
            f"{len(over)} of {len(rows)} rows are longer than the capacity of {capacity} tokens (row {over[0]} has "
            f"{rows[over[0]]}); cut the rows, or pack to {rows.max()} tokens or more"
        )
    random = np.random.Generator(np.random.PCG64(seed))
    order = random_order(random, len(rows))
    order = order[np.argsort(-rows[order], kind="stable")]
    sequences: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # the sequences that have exactly this much space left
    spaces = 0  # bit s is set where by_space[s] has a sequence: finding the least space that suffices is one shift
    for row, length in zip(order.tolist(), rows[order].tolist(), strict=True):
        enough = spaces >> length
        if enough:
            space = length + (enough & -enough).bit_length() - 1
            index = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, index = capacity, len(sequences)
            sequences.append([])
        sequences[index].append(row)
        by_space.setdefault(space - length, []).append(index)
        spaces |= 1 << (space - length)
    return [sequences[index] for index in random_order(random, len(sequences))]


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str | None = None, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pads rows on the left: (input_ids, attention_mask, position_ids), each (B, T) int64.

    Args:
        rows: B lists of token ids.
        pad_id: what to fill with.
        device: where the tensors go.
        width: T, no less than the tokens of the longest row; None for just those.
    """
    width = max((len(row) for row in rows), default=0) if width is None else width
    ids = torch.tensor([[pad_id] * (width - len(row)) + [*row] for row in rows], dtype=torch.int64)  # (B, T)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.int64)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # the padding gets 0, a position every model has
    return ids.to(device), mask.to(device), positions.to(device)


def collate_padded(examples: Sequence[Example], *, pad_id: int, length: int | None = None) -> dict[str, Tensor]:
    """Makes a batch of rows with padding on the left.

    On the left, since answers end the rows: the positions with labels are then the same few columns in every row, and
    logits are computed for the union of them over the rows.

    Args:
        examples: see the head of this file.
        pad_id: the token that fills up.
        length: T; None for the tokens of the longest row.

    Returns:
        ``input_ids``, ``attention_mask``, ``position_ids`` (from 0 at a row's first token, 0 on padding) and ``labels``
        (`IGNORE` on padding and before `start`), all (B, T).
    """
    rows, starts = _rows_and_starts(examples)
    longest = max(len(ids) for ids in rows)
    if length is not None and longest > length:
        raise DataError(f"an example has {longest} tokens, more than the length {length}; cut it, or raise the length")
    ids, mask, positions = pad_left(rows, pad_id, width=length)  # (B, T)
    learned = (mask == 1) & (positions >= torch.tensor(starts)[:, None])
    labels = ids.masked_fill(~learned, IGNORE)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def collate_packed(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Makes one sequence of examples, one after the other, which positions tell apart.

    There is no attention mask: without one, and without a cache (``use_cache=False``), transformers lets a token attend
    only back to where the positions last started at 0.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels`` (`IGNORE` before each example's `start`), all (1, T).
    """
    rows, starts = _rows_and_starts(examples)
    labels = [[IGNORE] * start + [*ids[start:]] for ids, start in zip(rows, starts, strict=True)]
    parts = {"input_ids": rows, "position_ids": [range(len(ids)) for ids in rows], "labels": labels}
    return {name: torch.tensor([[*itertools.chain(*part)]]) for name, part in parts.items()}


def collate_classified(examples: Sequence[Example], *, pad_id: int, pad_type_id: int = 0) -> dict[str, Any]:
    """Makes a batch of whole rows with a label each, with padding on the right, as encoders were trained.

    Args:
        examples: each with ``input_ids``, ``label`` (an int, or a float for regression) and maybe ``token_type_ids``
            and ``id``; alike in which they have.
        pad_id: the token that fills up.
        pad_type_id: the token type that fills up.

    Returns:
        ``input_ids``, ``attention_mask`` and, where rows have them, ``token_type_ids``, (B, T) int64; ``labels`` (B,),
        int64 or float32; where rows have them ``ids``, a list of B names.
    """
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    batch: dict[str, Any] = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.tensor([example["label"] for example in examples]),
    }
    if "token_type_ids" in examples[0]:
        types = [torch.tensor(example["token_type_ids"]) for example in examples]
        batch["token_type_ids"] = pad_sequence(types, batch_first=True, padding_value=pad_type_id)
    if "id" in examples[0]:
        batch["ids"] = [example["id"] for example in examples]
    return batch


def label_positions(labels: Tensor) -> Tensor:
    """Where logits are needed: every t from 0 to T-2 such that some row of `labels` (B, T) has a label at t+1.

    In order, (K,). Without any label it is position 0 alone, so that the loss, a sum over nothing, still has a graph.
    """
    positions = (labels[:, 1:] != IGNORE).any(dim=0).nonzero().flatten()
    return positions if len(positions) else positions.new_zeros(1)


def _rows_and_starts(examples: Sequence[Example]) -> tuple[list[list[int]], list[int]]:
    """Of each example the tokens, and the index of the first that gets a label."""
    if not examples:
        raise DataError("a batch of no examples; give at least one")
    rows, starts = [e["input_ids"] for e in examples], [int(e["start"]) for e in examples]
    for ids, start in zip(rows, starts, strict=True):
        if not len(ids) or not 0 <= start <= len(ids):
            raise DataError(
                f"an example has {len(ids)} tokens and start={start}; give a token or more, start up to that"
            )
    return rows, [max(start, 1) for start in starts]


def _checked(lengths: Sequence[int]) -> np.ndarray:
    rows = np.asarray(lengths, dtype=np.int64)
    if not len(rows) or rows.min() < 1:
        short = f"row {int(rows.argmin())} has length {rows.min()}" if len(rows) else "there are no rows"
        raise DataError(f"{short}; give one row or more, each of at least one token")
    return rows
