"""Generated images: what is written is what is read, and grids show every image whole, with labels that can be read."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.tasks.dreambooth.image_grid import (
    FILE,
    MOST_PIXELS,
    GeneratedImage,
    GeneratedImages,
    labelled_grid,
    read_images,
    read_picture,
    save_images,
    to_pictures,
    unlist_images,
    write_images,
)

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(colour, width=256, height=256):
    return Image.new("RGB", (width, height), colour)


def box(grid, colour):
    """Left, top, right and bottom of what a grid has in a colour, blurred edges left out."""
    far = np.abs(np.asarray(grid).astype(int) - np.array(colour)).max(2) < 8
    ys, xs = np.nonzero(far)
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None


def inked(grid, left, top, right, bottom):
    """Whether something dark is written there."""
    return bool((np.asarray(grid.convert("L"))[int(top) : int(bottom), int(left) : int(right)] < 160).any())


# --- grids ---


def test_images_stand_in_their_rows_and_columns_on_white():
    grid = labelled_grid([[plain(RED), plain(GREEN)], [plain(BLUE), None]], ["a", "b"], ["c", "d"], "title")
    red, green, blue = (box(grid, colour) for colour in (RED, GREEN, BLUE))
    assert red[1] == green[1] < blue[1]
    assert red[0] == blue[0] < green[0]
    assert {(b[2] - b[0], b[3] - b[1]) for b in (red, green, blue)} == {(256, 256)}
    assert green[0] - red[2] == blue[1] - red[3] > 0  # one gap
    assert grid.width - green[2] == grid.height - blue[3] > green[0] - red[2]  # one margin
    assert {grid.getpixel(p) for p in ((0, 0), (grid.width - 1, 0), (red[2] + 1, red[1] + 9))} == {(255, 255, 255)}


def test_labels_stand_at_their_images():
    rows = [[plain(RED), plain(GREEN)], [plain(BLUE), plain(GREEN)]]
    grid = labelled_grid(rows, ["", "below"], ["", "right"], "")
    red, blue = box(grid, RED), box(grid, BLUE)
    assert not inked(grid, 0, red[1], red[0], red[3])
    assert inked(grid, 0, blue[1], blue[0], blue[3])
    assert not inked(grid, red[0], 0, red[2], red[1])
    assert inked(grid, red[2], 0, grid.width, red[1])
    assert labelled_grid(rows, ["", "below"], ["", "right"], "step 200").height > grid.height


def test_no_labels_take_no_room():
    grid = labelled_grid([[plain(RED)]], [""], [""])
    left, top, right, bottom = box(grid, RED)
    assert left == top == grid.width - right == grid.height - bottom


@pytest.mark.parametrize("size", [(512, 768), (1024, 512), (64, 64), (700, 20)])
def test_images_of_other_sizes_are_whole_and_undistorted(size):
    grid = labelled_grid([[plain(GREEN, 512, 512), plain(RED, *size)]], [""], ["a", "b"])
    left, top, right, bottom = box(grid, RED)
    assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1], rel=0.2 if 20 in size else 0.02)
    green = box(grid, GREEN)
    assert (green[2] - green[0]) == pytest.approx(green[3] - green[1], abs=2)
    assert (top + bottom) / 2 == pytest.approx((green[1] + green[3]) / 2, abs=2)  # in the middle of its cell


@pytest.mark.parametrize(("rows", "columns", "side"), [(10, 10, 1024), (1, 40, 1024), (100, 3, 512), (500, 5, 32)])
def test_large_grids_are_scaled_down(rows, columns, side):
    image = plain(RED, side, side)
    labels = ["a sks dog in the jungle, with much else to be said of it\nseed 3"] * rows
    grid = labelled_grid([[image] * columns] * rows, labels, ["AuroRA\nruns/aurora"] * columns, "title")
    assert grid.width * grid.height <= MOST_PIXELS
    assert grid.width * grid.height > 0.5 * MOST_PIXELS or side == 32


def test_large_images_keep_their_size_where_there_is_room():
    left, _, right, _ = box(labelled_grid([[plain(RED, 1024, 1024)] * 2] * 2, ["", ""], ["", ""]), RED)
    assert right - left > 2 * 1024


def test_a_long_label_is_wrapped_and_then_cut_and_its_detail_stays():
    long, rows = "a sks dog " * 40, [[plain(RED)]]
    short = labelled_grid(rows, [""], ["a sks dog"])
    cut = labelled_grid(rows, [""], [long])
    assert cut.width == short.width
    assert short.height < cut.height < short.height + 100
    with_detail = labelled_grid(rows, [long + "\nseed 7"], [""])
    assert with_detail.height == labelled_grid(rows, [""], [""]).height
    other = labelled_grid(rows, [long + "\nseed 8"], [""])
    assert with_detail.tobytes() != other.tobytes()  # the detail is not what is cut
    assert labelled_grid(rows, [long + "x"], [""]).tobytes() == labelled_grid(rows, [long + "y"], [""]).tobytes()


@pytest.mark.parametrize(
    "label", ["x" * 5000, "一只狗 🐶 \ud83d", "a\x00b\x1b[1m", "\u202eabc\u200d", "שלום", " \t\n\n "]
)
def test_no_label_crashes_or_leaves_its_place(label):
    grid = labelled_grid([[plain(RED)]], [label], [label], label)
    left, top, right, bottom = box(grid, RED)
    assert (right - left, bottom - top) == (256, 256)
    assert not inked(grid, right, 0, grid.width, grid.height)


def test_accents_that_the_font_lacks_are_drawn_without():
    assert labelled_grid([[plain(RED)]], ["café – naïve"], [""]) == labelled_grid(
        [[plain(RED)]], ["cafe - naive"], [""]
    )


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_images_of_any_mode_are_drawn(mode):
    assert box(labelled_grid([[plain((255, 255, 255)).convert(mode), plain(RED)]], ["a"], ["b", "c"]), RED)


@pytest.mark.parametrize(
    ("images", "rows", "columns", "expected"),
    [
        ([], [], [], "0 x 0"),
        ([[]], ["a"], [], "1 x 0"),
        ([[None] * 501], ["a"], ["b"] * 501, "1 x 501"),
        ([[None] * 51] * 50, ["a"] * 50, ["b"] * 51, "50 x 51"),
        ([[None, None], [None]], ["a", "b"], ["c", "d"], "2 rows of 2, 1 images"),
        ([[None]], ["a", "b"], ["c"], "2 row labels"),
        ([[None]], ["a"], [], "0 column labels"),
    ],
)
def test_what_is_no_grid_is_refused(images, rows, columns, expected):
    with pytest.raises(ConfigurationError, match=expected):
        labelled_grid(images, rows, columns)


# --- pictures and their folder ---


def generated(*names):
    images = tuple(GeneratedImage(f"{name}.png", f"a dög, {name}", 2**63 - 1 - k) for k, name in enumerate(names))
    adapter = {"class_path": "pera_lightning.adapters.lora.LoRA", "init_args": {"rank": 4}}
    return GeneratedImages("org/model", adapter, 200, {"steps": 30, "guidance_scale": 7.5, "seed": None}, images)


def test_pictures_are_the_tensors_rounded():
    images = torch.tensor([0.0, 0.5, 1.0, -3.0, 7.0, 0.25]).view(1, 1, 2, 3).repeat(2, 3, 1, 1)
    images[1, 0] = 1
    first, second = to_pictures(images.requires_grad_())
    assert first.size == (3, 2)
    assert np.asarray(first)[..., 0].tolist() == [[0, 128, 255], [0, 255, 64]]
    assert np.asarray(second)[..., 0].min() == 255
    assert np.asarray(second)[..., 1].tolist() == [[0, 128, 255], [0, 255, 64]]
    assert np.array_equal(np.asarray(to_pictures(images.detach().bfloat16())[0]), np.asarray(first))


def test_pictures_that_are_not_finite_are_told():
    images = torch.ones(3, 3, 2, 2)
    images[1, 0, 0, 0], images[2, 0, 0, 0] = float("nan"), float("inf")
    with pytest.warns(UserWarning, match="2 of 3 generated images have NaN or infinite values"):
        assert np.asarray(to_pictures(images)[1])[0, 0].tolist() == [0, 255, 255]


def test_a_folder_is_read_as_written(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), dtype=np.uint8)
    folder = tmp_path / "run" / "images"
    paths = save_images([Image.fromarray(one) for one in pixels], ["a", "b"], folder)
    assert write_images(folder, generated("a", "b")).name == FILE
    assert read_images(folder) == generated("a", "b")
    assert [np.array_equal(read_picture(path), one) for path, one in zip(paths, pixels, strict=True)] == [True, True]
    assert sorted(one.name for one in folder.iterdir()) == ["a.png", "b.png", FILE]
    write_images(folder, GeneratedImages("m", None, 0, {}, generated("a").images))
    assert read_images(folder).adapter is None


def test_a_picture_is_scaled_down_to_the_pixels_there_are(tmp_path):
    (path,) = save_images([plain(RED, 400, 100)], ["a"], tmp_path)
    assert read_picture(path, 10_000).size == (200, 50)
    assert read_picture(path, 40_000).size == (400, 100)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_images([plain(RED, 8, 8)], ["a"], tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        save_images([plain(BLUE, 8, 8)], ["a"], tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["a.png"]
    assert read_picture(tmp_path / "a.png").getpixel((0, 0)) == RED


def test_list_and_grid_of_earlier_images_go_and_tell_which_those_are(tmp_path):
    save_images([plain(RED, 8, 8)] * 3, ["a", "mine", "grid"], tmp_path)
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
    ("content", "expected"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("3", "is damaged"),
        ('{"images": []}', "is damaged"),
        (changed(images=[]), "lists no image"),
        (changed(images=[{"file": "a.png"}]), "is damaged"),
        (changed(images=[{"file": "../a.png", "prompt": "p", "seed": 0}]), "names '../a.png'"),
        (changed(images=[{"file": 3, "prompt": "p", "seed": 0}]), "names 3"),
        (changed(images=[{"file": "a.png", "prompt": ["p"], "seed": 0}]), r"\['p'\] is no str"),
        (changed(images=[{"file": "a.png", "prompt": "p", "seed": "0"}]), "'0' is no int"),
        (changed(images=3), "is damaged"),
        (changed(adapter="LoRA"), "'LoRA' is no Mapping"),
        (changed(sampling=[1]), "is no Mapping"),
        (changed(more=1), "is damaged"),
    ],
)
def test_a_damaged_list_is_one_line(tmp_path, content, expected):
    (tmp_path / FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=expected) as error:
        read_images(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path / FILE) in str(error.value)


def test_the_folder_is_read_without_torch():
    code = "import sys, pera_lightning.tasks.dreambooth.image_grid; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "lightning", "diffusers", "matplotlib"} & set(loaded)
