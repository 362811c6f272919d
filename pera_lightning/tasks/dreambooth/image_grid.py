"""Labelled image grids: matplotlib writes the labels, Pillow sets the images beside them.

matplotlib is imported when a grid is drawn, so that `grid` refuses wrong input at once.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence

from PIL import Image, ImageOps

from pera_lightning.errors import ConfigurationError

MOST_ROWS, MOST_COLUMNS, MOST_IMAGES = 200, 40, 2500
_PAGE, _MOST_CELL, _LEAST_CELL = 8.0, 2.5, 0.75  # inches: width of the page, longer side of an image
_LABELS = 1.6  # inches beside the images for the labels of rows
_LINE, _LETTER, _POINTS = 0.15, 0.07, 8  # inches of a line and of a letter, in this size of type
_LEAST_DPI, _MOST_DPI = 30, 300
_MOST_PIXELS, _MOST_SIDE = 30_000_000, 65_000  # of the grid; matplotlib draws no side of 2^16 pixels
_EMPTY = (240, 240, 240)


def labelled_grid(
    images: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
) -> Image.Image:
    """Draws images in rows and columns, with labels, on white, for a page 8 inches wide.

    All cells have one size; images of other proportions stand in their cell's middle, undistorted. What follows a line
    break in a label is a detail, such as a seed. Long labels are wrapped, then cut with an ellipsis, the detail last.

    Args:
        images: rows of equal length; None leaves a cell empty.
        row_labels: the labels at the left, one a row; all may be empty, as may those above and the title.
        column_labels: the labels above, one a column.
        title: the line at the top.
    """
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(images), len(images[0]) if images else 0
    check_shape(rows, columns)
    # 1. Cells, in inches: as wide as the page allows, in the proportions of the largest image.
    left = _LABELS if any(row_labels) else 0.1
    there = [image for row in images for image in row if image is not None]
    sides = [max((getattr(image, side) for image in there), default=1) for side in ("width", "height")]
    longer = min(_MOST_CELL, max(_LEAST_CELL, (_PAGE - left) / columns * max(1.0, sides[1] / sides[0])))
    cell = [max(0.3, longer * side / max(sides)) for side in sides]
    # 2. Labels, wrapped to their cells; the row of those above is as high as the longest.
    above = [_wrapped(label, cell[0], 4) for label in column_labels]
    beside = [_wrapped(label, left, max(2, int(cell[1] / _LINE))) for label in row_labels]
    head = _wrapped(title, columns * cell[0], 2)
    top = 0.1 + _LINE * max(label.count("\n") + bool(label) for label in above) + 2 * _LINE * bool(head)
    width, height = left + columns * cell[0] + 0.1, top + rows * cell[1] + 0.1
    # 3. Dots per inch: no more than the images have, and within the limits of the entire grid.
    most = min(_MOST_DPI, (_MOST_PIXELS / (width * height)) ** 0.5, _MOST_SIDE / max(width, height))
    dpi = max(_LEAST_DPI, min(most, max(150, max(sides) / longer)))
    # 4. The page with its labels, drawn by matplotlib on axes that the images cover.
    figure = Figure(figsize=(width, height), dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((left / width, 0.1 / height, columns * cell[0] / width, rows * cell[1] / height))
    # A `$` in a prompt starts no formula, and signs that the font lacks are drawn as boxes.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        axes.set(xlim=(0, columns), ylim=(rows, 0))
        axes.set_xticks([j + 0.5 for j in range(columns)], above, fontsize=_POINTS)
        axes.set_yticks([i + 0.5 for i in range(rows)], beside, fontsize=_POINTS)
        axes.tick_params(length=0, pad=3, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)
        figure.text(left / width + columns * cell[0] / width / 2, 1 - 0.05 / height, head, ha="center", va="top")
        canvas.draw()
    page = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    # 5. The images, each padded to its cell less the gap around it: pixel by pixel, which matplotlib would resample.
    gap = max(2, round(0.03 * dpi))
    pixels = max(1, round(cell[0] * dpi) - gap), max(1, round(cell[1] * dpi) - gap)
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            tile = Image.new("RGB", pixels, _EMPTY) if image is None else image.convert("RGB")
            place = round((left + j * cell[0]) * dpi + gap / 2), round((top + i * cell[1]) * dpi + gap / 2)
            page.paste(ImageOps.pad(tile, pixels, Image.Resampling.LANCZOS, color="white"), place)
    return page


def check_shape(rows: int, columns: int) -> None:
    """Raises `ConfigurationError` for a grid of no images, or of more than can be seen."""
    if not (0 < rows <= MOST_ROWS and 0 < columns <= MOST_COLUMNS and rows * columns <= MOST_IMAGES):
        most = f"{MOST_ROWS} rows, {MOST_COLUMNS} columns and {MOST_IMAGES} images at most"
        raise ConfigurationError(f"a grid of {rows} x {columns} images cannot be drawn: {most}; choose among them")


def useful_side(count: int) -> int:
    """Pixels of an image's longer side that a grid of `count` images shows; more would fill memory only."""
    return min(round(_MOST_CELL * _MOST_DPI), round((2 * _MOST_PIXELS / count) ** 0.5))


def _wrapped(label: str, width: float, most: int) -> str:
    """Wraps a label to at most `most` lines (or one for the label and one for its detail) of `width` inches."""
    label = label.encode("utf-8", "replace").decode()  # no font takes half a surrogate pair
    head, _, detail = label.partition("\n")  # the prompt and its seed, the method and its run
    letters = max(4, int(width / _LETTER))
    below = textwrap.wrap(detail, letters, max_lines=max(1, most // 2), placeholder="…")
    lines = textwrap.wrap(head, letters, max_lines=max(1, most - len(below)), placeholder="…")
    return "\n".join([*lines, *below])
