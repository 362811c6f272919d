"""What all modules share, seen through the image module: building, groups, schedules, precision, the stop at NaN."""

import math
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback

import pera_lightning
from pera_lightning import AdapterInjection
from pera_lightning.adapters import PERA, FullFineTuning, LoRA
from pera_lightning.errors import CheckpointError, ConfigurationError, NonFiniteLossError
from pera_lightning.injection.inject import adapter_parameter_names
from tests.tasks.image_classification.vision_helpers import Rates, fit, loader, make_trainer, module


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr": 0.0}, "lr=0.0: a number above 0 is needed"),
        ({"lr": float("nan")}, "lr=nan: a number above 0 is needed"),
        ({"head_lr": -1.0}, "head_lr=-1.0: a number above 0 is needed"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: a number of at least 0 is needed"),
        ({"lr_schedule": "linea"}, "lr_schedule='linea' does not exist; one of linear, cosine, constant; closest: lin"),
        ({"warmup_steps": -1}, "warmup_steps=-1: an integer of at least 0 is needed"),
        ({"warmup_steps": 1.5}, "warmup_steps=1.5: an integer of at least 0 is needed"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio=1.0: a number in \[0, 1\) is needed"),
        ({"warmup_steps": 2, "warmup_ratio": 0.1}, "warmup_steps=2 and warmup_ratio=0.1: give one of them"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0: a number in \[0, 1\) is needed"),
        ({"base_dtype": "int8"}, "base_dtype='int8' does not exist; one of float32, bfloat16, float16"),
        ({"num_classes": 0}, "num_classes=0: a positive integer is needed"),
        ({"image_size": -8}, "image_size=-8: a positive integer is needed"),
    ],
)
def test_wrong_values_are_refused_at_once(options, expected):
    with pytest.raises(ValueError, match=expected):
        module("anything", **options)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("ImageClassificationModule", {}),
        ("SequenceClassificationModule", {}),
        ("CausalLMModule", {"lr": 1e-4, "base_dtype": "bfloat16"}),
        ("DreamBoothModule", {"lr": 1e-4, "lr_schedule": "constant", "base_dtype": "bfloat16"}),
    ],
)
def test_shared_options_of_every_module_on_the_command_line(name, own):
    """They are declared and described by the base alone; a module may have defaults of its own."""
    parser = ArgumentParser()
    parser.add_class_arguments(getattr(pera_lightning, name), "model")
    defaults = {"lr": 1e-3, "head_lr": None, "weight_decay": 0.0, "lr_schedule": "linear", "base_dtype": "float32"}
    defaults = {**defaults, "warmup_steps": 0, "warmup_ratio": 0.0, **own}
    found = parser.get_defaults()["model"]
    assert {key: found[key] for key in defaults} == defaults
    described = {action.dest.removeprefix("model."): action.help for action in parser._actions}
    assert described["lr"] == "learning rate of the adapters."
    assert all(described[key] for key in found.as_dict())


def test_built_once(vit):
    network = module(vit)
    assert network.model is None
    network.configure_model()
    built, metrics = network.model, network.metrics
    network.configure_model()
    assert network.model is built
    assert network.metrics is metrics


def test_the_hook_injects_after_building(vit):
    network = module(vit)
    network.adapter_injection = AdapterInjection(PERA(rank=2), ["attn.qkv[q]"], ["head"]).injector()
    network.configure_model()
    assert "model.blocks.1.attn.qkv.adapters.q.h" in adapter_parameter_names(network)
    assert not network.model.blocks[0].attn.qkv.weight.requires_grad


def test_dry_run_needs_no_memory(vit):
    network = module(vit)
    report = network.dry_run(AdapterInjection(PERA(rank=2), ["attn.qkv[q]"], ["head"]).injector())
    assert report.adapter_parameters == 2 * (2 * 32 + 3)
    assert all(parameter.is_meta for parameter in network.parameters())


# ---- the optimizer in a real fit ------------------------------------------------------------------------------------


def rates_of(folder, vit, **options):
    trainer_options = options.pop("trainer", {})
    rates = Rates()
    trainer = fit(folder, module(vit, **options), callbacks=[rates], method=PERA(rank=2), **trainer_options)
    return rates.seen, trainer


def test_rates_and_decay_of_the_groups(vit, tmp_path):
    options = {"lr": 0.3, "head_lr": 0.1, "weight_decay": 0.2, "lr_schedule": "constant"}
    seen, trainer = rates_of(tmp_path, vit, **options)
    assert seen == [{"adapter": 0.3, "adapter_no_decay": 0.3, "head": 0.1, "head_no_decay": 0.1}] * 3
    decay = {g["name"]: g["weight_decay"] for g in trainer.optimizers[0].param_groups}
    assert decay == {"adapter": 0.2, "adapter_no_decay": 0.0, "head": 0.2, "head_no_decay": 0.0}


def test_the_head_s_rate_is_the_adapters_where_not_given(vit, tmp_path):
    seen, _ = rates_of(tmp_path, vit, lr=0.3, lr_schedule="constant")
    assert set(seen[0].values()) == {0.3}


def test_a_rate_moves_its_own_group_only(vit, tmp_path):
    """With a tiny rate for the adapters and none to speak of for the head, each stays where it was."""

    def moved(**options):
        network = module(vit, lr_schedule="constant", **options)
        network.adapter_injection = None
        before = {}

        class Start(Callback):
            def on_train_start(self, trainer, pl_module):
                before.update({n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad})

        fit(tmp_path, network, callbacks=[Start()])
        after = dict(network.named_parameters())
        by = {"adapter": 0.0, "head": 0.0}
        for name, value in before.items():
            kind = "adapter" if ".adapters." in name else "head"
            by[kind] = max(by[kind], (after[name] - value).abs().max().item())
        return by

    slow_adapter, slow_head = moved(lr=1e-9, head_lr=0.01), moved(lr=0.01, head_lr=1e-9)
    assert slow_adapter["adapter"] < 1e-7 < 1e-3 < slow_adapter["head"]
    assert slow_head["head"] < 1e-7 < 1e-3 < slow_head["adapter"]


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"lr_schedule": "linear"}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"lr_schedule": "constant"}, [1] * 6),
        ({"lr_schedule": "cosine"}, [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
        ({"lr_schedule": "linear", "warmup_steps": 2}, [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ({"lr_schedule": "linear", "warmup_ratio": 0.3}, [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ({"lr_schedule": "constant", "warmup_steps": 3}, [0, 1 / 3, 2 / 3, 1, 1, 1]),
    ],
)
def test_the_schedule_in_a_fit(vit, tmp_path, options, factors):
    seen, _ = rates_of(tmp_path, vit, lr=0.01, head_lr=0.02, trainer={"max_epochs": 2}, **options)
    assert [rates["adapter"] for rates in seen] == pytest.approx([0.01 * f for f in factors], rel=1e-6)
    assert [rates["head_no_decay"] for rates in seen] == pytest.approx([0.02 * f for f in factors], rel=1e-6)


def test_the_schedule_counts_optimizer_steps(vit, tmp_path):
    """Four epochs of three batches, accumulated by three, are four steps."""
    trainer_options = {"max_epochs": 4, "accumulate_grad_batches": 3}
    seen, trainer = rates_of(tmp_path, vit, lr=0.01, trainer=trainer_options)
    assert trainer.global_step == 4
    assert [rates["adapter"] for rates in seen] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_a_warm_up_longer_than_the_run(vit, tmp_path):
    with pytest.warns(UserWarning, match="the warm-up takes 7 optimizer steps and the run has 6"):
        rates_of(tmp_path, vit, lr=0.01, warmup_steps=7, trainer={"max_epochs": 2})


@pytest.mark.parametrize(("schedule", "known"), [("linear", False), ("constant", True)])
def test_a_schedule_of_a_run_without_an_end(vit, schedule, known):
    network = module(vit, lr=0.01, lr_schedule=schedule)
    network.configure_model()
    network._trainer = SimpleNamespace(estimated_stepping_batches=math.inf)
    if known:
        network.configure_optimizers()
    else:
        with pytest.raises(ConfigurationError, match="lr_schedule=linear needs the number of optimizer steps, which"):
            network.configure_optimizers()


def test_nothing_to_train_is_refused(vit, tmp_path):
    from lightning.pytorch import Trainer

    class Frozen(type(module(vit))):
        def build_network(self, weights=True):
            return super().build_network(weights).requires_grad_(False)

    network = Frozen(model_name=str(vit), num_classes=3)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ConfigurationError, match="nothing is trained: give AdapterInjection a method"):
        trainer.fit(network, loader())


# ---- training mode, precision, NaN ----------------------------------------------------------------------------------


class Modes(Callback):
    def __init__(self):
        self.training, self.evaluation = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.training.append({m.training for m in pl_module.model.modules()})

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.evaluation.append({m.training for m in pl_module.model.modules()})


def test_in_training_mode_even_if_built_in_eval(vit, tmp_path):
    class Resting(type(module(vit))):
        def build_network(self, weights=True):
            return super().build_network(weights).eval()

    modes = Modes()
    network = Resting(model_name=str(vit), num_classes=3)
    fit(tmp_path, network, val=loader(), callbacks=[modes], max_epochs=2)
    assert modes.training == [{True}] * 6
    assert modes.evaluation == [{False}] * 6


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_in_low_precision_under_float32_adapters(vit, tmp_path, dtype, precision):
    network = module(vit, base_dtype=dtype)
    fit(tmp_path, network, method=PERA(rank=2), precision=precision, val=loader(), max_epochs=2)
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    frozen = {p.dtype for p in network.parameters() if not p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert frozen == {getattr(torch, dtype)}
    assert network.model.blocks[0].attn.qkv.adapters.q.B.abs().max() > 1e-3
    assert network(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_a_float16_base_is_cast(vit):
    network = module(vit, base_dtype="float16")
    network.configure_model()
    assert {p.dtype for p in network.model.parameters()} == {torch.float16}


def test_a_base_that_is_trained_must_be_float32(vit, tmp_path):
    with pytest.raises(ConfigurationError, match="trained parameters are in low precision"):
        fit(tmp_path, module(vit, base_dtype="bfloat16"), method=FullFineTuning())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(vit, tmp_path, value):
    data = loader(12, batch_size=2)
    data.dataset.x[9] = value  # epoch 1, batch 4 of 6
    with pytest.raises(
        NonFiniteLossError, match=r"training loss is nan at optimizer step 2, epoch 0, batch 4: lower the learning rate"
    ):
        fit(tmp_path, module(vit), data, method=LoRA(rank=2), accumulate_grad_batches=2)


def test_an_infinite_loss_is_one_too(vit):
    with pytest.raises(NonFiniteLossError, match="training loss is inf at optimizer step 0, epoch 0, batch 3"):
        module(vit).check_loss(torch.tensor(float("inf")), 3)


def test_every_way_in_shares_one_network(vit, tmp_path):
    """fit, then validate with the same trainer: setup runs again, the network stays."""
    network = module(vit)
    trainer = make_trainer(tmp_path)
    trainer.fit(network, loader())
    built = network.model
    trainer.validate(network, loader(), verbose=False)
    assert network.model is built


class Evil:
    """A pickle that prints when it is read."""

    def __reduce__(self):
        return print, ("code ran",)


def test_load_from_checkpoint_takes_tensors_only(vit, tmp_path, capsys):
    """Whatever it is given: a file, an open one, a checkpoint with a flipped bit or one that runs code."""
    model = module(vit)
    trainer = fit(tmp_path, model, max_steps=1)
    file = tmp_path / "x.ckpt"
    trainer.save_checkpoint(file)
    value = model.model.head.weight.detach()
    assert torch.equal(type(model).load_from_checkpoint(file).model.head.weight, value)
    with file.open("rb") as opened:
        assert torch.equal(type(model).load_from_checkpoint(opened).model.head.weight, value)
    whole, place = file.read_bytes(), file.read_bytes().find(value.numpy().tobytes())
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(CheckpointError, match=r"x.ckpt .*Bad CRC-32"):
        type(model).load_from_checkpoint(file)
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        model.load_from_checkpoint(file)
    file.write_bytes(whole)
    torch.save({**torch.load(file, weights_only=True), "more": Evil()}, file)
    capsys.readouterr()
    with (
        file.open("rb") as opened,
        pytest.raises(CheckpointError, match=r"UnpicklingError: only tensors .*, and it asks for \S+\)"),
    ):
        type(model).load_from_checkpoint(opened)
    assert "code ran" not in capsys.readouterr().out
