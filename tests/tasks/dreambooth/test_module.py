"""DreamBooth on SDXL: the loss, what is trained, values, and a checkpoint."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from pera_lightning.adapters import PERA
from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.errors import PeraError
from pera_lightning.tasks.dreambooth.module import DreamBoothModule
from tests.tasks.dreambooth.fits import (
    assert_same,
    base_fixture,
    cache_fixture,
    cached_batch,
    data,
    fit,
    gradients,
    injected,
    module,
    photos_fixture,
    seeded_loss,
    trained,
)
from tests.tasks.dreambooth.sdxl import SHALLOW, save_tiny

base = base_fixture()
photos = photos_fixture()
cache = cache_fixture()


# --- the loss ---


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("prior", [0, 2])
def test_the_loss_is_the_plain_loop(base, kind, prior):
    """All after the UNet, in float64 and row by row, from the noise and timesteps that the same seed gives."""
    gamma, offset, weight = 0.8, 0.3, 0.7
    options = {"snr_gamma": gamma, "noise_offset": offset, "prior_weight": weight, "prediction_type": kind}
    network, batch, calls = injected(base, **options), cached_batch(prior=prior), []
    network.model.unet.register_forward_hook(lambda _, given, out: calls.append((given, out[0])))
    loss = seeded_loss(network, batch)
    (given, predicted), shape = calls[0], batch["latent_mean"].shape

    torch.manual_seed(5)
    latents = batch["latent_mean"] + batch["latent_std"] * torch.randn(shape)
    noise = torch.randn(shape) + offset * torch.randn(*shape[:2], 1, 1)
    steps = torch.randint(1000, (4,))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    losses = []
    for row, t in enumerate(steps.tolist()):
        x, e = latents[row].double().numpy(), noise[row].double().numpy()
        signal, rest = math.sqrt(kept[t]), math.sqrt(1 - kept[t])
        np.testing.assert_allclose(given[0][row], signal * x + rest * e, rtol=1e-4, atol=1e-5)
        wanted = e if kind == "epsilon" else signal * e - rest * x
        ratio = kept[t] / (1 - kept[t])
        scale = min(ratio, gamma) / (ratio if kind == "epsilon" else ratio + 1)
        losses.append(scale * np.mean((predicted[row].detach().double().numpy() - wanted) ** 2))
    assert given[1].tolist() == steps.tolist()
    expected = np.mean(losses[: 4 - prior]) + (weight * np.mean(losses[4 - prior :]) if prior else 0)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_each_setting_of_the_loss_acts(base):
    plain = seeded_loss(injected(base), cached_batch()).item()
    for option in ({"snr_gamma": 0.5}, {"noise_offset": 0.5}, {"prior_weight": 0.0}, {"prediction_type": "epsilon"}):
        other = seeded_loss(injected(base, **option), cached_batch()).item()
        assert (other == plain) is ("prediction_type" in option), option


def test_the_repository_says_what_is_predicted(tmp_path, base):
    velocity = save_tiny(tmp_path / "v", scheduler={"prediction_type": "v_prediction"})
    assert injected(velocity).schedule[1] == "v_prediction"
    assert injected(velocity, prediction_type="epsilon").schedule[1] == injected(base).schedule[1] == "epsilon"


def test_it_learns_a_batch_by_heart(tmp_path):
    """With attention at the size of the latents; the other tests' pipeline has it at a half and a quarter only."""
    sizes = {"block_out_channels": (32, 64), "norm_num_groups": 8, "attention_head_dim": (2, 4)}
    blocks = {f"{way}_block_types": (f"CrossAttn{way.title()}Block2D",) * 2 for way in ("down", "up")}
    base = save_tiny(tmp_path, unet={**sizes, **blocks, "transformer_layers_per_block": (1, 1)})
    network, batch = injected(base, PERA(rank=16), std=0), cached_batch(rows=1, prior=0)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    start = seeded_loss(network, batch).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss = seeded_loss(network, batch)
        if loss.item() < start / 2:
            return
        loss.backward()
        optimizer.step()
    raise AssertionError(f"{start} -> {loss.item()}")


# --- what is trained ---


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_only_adapters_move_and_stay_in_float32_over_a_low_base(base, photos, cache, tmp_path, precision):
    network, before = module(base, base_dtype="bfloat16"), {}

    class Before(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before.setdefault("all", {n: p.detach().clone() for n, p in pl_module.named_parameters()})

    rows = data(photos, cache, resolution=64)  # at 32 pixels a layer sees a single place, and attends to that
    fit(tmp_path, network, rows, callbacks=[Before()], precision=precision)
    adapters = trained(network)
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    layers = [layer for layer in network.modules() if isinstance(layer, AdaptedLayer)]
    assert len(layers) == 11 * 8  # transformer blocks, of two attentions each
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before["all"][name]) is (name not in adapters), name
        assert parameter.dtype == (torch.float32 if name in adapters else torch.bfloat16), name


def test_activations_that_are_computed_again_change_nothing(base):
    plain, again = injected(base), injected(base, activation_checkpointing=True)
    runs = []
    block = again.model.unet.mid_block.attentions[0].transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    for network in (plain, again):
        seeded_loss(network, cached_batch()).backward()
    assert len(runs) == 2  # once more in the backward
    for name, value in gradients(plain).items():
        torch.testing.assert_close(gradients(again)[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compiled_it_computes_the_same(tmp_path, monkeypatch):
    base = str(save_tiny(tmp_path, unet=SHALLOW))
    original, compiled = torch.nn.Module.compile, []

    def quick(self, *args, **options):
        compiled.append(type(self).__name__)
        original(self, *args, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    found = seeded_loss(injected(base, compile=True), cached_batch())
    assert compiled == ["UNet2DConditionModel"]
    assert found.item() == pytest.approx(seeded_loss(injected(base), cached_batch()).item(), rel=1e-5)


# --- values ---


WRONG = {
    "snr_gamma": (0, "snr_gamma=0"),
    "noise_offset": (-0.1, "noise_offset=-0.1"),
    "prior_weight": (-1.0, "prior_weight=-1.0"),
    "prediction_type": ("sample", "prediction_type"),
    "optimizer": ("adam8bit", "optimizer"),
    "sampling_steps": (0, "sampling_steps=0"),
    "guidance_scale": (-1.0, "guidance_scale=-1.0"),
    "lr": (0.0, "lr=0.0"),
    "base_dtype": ("fp16", "base_dtype"),
}


@pytest.mark.parametrize("name", WRONG)
def test_values_that_are_not_allowed(base, name):
    value, words = WRONG[name]
    with pytest.raises(PeraError, match=words) as error:
        module(base, **{name: value})
    assert "\n" not in str(error.value)


def test_a_checkpoint_rebuilds_the_module(base, photos, cache, tmp_path):
    network = module(base)
    trainer = fit(tmp_path, network, data(photos, cache))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    again = DreamBoothModule.load_from_checkpoint(tmp_path / "own.ckpt")
    assert again.trained_steps == 3
    assert again.trained_with["identifier"] == "sks"
    assert_same(trained(again), trained(network))
    batch = cached_batch()
    assert torch.equal(seeded_loss(again, batch), seeded_loss(network.eval(), batch))
    assert not any(Path(key).name.startswith("encoders") for key in torch.load(tmp_path / "own.ckpt")["state_dict"])
