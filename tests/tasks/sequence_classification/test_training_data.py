"""What checkpoints keep of the data: the order of the classes, and examples told apart by their texts."""

from __future__ import annotations

from pathlib import Path

from tests.tasks.sequence_classification.glue_helpers import glue, pair_tokenizer, pairs, write


def test_classes_are_numbered_as_a_checkpoint_numbers_them(tmp_path: Path) -> None:
    rows = [{"t": f"{k:03d}", "label": ("no", "yes", "maybe")[k % 3]} for k in range(12)]
    files = {"train_file": write(tmp_path / "a.jsonl", rows), "validation_file": write(tmp_path / "b.jsonl", rows)}
    data = glue(tmp_path, task="custom", text_columns=["t"], tokenizer=pair_tokenizer(), **files)
    assert data.class_names == ["maybe", "no", "yes"]
    data.number_classes(["yes", "no", "maybe"])
    data.setup("test")  # what is built later too
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            numbered = [int(text) for text in data.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)]
            assert batch["labels"].tolist() == [(1, 0, 2)[k % 3] for k in numbered]
    assert data.description()["class_names"] == ["yes", "no", "maybe"]


def test_examples_are_told_apart_by_their_texts(tmp_path: Path) -> None:
    again = [{**one, "idx": 41 + k} for k, one in enumerate(pairs(5))]
    write(tmp_path / "train.jsonl", [*pairs(41), *again])
    write(tmp_path / "validation.jsonl", pairs(21))
    data = glue(tmp_path, "fit")
    data.setup("test")
    train, test = data.example_hashes("train"), data.example_hashes("test")
    assert (len(train), len(test)) == (46, 21)
    assert set(test) <= set(train)
    assert len({*train}) == 41
