"""Stages of DreamBooth after one another, and what is refused before it takes long or replaces anything."""

import sys
import warnings

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch.utils.data import DataLoader

from pera_lightning.adapters import PERA, AuroRA
from pera_lightning.errors import ConfigurationError, DataError, UnknownNameError
from pera_lightning.tasks.dreambooth import encoders as dreambooth_encoders
from pera_lightning.tasks.dreambooth.image_folder import read_images
from tests.tasks.dreambooth.fits import CLASS, TEXT, UNET, base_fixture, data, fit, make_trainer, module, photos_fixture
from tests.tasks.dreambooth.sdxl import SHALLOW, save_tiny

base = base_fixture(unet=SHALLOW)
photos = photos_fixture()


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_a_stage_that_fails_leaves_the_images_of_the_one_before(base, photos, tmp_path, monkeypatch, stage):
    getattr(make_trainer(tmp_path, AuroRA(rank=2)), stage)(module(base), datamodule=data(photos))
    before = files(tmp_path)
    again = getattr(make_trainer(tmp_path, AuroRA(rank=2)), stage)
    with pytest.raises(ConfigurationError, match="1001 sampling steps, and there are 1 to 1000"):
        again(module(base, sampling_steps=1001), datamodule=data(photos))
    assert files(tmp_path) == before

    def full(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(dreambooth_encoders.Encoders, "decode", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        again(module(base), datamodule=data(photos))
    assert files(tmp_path) == before


def test_a_test_of_another_method_leaves_nothing_of_the_one_before(base, photos, tmp_path):
    make_trainer(tmp_path, AuroRA(rank=2)).test(module(base), datamodule=data(photos), verbose=False)
    (tmp_path / "test_images" / "mine.png").write_bytes(b"")
    make_trainer(tmp_path, PERA(rank=2)).test(module(base), datamodule=data(photos, seeds=[1]), verbose=False)
    assert not list((tmp_path / "test_images_static").iterdir())
    made = {one.file for one in read_images(tmp_path / "test_images").images}
    assert {name.split("/")[1] for name in files(tmp_path) if "/" in name} == {
        *made,
        "grid.png",
        "images.json",
        "mine.png",
    }


def test_lightning_s_check_before_a_fit_leaves_the_images_of_a_validation(base, photos, tmp_path):
    rows, network = data(photos, validation_prompts=["a {}"]), module(base)
    trainer = make_trainer(tmp_path, num_sanity_val_steps=2)
    trainer.validate(network, datamodule=rows, verbose=False)
    before = files(tmp_path / "validation" / "step_000000")
    assert len(before) == 3
    trainer.fit(network, datamodule=rows)
    assert files(tmp_path / "validation" / "step_000000") == before
    assert len(files(tmp_path / "validation" / "step_000003")) == 3


def test_a_fit_is_refused_before_anything_is_computed(base, photos, tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="1001 sampling steps"):
        fit(tmp_path, module(base, sampling_steps=1001), data(photos, tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigurationError, match="needs bitsandbytes"):
        fit(tmp_path, module(base, optimizer="adamw8bit"), data(photos, tmp_path / "cache"))
    sampled = save_tiny(tmp_path / "base", unet=SHALLOW, scheduler={"prediction_type": "sample"})
    with pytest.raises(UnknownNameError, match="prediction_type='sample' does not exist; one of epsilon"):
        fit(tmp_path, module(sampled), data(photos, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_adapted_text_encoders_are_not_cached_after_a_validation_either(base, photos, tmp_path):
    rows = data(photos, tmp_path / "cache", validation_prompts=["a {}"])
    trainer = make_trainer(tmp_path, targets=[*UNET, *TEXT])
    network = module(base, adapt_text_encoders=True)
    trainer.validate(network, datamodule=rows, verbose=False)
    with pytest.raises(ConfigurationError, match="text encoders with adapters change what a prompt becomes"):
        trainer.fit(network, datamodule=rows)
    assert not (tmp_path / "cache").exists()


def test_steps_are_those_of_the_network_whatever_trainer_made_them(base, photos, tmp_path):
    network, rows = module(base), data(photos, validation_prompts=["a {}"])
    fit(tmp_path, network, rows)
    make_trainer(tmp_path).predict(network, datamodule=data(photos), return_predictions=False)
    assert read_images(tmp_path / "images").step == 3
    again = fit(tmp_path, network, rows, random=False)
    assert {path.name for path in (tmp_path / "validation").iterdir()} == {"step_000003", "step_000006"}
    again.save_checkpoint(tmp_path / "own.ckpt")
    resumed = module(base)
    fit(tmp_path, resumed, rows, ckpt=str(tmp_path / "own.ckpt"), max_epochs=2)
    assert resumed.trained_steps == 9


def test_a_trained_network_makes_no_class_images_and_leaves_no_mark(base, photos, tmp_path):
    network, classes = module(base), tmp_path / "class"
    fit(tmp_path, network, data(photos))
    rows = data(photos, class_folder=str(classes), class_prompt=CLASS, num_class_images=2)
    with pytest.raises(DataError, match=r"2 of 2 class images are missing .*, or give your own"):
        fit(tmp_path, network, rows)
    assert not classes.exists()


class Gallery(CSVLogger):
    """Takes images, as Lightning's WandbLogger does."""

    def __init__(self, folder):
        super().__init__(folder)
        self.taken = []

    def log_image(self, key, images, step=None):
        self.taken.append((key, step, [image.size for image in images]))


def test_a_logger_that_takes_images_has_the_grid(base, photos, tmp_path):
    logger = Gallery(tmp_path)
    fit(tmp_path, module(base), data(photos, validation_prompts=["a {}"]), logger=logger)
    with Image.open(next(tmp_path.rglob("step_000003/grid.png"))) as grid:
        assert logger.taken == [("val/images", 3, [grid.size])]


def test_what_stands_for_the_subject_is_said(base, photos, tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(tmp_path, module(base), data(photos, validation_prompts=["a {}"]))
    assert "In validation prompts {} is 'sks dog'" in caplog.messages


class Bare(LightningDataModule):
    def test_dataloader(self):
        return DataLoader([{"prompt": ["a dog"], "seed": torch.tensor([0]), "name": ["a"]}], batch_size=None)


def test_measures_without_photographs_are_refused_before_images_are_made(base, tmp_path):
    with pytest.raises(ConfigurationError, match="no reference_images to compare with: set dino, clip null"):
        make_trainer(tmp_path).test(module(base, clip="gone/model"), datamodule=Bare(), verbose=False)
    assert not files(tmp_path)


def test_what_left_memory_is_said_text_encoders_included(base, photos, tmp_path, capsys, caplog):
    network = module(base)
    network.encoders.latents(torch.zeros(1, 3, 32, 32), "cpu")
    network.encoders.prompts(["a"], "cpu")
    held = network.encoders.held()
    with caplog.at_level("INFO"):
        fit(tmp_path, network, data(photos, tmp_path / "cache", validation_prompts=["a {}"]))
    (line,) = [one for one in caplog.messages if "left memory" in one]
    assert line.endswith(f"{held / 1e6:.3g} MB")


def test_nothing_is_warned_of_where_no_images_are_asked_for(base, photos, tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(tmp_path, module(base), data(photos))
    assert not [one for one in seen if "Total length" in str(one.message)]


WRONG_VAE = {
    "a pipeline": (lambda base: base, r"^vae=\S* is a pipeline: give \S*/vae$"),
    "a file": (lambda base: f"{base}/model_index.json", r"^vae of \S*model_index.json: .* is a file, and a folder"),
    "no folder": (lambda base: "nowhere/x", r"^vae of nowhere/x: "),
    "another part": (lambda base: f"{base}/unet", r"^the VAE of \S*unet is a UNet2DConditionModel"),
}


@pytest.mark.parametrize("name", WRONG_VAE)
def test_a_vae_that_is_none_is_named(base, name):
    given, message = WRONG_VAE[name]
    with pytest.raises(ConfigurationError, match=message) as error:
        module(base, vae=given(base)).encoders.decode(torch.zeros(1, 4, 4, 4), "cpu")
    assert "\n" not in str(error.value)
