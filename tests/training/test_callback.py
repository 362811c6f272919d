"""The callback in real fits, with probes that look in the middle."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from pera_lightning import inject, load_adapted
from pera_lightning.adapters import PERA, AdaptedLinear, HiRA, LoRA
from pera_lightning.errors import ConfigurationError, DataError, NoTargetMatched, UnknownNameError, UnusedLayerError
from tests.training.foreign import BuildsLate, Noisy, Plain, WithHook, train_loader, val_loader
from tests.training.short_fits import HEAD, TARGETS, callback, fitted, trainer


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
    with pytest.raises(UnknownNameError, match="on_unused='ignore' does not exist; one of raise, warn"):
        callback(on_unused="ignore")


class SkipsABatch(Skips):
    """Answers nothing of the first validation batch."""

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        if batch_idx:
            super().validation_step(batch, batch_idx)


def test_a_batch_in_which_nothing_runs_is_not_the_first(tmp_path: Path) -> None:
    """The next one tells which layers run; if none does, no hook is left behind."""
    run = trainer(tmp_path, callback(targets=[*TARGETS, "extra"]))
    with pytest.raises(UnusedLayerError, match="1 adapted layers did not run in the first evaluation batch"):
        run.validate(SkipsABatch(), val_loader())
    model = SkipsABatch()
    trainer(tmp_path, callback(targets=[*TARGETS, "extra"]), limit_val_batches=1).validate(model, val_loader())
    assert not any(module._forward_hooks for module in model.modules())
    assert not torch.nn.modules.module._global_forward_pre_hooks


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


def test_the_fitted_module_can_be_copied(tmp_path: Path) -> None:
    model, _ = fitted(tmp_path)
    twin = copy.deepcopy(model)
    twin.body[0].adapters["all"].B.data.add_(1)
    assert not torch.equal(twin.body[0].adapters["all"].B, model.body[0].adapters["all"].B)


def test_base_parameters_that_are_not_frozen_are_named(tmp_path: Path) -> None:
    class Warm(Plain):
        def setup(self, stage: str) -> None:
            self.norm.weight.requires_grad_(True)

    with pytest.warns(UserWarning, match=r"1 base parameters are trained besides adapters and heads.*norm\.weight"):
        trainer(tmp_path, callback()).fit(Warm(), train_loader(), val_loader())


@pytest.mark.parametrize(
    "finder", [LearningRateFinder(num_training_steps=4), BatchSizeFinder(max_trials=1)], ids=["lr", "batch"]
)
def test_lightnings_finders(tmp_path: Path, finder: Callback) -> None:
    class Tunable(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.lr, self.batch_size = 0.01, 2

        def train_dataloader(self) -> DataLoader:
            return DataLoader(Noisy(), batch_size=self.batch_size)

        def val_dataloader(self) -> DataLoader:
            return val_loader()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    model = Tunable()
    trainer(tmp_path, callback(), finder, enable_checkpointing=True).fit(model)
    assert model.body[0].adapters["all"].B.abs().sum() > 0


def test_two_optimizers_that_step_by_themselves(tmp_path: Path) -> None:
    class Two(Plain):
        automatic_optimization = False

        def training_step(self, batch: list, batch_idx: int) -> None:
            one, two = self.optimizers()
            for optimizer, part in ((one, self.body[0](batch[0])), (two, self.body[3](torch.ones(4, 16)))):
                optimizer.zero_grad()
                self.manual_backward(part.square().mean())
                optimizer.step()
            self(batch[0])

        def configure_optimizers(self) -> list:
            groups = [
                [p for p in m.parameters() if p.requires_grad]
                for m in (self.body[0], nn.ModuleList([self.body[3], self.head]))
            ]
            return [torch.optim.SGD(g, lr=0.1) for g in groups]

    trainer(tmp_path, callback()).fit(Two(), train_loader(), val_loader())


def test_a_compiled_module_is_fitted_again(tmp_path: Path) -> None:
    model = Plain()
    model.body.compile(backend="aot_eager")
    for _ in range(2):
        trainer(tmp_path, callback()).fit(model, train_loader(), val_loader())


# --- what is done to an adapted module between its injection and its end ---


class Meddles(Callback):
    """Does something to the module in one hook."""

    def __init__(self, hook: str, change) -> None:
        setattr(self, hook, lambda trainer, module, *_, **__: change(module))


def replace_layer(module: Plain) -> None:
    module.body[0] = nn.Linear(8, 16).requires_grad_(False)


def swap_adapter(module: Plain) -> None:
    module.body[3].adapters["all"] = copy.deepcopy(module.body[3].adapters["all"])


def halve(module: Plain) -> None:
    module.body[3].adapters.half()


def other_base(module: Plain) -> None:
    module.body[0].weight.data.mul_(2)


REPLACED = "1 adapted layers, or their adapters, were replaced after the injection: body"


@pytest.mark.parametrize(
    ("hook", "change", "said"),
    [
        ("setup", replace_layer, f"{REPLACED}.0"),
        ("on_train_start", swap_adapter, "2 trained parameters are in no optimizer: body.3"),
        ("on_train_epoch_end", replace_layer, f"{REPLACED}.0"),  # seen where it would be saved
        ("setup", other_base, "the weights of 1 adapted layers changed after the injection: body.0"),
        ("on_train_epoch_end", halve, "2 adapter parameters are torch.float16"),
    ],
)
def test_adapted_layers_that_others_change(tmp_path: Path, hook: str, change, said: str) -> None:
    run = trainer(tmp_path, callback(), Meddles(hook, change), ModelCheckpoint(tmp_path, save_on_train_epoch_end=True))
    with pytest.raises(ConfigurationError, match=said):
        run.fit(Plain(), train_loader())
    assert not list(tmp_path.glob("*.ckpt"))


def test_adapters_frozen_in_configure_optimizers(tmp_path: Path) -> None:
    class Probes(Plain):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.body.requires_grad_(False)
            return super().configure_optimizers()

    with pytest.raises(ConfigurationError, match=r"4 parameters of adapters and heads were frozen after.*body\.0"):
        trainer(tmp_path, callback()).fit(Probes(), train_loader())


class Thaws(BaseFinetuning):
    def freeze_before_training(self, pl_module: Plain) -> None:
        self.freeze([pl_module.body[0].adapters, pl_module.body[3].adapters])

    def finetune_function(self, pl_module: Plain, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        self.unfreeze_and_add_param_group([pl_module.body[0].adapters, pl_module.body[3].adapters], optimizer)


def test_adapters_that_a_callback_thaws_later(tmp_path: Path) -> None:
    model = Plain()
    with pytest.warns(UserWarning, match="4 parameters of adapters and heads were frozen.*once a callback unfreezes"):
        trainer(tmp_path, callback(), Thaws()).fit(model, train_loader())
    assert model.body[0].adapters["all"].B.abs().sum() > 0


def test_a_second_fit_without_the_callback(tmp_path: Path) -> None:
    model = Plain()
    trainer(tmp_path / "a", callback()).fit(model, train_loader())
    with pytest.warns(UserWarning, match="no AdapterInjection: its checkpoints hold all of the base"):
        trainer(tmp_path / "b", ModelCheckpoint(tmp_path / "b")).fit(model, train_loader())


# --- fits that train nothing ---


def test_an_empty_train_loader(tmp_path: Path) -> None:
    empty = DataLoader(Noisy(3), batch_size=4, drop_last=True)
    with pytest.raises(DataError, match="nothing was trained: the train loader has no batch"):
        trainer(tmp_path, callback(), limit_train_batches=1.0).fit(Plain(), empty)


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


def test_an_iterable_that_gives_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gave no batch in this epoch"):
        trainer(tmp_path, callback(), max_epochs=-1).fit(Plain(), DataLoader(Nothing(), batch_size=4))


def test_an_optimizer_that_never_steps(tmp_path: Path) -> None:
    class Forgets(Plain):
        automatic_optimization = False

        def training_step(self, batch: list, batch_idx: int) -> None:
            self.manual_backward(self(batch[0]).mean())

    with pytest.warns(UserWarning, match="no optimizer step in the first 3 batches"):
        trainer(tmp_path, callback()).fit(Forgets(), train_loader())
