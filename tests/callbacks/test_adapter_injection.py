"""The callback in real fits, with probes that look in the middle."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from foreign import BuildsLate, Plain, WithHook, train_loader, val_loader
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, WeightAveraging
from torch import nn

from pera_lightning import AdapterInjection, adapter_state_dict, inject, load_adapted, load_adapter
from pera_lightning.adapters import PERA, AdaptedLinear, FullFineTuning, HiRA, LinearProbe, LoRA
from pera_lightning.errors import CheckpointError, ConfigurationError, NoTargetMatched, UnusedLayerError

TARGETS, HEAD = ["body.0", "body.3"], ["head"]


def callback(method=None, **options) -> AdapterInjection:
    return AdapterInjection(
        method or LoRA(rank=2), options.pop("targets", TARGETS), options.pop("trainable", HEAD), **options
    )


def trainer(folder: Path, *callbacks: Callback, **options) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "max_epochs": 1,
            "limit_train_batches": 3,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            **options,
        }
    )


def fitted(folder: Path, method=None, **options) -> tuple[Plain, Trainer]:
    seed_everything(0, verbose=False)
    model = Plain()
    run = trainer(folder, callback(method), ModelCheckpoint(folder, filename="best"), **options)
    run.fit(model, train_loader(), val_loader())
    return model, run


class Probe(Callback):
    """What a user would look at in the middle of a fit."""

    def on_train_start(self, trainer: Trainer, pl_module: Plain) -> None:
        self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        assert isinstance(pl_module.body[0], AdaptedLinear)
        held = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
        assert held == {id(p) for p in pl_module.parameters() if p.requires_grad}

    def on_after_backward(self, trainer: Trainer, pl_module: Plain) -> None:
        for name, p in pl_module.named_parameters():
            trained = ".adapters." in name or name.startswith("head.")
            assert p.requires_grad is trained, name
            assert (p.grad is not None) is trained, name


def test_only_adapters_and_heads_move(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    probe, model = Probe(), Plain()
    trainer(tmp_path, callback(PERA(rank=2)), probe).fit(model, train_loader(), val_loader())
    for name, p in model.named_parameters():
        trained = ".adapters." in name or name.startswith("head.")
        assert torch.equal(p, probe.before[name]) is not trained, name
    printed = capsys.readouterr().out
    assert "Injected PERA(rank=2" in printed
    assert str(tmp_path / "adapter") in printed


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
        ({"method": PERA(rank=2)}, r"LoRA\(rank=2.*PERA\(rank=2"),
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
    with pytest.raises(CheckpointError, match=r"another base: 1 of 2 frozen weights differ, first body.3"):
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


def test_a_damaged_or_missing_checkpoint(tmp_path: Path) -> None:
    fitted(tmp_path)
    whole = (tmp_path / "best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cut.ckpt is damaged"):
        trainer(tmp_path, callback()).test(Plain(), val_loader(), ckpt_path=str(tmp_path / "cut.ckpt"), verbose=False)
    with pytest.raises(CheckpointError, match=r"not exist.*best.ckpt"):
        trainer(tmp_path, callback()).test(Plain(), val_loader(), ckpt_path=str(tmp_path / "bset.ckpt"), verbose=False)


def test_a_checkpoint_without_adapters(tmp_path: Path) -> None:
    run = trainer(tmp_path, ModelCheckpoint(tmp_path, filename="plain"))
    run.fit(Plain(), train_loader(), val_loader())
    with pytest.raises(CheckpointError, match="holds no adapters"):
        trainer(tmp_path, callback()).test(Plain(), val_loader(), ckpt_path=str(tmp_path / "plain.ckpt"), verbose=False)
    with pytest.raises(CheckpointError, match="holds no adapters"):
        load_adapted(Plain, tmp_path / "plain.ckpt")


def test_a_plain_module_still_loads_strictly(tmp_path: Path) -> None:
    """Only the frozen base may be missing; torch's own check stays on for the rest."""
    model, _ = fitted(tmp_path)
    state = adapter_state_dict(model)
    model.load_state_dict(state)
    del state["head.bias"]
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        model.load_state_dict(state)


def test_must_come_first(tmp_path: Path) -> None:
    run = trainer(tmp_path, LearningRateMonitor(), callback(), logger=True)
    with pytest.raises(ConfigurationError, match="must be the first callback, LearningRateMonitor comes before it"):
        run.fit(Plain(), train_loader())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_true_low_precision_is_refused(tmp_path: Path, precision: str) -> None:
    with pytest.raises(ConfigurationError, match=f"precision={precision} casts the adapters"):
        trainer(tmp_path, callback(), precision=precision).fit(Plain(), train_loader())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_bfloat16_base_with_float32_adapters(tmp_path: Path, precision: str) -> None:
    class Low(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.body.bfloat16()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.body(x.bfloat16()).float()))

    model = Low()
    trainer(tmp_path, callback(HiRA(rank=2)), precision=precision).fit(model, train_loader(), val_loader())
    assert model.body[0].weight.dtype == torch.bfloat16
    assert model.body[0].adapters["all"].B.dtype == torch.float32
    assert model.body[0].adapters["all"].B.abs().sum() > 0


def test_cast_after_the_injection_is_noticed(tmp_path: Path) -> None:
    class Casts(Callback):
        def setup(self, trainer: Trainer, pl_module: Plain, stage: str) -> None:
            pl_module.bfloat16()

    with pytest.raises(ConfigurationError, match=r"adapter parameters are torch.bfloat16"):
        trainer(tmp_path, callback(), Casts()).fit(Plain(), train_loader())


def test_parameters_in_no_optimizer(tmp_path: Path) -> None:
    class HeadOnly(Plain):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.head.parameters())

    with pytest.raises(ConfigurationError, match=r"4 trained parameters are in no optimizer: body.0.adapters.all.A"):
        trainer(tmp_path, callback()).fit(HeadOnly(), train_loader())


class Skips(Plain):
    """One of its linears runs in training only, another never."""

    def __init__(self, never: bool = False) -> None:
        super().__init__()
        self.never, self.extra = never, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.extra(x) if self.training and not self.never else x)


@pytest.mark.parametrize(("never", "kind"), [(True, "evaluation"), (False, "evaluation")])
def test_layers_that_do_not_run(tmp_path: Path, never: bool, kind: str) -> None:
    with pytest.raises(UnusedLayerError, match=f"1 adapted layers did not run in the first {kind} batch.*: extra;"):
        trainer(tmp_path, callback(targets=[*TARGETS, "extra"])).fit(Skips(never), train_loader(), val_loader())


def test_layers_that_do_not_run_in_training(tmp_path: Path) -> None:
    with pytest.raises(UnusedLayerError, match="extra"):
        trainer(tmp_path, callback(targets=[*TARGETS, "extra"])).fit(Skips(True), train_loader())


def test_unused_layers_may_be_a_warning(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(targets=[*TARGETS, "extra"], on_unused="warn"))
    with pytest.warns(UserWarning, match="extra"):
        run.fit(Skips(True), train_loader(), val_loader())
    with pytest.raises(ConfigurationError, match="'raise' or 'warn'"):
        callback(on_unused="ignore")


def test_compiled_in_place(tmp_path: Path) -> None:
    class Compiled(Plain):
        def on_fit_start(self) -> None:
            self.body.compile(backend="aot_eager")

    model = Compiled()
    trainer(tmp_path, callback()).fit(model, train_loader(), val_loader())
    assert model.body[0].adapters["all"].B.abs().sum() > 0


def test_builds_in_configure_model(tmp_path: Path) -> None:
    options = {"targets": ["body.0"]}
    with pytest.raises(ConfigurationError, match=r"builds its network in configure_model.*adapter_injection = None"):
        trainer(tmp_path, callback(**options)).fit(BuildsLate(), train_loader())
    model = WithHook()
    run = trainer(tmp_path, callback(**options), ModelCheckpoint(tmp_path, filename="late"))
    run.fit(model, train_loader(), val_loader())
    assert isinstance(model.inner.body[0], AdaptedLinear)
    result = run.test(model, val_loader(), verbose=False)
    again = trainer(tmp_path, callback(**options))
    assert again.test(WithHook(), val_loader(), ckpt_path=str(tmp_path / "late.ckpt"), verbose=False) == result
    assert torch.equal(load_adapted(WithHook, tmp_path / "late.ckpt").inner.head.weight, model.inner.head.weight)


def test_a_hook_that_is_never_called(tmp_path: Path) -> None:
    class Forgets(BuildsLate):
        adapter_injection = None

    with pytest.raises(ConfigurationError, match="did not call it"):
        trainer(tmp_path, callback()).fit(Forgets(), train_loader())


def test_a_wrong_target_is_not_taken_for_a_late_build(tmp_path: Path) -> None:
    with pytest.raises(NoTargetMatched, match="'q_proj' matches none"):
        trainer(tmp_path, callback(targets=["q_proj"])).fit(Plain(), train_loader())


def test_an_injected_module_is_taken_as_it_is(tmp_path: Path) -> None:
    model = Plain()
    inject(model, LoRA(rank=2), TARGETS, HEAD)
    model.body[0].adapters["all"].A.data.fill_(0.5)
    run = trainer(tmp_path, callback(), limit_train_batches=1)
    run.validate(model, val_loader(), verbose=False)
    assert (model.body[0].adapters["all"].A == 0.5).all()


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


def test_the_fitted_module_can_be_copied(tmp_path: Path) -> None:
    model, _ = fitted(tmp_path)
    twin = copy.deepcopy(model)
    twin.body[0].adapters["all"].B.data.add_(1)
    assert not torch.equal(twin.body[0].adapters["all"].B, model.body[0].adapters["all"].B)
