"""The folder of generated images: what is written is what is read, and damage is told in one line."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pera_lightning.errors import DataError
from pera_lightning.tasks.dreambooth.image_folder import (
    FILE,
    GeneratedImage,
    GeneratedImages,
    read_image,
    read_images,
    save_image,
    to_pil,
    unlist_images,
    write_images,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(colour, width=8, height=8):
    return Image.new("RGB", (width, height), colour)


def generated(*names):
    images = tuple(GeneratedImage(f"{name}.png", f"a dög, {name}", 2**63 - 1 - k) for k, name in enumerate(names))
    adapter = {"class_path": "pera_lightning.adapters.lora.LoRA", "init_args": {"rank": 4}}
    return GeneratedImages("org/model", adapter, 200, {"steps": 30, "guidance_scale": 7.5, "seed": None}, images)


def test_images_are_the_tensors_rounded():
    images = torch.tensor([0.0, 0.5, 1.0, -3.0, 7.0, 0.25]).view(1, 1, 2, 3).repeat(2, 3, 1, 1)
    images[1, 0] = 1
    first, second = to_pil(images.requires_grad_())
    assert first.size == (3, 2)
    assert np.asarray(first)[..., 0].tolist() == [[0, 128, 255], [0, 255, 64]]
    assert np.asarray(second)[..., 0].min() == 255
    assert np.asarray(second)[..., 1].tolist() == [[0, 128, 255], [0, 255, 64]]
    assert np.array_equal(np.asarray(to_pil(images.detach().bfloat16())[0]), np.asarray(first))


def test_images_that_are_not_finite_are_told():
    images = torch.ones(3, 3, 2, 2)
    images[1, 0, 0, 0], images[2, 0, 0, 0] = float("nan"), float("inf")
    with pytest.warns(UserWarning, match="2 of 3 generated images have NaN or infinite values"):
        assert np.asarray(to_pil(images)[1])[0, 0].tolist() == [0, 255, 255]


def test_a_folder_is_read_as_written(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), dtype=np.uint8)
    folder = tmp_path / "run" / "images"
    paths = [folder / "a.png", folder / "b.png"]
    for one, path in zip(pixels, paths, strict=True):
        assert save_image(Image.fromarray(one), path) == path.stat().st_size
    assert write_images(folder, generated("a", "b")).name == FILE
    assert read_images(folder) == generated("a", "b")
    assert [np.array_equal(read_image(path), one) for path, one in zip(paths, pixels, strict=True)] == [True, True]
    assert sorted(one.name for one in folder.iterdir()) == ["a.png", "b.png", FILE]
    write_images(folder, GeneratedImages("m", None, 0, {}, generated("a").images))
    assert read_images(folder).adapter is None


def test_an_image_is_scaled_down_to_what_is_asked_for(tmp_path):
    save_image(plain(RED, 400, 100), tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 200).size == (200, 50)
    assert read_image(tmp_path / "a.png", 500).size == read_image(tmp_path / "a.png").size == (400, 100)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_image(plain(RED), tmp_path / "a.png")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        save_image(plain(BLUE), tmp_path / "a.png")
    assert [one.name for one in tmp_path.iterdir()] == ["a.png"]
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == RED


def test_list_and_grid_of_earlier_images_go_and_tell_which_those_are(tmp_path):
    for name in ("a", "mine", "grid"):
        save_image(plain(RED), tmp_path / f"{name}.png")
    write_images(tmp_path, generated("a", "gone"))
    assert unlist_images(tmp_path) == [tmp_path / "a.png", tmp_path / "gone.png"]
    assert {one.name for one in tmp_path.iterdir()} == {"a.png", "mine.png"}
    (tmp_path / FILE).write_text("{")
    assert unlist_images(tmp_path) == unlist_images(tmp_path / "nothing") == []
    assert {one.name for one in tmp_path.iterdir()} == {"a.png", "mine.png"}


def changed(**values):
    found = json.loads(json.dumps({"model_name": "m", "adapter": None, "step": 1, "sampling": {}}))
    return {**found, "images": [{"file": "a.png", "prompt": "p", "seed": 0}], **values}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "3",
        '{"images": []}',
        changed(images=[]),
        changed(images=[{"file": "a.png"}]),
        changed(images=[{"file": "../a.png", "prompt": "p", "seed": 0}]),
        changed(images=[{"file": 3, "prompt": "p", "seed": 0}]),
        changed(images=[{"file": "a.png", "prompt": ["p"], "seed": 0}]),
        changed(images=[{"file": "a.png", "prompt": "p", "seed": "0"}]),
        changed(images=3),
        changed(adapter="LoRA"),
        changed(sampling=[1]),
        changed(more=1),
    ],
)
def test_a_damaged_list_is_one_line(tmp_path, content):
    (tmp_path / FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=r"images\.json is damaged") as error:
        read_images(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path / FILE) in str(error.value)


def test_the_folder_is_read_without_torch():
    code = "import sys\nfrom pera_lightning.tasks.dreambooth import image_folder, image_grid\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "lightning", "diffusers", "matplotlib"} & set(loaded)
