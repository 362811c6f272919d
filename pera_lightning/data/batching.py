"""Batches of tokens: examples padded, or packed into one sequence.

An *example* is a mapping with ``input_ids``, a list of token ids, and ``start``, the index of its first token with a
label: where the answer begins, or 0 where the entire text is learned. Other keys are not looked at. Batches are
dictionaries of int64 tensors. No collator gives an example's first token a label: what stands before it, and would
predict it, is padding or another example. Shapes: B examples, T tokens of the longest, K positions. Examples with one
label for all of it are `collate_classified`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pera_lightning.data.length_grouping import checked_lengths
from pera_lightning.data.splits import random_order
from pera_lightning.errors import DataError
from pera_lightning.validation import check_in_range

Example = Mapping[str, Any]
IGNORE = -100  # the label of a token that is not learned; cross_entropy's default


def capacity_for(lengths: Sequence[int], batch_size: int) -> int:
    """The capacity for `pack` at which a sequence has about `batch_size` examples, and the longest one fits."""
    known = checked_lengths(lengths)
    return max(int(known.max()), round(batch_size * float(known.mean())))


def pack(lengths: Sequence[int], capacity: int, *, seed: int = 0) -> list[list[int]]:
    """Packs examples into few sequences: longest first, each goes where it leaves the least space (best fit).

    Args:
        lengths: tokens of each example.
        capacity: most tokens of a sequence.
        seed: seed of the order among equally long examples, and of the sequences; from 0 on.
    """
    known = checked_lengths(lengths)
    check_in_range(seed, "seed", ge=0, integer=True)
    if known.max() > capacity:
        over = np.flatnonzero(known > capacity)
        raise DataError(
            f"{len(over)} of {len(known)} examples are longer than the capacity of {capacity} tokens (number {over[0]} "
            f"has {known[over[0]]}); cut them, or pack to {known.max()} tokens or more"
        )
    random = np.random.Generator(np.random.PCG64(seed))
    order = random_order(random, len(known))
    order = order[np.argsort(-known[order], kind="stable")]  # longest first, equals in random order
    sequences: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # the sequences that have exactly this much space left
    # Bit s is set where by_space[s] has a sequence: the least space that suffices is found by one shift, in a time
    # that does not grow with the number of sequences.
    spaces = 0
    for number, length in zip(order.tolist(), known[order].tolist(), strict=True):
        enough = spaces >> length
        if enough:
            space = length + (enough & -enough).bit_length() - 1  # the lowest bit that is set
            index = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space  # its last sequence of this space
        else:
            space, index = capacity, len(sequences)  # none has room: a new sequence
            sequences.append([])
        sequences[index].append(number)
        by_space.setdefault(space - length, []).append(index)
        spaces |= 1 << (space - length)
    return [sequences[index] for index in random_order(random, len(sequences))]


def pad_left(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pads B lists of token ids on the left: (input_ids, attention_mask, position_ids), each (B, T) int64."""
    width = max((len(ids) for ids in sequences), default=0)  # T
    ids = torch.tensor([[pad_id] * (width - len(own)) + [*own] for own in sequences], dtype=torch.int64)  # (B, T)
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in sequences], dtype=torch.int64)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # the padding gets 0, a position every model has
    return ids.to(device), mask.to(device), positions.to(device)


def collate_padded(examples: Sequence[Example], *, pad_id: int) -> dict[str, Tensor]:
    """Makes a batch of examples with padding on the left.

    On the left, since answers end the examples: the positions with labels are then the same few columns in all of
    them, and logits are computed for the union of these columns.

    Returns:
        ``input_ids``, ``attention_mask``, ``position_ids`` (from 0 at an example's first token, 0 on padding) and
        ``labels`` (`IGNORE` on padding and before `start`), all (B, T).
    """
    sequences, starts = _sequences_and_starts(examples)
    ids, mask, positions = pad_left(sequences, pad_id)  # (B, T)
    # Positions count an example's own tokens, so they find its answer wherever the padding ends.
    learned = (mask == 1) & (positions >= torch.tensor(starts)[:, None])  # (B, T)
    labels = ids.masked_fill(~learned, IGNORE)  # (B, T)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def collate_packed(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Makes one sequence of examples, one after the other, which positions tell apart.

    It comes without an attention mask: then, with ``use_cache=False`` too, transformers lets a token attend only back
    to where the positions last started at 0.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels`` (`IGNORE` before each example's `start`), all (1, T).
    """
    sequences, starts = _sequences_and_starts(examples)
    labels = [[IGNORE] * start + [*ids[start:]] for ids, start in zip(sequences, starts, strict=True)]
    lists = {"input_ids": sequences, "position_ids": [range(len(ids)) for ids in sequences], "labels": labels}
    return {name: torch.tensor([[*itertools.chain(*each)]]) for name, each in lists.items()}  # (1, T)


def collate_classified(examples: Sequence[Example], *, pad_id: int, pad_type_id: int = 0) -> dict[str, Any]:
    """Makes a batch of examples with one label each, with padding on the right, as encoders were trained.

    Args:
        examples: each with ``input_ids``, ``label`` (an int, or a float for regression) and maybe ``token_type_ids``
            and ``id``; alike in which they have.
        pad_id: token that fills up.
        pad_type_id: token type that fills up.

    Returns:
        ``input_ids``, ``attention_mask`` and ``token_type_ids`` (if examples have them), (B, T) int64; ``labels`` (B,),
        int64 or float32; ``ids`` (if examples have them), a list of B names.
    """
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    batch: dict[str, Any] = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(own) for own in ids], batch_first=True),
        "labels": torch.tensor([example["label"] for example in examples]),
    }
    if "token_type_ids" in examples[0]:
        types = [torch.tensor(example["token_type_ids"]) for example in examples]
        batch["token_type_ids"] = pad_sequence(types, batch_first=True, padding_value=pad_type_id)
    if "id" in examples[0]:
        batch["ids"] = [example["id"] for example in examples]
    return batch


def label_positions(labels: Tensor) -> Tensor:
    """Where logits are needed: every t from 0 to T-2 such that some example of `labels` (B, T) has a label at t+1.

    In order, (K,). Without any label it is position 0 alone, so that the loss, a sum over nothing, still has a graph.
    """
    positions = (labels[:, 1:] != IGNORE).any(dim=0).nonzero().flatten()
    return positions if len(positions) else positions.new_zeros(1)  # (K,)


def _sequences_and_starts(examples: Sequence[Example]) -> tuple[list[list[int]], list[int]]:
    """Of each example the tokens, and the index of the first that gets a label."""
    if not examples:
        raise DataError("a batch of no examples; give at least one")
    sequences, starts = [e["input_ids"] for e in examples], [int(e["start"]) for e in examples]
    for ids, start in zip(sequences, starts, strict=True):
        if not len(ids) or not 0 <= start <= len(ids):
            raise DataError(f"an example has {len(ids)} tokens and start={start}; give tokens, and start up to as many")
    return sequences, [max(start, 1) for start in starts]
