"""What checkpoints of adapted modules hold, and what they are refused for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import (
    Callback,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

from pera_lightning import adapter_state_dict, load_adapted, load_adapter
from pera_lightning.adapters import PERA, FullFineTuning, LinearProbe, LoRA
from pera_lightning.errors import CheckpointError
from tests.training.foreign import Plain, train_loader, val_loader
from tests.training.short_fits import TARGETS, callback, fitted, trainer


def test_a_fit_does_not_go_on_from_weights_only(tmp_path: Path) -> None:
    _, run = fitted(tmp_path)
    path = str(tmp_path / "weights.ckpt")
    run.save_checkpoint(path, weights_only=True)
    with pytest.raises(CheckpointError, match=r"weights.ckpt holds weights only \(save_weights_only=True\)"):
        trainer(tmp_path, callback(), enable_checkpointing=False).fit(Plain(), train_loader(), ckpt_path=path)
    trainer(tmp_path, callback()).test(Plain(), val_loader(), ckpt_path=path, verbose=False)


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_no_frozen_base(tmp_path: Path, weights_only: bool) -> None:
    model = Plain()
    keep = ModelCheckpoint(tmp_path, filename="x", save_weights_only=weights_only)
    run = trainer(tmp_path, callback(), keep)
    run.fit(model, train_loader(), val_loader())
    run.save_checkpoint(tmp_path / "after.ckpt", weights_only=weights_only)
    for name in ("x.ckpt", "after.ckpt"):
        checkpoint = torch.load(tmp_path / name, weights_only=True)
        saved = set(checkpoint["state_dict"])
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        assert not saved & frozen
        assert saved == set(model.state_dict()) - frozen
        # The statistics of a norm in training mode change, so they are saved although its parameters are frozen.
        assert "norm.running_mean" in saved
        assert checkpoint["pera_lightning"]["method"]["class_path"].endswith("lora.LoRA")
    # What other code asks of the module stays whole.
    assert frozen <= set(model.state_dict())


def test_test_with_a_checkpoint(tmp_path: Path) -> None:
    model, _ = fitted(tmp_path)
    expected = trainer(tmp_path, callback()).test(model, val_loader(), verbose=False)
    fresh = Plain()
    got = trainer(tmp_path, callback()).test(fresh, val_loader(), ckpt_path=str(tmp_path / "best.ckpt"), verbose=False)
    assert got == expected


def test_fit_then_test_with_one_trainer(tmp_path: Path) -> None:
    model, run = fitted(tmp_path)
    assert run.test(model, val_loader(), ckpt_path="best", verbose=False) == run.test(
        model, val_loader(), verbose=False
    )


def test_load_adapted(tmp_path: Path) -> None:
    model, _ = fitted(tmp_path)
    x = torch.randn(5, 8)
    expected = model.eval()(x)
    by_class = load_adapted(Plain, tmp_path / "best.ckpt")
    by_instance = load_adapted(Plain(), tmp_path / "best.ckpt")
    assert torch.equal(by_class(x), expected)
    assert torch.equal(by_instance(x), expected)
    assert not by_class.training
    assert load_adapted(Plain, tmp_path / "best.ckpt", dropout=0.5).body[2].p == 0.5


def test_adapter_folder_is_the_best_checkpoint(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    model, keep = Plain(), ModelCheckpoint(tmp_path, monitor="val/loss", mode="min", save_top_k=1)
    run = trainer(tmp_path, callback(), keep, max_epochs=4)
    run.fit(model, train_loader(), val_loader())
    best = torch.load(keep.best_model_path, weights_only=True)["state_dict"]
    loaded = load_adapter(Plain(), tmp_path / "adapter")
    for name, value in adapter_state_dict(loaded).items():
        assert torch.equal(value, best[name]), name
    assert not torch.equal(best["head.weight"], model.head.weight)  # else best and last would be the same
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["targets"] == TARGETS


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    trainer(tmp_path, callback(), fast_dev_run=True).fit(Plain(), train_loader(), val_loader())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"method": PERA(rank=2)}, "is of LoRA, the model has PERA"),
        ({"method": LoRA(rank=3)}, r"LoRA\(rank=2.*LoRA\(rank=3"),
        ({"method": LoRA(rank=2, alpha=3)}, r"alpha=16.*alpha=3"),
        ({"targets": ["body.0"]}, "adapts 2 layers .* the model 1 .*body.3"),
        ({"trainable": []}, "trains .*head.* give the same trainable"),
    ],
)
def test_a_checkpoint_of_something_else(tmp_path: Path, other: dict, message: str) -> None:
    fitted(tmp_path)
    run = trainer(tmp_path, callback(other.pop("method", None), **other))
    with pytest.raises(CheckpointError, match=message):
        run.test(Plain(), val_loader(), ckpt_path=str(tmp_path / "best.ckpt"), verbose=False)


def test_a_checkpoint_of_another_base(tmp_path: Path) -> None:
    fitted(tmp_path)
    other = Plain()
    with torch.no_grad():
        other.body[3].weight.mul_(1.1)
    with pytest.raises(CheckpointError, match=r"another base: 1 of 7 frozen tensors differ: body.3"):
        trainer(tmp_path, callback()).test(other, val_loader(), ckpt_path=str(tmp_path / "best.ckpt"), verbose=False)


def test_a_bfloat16_copy_of_the_base_is_the_same_base(tmp_path: Path) -> None:
    fitted(tmp_path)
    loaded = load_adapted(Plain().bfloat16(), tmp_path / "best.ckpt")
    assert loaded.body[0].adapters["all"].A.dtype == torch.float32


def test_dropout_may_differ(tmp_path: Path) -> None:
    fitted(tmp_path)
    run = trainer(tmp_path, callback(LoRA(rank=2, dropout=0.4)))
    run.test(Plain(), val_loader(), ckpt_path=str(tmp_path / "best.ckpt"), verbose=False)


def test_missing_and_unexpected_keys(tmp_path: Path) -> None:
    fitted(tmp_path)
    path = tmp_path / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["body.0.adapters.all.C"] = checkpoint["state_dict"].pop("body.0.adapters.all.A")
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=r"1 missing: body.0.adapters.all.A; 1 unexpected: body.0.adapters.all.C"):
        trainer(tmp_path, callback()).test(Plain(), val_loader(), ckpt_path=str(path), verbose=False)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_damaged_checkpoint(tmp_path: Path, share: float) -> None:
    """One line names it, the error, and the others of its folder."""
    fitted(tmp_path)
    data = (tmp_path / "best.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(data[: int(len(data) * share)])
    for read in (
        lambda: trainer(tmp_path, callback()).fit(Plain(), train_loader(), val_loader(), ckpt_path=str(cut)),
        lambda: load_adapted(Plain, cut),
    ):
        with pytest.raises(
            CheckpointError,
            match=rf"cut.ckpt is damaged, or another kind of file \(\w+: .*\); {tmp_path} has best.ckpt$",
        ) as error:
            read()
        assert "\n" not in str(error.value)


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    fitted(tmp_path)
    missing = str(tmp_path / "bset.ckpt")
    with pytest.raises(CheckpointError, match=rf"bset.ckpt does not exist; {tmp_path} has best.ckpt$"):
        load_adapted(Plain, missing)
    with pytest.raises(CheckpointError, match=r"not exist.*best.ckpt"):
        trainer(tmp_path, callback()).test(Plain(), val_loader(), ckpt_path=missing, verbose=False)


def test_an_adapter_folder_is_no_checkpoint_and_those_beside_it_are_named(tmp_path: Path) -> None:
    fitted(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "best.ckpt").rename(tmp_path / "checkpoints" / "best.ckpt")
    with pytest.raises(CheckpointError, match=r"is a folder; .* needed: \S*/checkpoints/best.ckpt \(") as error:
        trainer(tmp_path, callback()).test(Plain(), val_loader(), ckpt_path=str(tmp_path / "adapter"), verbose=False)
    assert "\n" not in str(error.value)
    for folder in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError, match=r"is a folder; .* needed: \S*/checkpoints/best.ckpt \("):
            load_adapted(Plain, folder)
    (tmp_path / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"here a .ckpt file is needed \("):
        load_adapted(Plain, tmp_path / "adapter")


def test_a_checkpoint_without_adapters(tmp_path: Path) -> None:
    run = trainer(tmp_path, ModelCheckpoint(tmp_path, filename="plain"))
    run.fit(Plain(), train_loader(), val_loader())
    with pytest.raises(CheckpointError, match="holds no adapters"):
        trainer(tmp_path, callback()).test(Plain(), val_loader(), ckpt_path=str(tmp_path / "plain.ckpt"), verbose=False)
    with pytest.raises(CheckpointError, match="holds no adapters"):
        load_adapted(Plain, tmp_path / "plain.ckpt")


def test_a_checkpoint_of_a_later_format(tmp_path: Path) -> None:
    fitted(tmp_path)
    content = torch.load(tmp_path / "best.ckpt", weights_only=True)
    content["pera_lightning"]["format"] = 2
    torch.save(content, tmp_path / "best.ckpt")
    with pytest.raises(CheckpointError, match="has format 2, this version of pera_lightning reads 1"):
        load_adapted(Plain, tmp_path / "best.ckpt")


def test_a_plain_module_still_loads_strictly(tmp_path: Path) -> None:
    """Only the frozen base may be missing; torch's own check stays on for the rest."""
    model, _ = fitted(tmp_path)
    state = adapter_state_dict(model)
    model.load_state_dict(state)
    del state["head.bias"]
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        model.load_state_dict(state)


@pytest.mark.parametrize("method", [LinearProbe(), FullFineTuning()], ids=str)
def test_controls(tmp_path: Path, method) -> None:
    model, _ = fitted(tmp_path, method)
    saved = set(torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"])
    assert ("body.0.weight" in saved) is isinstance(method, FullFineTuning)
    assert torch.equal(load_adapted(Plain, tmp_path / "best.ckpt").head.weight, model.head.weight)


def test_weight_averaging(tmp_path: Path) -> None:
    """It copies the model at its setup, and resumes from a checkpoint that lacks the base."""
    seed_everything(0, verbose=False)
    model, keep = Plain(), ModelCheckpoint(tmp_path, filename="ema", save_last=True)
    trainer(tmp_path, callback(), WeightAveraging(), keep).fit(model, train_loader(), val_loader())
    checkpoint = torch.load(tmp_path / "ema.ckpt", weights_only=True)
    assert "body.0.weight" not in checkpoint["state_dict"]
    assert "body.0.weight" not in checkpoint["current_model_state"]
    run = trainer(tmp_path, callback(), WeightAveraging(), max_epochs=2)
    run.fit(Plain(), train_loader(), val_loader(), ckpt_path=str(tmp_path / "ema.ckpt"))


class Means(Callback):
    """An average of other people: of the adapters, put into the module when training ends."""

    def on_train_start(self, trainer: Trainer, pl_module: Plain) -> None:
        self.sum = [torch.zeros_like(p) for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Plain, *_: object) -> None:
        for total, p in zip(self.sum, pl_module.parameters(), strict=True):
            total += p.data

    def on_train_end(self, trainer: Trainer, pl_module: Plain) -> None:
        for total, p in zip(self.sum, pl_module.parameters(), strict=True):
            p.data = total / trainer.global_step


@pytest.mark.parametrize(
    ("average", "norm"),
    [(StochasticWeightAveraging(1e-2, 1), True), (StochasticWeightAveraging(1e-2, 1), False), (Means(), True)],
    ids=["swa with an epoch for the norms", "swa", "other people's"],
)
def test_the_adapter_folder_is_of_the_averaged_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture, average: Callback, norm: bool
) -> None:
    class Normless(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.Identity()

    model = Plain() if norm else Normless()
    keep = ModelCheckpoint(tmp_path, monitor="val/loss")
    trainer(tmp_path, callback(), average, keep, max_epochs=3).fit(model, train_loader(), val_loader())
    assert "Adapter of the averaged weights" in capsys.readouterr().out
    saved = adapter_state_dict(load_adapter(type(model)(), tmp_path / "adapter"))
    for name, value in adapter_state_dict(model).items():
        assert torch.equal(saved[name], value), name


class Thaws(Callback):
    """Unfreezes a base layer in the second epoch, as BaseFinetuning does."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Plain) -> None:
        if trainer.current_epoch == 1:
            pl_module.body[3].weight.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": [pl_module.body[3].weight]})


def test_what_others_unfreeze_is_saved(tmp_path: Path) -> None:
    model = Plain()
    keep = ModelCheckpoint(tmp_path, filename="thawed", every_n_epochs=3)
    trainer(tmp_path, callback(), Thaws(), keep, max_epochs=3).fit(model, train_loader(), val_loader())
    assert "body.3.weight" in torch.load(tmp_path / "thawed.ckpt", weights_only=True)["state_dict"]
    with pytest.warns(UserWarning, match=r"weights of the base that were unfrozen in its training \(body\.3\.weight\)"):
        again = load_adapted(Plain, tmp_path / "thawed.ckpt")
    assert torch.equal(again.body[3].weight, model.body[3].weight)
    model.body[3].weight.requires_grad_(False)
    assert "body.3.weight" in adapter_state_dict(model)
    assert "body.0.weight" not in adapter_state_dict(model)


def test_strict_loading_is_the_modules(tmp_path: Path) -> None:
    """A module that leaves something of its own out of its checkpoints says so by strict_loading."""

    class Drops(Plain):
        strict_loading = False

        def on_save_checkpoint(self, checkpoint: dict) -> None:
            del checkpoint["state_dict"]["norm.running_mean"]

    run = trainer(tmp_path, callback(), ModelCheckpoint(tmp_path, filename="best"))
    run.fit(Drops(), train_loader(), val_loader())
    again = trainer(tmp_path, callback())
    again.test(Drops(), val_loader(), ckpt_path=str(tmp_path / "best.ckpt"), verbose=False)
    path = tmp_path / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["state_dict"]["head.weight"]
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=r"1 missing: head\.weight"):
        again.test(Drops(), val_loader(), ckpt_path=str(path), verbose=False)
