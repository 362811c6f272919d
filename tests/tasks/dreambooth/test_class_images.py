"""Class images that a DreamBooth fit makes at its start."""

import contextlib
import io
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from pera_lightning.errors import DataError
from pera_lightning.tasks.dreambooth.networks import load_unet
from pera_lightning.tasks.dreambooth.sampling import sample
from tests.tasks.dreambooth import fits as fits
from tests.tasks.dreambooth.fits import assert_same, base_fixture, data, fit, module, photos_fixture, trained
from tests.tasks.dreambooth.sdxl import SHALLOW

base = base_fixture(unet=SHALLOW)
photos = photos_fixture()


class Kills(RuntimeError):
    pass


def run(base, photos, folder, classes, *, dies_at=None, ckpt=None, **options):
    """A fit with three class images; gives the numbers of those it made, and what it trained."""
    given = {"class_folder": str(classes), "class_prompt": fits.CLASS, "num_class_images": 3}
    network, made = module(base, **options), []
    rows = data(photos, classes.parent / "cache", **given)
    add = rows.add_class_image

    def added(number, image):
        if number == dies_at:
            raise Kills
        assert network.encoders._text is None  # UNet and VAE need the room
        made.append(number)
        add(number, image)

    rows.add_class_image = added
    keeps = ModelCheckpoint(folder, save_last=True)
    fit(folder, network, rows, ckpt=ckpt, callbacks=[keeps], enable_checkpointing=True, max_epochs=2 if ckpt else 1)
    return made, trained(network)


@pytest.fixture
def classes(made, tmp_path):
    """A copy of the three class images, and what is cached of them."""
    shutil.copytree(made.classes.parent, tmp_path / "kept")
    return tmp_path / "kept" / "class"


@pytest.fixture(scope="module")
def made(base, photos, tmp_path_factory):
    """Class images of a run that was killed at the second, and of the next one."""
    folder = tmp_path_factory.mktemp("made")
    classes = folder / "kept" / "class"
    with pytest.raises(Kills):
        run(base, photos, folder / "killed", classes, dies_at=1)
    left = {path.name: path.read_bytes() for path in classes.glob("*.png")}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        numbers, adapters = run(base, photos, folder / "run", classes)
    last = str(folder / "run" / "last.ckpt")
    return SimpleNamespace(
        classes=classes, left=left, numbers=numbers, adapters=adapters, out=out.getvalue(), last=last
    )


def test_a_run_goes_on_with_what_a_killed_one_left(made):
    assert list(made.left) == ["00000.png"]
    assert made.numbers == [1, 2]
    assert "Class images: 2 of 3 are made, by the base" in made.out
    assert (made.classes / "00000.png").read_bytes() == made.left["00000.png"]


def test_they_are_made_once_and_making_them_leaves_the_training_as_it_is(base, photos, tmp_path, made, classes):
    numbers, adapters = run(base, photos, tmp_path, classes)
    assert numbers == []
    assert_same(adapters, made.adapters)


def test_image_n_is_the_base_s_with_seed_n(base, made):
    unet = load_unet(base, dtype=torch.float32)
    how = {"height": fits.SIDE, "width": fits.SIDE, "steps": 2, "guidance_scale": 2.0, "device": "cpu"}
    for number in range(3):
        image = sample(unet, module(base).encoders, prompts=[fits.CLASS], seeds=[number], **how)[0]
        pixels = np.asarray(Image.open(made.classes / f"{number:05d}.png"))
        np.testing.assert_allclose(pixels, image.mul(255).permute(1, 2, 0).numpy(), atol=1.01)


def test_a_network_that_is_trained_already_makes_none(base, photos, tmp_path, made, classes):
    run(base, photos, tmp_path / "whole", classes, ckpt=made.last)  # all are there
    (classes / "00002.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 class images are missing in .* without --ckpt_path") as error:
        run(base, photos, tmp_path / "lacks", classes, ckpt=made.last)
    assert "\n" not in str(error.value)
    assert not (classes / "00002.png").exists()


OTHERWISE = {
    "base_dtype": ({"base_dtype": "bfloat16"}, "base_dtype 'float32', not 'bfloat16'"),
    "sampling_steps": ({"sampling_steps": 1}, "steps 2, not 1"),
    "guidance_scale": ({"guidance_scale": 3.0}, "guidance_scale 2.0, not 3.0"),
    "prediction_type": ({"prediction_type": "v_prediction"}, "prediction_type 'epsilon', not 'v_prediction'"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_missing_images_are_not_made_otherwise_than_those_there(base, photos, tmp_path, classes, name):
    options, words = OTHERWISE[name]
    (classes / "00001.png").unlink()
    with pytest.raises(DataError, match=f"holds images made with {words}; give another class_folder") as error:
        run(base, photos, tmp_path, classes, **options)
    assert "\n" not in str(error.value)
    assert not (classes / "00001.png").exists()


def test_images_of_another_model_are_refused_also_where_none_is_missing(base, photos, tmp_path, classes):
    shutil.copytree(base, tmp_path / "copy")
    with pytest.raises(DataError, match=r"holds images made with model_name '.*', not '.*copy'; give another") as error:
        run(str(tmp_path / "copy"), photos, tmp_path, classes)
    assert "\n" not in str(error.value)
