"""A run that was stopped and resumed equals, to the bit, the run that never was."""

from __future__ import annotations

import io
import itertools
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from pera_lightning import AdapterInjection, load_adapted
from pera_lightning.adapters import PERA, AuroRA, HiRA
from pera_lightning.injection.state import adapter_state_dict
from pera_lightning.training.data_order import Progress, make_resumable
from pera_lightning.training.random_state import capture, restore
from tests.training.foreign import Noisy, Plain, train_loader, val_loader


class Draws(Callback):
    """Draws from every generator after validation, as a logging callback of other people might."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Plain) -> None:
        torch.rand(3)


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Plain, outputs: dict, *_: object) -> None:
        self.seen[trainer.global_step] = outputs["loss"].item()


def fit(folder: Path, *, steps: str, ckpt: str | None = None, method=None, seed: int = 3, workers: int = 0, **options):
    """Trains `Plain`; returns the final adapter state, the losses by step and the trainer."""
    seed_everything(seed, verbose=False)
    model, losses = options.pop("model", None) or Plain(), Losses()
    more, train, val = options.pop("more", []), options.pop("loader", None), options.pop("val", None)
    keep_options = dict(options.pop("keep", {}))
    keep = ModelCheckpoint(folder, save_top_k=-1, save_last=True, **keep_options)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            AdapterInjection(method or PERA(rank=2, dropout=0.2), ["body.0", "body.3"], ["head"]),
            Draws(),
            losses,
            *more,
            keep,
        ],
        **{"max_epochs": 3, **options},
        **({"max_steps": int(steps)} if steps else {}),
    )
    trainer.fit(model, train or train_loader(workers), val or val_loader(), ckpt_path=ckpt)
    return {k: v.clone() for k, v in adapter_state_dict(model).items()}, losses.seen, trainer


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("method", [PERA(rank=2, dropout=0.2), AuroRA(dropout=0.2), HiRA(rank=2, dropout=0.2)], ids=str)
def test_after_an_epoch(tmp_path: Path, method) -> None:
    whole, losses, _ = fit(tmp_path / "a", steps="", method=method)
    fit(tmp_path / "b", steps="", method=method, max_epochs=1)
    resumed, later, _ = fit(tmp_path / "b", steps="", method=method, ckpt=str(tmp_path / "b" / "last.ckpt"), seed=99)
    assert_same(whole, resumed)
    assert later == {step: loss for step, loss in losses.items() if step > 10}


# 10 batches an epoch: the first step, the middle, the last step of an epoch, and the second epoch.
@pytest.mark.parametrize("stop", [1, 4, 10, 13, 20])
def test_in_the_middle_of_an_epoch(tmp_path: Path, stop: int) -> None:
    keep = {"every_n_train_steps": stop}
    whole, losses, _ = fit(tmp_path / "a", steps="", keep=keep)
    fit(tmp_path / "b", steps=str(stop), keep=keep)
    resumed, later, _ = fit(tmp_path / "b", steps="", keep=keep, ckpt=str(tmp_path / "b" / "last.ckpt"), seed=99)
    assert later == {step: loss for step, loss in losses.items() if step > stop}
    assert_same(whole, resumed)


def test_twice_in_the_same_epoch(tmp_path: Path) -> None:
    """A resumed run that stops again in the same epoch still knows how that epoch began."""
    whole, _, _ = fit(tmp_path / "a", steps="", keep={"every_n_train_steps": 1})
    for stop, start in (("12", None), ("15", "12"), ("", "15")):
        ckpt = None if start is None else str(tmp_path / "b" / "last.ckpt")
        seed = 3 if start is None else 8
        resumed, _, _ = fit(tmp_path / "b", steps=stop, ckpt=ckpt, keep={"every_n_train_steps": 1}, seed=seed)
    assert_same(whole, resumed)


# 10 batches an epoch. The first two go on from the end of an epoch, whole and cut short by max_steps; the third from a
# checkpoint of an epoch's last batch, and then from the middle of the next epoch.
@pytest.mark.parametrize(
    ("end", "keep", "options", "files"),
    [
        ("9", {"save_on_train_epoch_end": True}, {"max_epochs": -1, "accumulate_grad_batches": 4}, ["epoch=0-step=3"]),
        ("25", {"save_on_train_epoch_end": True}, {}, ["epoch=1-step=15"]),
        ("", {"every_n_train_steps": 1}, {"accumulate_grad_batches": 4}, ["epoch=0-step=3", "epoch=1-step=4"]),
    ],
    ids=["whole", "cut short", "last batch"],
)
def test_at_the_end_of_an_epoch(tmp_path: Path, end: str, keep: dict, options: dict, files: list[str]) -> None:
    options = {"keep": keep, "limit_val_batches": 0, **options}
    whole, losses, _ = fit(tmp_path / "a", steps=end, **options)
    fit(tmp_path / "0", steps="15", **options)
    for i, file in enumerate(files):
        ckpt = str(tmp_path / f"{i}" / f"{file}.ckpt")
        resumed, later, run = fit(tmp_path / f"{i + 1}", steps=end, ckpt=ckpt, seed=99, **options)
    assert_same(whole, resumed)
    assert later == {step: loss for step, loss in losses.items() if step in later}
    assert run.current_epoch == 3


def test_with_validation_inside_the_epoch(tmp_path: Path) -> None:
    options = {"val_check_interval": 3, "keep": {"every_n_train_steps": 6}}
    whole, _, _ = fit(tmp_path / "a", steps="", **options)
    options = {"val_check_interval": 3, "keep": {"every_n_train_steps": 6}}
    fit(tmp_path / "b", steps="6", **options)
    options = {"val_check_interval": 3, "keep": {"every_n_train_steps": 6}}
    resumed, _, _ = fit(tmp_path / "b", steps="", ckpt=str(tmp_path / "b" / "last.ckpt"), seed=5, **options)
    assert_same(whole, resumed)


def test_validation_leaves_training_as_it_was(tmp_path: Path) -> None:
    with_validation, _, _ = fit(tmp_path / "a", steps="", limit_val_batches=1.0)
    without, _, _ = fit(tmp_path / "b", steps="", limit_val_batches=0)
    assert_same(with_validation, without)


@pytest.mark.parametrize("stop", [4, 13])
def test_with_workers_and_accumulation(tmp_path: Path, stop: int) -> None:
    options = {"workers": 1, "accumulate_grad_batches": 2}
    keep = {"every_n_train_steps": stop}
    whole, _, _ = fit(tmp_path / "a", steps="", keep=dict(keep), max_epochs=4, **options)
    fit(tmp_path / "b", steps=str(stop), keep=dict(keep), max_epochs=4, **options)
    last = str(tmp_path / "b" / "last.ckpt")
    resumed, _, _ = fit(tmp_path / "b", steps="", keep=dict(keep), ckpt=last, seed=9, max_epochs=4, **options)
    assert_same(whole, resumed)


class Dies(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: Plain, batch: list, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 6:
            raise RuntimeError("killed")


def test_a_schedule_by_a_metric_is_said_not_to_be_resumed(tmp_path: Path) -> None:
    class ByMetric(Plain):
        def configure_optimizers(self) -> dict:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}

    fit(tmp_path, steps="", max_epochs=1, model=ByMetric())
    with pytest.warns(UserWarning, match="ReduceLROnPlateau watches a metric, which no checkpoint holds"):
        fit(tmp_path, steps="", max_epochs=2, model=ByMetric(), ckpt=str(tmp_path / "last.ckpt"))


class Compiled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(self.body, backend="eager")


@pytest.mark.parametrize(("first", "second"), [(Compiled, Plain), (Plain, Compiled)])
def test_compiled_and_plain_go_on_from_each_other(tmp_path: Path, first: type[Plain], second: type[Plain]) -> None:
    """In the middle of an accumulation, whose gradients have names too."""
    options = {"accumulate_grad_batches": 4, "limit_val_batches": 0, "max_epochs": 1}
    whole, _, _ = fit(tmp_path / "a", steps="", model=Plain(), **options)

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Plain, outputs: dict, batch: list, i: int) -> None:
            if i == 5:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    fit(tmp_path / "b", steps="", model=first(), more=[Saves()], **options)
    assert not [name for name in torch.load(tmp_path / "x.ckpt")["state_dict"] if "_orig_mod" in name]
    resumed, _, _ = fit(tmp_path / "c", steps="", model=second(), ckpt=str(tmp_path / "x.ckpt"), **options)
    assert_same(whole, {name.replace("_orig_mod.", ""): value for name, value in resumed.items()})
    again = load_adapted(second(), tmp_path / "x.ckpt")
    assert again.get_submodule("body.0").adapters["all"].B.abs().sum() > 0


def test_between_two_batches_of_one_optimizer_step(tmp_path: Path) -> None:
    """Validation, and the checkpoint with it, may come in the middle of an accumulation: no gradient is lost."""
    options = {"accumulate_grad_batches": 4, "val_check_interval": 3}
    whole, _, _ = fit(tmp_path / "a", steps="", **options)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "b", steps="", more=[Dies()], **options)
    last = tmp_path / "b" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == 6
    resumed, _, _ = fit(tmp_path / "b", steps="", ckpt=str(last), seed=8, **options)
    assert_same(whole, resumed)


class DiesInEpoch(Callback):
    """Ends a fit before the validation, or before the first training batch, of an epoch."""

    def __init__(self, before: str, epoch: int) -> None:
        self.before, self.epoch = before, epoch

    def on_validation_start(self, trainer: Trainer, pl_module: Plain) -> None:
        if (self.before, self.epoch) == ("validation", trainer.current_epoch) and not trainer.sanity_checking:
            raise RuntimeError("killed")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Plain, batch: list, batch_idx: int) -> None:
        if (self.before, self.epoch) == ("training", trainer.current_epoch):
            raise RuntimeError("killed")


def test_stopped_again_after_the_validation_it_resumed_with(tmp_path: Path) -> None:
    """The second checkpoint is of a process that has trained no batch, and whose validation has drawn."""

    def run(folder: Path, *more: Callback, **options):
        after = ModelCheckpoint(folder, filename="after", enable_version_counter=False)
        keep = {"every_n_train_steps": 10}
        return fit(folder, steps="", keep=keep, more=[after, *more], **options)

    whole, losses, _ = run(tmp_path / "a")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "b", DiesInEpoch("validation", 0))
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "b", DiesInEpoch("training", 1), ckpt=str(tmp_path / "b" / "last.ckpt"), seed=8)
    resumed, later, _ = run(tmp_path / "b", ckpt=str(tmp_path / "b" / "after.ckpt"), seed=9)
    assert later == {step: loss for step, loss in losses.items() if step > 10}
    assert_same(whole, resumed)


def test_random_state_round_trip() -> None:
    import random

    import numpy as np

    def draw() -> tuple:
        return random.random(), random.gauss(0, 1), np.random.randn(), torch.rand(2).tolist()

    draw()
    state = capture()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    first = draw()
    draw()
    restore(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert draw() == first


def test_the_generator_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    loader, other = (
        make_resumable([1], lambda: Progress(0, 0, False)),
        make_resumable([1], lambda: Progress(0, 0, False)),
    )
    iter(other)
    on_cpu, device = other.state_dict(), torch.Generator().manual_seed(3)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", device.get_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", device.set_state)
    state = capture()
    first = torch.rand(3, generator=device)
    restore(state)
    assert torch.equal(torch.rand(3, generator=device), first)
    with pytest.warns(UserWarning, match="was written on cpu and is loaded on mps: what a device draws"):
        loader.load_state_dict(on_cpu)


class Samples(torch.utils.data.Sampler):
    """A sampler with a generator of its own."""

    def __init__(self, size: int) -> None:
        self.size, self.generator = size, torch.Generator().manual_seed(4)

    def __len__(self) -> int:
        return self.size

    def __iter__(self):
        yield from torch.randperm(self.size, generator=self.generator).tolist()


@pytest.mark.parametrize("kind", ["loader's generator", "sampler's generator"])
@pytest.mark.parametrize("stop", [10, 13])
def test_with_a_generator_of_its_own(tmp_path: Path, kind: str, stop: int) -> None:
    def loader():
        if kind == "loader's generator":
            return DataLoader(Noisy(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(4))
        return DataLoader(Noisy(), batch_size=4, sampler=Samples(40))

    keep = {"every_n_train_steps": stop}
    whole, _, _ = fit(tmp_path / "a", steps="", keep=dict(keep), loader=loader())
    fit(tmp_path / "b", steps=str(stop), keep=dict(keep), loader=loader())
    last = str(tmp_path / "b" / "last.ckpt")
    resumed, _, _ = fit(tmp_path / "b", steps="", keep=dict(keep), loader=loader(), ckpt=last, seed=8)
    assert_same(whole, resumed)


def test_one_loader_for_training_and_validation(tmp_path: Path) -> None:
    def run(folder: Path, **options):
        both = DataLoader(Noisy(), batch_size=4, shuffle=True)
        return fit(folder, loader=both, val=both, val_check_interval=4, keep={"every_n_train_steps": 15}, **options)

    whole, _, _ = run(tmp_path / "a", steps="")
    run(tmp_path / "b", steps="15")
    resumed, _, _ = run(tmp_path / "b", steps="", ckpt=str(tmp_path / "b" / "last.ckpt"), seed=8)
    assert_same(whole, resumed)


def test_a_loader_without_a_class_of_its_own(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(4, 8, generator=generator), torch.zeros(4, dtype=torch.long)) for _ in range(10)]
    options = {"limit_train_batches": 10, "keep": {"every_n_train_steps": 14}}
    whole, _, _ = fit(tmp_path / "a", steps="", loader=itertools.cycle(batches), **options)
    fit(tmp_path / "b", steps="14", loader=itertools.cycle(batches), **options)
    last = str(tmp_path / "b" / "last.ckpt")
    resumed, _, _ = fit(tmp_path / "b", steps="", loader=itertools.cycle(batches), ckpt=last, seed=8, **options)
    assert_same(whole, resumed)


def test_the_users_loader_is_left_as_it_was(tmp_path: Path) -> None:
    loader = train_loader()
    before = dict(vars(loader))
    _, _, trainer = fit(tmp_path, steps="2", loader=loader)
    assert type(loader) is DataLoader
    assert vars(loader) == before
    pickle.dumps(loader)
    assert "process_dataloader" not in vars(trainer.strategy)
