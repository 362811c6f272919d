"""Labelled image grids: every image in its place, undistorted, with labels that can be read."""

import numpy as np
import pytest
from PIL import Image

from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.dreambooth.image_grid import labelled_grid, useful_side

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(colour, width=256, height=256):
    return Image.new("RGB", (width, height), colour)


def box(grid, colour):
    """Left, top, right and bottom of what a grid has in a colour, blurred edges left out."""
    far = np.abs(np.asarray(grid).astype(int) - np.array(colour)).max(2) < 8
    ys, xs = np.nonzero(far)
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def inked(grid, left, top, right, bottom):
    """Whether something dark is written there."""
    return bool((np.asarray(grid.convert("L"))[int(top) : int(bottom), int(left) : int(right)] < 160).any())


def test_images_stand_in_their_rows_and_columns_on_white():
    grid = labelled_grid([[plain(RED), plain(GREEN)], [plain(BLUE), None]], ["a", "b"], ["c", "d"], "title")
    red, green, blue = (box(grid, colour) for colour in (RED, GREEN, BLUE))
    assert red[1] == green[1] < red[3] < blue[1]
    assert red[0] == blue[0] < red[2] < green[0]
    assert len({(b[2] - b[0], b[3] - b[1]) for b in (red, green, blue)}) == 1
    assert {grid.getpixel(p) for p in ((0, 0), (grid.width - 1, 0), (red[2] + 1, red[1] + 9))} == {(255, 255, 255)}
    assert grid.getpixel((green[0] + 20, blue[1] + 20)) == (240, 240, 240)  # the empty cell


def test_labels_stand_at_their_images():
    rows = [[plain(RED), plain(GREEN)], [plain(BLUE), plain(GREEN)]]
    grid = labelled_grid(rows, ["", "below"], ["", "right"], "")
    red, blue = box(grid, RED), box(grid, BLUE)
    assert not inked(grid, 0, red[1], red[0], red[3])
    assert inked(grid, 0, blue[1], blue[0], blue[3])
    assert not inked(grid, red[0], 0, red[2], red[1])
    assert inked(grid, red[2], 0, grid.width, red[1])
    titled = labelled_grid(rows, ["", "below"], ["", "right"], "step 200")
    assert titled.height > grid.height
    assert inked(titled, 0, 0, titled.width, titled.height - grid.height)


@pytest.mark.parametrize("columns", [2, 4, 8])
def test_a_page_shows_it_with_letters_of_the_usual_size(columns):
    """At most 8.2 inches wide, in which labels have 8 points."""
    grid = labelled_grid([[plain(RED, 512, 512)] * columns] * 2, ["a dog\nseed 0"] * 2, ["LoRA"] * columns)
    left, _, right, _ = box(grid, RED)
    inches = 1.6 + columns * min(2.5, 6.4 / columns) + 0.1
    assert inches <= 8.2
    assert 150 <= grid.width / inches <= 300
    assert (right - left) / grid.width > 0.7


@pytest.mark.parametrize("size", [(512, 768), (1024, 512), (64, 64), (700, 200)])
def test_images_of_other_sizes_are_whole_and_undistorted(size):
    grid = labelled_grid([[plain(GREEN, 512, 512), plain(RED, *size)]], [""], ["a", "b"])
    left, top, right, bottom = box(grid, RED)
    assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1], rel=0.03)
    green = box(grid, GREEN)
    assert (green[2] - green[0]) == pytest.approx(green[3] - green[1], abs=3)
    assert (top + bottom) / 2 == pytest.approx((green[1] + green[3]) / 2, abs=3)  # in the middle of its cell


@pytest.mark.parametrize(("rows", "columns"), [(1, 40), (200, 1), (25, 40)])
def test_large_grids_are_drawn_within_limits(rows, columns):
    side = min(256, useful_side(rows * columns))
    labels = ["a sks dog in the jungle, with much else to be said of it\nseed 3"] * rows
    grid = labelled_grid([[plain(RED, side, side)] * columns] * rows, labels, ["AuroRA\nruns/a"] * columns, "title")
    assert grid.width * grid.height <= 31_000_000
    assert max(grid.size) < 2**16


def test_a_long_label_is_cut_and_its_detail_stays():
    rows, long = [[plain(RED)]], "a sks dog " * 100
    grids = [labelled_grid(rows, [long + end], [""]) for end in ("\nseed 7", "\nseed 8", "x\nseed 7")]
    assert grids[0].size == labelled_grid(rows, ["a"], [""]).size
    assert grids[0].tobytes() != grids[1].tobytes()
    assert grids[0].tobytes() == grids[2].tobytes()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "label", ["x" * 5000, "一只狗 🐶 \ud83d", "a\x00b\x1b[1m", "\u202eabc\u200d", "$x$ costs $5 {}"]
)
def test_no_label_crashes_or_covers_an_image(label):
    grid = labelled_grid([[plain(RED)]], [label], [label], label)
    left, top, right, bottom = box(grid, RED)
    assert not inked(grid, right, top, grid.width, bottom)
    assert (np.asarray(grid)[top + 1 : bottom - 1, left + 1 : right - 1] == RED).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_images_of_any_mode_are_drawn(mode):
    assert box(labelled_grid([[plain((255, 255, 255)).convert(mode), plain(RED)]], ["a"], ["b", "c"]), RED)


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 0), (1, 41), (201, 1), (100, 26)])
def test_too_few_or_too_many_images_are_refused(rows, columns):
    with pytest.raises(ConfigurationError, match=f"a grid of {rows} x {columns} images cannot be drawn"):
        labelled_grid([[None] * columns] * rows, [""] * rows, [""] * columns)
