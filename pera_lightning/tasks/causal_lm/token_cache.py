"""Training rows as token ids in an Arrow file, written once and mapped into memory ever after.

The file's name is a hash of all that decides its content: tokenizer, protocol and rows. Ids are kept whole; cutting
them to a length costs nothing later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pera_lightning.data.cached_tables import kept
from pera_lightning.data.tokenization import encode_pairs, tokenizer_key, truncate
from pera_lightning.tasks.causal_lm.examples import Row
from pera_lightning.tasks.causal_lm.protocols import Protocol

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
_CHUNK = 8192  # rows tokenised and written at once


def tokenised(
    rows: Sequence[Row], protocol: Protocol, tokenizer: PreTrainedTokenizerBase, folder: Path, *, sha256: str
) -> datasets.Dataset:
    """The table of ``input_ids`` and ``start`` (first token with a label), from the cache where it is there.

    Args:
        rows: training rows.
        protocol: gives prompt, response, BOS and what the loss is on.
        tokenizer: of the model.
        folder: of the cache.
        sha256: `digest` of the rows.

    Raises:
        DataError: where the folder cannot be written, or its file is damaged.
    """
    facts = [_FORMAT, tokenizer_key(tokenizer), protocol.describe(), sha256]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    path = folder / f"{protocol.task}-{protocol.name}-{key}.arrow"
    return kept(path, lambda temporary: _write(rows, protocol, tokenizer, temporary))


def _write(rows: Sequence[Row], protocol: Protocol, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    import pyarrow as pa

    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("start", pa.int32())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for begin in range(0, len(rows), _CHUNK):
            part = rows[begin : begin + _CHUNK]
            pairs = encode_pairs(
                tokenizer,
                [protocol.training_prompt(row) for row in part],
                [protocol.response(row) for row in part],
                bos=protocol.bos,
                eos=True,
            )
            ids = pa.array([ids for ids, _ in pairs], type=pa.list_(pa.int32()))
            starts = pa.array([start if protocol.loss_on == "answer" else 0 for _, start in pairs], type=pa.int32())
            writer.write_batch(pa.record_batch([ids, starts], schema=schema))


class TokenRows:
    """Rows of the table, cut at a length; those that keep no label are left out.

    Args:
        table: as `tokenised` gives it.
        indices: rows of it, in order.
        max_length: tokens of a row at most; cut at the end.

    Attributes:
        lengths: tokens of each row kept, after cutting.
        cut: rows that were cut.
        dropped: rows left out, since the cut took all their labels.
        highest: the highest token id of the whole table.
    """

    def __init__(self, table: datasets.Dataset, indices: np.ndarray, max_length: int) -> None:
        self._table, self._max_length = table, max_length
        columns = table.with_format("arrow")[:]
        full, self.highest = _lengths_and_highest(columns.column("input_ids"))
        full = full[indices]
        starts = columns.column("start").to_numpy()[indices]
        lengths = np.minimum(full, max_length)
        kept = lengths > np.maximum(starts, 1)  # a first token has none before it that predicts it
        self.cut, self.dropped = int((full > max_length).sum()), int((~kept).sum())
        self.indices, self.lengths = indices[kept], lengths[kept]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> dict[str, object]:
        row = self._table[int(self.indices[number])]
        ids, start, _ = truncate(row["input_ids"], row["start"], self._max_length)
        return {"input_ids": ids, "start": start}


class PackedRows:
    """Several rows as one item, for packed batches.

    Args:
        rows: the rows.
        sequences: the rows of each item.
    """

    def __init__(self, rows: TokenRows, sequences: Sequence[Sequence[int]]) -> None:
        self.rows, self.sequences = rows, sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, number: int) -> list[dict[str, object]]:
        return [self.rows[row] for row in self.sequences[number]]


def _lengths_and_highest(column: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    import pyarrow.compute as pc

    return np.asarray(pc.list_value_length(column)), int(pc.max(pc.list_flatten(column)).as_py())
