"""Named transforms: what each does to a photograph, and where its values come from."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1

from pera_lightning.errors import ConfigurationError, UnknownNameError
from pera_lightning.tasks.image_classification import transforms

MODEL = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
    "crop_pct": 0.8,
}
NOTHING = {"image_size": None, "mean": None, "std": None, "interpolation": None, "crop_pct": None}


@pytest.fixture
def photograph():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _made(name, training, **given):
    checked = transforms.check_given(name, **{**NOTHING, **given})
    return transforms.build(name, transforms.resolve(name, checked, MODEL), training=training)


def test_fourierft_evaluation_is_resize_and_centre_crop(photograph):
    by_hand = v1.Compose([v1.Resize(32), v1.CenterCrop(32), v1.ToTensor(), v1.Normalize(MODEL["mean"], MODEL["std"])])
    torch.testing.assert_close(_made("fourierft", False)(photograph), by_hand(photograph))


def test_fourierft_training_is_random_crop_and_flip(photograph):
    by_hand = v1.Compose(
        [v1.RandomResizedCrop(32), v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(MODEL["mean"], MODEL["std"])]
    )
    ours = _made("fourierft", True)
    for seed in range(4):
        torch.manual_seed(seed)
        given = ours(photograph)
        torch.manual_seed(seed)
        torch.testing.assert_close(given, by_hand(photograph))


@pytest.mark.parametrize("name", transforms.TRANSFORMS)
def test_every_protocol_gives_floats_of_the_size_and_pickles(name, photograph):
    for training in (True, False):
        made = pickle.loads(pickle.dumps(_made(name, training)))
        image = made(photograph)
        assert type(image) is torch.Tensor
        assert image.dtype == torch.float32
        assert image.shape == (3, 32, 32)
    assert torch.equal(made(photograph), made(photograph))


@pytest.mark.parametrize("name", ["center", "none"])
def test_without_augmentation_training_sees_what_evaluation_sees(name, photograph):
    assert torch.equal(_made(name, True)(photograph), _made(name, False)(photograph))


def test_center_follows_the_models_crop(photograph):
    by_hand = v1.Compose(
        [
            v1.Resize(40, interpolation=v1.InterpolationMode.BICUBIC),
            v1.CenterCrop(32),
            v1.ToTensor(),
            v1.Normalize(MODEL["mean"], MODEL["std"]),
        ]
    )
    torch.testing.assert_close(_made("center", False)(photograph), by_hand(photograph))


def test_none_keeps_the_whole_photograph():
    photograph = Image.new("RGB", (60, 40))
    photograph.putpixel((0, 0), (255, 255, 255))
    exact = _made("none", False, image_size=40, interpolation="nearest", mean=[0, 0, 0], std=[1, 1, 1])(photograph)
    assert exact.shape == (3, 40, 40)
    assert exact.max() == 1
    assert exact[:, 0, 0].min() == 1


def test_timm_is_timms(photograph):
    from timm.data import create_transform

    values = dict(MODEL.items())
    for training in (True, False):
        theirs = create_transform(**values, is_training=training)
        ours = _made("timm", training)
        assert str(ours) == str(theirs)


@pytest.mark.parametrize(
    "given",
    [
        {"image_size": 24},
        {"mean": [0.1, 0.1, 0.1]},
        {"std": [0.9, 0.9, 0.9]},
        {"interpolation": "nearest"},
        {"crop_pct": 0.5},
    ],
)
@pytest.mark.parametrize("name", ["fourierft", "center"])
def test_what_is_given_wins(name, given, photograph):
    default, changed = _made(name, False)(photograph), _made(name, False, **given)(photograph)
    assert default.shape != changed.shape or not torch.equal(default, changed)


def test_what_the_protocol_fixes_wins_over_the_model():
    fixed = transforms.resolve("fourierft", {}, MODEL)
    assert (fixed.interpolation, fixed.crop_pct, fixed.mean) == ("bilinear", 1.0, MODEL["mean"])
    assert transforms.resolve("fourierft", {"crop_pct": 0.5}, MODEL).crop_pct == 0.5
    assert transforms.resolve("center", {}, MODEL).crop_pct == 0.8


def test_missing_values_are_named():
    with pytest.raises(ConfigurationError, match="needs image_size, mean, std, and no model with a data_config says"):
        transforms.resolve("fourierft", {}, None)
    with pytest.raises(ConfigurationError, match="needs crop_pct"):
        transforms.resolve("center", {}, {**MODEL, "crop_pct": None})


def test_unsuitable_models():
    oblong = {**MODEL, "input_size": (3, 32, 16)}
    with pytest.raises(ConfigurationError, match="32x16"):
        transforms.resolve("center", {}, oblong)
    assert transforms.resolve("none", {}, oblong).size == (32, 16)
    with pytest.raises(ConfigurationError, match="1 channels"):
        transforms.resolve("center", {}, {**MODEL, "input_size": (1, 32, 32)})


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        ("fourier", {}, UnknownNameError, "closest: fourierft"),
        ("center", {"interpolation": "bicubik"}, UnknownNameError, "closest: bicubic"),
        ("center", {"image_size": 0}, ConfigurationError, "image_size=0: a positive integer"),
        ("center", {"mean": [0.5]}, ConfigurationError, "three numbers"),
        ("center", {"std": [0.5, 0.5, 0.0]}, ConfigurationError, "std takes three numbers .* above 0"),
        ("center", {"crop_pct": 1.5}, ConfigurationError, "crop_pct"),
        ("none", {"crop_pct": 0.9}, ConfigurationError, "crops nothing"),
    ],
)
def test_bad_values(name, given, error, message):
    with pytest.raises(error, match=message):
        transforms.check_given(name, **{**NOTHING, **given})
