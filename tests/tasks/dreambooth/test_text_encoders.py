"""Adapters in SDXL's text encoders: trained, used for images, never cached."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.dreambooth import encoders as dreambooth_encoders
from pera_lightning.tasks.dreambooth import module as dreambooth
from pera_lightning.tasks.dreambooth.generate import ImageGenerator
from tests.tasks.dreambooth.fits import (
    CLASS,
    TEXT,
    UNET,
    Seen,
    base_fixture,
    cache_fixture,
    data,
    fit,
    injected,
    module,
    photos_fixture,
    trained,
)

base = base_fixture()
photos = photos_fixture()
cache = cache_fixture()


def test_adapters_in_both_text_encoders_are_trained(base, photos, tmp_path):
    """With the callback's checks: every adapter gets a gradient, so none is in the block whose output is not used."""
    network, seen = module(base, adapt_text_encoders=True), Seen()
    rows = data(photos, validation_prompts=["a {}"], batch_size=2, resolution=64)
    fit(tmp_path, network, rows, callbacks=[seen], targets=[*UNET, *TEXT])
    names = set(trained(network))
    assert set(seen.gradients[0]) == names
    for name in names:
        assert seen.gradients[0][name].abs().max() > 0, name
    blocks = {(n.split(".")[1], n.split("layers.")[1].split(".")[0]) for n in names if "layers." in n}
    assert blocks == {*(("text_encoder", k) for k in "01"), *(("text_encoder_2", k) for k in "012")}


def test_images_and_losses_are_of_the_adapted_text_encoders(base, photos, monkeypatch):
    network = injected(base, targets=[*UNET, *TEXT], adapt_text_encoders=True)
    plain = network.encoders.prompts(["a dog"], "cpu")
    adapted = network.generator.embeddings(["a dog"])
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(plain, adapted, strict=True))
    with torch.no_grad():
        image = network.generator.generate(["a dog"], [0])[0]
        monkeypatch.setattr(ImageGenerator, "embeddings", lambda own, prompts: own.encoders.prompts(prompts, "cpu"))
        other = network.generator.generate(["a dog"], [0])[0]
    assert (np.asarray(image) != np.asarray(other)).any()


def test_nothing_is_embedded_beforehand_where_text_encoders_are_trained(base, photos, tmp_path, monkeypatch):
    """What they make of a prompt changes with every step; and frozen ones beside them would need memory."""
    monkeypatch.setattr(dreambooth_encoders, "load_text_encoders", lambda *_, **__: pytest.fail("frozen ones loaded"))
    network = module(base, adapt_text_encoders=True)
    rows = data(photos, validation_prompts=["a {}"])
    trainer = fit(tmp_path, network, rows, targets=[*UNET, *TEXT], max_steps=2, val_check_interval=1)
    assert network.encoders._prompts == {}
    assert trainer.global_step == 2
    assert len(list((tmp_path / "validation").iterdir())) == 2


@pytest.mark.parametrize("also", [{}, {"class_prompt": CLASS, "num_class_images": 2}])
def test_adapted_text_encoders_are_not_cached_which_is_said_before_anything_is_loaded(
    base, photos, cache, tmp_path, monkeypatch, also
):
    for name in ("load_unet", "load_text_encoders"):
        monkeypatch.setattr(dreambooth, name, lambda *_, name=name, **__: pytest.fail(f"{name} before the refusal"))
    rows = data(photos, cache, **({**also, "class_folder": str(tmp_path / "class")} if also else {}))
    with pytest.raises(ConfigurationError, match="text encoders with adapters change what a prompt becomes") as error:
        fit(tmp_path, module(base, adapt_text_encoders=True), rows, targets=[*UNET, *TEXT])
    assert "set cache=false" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "class").exists()


def test_text_encoders_learn_at_a_rate_of_their_own(base, photos, tmp_path):
    """The rate decides the step: AdamW's first one is of that size in every element with a gradient."""
    network, rates = module(base, adapt_text_encoders=True, text_encoder_lr=1e-5), {"unet": 1e-2, "text": 1e-5}
    start = {}

    class Before(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            start.update(trained(pl_module))

    fit(tmp_path, network, data(photos, resolution=64), callbacks=[Before()], targets=[*UNET, *TEXT], max_steps=1)
    for name, value in trained(network).items():
        part = "text" if "text_encoder" in name else "unet"
        moved = (value - start[name]).abs().max().item()
        assert moved == pytest.approx(rates[part], rel=0.02), name


def test_text_encoders_without_a_target_are_refused(base, photos, tmp_path):
    with pytest.raises(ConfigurationError, match="no target names a layer of text_encoder, text_encoder_2: ") as error:
        fit(tmp_path, module(base, adapt_text_encoders=True), data(photos))
    assert "\n" not in str(error.value)
    one = [*UNET, "text_encoder.**.q_proj"]
    with pytest.raises(ConfigurationError, match="no target names a layer of text_encoder_2: "):
        fit(tmp_path, module(base, adapt_text_encoders=True), data(photos), targets=one)
