"""Examples in shards: each once, equally many for all, and left alone by Lightning."""

import pickle
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader

from pera_lightning.data.distributed_sampler import PaddedShard, merge_shards, padded_shard


def negative(row):
    return -row


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 6, 7, 11])
def test_each_example_once_and_as_many_for_all(count, world):
    rows = range(1, count + 1)
    split = [PaddedShard(rows, rank, world, negative) for rank in range(world)]
    assert {len(share) for share in split} == {-(-count // world)}
    shares = [[share[k] for k in range(len(share))] for share in split]
    assert sorted(row for share in shares for row in share if row > 0) == list(rows)
    assert {row for share in shares for row in share if row < 0} <= {-count}
    # Taken in turn they are in their order, the filling at the end.
    in_turn = [share[k] for k in range(len(shares[0])) for share in shares]
    assert in_turn[:count] == list(rows)


def test_a_share_goes_to_workers():
    share = pickle.loads(pickle.dumps(PaddedShard([1, 2, 3], 1, 2, negative)))
    assert [share[k] for k in range(2)] == [2, -3]


@pytest.mark.parametrize("mode", [RunningStage.VALIDATING, RunningStage.TESTING, RunningStage.PREDICTING])
@pytest.mark.parametrize("ours", [True, False])
def test_lightning_does_not_shard_it_again(tmp_path, ours, mode):
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, default_root_dir=tmp_path, enable_progress_bar=False
    )
    process = SimpleNamespace(global_rank=1, world_size=2)
    loader = DataLoader(**padded_shard(range(1, 12), process, negative)) if ours else DataLoader(range(1, 12))
    prepared = trainer._data_connector._prepare_dataloader(loader, shuffle=False, mode=mode)
    rows = [int(batch) for batch in prepared]
    # The other one shows that Lightning would have sharded it here: to rank 0, as the trainer has not started.
    assert rows == ([2, 4, 6, 8, 10, -11] if ours else [1, 3, 5, 7, 9, 11])


def test_without_a_trainer_there_is_one_process():
    assert list(DataLoader(**padded_shard(range(3), None, negative), batch_size=None)) == [0, 1, 2]


def test_results_of_several_processes_come_in_order_and_once():
    """Seven examples over three processes: two fill up with the last row."""
    ranks = [[("0", 5), ("3", 4), ("6", 9)], [("1", 2), ("4", 7), ("6", 9)], [("2", 0), ("5", 1), ("6", 9)]]
    assert merge_shards(ranks) == [("0", 5), ("1", 2), ("2", 0), ("3", 4), ("4", 7), ("5", 1), ("6", 9)]


def test_without_a_blank_the_last_example_fills_up():
    assert [PaddedShard("abc", 1, 2)[k] for k in range(2)] == ["b", "c"]
