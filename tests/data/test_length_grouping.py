"""The sampler that groups by length: what each process gets, in which order, and how little is padding."""

from __future__ import annotations

import pickle
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader, DistributedSampler

from pera_lightning.data.length_grouping import LengthGroupedSampler
from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.training.data_order import Progress, make_resumable


def lognormal(count: int, seed: int = 0) -> list[int]:
    """Lengths like those of a text data set."""
    return np.random.default_rng(seed).lognormal(4.3, 0.6, count).astype(int).clip(4, 512).tolist()


def padding_share(lengths: list[int], batches: list[list[int]]) -> float:
    """The share of padding in batches of examples that are padded to their longest."""
    padded = sum(len(batch) * max(lengths[example] for example in batch) for batch in batches)
    return 1 - sum(lengths[example] for batch in batches for example in batch) / padded


def ranks(lengths: list[int], batch_size: int, world: int, epoch: int = 0, **options) -> list[list[int]]:
    """The examples of every rank, in order."""
    samplers = [LengthGroupedSampler(lengths, batch_size, num_replicas=world, rank=r, **options) for r in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    examples = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(own) for own in examples]
    return examples


def chunks(examples: list[int], size: int) -> list[list[int]]:
    return [examples[i : i + size] for i in range(0, len(examples), size)]


# Examples fewer than a batch, than the processes; divisible or not by the batch, the global batch and the piece.
SIZES = [(1, 4, 1), (3, 4, 1), (1, 2, 4), (3, 2, 8), (16, 4, 2), (17, 4, 2), (23, 4, 2), (97, 3, 3), (480, 8, 2)]


@pytest.mark.parametrize(("count", "batch_size", "world"), SIZES)
@pytest.mark.parametrize("group", [1, 3, 50])
def test_every_example_is_drawn_and_only_the_last_batch_repeats_some(count, batch_size, world, group) -> None:
    examples = ranks(lognormal(count), batch_size, world, epoch=2, group=group, seed=5)
    assert len({len(own) for own in examples}) == 1
    size = batch_size * world
    complete = count // size
    whole = [example for own in examples for example in own[: complete * batch_size]]
    last = [example for own in examples for example in own[complete * batch_size :]]
    assert len(whole) == len(set(whole)) == complete * size
    assert set(whole).isdisjoint(last)
    assert set(whole) | set(last) == set(range(count))
    rest = count - complete * size
    assert len(last) == -(-rest // world) * world  # no more padding than the processes need
    assert max((last.count(example) for example in last), default=0) <= (-(-world // rest) if rest else 0) + 1


def test_the_batches_of_the_loader_are_slices_of_the_global_batches() -> None:
    lengths, world, batch_size = lognormal(203), 3, 4
    sampler = LengthGroupedSampler(lengths, batch_size, num_replicas=world, group=5)
    together = [batch.tolist() for batch in sampler.global_batches()]
    own = [chunks(examples, batch_size) for examples in ranks(lengths, batch_size, world, group=5)]
    assert [len(batches) for batches in own] == [len(together)] * world
    for number, batch in enumerate(together):
        for rank in range(world):
            assert own[rank][number] == batch[rank::world]
    loader = DataLoader(range(203), batch_size=batch_size, sampler=sampler, collate_fn=list)
    assert list(loader) == own[0]
    assert len(loader) == len(together)


def test_a_global_batch_has_examples_of_similar_length() -> None:
    lengths = np.array(lognormal(6000))
    batches = LengthGroupedSampler(lengths, 8, num_replicas=2).global_batches()
    spread = [np.ptp(lengths[batch]) for batch in batches]
    assert np.median(spread) <= 4
    assert np.ptp(lengths) > 300
    # All of a piece: neighbours in the order of lengths, with nobody of that piece between them.
    one_piece = LengthGroupedSampler(lengths[:160], 8, num_replicas=2, group=10).global_batches()
    intervals = sorted((int(lengths[batch].min()), int(lengths[batch].max())) for batch in one_piece)
    assert all(low[1] <= high[0] for low, high in pairwise(intervals))


def test_the_share_of_padding() -> None:
    lengths = lognormal(20_000)
    examples = np.random.default_rng(1).permutation(len(lengths)).tolist()
    random = padding_share(lengths, chunks(examples, 16))
    grouped = padding_share(lengths, chunks(list(LengthGroupedSampler(lengths, 16)), 16))
    in_pairs = padding_share(lengths, chunks(list(LengthGroupedSampler(lengths, 16, group=2)), 16))
    assert random > 0.5
    assert grouped < 0.06
    assert grouped < in_pairs < random


@pytest.mark.parametrize("count", [100, 1601, 5000])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_the_longest_example_comes_first_and_short_batches_do_not_follow_in_order(count: int, epoch: int) -> None:
    lengths = np.array(lognormal(count))
    first, *others = ranks(lengths, 4, 2, epoch, group=20)
    assert lengths[first[:4]].max() == lengths.max()
    assert len(first[:4]) == 4
    longest = [lengths[batch].max() for batch in chunks(first, 4)][1:-1]
    assert longest != sorted(longest, reverse=True)
    assert others


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    lengths = lognormal(300)

    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(lengths, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    np.random.seed(1)
    once = order(3, 1)
    torch.manual_seed(2)
    np.random.seed(2)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert order(3, 1) == once
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    others = [order(3, 0), order(3, 2), order(4, 1), order(1, 3)]
    assert all(other != once for other in others)
    # Not only the order of the batches: examples meet other examples.
    batches = [{frozenset(batch) for batch in chunks(examples, 4)} for examples in (once, others[0])]
    assert len(batches[0] & batches[1]) < 10
    sampler = LengthGroupedSampler(lengths, 4, seed=3)
    sampler.set_epoch(1)
    assert list(sampler) == list(sampler) == list(pickle.loads(pickle.dumps(sampler))) == once


def test_order_among_equal_lengths_is_random() -> None:
    first = list(LengthGroupedSampler([7] * 64, 4))
    assert sorted(first) == list(range(64))
    assert first != sorted(first)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_replicas": 0}, "num_replicas=0"),
        ({"group": 0}, "group=0"),
        ({"num_replicas": 2, "rank": 2}, "rank=2"),
        ({"rank": -1}, "rank=-1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_settings_of_the_sampler(options: dict, word: str) -> None:
    with pytest.raises(ConfigurationError, match=word) as error:
        LengthGroupedSampler([1, 2], **{"batch_size": 2, **options})
    assert "\n" not in str(error.value)


def test_lengths_that_are_none() -> None:
    with pytest.raises(DataError, match="no examples"):
        LengthGroupedSampler([], 2)
    with pytest.raises(DataError, match="example 1 has length 0"):
        LengthGroupedSampler([3, 0, 2], 2)


# Lightning and resuming


@pytest.mark.parametrize("grouped", [True, False])
def test_lightning_leaves_the_sampler_alone(tmp_path, grouped: bool) -> None:
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, default_root_dir=tmp_path, enable_progress_bar=False
    )
    sampler = LengthGroupedSampler(lognormal(40), 4, num_replicas=2) if grouped else None
    loader = DataLoader(range(40), batch_size=4, sampler=sampler, shuffle=not grouped)
    prepared = trainer._data_connector._prepare_dataloader(loader, shuffle=True, mode=RunningStage.TRAINING)
    # The other one shows that this is the place where Lightning would have put a sampler of its own.
    assert (prepared.sampler is loader.sampler) == grouped
    assert isinstance(prepared.sampler, DistributedSampler)


def test_a_resumable_loader_sets_the_epoch_and_goes_on_in_the_middle() -> None:
    lengths, at = lognormal(50), {"epoch": 0, "batches": 0}

    def make():
        loader = DataLoader(range(50), batch_size=4, sampler=LengthGroupedSampler(lengths, 4, seed=2), collate_fn=list)
        return make_resumable(loader, lambda: Progress(**at, complete=False))

    whole = []
    for epoch in range(3):
        at["epoch"] = epoch
        whole.append(list(make()))
        expected = LengthGroupedSampler(lengths, 4, seed=2)
        expected.set_epoch(epoch)
        assert whole[-1] == chunks(list(expected), 4)
    assert whole[0] != whole[1] != whole[2]

    at["epoch"] = 1
    stopped = make()
    begun = list(islice(stopped, 5))
    at["batches"] = 5
    resumed = make()
    resumed.load_state_dict(stopped.state_dict())
    assert begun + list(resumed) == whole[1]
