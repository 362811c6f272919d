"""Training examples as token ids in an Arrow file, written once and mapped into memory ever after.

The file's name is a hash of all that decides its content: tokenizer, protocol and examples. Ids are kept in full;
cutting them to a length costs nothing later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pera_lightning.data.cached_tables import kept
from pera_lightning.data.tokenization import encode_pairs, tokenizer_key
from pera_lightning.tasks.causal_lm.examples import Example
from pera_lightning.tasks.causal_lm.protocols import Protocol

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
_CHUNK = 8192  # examples tokenised and written at once


def tokenised(
    examples: Sequence[Example], protocol: Protocol, tokenizer: PreTrainedTokenizerBase, folder: Path, *, sha256: str
) -> datasets.Dataset:
    """The table of ``input_ids`` and ``start`` (first token with a label), from the cache if it is there.

    Args:
        examples: training examples.
        protocol: gives prompt, response, BOS and what the loss is on.
        tokenizer: the model's.
        folder: folder of the cache.
        sha256: `digest` of the examples.

    Raises:
        DataError: if the folder cannot be written, or its file is damaged.
    """
    decisive = {name: value for name, value in protocol.describe().items() if name != "origin"}  # words about it
    facts = [_FORMAT, tokenizer_key(tokenizer), decisive, sha256]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    path = folder / f"{protocol.task}-{protocol.name}-{key}.arrow"
    return kept(path, lambda temporary: _write(examples, protocol, tokenizer, temporary))


def _write(examples: Sequence[Example], protocol: Protocol, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    import pyarrow as pa

    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("start", pa.int32())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for begin in range(0, len(examples), _CHUNK):
            chunk = examples[begin : begin + _CHUNK]
            texts = [protocol.training_prompt(one) for one in chunk], [protocol.response(one) for one in chunk]
            pairs = encode_pairs(tokenizer, *texts, bos=protocol.bos, eos=True)
            # The loss begins at the response, or covers the prompt too.
            ids = pa.array([ids for ids, _ in pairs], type=pa.list_(pa.int32()))
            starts = pa.array([start if protocol.loss_on == "answer" else 0 for _, start in pairs], type=pa.int32())
            writer.write_batch(pa.record_batch([ids, starts], schema=schema))


class TokenDataset:
    """Examples of the table, cut at a length; those that keep no label are left out.

    Args:
        table: as `tokenised` gives it.
        indices: examples of it, in order.
        max_length: most tokens of an example; cut at the end.
    """

    def __init__(self, table: datasets.Dataset, indices: np.ndarray, max_length: int) -> None:
        import pyarrow.compute as pc

        self._table, self._max_length = table, max_length
        columns = table.with_format("arrow")[:]  # mapped, not read; only lengths are kept
        ids = columns.column("input_ids")
        self.highest = int(pc.max(pc.list_flatten(ids)).as_py())  # token id of the entire table
        full = np.asarray(pc.list_value_length(ids))[indices]
        starts = columns.column("start").to_numpy()[indices]
        lengths = np.minimum(full, max_length)
        kept = lengths > np.maximum(starts, 1)  # a first token has none before it that predicts it
        self.cut, self.dropped = int((full > max_length).sum()), int((~kept).sum())  # how many; all labels were cut
        self.indices, self.lengths = indices[kept], lengths[kept]  # tokens after cutting

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> dict[str, object]:
        entry = self._table[int(self.indices[number])]
        # Cut at the end, as LLM-Adapters does: the EOS goes first, then the response.
        ids = entry["input_ids"][: self._max_length]
        return {"input_ids": ids, "start": min(entry["start"], len(ids))}


class PackedDataset:
    """Several examples as one item, for packed batches: `sequences` are the numbers of the examples of each."""

    def __init__(self, examples: TokenDataset, sequences: Sequence[Sequence[int]]) -> None:
        self.examples, self.sequences = examples, sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, number: int) -> list[dict[str, object]]:
        return [self.examples[k] for k in self.sequences[number]]
