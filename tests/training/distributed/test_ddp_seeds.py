"""What two processes draw: dropout and augmentation apart, adapters and the order of the data alike; and resuming."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, Sampler, SubsetRandomSampler

from pera_lightning.adapters import PERA, LoRA
from pera_lightning.training.random_state import capture
from tests.training.distributed.ddp_helpers import Keeps, Steps, assert_equal, kept, make, seeded, trained

ROWS = 24


class Draws(Dataset):
    """Images whose noise is drawn from torch, python and numpy, with what was drawn beside the label."""

    def __init__(self, count=ROWS):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        drawn = torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()], dtype=torch.float64)
        image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(row)) + drawn.mean()
        return image.float(), row % 3, row, drawn


class Data(LightningDataModule):
    """`sampler` None shuffles; before anything is built, a process may be told to be at a state of its own."""

    num_classes = 3

    def __init__(self, *, sampler=None, workers=0, apart=False, same=False):
        super().__init__()
        self.sampler, self.workers, self.apart, self.same = sampler, workers, apart, same

    def setup(self, stage):
        if self.apart:
            torch.manual_seed(100 + self.trainer.global_rank)

    def train_dataloader(self):
        rows = [(torch.ones(3, 8, 8), 1, 0, 0.0)] * ROWS if self.same else Draws()
        order = {"shuffle": True} if self.sampler is None else {"sampler": self.sampler(rows)}
        return DataLoader(rows, batch_size=4, num_workers=self.workers, **order)


class Seen(Keeps):
    """Rows and draws of every training batch, the logits of the first, and the random state after the fit."""

    def on_train_start(self, trainer, pl_module):
        network = getattr(pl_module, "model", None) or pl_module.head
        self.hook = network.register_forward_hook(lambda _, __, logits: self.add("logits", logits.detach()))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.add("rows", (trainer.current_epoch, batch[2].tolist()))
        self.add("draws", batch[3])

    def on_fit_end(self, trainer, pl_module):
        self.hook.remove()
        self.add("after", capture())


def fit(folder, vit, world, data=None, method=None, base_dropout=0.0, callbacks=(), ckpt=None, **options):
    from tests.tasks.image_classification.vision_helpers import module

    # Constant, so that a run that is stopped early has the learning rates of one that is not.
    network = module(vit, num_classes=None, lr_schedule="constant")
    if base_dropout:
        build = network.build_network

        def with_dropout(**arguments):
            built = build(**arguments)
            built.pos_drop = torch.nn.Dropout(base_dropout)
            return built

        network.build_network = with_dropout
    trainer = make(folder, world, method, callbacks=[*callbacks], **options)
    trainer.fit(network, datamodule=data or Data(), ckpt_path=ckpt)
    return network


def test_initial_adapters_agree_whatever_state_a_process_is_at(vit, tmp_path):
    fit(tmp_path, vit, 2, Data(apart=True), PERA(rank=2), callbacks=[Steps(tmp_path)])
    one, two = kept(tmp_path, 2)
    assert_equal(one.start[0], two.start[0])
    assert {"model.head.weight"} < set(one.start[0])
    assert_equal(one.end[0], two.end[0])


class DrawsLess(Data):
    """The first process draws more while it builds, as under FSDP2, where the others build on the meta device."""

    def setup(self, stage):
        if self.trainer.global_rank:
            torch.manual_seed(5)


def test_each_process_draws_the_same_whatever_it_drew_before(vit, tmp_path):
    drawn = []
    for data in (Data(), DrawsLess()):
        seeded()
        fit(tmp_path, vit, 2, data, callbacks=[Seen(tmp_path)], max_epochs=1)
        drawn.append([torch.stack(process.draws) for process in kept(tmp_path, 2)])
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


@pytest.mark.parametrize(
    ("adapter", "base", "differ"),
    [(0.4, 0.0, True), (0.0, 0.4, True), (0.0, 0.0, False)],
    ids=["adapter", "base", "no"],
)
def test_dropout_differs_between_processes(vit, tmp_path, adapter, base, differ):
    """Every image is the same: what differs between the processes' logits is what was dropped."""
    seeded()
    start = [RandomB(), Seen(tmp_path)]
    fit(tmp_path, vit, 2, Data(same=True), PERA(rank=2, dropout=adapter), base, start, max_epochs=1)
    one, two = kept(tmp_path, 2)
    assert torch.equal(one.logits[0], two.logits[0]) is not differ


class RandomB(Callback):
    """B is zero at first, so that an adapter's dropout would not show."""

    def on_fit_start(self, trainer, pl_module):
        generator = torch.Generator().manual_seed(3)
        for parameter in trained(pl_module):
            own = pl_module.get_parameter(parameter)
            own.data = 0.3 * torch.randn(own.shape, generator=generator)


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_differs_and_the_order_is_common(vit, tmp_path, workers):
    seeded()
    fit(tmp_path, vit, 2, Data(workers=workers), callbacks=[Seen(tmp_path)], max_epochs=2)
    one, two = kept(tmp_path, 2)
    assert_each_row_once(one, two, 2)
    drawn = torch.cat([*one.draws, *two.draws])  # (2 epochs of all rows, 3 generators)
    assert drawn.shape == (2 * ROWS, 3)
    for k, name in enumerate(("torch", "python", "numpy")):
        assert len(set(drawn[:, k].tolist())) == 2 * ROWS, name


class FlatDraws(Draws):
    def __getitem__(self, row):
        image, label, row, drawn = super().__getitem__(row)
        return image[0, 0], label, row, drawn


def test_with_a_sanity_check_before_the_train_loader_is_made(tmp_path):
    """Somebody else's module, which asks for no train loader while it makes its optimizer."""
    from tests.training.foreign import Plain, val_loader

    seeded()
    trainer = make(
        tmp_path, 2, targets=["body.0"], trainable=["head"], callbacks=[Seen(tmp_path)], num_sanity_val_steps=1
    )
    trainer.fit(Plain(), DataLoader(FlatDraws(), batch_size=4), val_loader())
    drawn = torch.cat([draws for own in kept(tmp_path, 2) for draws in own.draws])
    for k in range(3):
        assert len(set(drawn[:, k].tolist())) == ROWS


def assert_each_row_once(one, two, epochs):
    orders = []
    for epoch in range(epochs):
        parts = [[row for e, rows in own.rows if e == epoch for row in rows] for own in (one, two)]
        assert Counter(parts[0] + parts[1]) == dict.fromkeys(range(ROWS), 1)
        orders.append(parts)
    assert orders[0] != orders[1]
    return orders


class PythonOrder(Sampler):
    """Somebody else's sampler, which draws from python's generator."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        order = list(range(len(self.rows)))
        random.shuffle(order)
        yield from order


def subset(rows):
    return SubsetRandomSampler(range(len(rows)))


@pytest.mark.parametrize("sampler", [subset, PythonOrder], ids=["torch", "python"])
def test_a_sampler_that_draws_deals_each_row_once(vit, tmp_path, sampler):
    """Lightning lets each process draw the whole order and take its share: the orders have to be the same."""
    seeded()
    fit(tmp_path, vit, 2, Data(sampler=sampler), callbacks=[Seen(tmp_path)], max_epochs=2)
    one, two = kept(tmp_path, 2)
    assert_each_row_once(one, two, 2)
    assert len(set(torch.cat([*one.draws, *two.draws])[:, 0].tolist())) == 2 * ROWS


def test_after_a_fit_the_processes_are_together_again(vit, tmp_path):
    seeded()
    fit(tmp_path, vit, 2, method=LoRA(rank=2, dropout=0.3), callbacks=[Seen(tmp_path)])
    one, two = kept(tmp_path, 2)
    assert torch.equal(one.after[0]["torch"], two.after[0]["torch"])
    assert torch.equal(one.after[0]["python"]["words"], two.after[0]["python"]["words"])
    assert torch.equal(one.after[0]["numpy"]["keys"], two.after[0]["numpy"]["keys"])


def test_the_first_of_several_draws_what_a_single_one_draws(vit, tmp_path):
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        seeded()
        data = Data() if world == 2 else Data(sampler=lambda rows: range(len(rows)))
        fit(tmp_path / str(world), vit, world, data, callbacks=[Seen(tmp_path / str(world))])
    (one,), (first, second) = kept(tmp_path / "1"), kept(tmp_path / "2", 2)
    assert torch.equal(one.draws[0], first.draws[0])
    assert not torch.equal(one.draws[0], second.draws[0])


STEPS = 9  # three an epoch


def nine_steps(folder, vit, sampler, *callbacks, **options):
    """A fit of three epochs on two processes, or what is left of it; what each of them had, and the end."""
    folder.mkdir()
    seeded()
    data, method = Data(sampler=sampler), PERA(rank=2, dropout=0.3)
    watched = [Seen(folder), Ends(folder / "end"), *callbacks]
    fit(folder, vit, 2, data, method, callbacks=watched, max_epochs=3, **options)
    return kept(folder, 2), torch.load(folder / "end")


@pytest.fixture(scope="module")
def undisturbed(vit, tmp_path_factory):
    """Fits that nothing stops, each run once."""
    found = {}

    def of(sampler):
        if sampler not in found:
            found[sampler] = nine_steps(tmp_path_factory.mktemp("undisturbed") / "run", vit, sampler)
        return found[sampler]

    return of


@pytest.mark.parametrize(
    ("stop", "sampler"), [(2, None), (3, None), (4, None), (4, subset)], ids=["2", "3", "4", "4-sampler"]
)
def test_two_processes_resume_to_the_bit(vit, undisturbed, tmp_path, stop, sampler):
    """Three steps an epoch: stopped in the middle of one, at its end, and in the second."""
    keep = ModelCheckpoint(tmp_path, filename="at", every_n_train_steps=stop, save_top_k=-1)
    nine_steps(tmp_path / "stopped", vit, sampler, keep, enable_checkpointing=True, max_steps=stop)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    ranks, ended = nine_steps(tmp_path / "resumed", vit, sampler, ckpt=str(checkpoint))
    whole_ranks, whole_end = undisturbed(sampler)
    for whole, resumed in zip(whole_ranks, ranks, strict=True):
        assert len(whole.rows) == STEPS
        assert resumed.rows == whole.rows[stop:]
        assert all(torch.equal(a, b) for a, b in zip(resumed.draws, whole.draws[stop:], strict=True))
    assert_equal(whole_end, ended)


class Ends(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(trained(pl_module), self.path)
