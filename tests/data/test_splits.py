"""Seeded splits: sizes, independence of global random state, shares of classes, and the file."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pera_lightning.data import splits
from pera_lightning.errors import DataError


def _cut(count, labels=None, **changes):
    arguments = {"validation_fraction": 0.1, "test_fraction": 0.2, "seed": 0, "stratify": labels is not None} | changes
    labels = np.zeros(count, dtype=int) if labels is None else labels
    return splits.cut({"train": np.arange(count)}, labels, **arguments)


@pytest.mark.parametrize(
    ("count", "fraction", "held"),
    [(3680, 0.1, 368), (8144, 0.1, 815), (50000, 0.1, 5000), (5640, 0.2, 1128), (4512, 0.1, 452), (3334, 0.1, 334)],
)
def test_the_held_out_split_is_rounded_up(count, fraction, held):
    assert splits.held_out_size(count, fraction) == held


def test_no_example_is_held_out_by_rounding_of_floats():
    assert all(splits.held_out_size(10 * n, 0.1) == n for n in range(1, 5000))
    assert all(splits.held_out_size(10 * n, 0.7) == 7 * n for n in range(1, 5000))


def test_splits_are_disjoint_complete_and_sorted():
    parts = _cut(101)
    assert [len(rows) for rows in parts.values()] == [72, 8, 21]
    assert list(parts) == ["train", "validation", "test"]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(101))
    assert all((np.diff(rows) > 0).all() for rows in parts.values())


def test_seed_decides_and_known_examples_stay():
    assert _cut(20)["test"].tolist() == [2, 3, 11, 13]  # fixed for ever: published results rest on it
    assert _cut(20, seed=1)["test"].tolist() != [2, 3, 11, 13]


def test_fractions_and_existing_splits_decide():
    assert len(_cut(100, validation_fraction=0.5)["validation"]) == 40
    assert len(_cut(100, test_fraction=0.5)["test"]) == 50
    given = splits.cut(
        {"train": np.arange(10), "test": np.arange(3)},
        np.zeros(10),
        validation_fraction=0.2,
        test_fraction=0.9,
        seed=0,
        stratify=False,
    )
    assert given["test"].tolist() == [0, 1, 2]
    assert len(given["validation"]) == 2


def test_global_random_state_is_neither_used_nor_moved():
    first = _cut(50)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    second = _cut(50)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert all((first[name] == second[name]).all() for name in first)
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_every_class_gives_its_share():
    labels = np.repeat([0, 1, 2], [100, 50, 7])
    np.random.default_rng(3).shuffle(labels)
    parts = _cut(157, labels)
    assert len(parts["test"]) == 32
    for rows, part in ((parts["test"], 0.2), (parts["validation"], 0.08)):
        counts = np.bincount(labels[rows], minlength=3)
        assert np.abs(counts - part * np.array([100, 50, 7])).max() <= 1.5
    assert set(labels[parts["train"]]) == {0, 1, 2}


def test_no_class_gives_its_last_example():
    labels = np.array([0] * 20 + list(range(1, 6)))
    for seed in range(20):
        assert set(labels[_cut(25, labels, seed=seed)["train"]]) == set(range(6))
    with pytest.raises(DataError, match="too few"):
        _cut(6, np.arange(6))


def test_too_few_examples():
    with pytest.raises(DataError, match="1 images cannot be split"):
        _cut(1)


def test_file_is_written_in_one_step(tmp_path, monkeypatch):
    path = splits.write_split(tmp_path, "org/name", {"seed": 3})
    assert path == tmp_path / "splits" / "org--name.json"
    assert json.loads(path.read_text()) == {"seed": 3}

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        splits.write_split(tmp_path, "org/name", {"seed": 4})
    assert json.loads(path.read_text()) == {"seed": 3}
    assert not [entry for entry in path.parent.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_no_record_is_lost(tmp_path, stage):
    """A test has a file of its own, and another fit of the folder keeps the earlier one's."""
    trainer = SimpleNamespace(log_dir=tmp_path, is_global_zero=True, fast_dev_run=0)
    for seed, of in ((0, "fit"), (1, stage), (1, "fit"), (1, "fit")):
        splits.record_run(trainer, "dtd", lambda seed=seed: {"seed": seed}, of)
    found = {path.name: json.loads(path.read_text())["seed"] for path in (tmp_path / "splits").iterdir()}
    (earlier,) = (name for name in found if name.startswith("dtd.earlier-"))
    assert found == {"dtd.json": 1, f"dtd-{stage}.json": 1, earlier: 0}


@pytest.mark.parametrize(("name", "file"), [("dtd", "dtd"), ("a b:c", "a-b-c"), ("..", "dataset")])
def test_file_names_are_harmless(name, file):
    assert splits.file_name(name) == file
