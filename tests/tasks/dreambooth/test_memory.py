"""What VAE and text encoders compute before the training, and what stays of them in memory."""

import pytest
import torch
from diffusers import AutoencoderKL
from lightning.pytorch.callbacks import Callback

from pera_lightning.errors import DataError
from pera_lightning.tasks.dreambooth import encoders as dreambooth_encoders
from pera_lightning.tasks.dreambooth.encoders import Encoders
from tests.tasks.dreambooth import fits as fits
from tests.tasks.dreambooth.data_helpers import attach
from tests.tasks.dreambooth.fits import (
    base_fixture,
    cache_fixture,
    data,
    fit,
    injected,
    make_trainer,
    module,
    photos_fixture,
    priors,
    seeded_loss,
)
from tests.tasks.dreambooth.sdxl import SHALLOW, save_tiny

base = base_fixture()
photos = photos_fixture()
cache = cache_fixture()


@pytest.fixture(scope="module")
def own_class(tmp_path_factory):
    return priors(tmp_path_factory.mktemp("class"))


def test_cached_batches_are_the_uncached_ones_computed_before(base, photos, cache, own_class):
    batches = []
    network = injected(base)
    for folder in (None, cache):
        rows = data(photos, folder, batch_size=3, **own_class)
        attach(rows, network.encoders).setup("fit")
        torch.manual_seed(0)
        batches.append(next(iter(rows.train_dataloader())))
    plain, kept = batches
    assert "pixel_values" in plain
    assert "latent_mean" in kept
    assert plain["ids"] == kept["ids"]
    assert torch.equal(plain["time_ids"], kept["time_ids"])
    assert plain["is_prior"].tolist() == kept["is_prior"].tolist() == [False] * 3 + [True] * 3
    mean, std = network.encoders.latents(plain["pixel_values"], "cpu")
    embeds, pooled = network.encoders.prompts(plain["prompts"], "cpu")
    for name, value in {"latent_mean": mean, "latent_std": std, "prompt_embeds": embeds}.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(kept["pooled_prompt_embeds"], pooled, rtol=1e-4, atol=1e-5)
    assert seeded_loss(network, kept).item() == pytest.approx(seeded_loss(network, plain).item(), rel=1e-4)


class Holds(Callback):
    """What the encoders hold before and after every batch of training: VAE, text encoders, bytes."""

    def __init__(self):
        self.held = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        own = pl_module.encoders
        self.held.append((own._vae is not None, own._text is not None, own.held()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.on_train_batch_start(trainer, pl_module, batch, batch_idx)


@pytest.mark.parametrize("epochs", [{"max_epochs": 1}, {"max_epochs": -1, "max_steps": 3}], ids=["epochs", "steps"])
@pytest.mark.parametrize("kept", [True, False], ids=["cached", "uncached"])
def test_with_a_cache_nothing_is_held_while_training_and_without_the_vae_alone(
    base, photos, cache, tmp_path, kept, epochs
):
    holds, folder = Holds(), cache if kept else None
    # A validation in between has the VAE loaded, and gives it back where it is not needed.
    rows = data(photos, folder, validation_prompts=["a {}"])
    fit(tmp_path, module(base), rows, callbacks=[holds], val_check_interval=1, random=False, **epochs)
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    size = sum(t.numel() * t.element_size() for t in (*vae.parameters(), *vae.buffers()))
    stays = (False, False, 0) if kept else (True, False, size)
    assert holds.held == [(False, False, 0), *[stays] * 5]  # three batches, the VAE loaded by the first


@pytest.fixture
def loads(monkeypatch):
    """Grows by one each time that the frozen text encoders are loaded."""
    found, original = [], dreambooth_encoders.load_text_encoders

    def load(name, **options):
        found.append(name)
        return original(name, **options)

    monkeypatch.setattr(dreambooth_encoders, "load_text_encoders", load)
    return found


class Given(Callback):
    """The embeddings that the network was given: of training by the prompts of the batch, and of images."""

    def __init__(self):
        self.trained, self.images = {}, []

    def on_fit_start(self, trainer, pl_module):
        pl_module.model.register_forward_pre_hook(lambda network, _, given: self.note(network, given), with_kwargs=True)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.prompts = batch["prompts"]

    def note(self, network, given):
        pairs = zip(given["prompt_embeds"].clone(), given["pooled_prompt_embeds"].clone(), strict=True)
        if network.training:
            self.trained |= dict(zip(self.prompts, pairs, strict=True))
        else:
            self.images.append(list(pairs)[-1])  # what guidance leads away from comes first


def assert_embedded(found, prompt, expected):
    """As the text encoders embed that prompt, and none of the others."""
    for other, wanted in expected.items():
        same = all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
        assert same is (other == prompt), (prompt, other)


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "the-empty-prompt"])
def test_prompts_are_embedded_before_an_uncached_fit_and_the_text_encoders_load_once(
    photos, own_class, tmp_path, loads, zeros
):
    """Captions, class prompt and prompts of images, and what guidance leads away from, whatever that is."""
    base = save_tiny(tmp_path / "base", unet=SHALLOW, index={"force_zeros_for_empty_prompt": zeros})
    network, given = module(base), Given()
    rows = data(photos, batch_size=3, validation_prompts=["a {}"], **own_class)
    fit(tmp_path, network, rows, callbacks=[given], val_check_interval=1, limit_train_batches=2)
    assert loads == [str(base)]
    captions, shown = {"a photo of sks dog", "sks dog, a photo", fits.CLASS}, "a sks dog"
    own = fits.encoders(base)
    expected = {one: [t[0] for t in own.prompts([one], "cpu")] for one in [*captions, shown]}
    assert set(given.trained) == captions
    for prompt, found in given.trained.items():
        assert_embedded(found, prompt, expected)
    assert len(given.images) == 2 * 2  # validations, and steps of sampling
    for found in given.images:
        assert_embedded(found, shown, expected)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_text_encoders_are_gone_when_images_are_made(base, photos, tmp_path, loads, stage):
    """They and a VAE at work would need memory at the same time."""
    network, found, original = module(base), [], Encoders.decode

    def decode(self, *given):
        found.append(self._text is not None)
        return original(self, *given)

    network.encoders.decode = decode.__get__(network.encoders)
    rows = data(photos, validation_prompts=["a photo of {}", "a dog"], validation_seeds=[0])
    getattr(make_trainer(tmp_path), stage)(network, datamodule=rows)
    assert found == [False] * (2 if stage == "validate" else 4)
    assert len(loads) == 1
    assert network.encoders.held() == 0


def test_a_prompt_that_was_not_known_loads_the_text_encoders_again(base, photos, tmp_path, loads):
    network = module(base)
    fit(tmp_path, network, data(photos), max_steps=1)
    assert network.encoders._text is None
    embedded = network.generator.embeddings(["a photo of sks dog", "another one"])
    assert len(loads) == 2
    expected = fits.encoders(base).prompts(["a photo of sks dog", "another one"], "cpu")
    assert all(torch.equal(one, other) for one, other in zip(embedded, expected, strict=True))


@pytest.mark.parametrize("kept", [True, False])
def test_latents_that_are_nan_stop_the_run_and_name_the_image(base, photos, tmp_path, monkeypatch, kept):
    network = module(base)
    original, broken = network.encoders.latents, fits.photograph_pixels(photos / "01.png")

    def latents(pixels, device):
        mean, std = original(pixels, device)
        for row, one in enumerate(pixels):
            if torch.equal(one, broken):
                mean[row, 0, 0, 0] = torch.nan
        return mean, std

    monkeypatch.setattr(network.encoders, "latents", latents)
    rows = data(photos, tmp_path / "cache" if kept else None, batch_size=3)
    with pytest.raises(DataError, match=r"01\.png") as error:
        fit(tmp_path, network, rows)
    assert "00.png" not in str(error.value)
    assert "02.png" not in str(error.value)
    assert "\n" not in str(error.value)
    assert "VAE" in str(error.value)
