"""Texts and pairs as token ids in an Arrow file, written once and mapped into memory ever after.

The file's name is a hash of all that decides its content: tokenizer, length, and the texts. Labels are not in it. An
example is cut by the tokenizer, which takes from the longer text of a pair and leaves the special tokens; so the length
is part of the key.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pera_lightning.data.batching import IGNORE
from pera_lightning.data.cached_tables import kept
from pera_lightning.data.tokenization import tokenizer_key
from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.sequence_classification.examples import Examples

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
_CHUNK = 4096  # examples tokenised and written at once


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], max_length: int
) -> tuple[dict[str, list[list[int]]], list[bool]]:
    """Token ids of texts or pairs, as the tokenizer makes them for its model.

    Args:
        tokenizer: any transformers tokenizer.
        texts: one or two lists, n texts each.
        max_length: most tokens of an example, special ones included; the longer text of a pair loses tokens first.

    Returns:
        ``input_ids`` and, if the tokenizer makes them, ``token_type_ids``, n lists each; and which examples were cut.

    Raises:
        ConfigurationError: for a `max_length` that leaves no room beside the special tokens.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
    if max_length < special + len(texts):  # each text keeps at least one token
        raise ConfigurationError(
            f"max_length={max_length} leaves no room for text beside {special} special tokens; raise it"
        )
    options = {"padding": False, "return_attention_mask": False, "verbose": False}
    full = tokenizer(*map(list, texts), truncation=False, **options)
    columns = {name: [list(ids) for ids in full[name]] for name in ("input_ids", "token_type_ids") if name in full}
    cut = [len(ids) > max_length for ids in columns["input_ids"]]
    # Only the long ones are tokenised again, with truncation: so it is known how many those are.
    if long := [number for number, over in enumerate(cut) if over]:
        own = [[column[number] for number in long] for column in texts]
        shorter = tokenizer(*own, truncation="longest_first", max_length=max_length, **options)
        for name, column in columns.items():
            for number, ids in zip(long, shorter[name], strict=True):
                column[number] = list(ids)
    return columns, cut


def tokenised(
    texts: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, max_length: int, path: Path
) -> datasets.Dataset:
    """The table of what `encode` gives, from the cache if it is there; ``cut`` is one of its columns.

    Args:
        texts: one or two lists, n texts each.
        tokenizer: tokenizer of the model.
        max_length: most tokens of an example.
        path: folder of the cache, and the beginning of the file's name.
    """
    # The name is a hash of all that decides the content, so a file that is there is the right one.
    total = hashlib.sha256()
    for example in zip(*texts, strict=True):
        total.update(json.dumps(example).encode())
    facts = [_FORMAT, tokenizer_key(tokenizer), tokenizer.truncation_side, max_length, len(texts), total.hexdigest()]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return kept(path.with_name(f"{path.name}-{key}.arrow"), lambda new: _write(texts, tokenizer, max_length, new))


def _write(texts: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, max_length: int, path: Path) -> None:
    import pyarrow as pa

    lists = pa.list_(pa.int32())
    first, _ = encode(tokenizer, [column[:1] for column in texts], max_length)  # tells whether there are token types
    schema = pa.schema([*((name, lists) for name in first), ("cut", pa.bool_())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for begin in range(0, len(texts[0]), _CHUNK):
            encoded, cut = encode(tokenizer, [column[begin : begin + _CHUNK] for column in texts], max_length)
            columns = [*(pa.array(column, type=lists) for column in encoded.values()), pa.array(cut)]
            writer.write_batch(pa.record_batch(columns, schema=schema))


class TokenDataset:
    """Some examples of a table with their labels: what a loader draws from.

    Args:
        table: as `tokenised` gives it.
        examples: what it was made of.
        indices: numbers of the examples that are wanted, in order.
        with_ids: items say their ``id``.
    """

    def __init__(
        self, table: datasets.Dataset, examples: Examples, indices: np.ndarray, *, with_ids: bool = False
    ) -> None:
        import pyarrow.compute as pc

        self._table, self._ids = table, examples.ids if with_ids else None
        columns = table.with_format("arrow")[:]  # mapped, not read; only lengths are kept
        self.indices, self.labels = indices, examples.labels[indices]
        self.lengths = np.asarray(pc.list_value_length(columns.column("input_ids")))[indices]  # tokens of each
        self.cut = int(columns.column("cut").to_numpy()[indices].sum())  # how many examples were cut
        self.highest = int(pc.max(pc.list_flatten(columns.column("input_ids"))).as_py())  # token id of the entire table

    def __len__(self) -> int:
        return len(self.indices)

    def longest_first(self) -> TokenDataset:
        """The same examples in another order, in which batches have little padding and the largest comes first."""
        # Running out of memory shows in the first batch.
        order = np.argsort(-self.lengths, kind="stable")
        other = copy.copy(self)
        other.indices, other.labels, other.lengths = self.indices[order], self.labels[order], self.lengths[order]
        return other

    def __getitem__(self, number: int) -> dict[str, Any]:
        index = int(self.indices[number])
        example = self._table[index]
        del example["cut"]
        example["label"] = self.labels[number].item()
        if self._ids is not None:
            example["id"] = self._ids[index]
        return example


def without_label(example: dict[str, Any]) -> dict[str, Any]:
    """The same example without its label, in the label's type: an int for classes, a float for regression."""
    return {**example, "label": type(example["label"])(IGNORE)}
