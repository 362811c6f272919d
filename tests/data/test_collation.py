"""Collation: padded and packed batches, and where logits are needed."""

from __future__ import annotations

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from pera_lightning.data.batching import IGNORE, collate_packed, collate_padded, label_positions
from pera_lightning.errors import DataError


def examples(count: int, seed: int = 0) -> list[dict]:
    """Examples with every kind of start: 0, 1, in the middle, and behind the end."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(random.integers(1, 12))
        start = [0, min(1, length), int(random.integers(0, length + 1)), length][number % 4]
        made.append({"input_ids": random.integers(5, 90, length).tolist(), "start": start, "id": number})
    return made


@pytest.mark.parametrize("seed", range(3))
def test_collate_padded_against_plain_loops(seed: int) -> None:
    rows = examples(9, seed)
    width = max(len(row["input_ids"]) for row in rows)
    expected: dict[str, list] = {"input_ids": [], "attention_mask": [], "position_ids": [], "labels": []}
    for row in rows:
        ids, labels = row["input_ids"], []
        fill = width - len(ids)
        for i, token in enumerate(ids):
            labels.append(token if i >= row["start"] and i > 0 else -100)
        expected["input_ids"].append([3] * fill + ids)
        expected["attention_mask"].append([0] * fill + [1] * len(ids))
        expected["position_ids"].append([0] * fill + list(range(len(ids))))
        expected["labels"].append([-100] * fill + labels)
    batch = collate_padded(rows, pad_id=3)
    assert {name: value.tolist() for name, value in batch.items()} == expected
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_padding_token_inside_an_example_keeps_its_label() -> None:
    batch = collate_padded([{"input_ids": [7, 8, 2], "start": 1}, {"input_ids": [9, 2], "start": 1}], pad_id=2)
    assert batch["labels"].tolist() == [[-100, 8, 2], [-100, -100, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("seed", range(3))
def test_collate_packed_against_plain_loops(seed: int) -> None:
    rows = examples(9, seed)
    ids, positions, labels = [], [], []
    for row in rows:
        for i, token in enumerate(row["input_ids"]):
            ids.append(token)
            positions.append(i)
            labels.append(-100 if i < row["start"] or i == 0 else token)
    batch = collate_packed(rows)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [ids],
        "position_ids": [positions],
        "labels": [labels],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


@pytest.mark.parametrize("collate", [partial(collate_padded, pad_id=0), collate_packed], ids=["padded", "packed"])
def test_examples_that_cannot_be_collated(collate) -> None:
    with pytest.raises(DataError, match="no examples"):
        collate([])
    good = {"input_ids": [4, 5], "start": 1}
    for ids, start in (([], 0), ([4, 5], 3), ([4, 5], -1)):
        with pytest.raises(DataError, match=rf"{len(ids)} tokens and start={start}") as error:
            collate([good, {"input_ids": ids, "start": start}])
        assert "\n" not in str(error.value)
    given = {"input_ids": [4, 5, 6], "start": 1}
    collate([given])
    assert given == {"input_ids": [4, 5, 6], "start": 1}
    pickle.dumps(collate)  # for the workers of a loader


# Label positions


@pytest.mark.parametrize("seed", range(4))
def test_label_positions_against_plain_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 9, (3, 14), generator=generator)
    labels[torch.rand(3, 14, generator=generator) < 0.8] = IGNORE
    labels[:, 0] = 5  # predicted by nothing
    wanted = [t for t in range(13) if any(labels[row, t + 1] != IGNORE for row in range(3))]
    assert wanted
    assert label_positions(labels).tolist() == wanted
    assert label_positions(labels).dtype == torch.int64


def test_label_positions_of_a_batch_without_labels() -> None:
    for labels in (torch.full((2, 5), IGNORE), torch.tensor([[3, IGNORE, IGNORE]]), torch.tensor([[3]])):
        assert label_positions(labels).tolist() == [0]


def test_answers_at_the_end_need_few_positions() -> None:
    rows = [{"input_ids": [5] * length, "start": length - 3} for length in (40, 21, 9, 33)]
    assert label_positions(collate_padded(rows, pad_id=0)["labels"]).tolist() == [36, 37, 38]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_packed_and_single_examples_have_the_same_loss(attention: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()

    def loss(batch: dict[str, torch.Tensor]) -> float:
        labels = batch.pop("labels")
        positions = label_positions(labels)
        with torch.no_grad():
            logits = model(**batch, use_cache=False, logits_to_keep=positions).logits
        wanted = labels[:, positions + 1].flatten()
        return cross_entropy(logits.flatten(0, 1), wanted, ignore_index=IGNORE, reduction="sum").item()

    rows = [row for row in examples(30) if len(row["input_ids"]) > 1]
    alone = sum(loss(collate_packed([row])) for row in rows)
    assert alone > 100
    assert loss(collate_padded(rows, pad_id=0)) == pytest.approx(alone, rel=1e-5)
    assert loss(collate_packed(rows)) == pytest.approx(alone, rel=1e-5)
