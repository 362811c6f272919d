"""What the network sees of a photograph: upright, scaled, cropped and maybe flipped, as pixels in [-1, 1].

SDXL is told of each image the size it had, where it was cropped and the size it has now (its micro-conditioning,
arXiv 2307.01952, section 2.2). A flip comes before the crop, so that the crop's place is one in what is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pera_lightning.data.image_files import open_lazily, to_rgb
from pera_lightning.errors import ConfigurationError, DataError, shorten
from pera_lightning.tasks.dreambooth.pipeline_files import FACTOR

if TYPE_CHECKING:
    from PIL import Image

CROPS = ("center", "random")


def sides(resolution: int | Sequence[int]) -> tuple[int, int]:
    """Gives height and width in pixels of one number or two."""
    given = [resolution] * 2 if isinstance(resolution, int) else list(resolution)
    if len(given) != 2 or not all(isinstance(side, int) and side >= FACTOR and side % FACTOR == 0 for side in given):
        takes = f"one side or [height, width] in pixels, multiples of {FACTOR}"
        raise ConfigurationError(f"resolution takes {takes}; given {given}")
    return given[0], given[1]


def open_image(path: Path) -> Image.Image:
    """Reads an image: upright, RGB, of an animation the first frame."""
    try:
        with open_lazily(path) as image:
            return to_rgb(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error …
        raise DataError(f"image {path} cannot be read ({shorten(str(error))}); replace or remove it") from error


def cover(given: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Gives the smallest height and width in the proportions of `given` that cover `size`, in pixels."""
    factor = max(size[0] / given[0], size[1] / given[1])  # the side that is short of more decides
    return max(size[0], round(given[0] * factor)), max(size[1], round(given[1] * factor))


def crop_to(
    image: Image.Image, size: tuple[int, int], *, crop: str = "center", flip: bool = False
) -> tuple[Image.Image, Tensor]:
    """Scales an RGB image to cover a height and width in pixels and crops it, after a flip.

    Random crops and flips draw from torch's global generator, which a loader seeds in its workers.

    Returns:
        The image of that size, and (6,) float32: height and width before, top and left of the crop in the scaled
        image, height and width now.
    """
    from PIL import Image as pillow
    from PIL import ImageOps

    before = image.height, image.width  # upright, as the network is told
    # 1. Scale: as little as covers the size.
    scaled = cover(before, size)
    if scaled != before:
        image = image.resize((scaled[1], scaled[0]), pillow.Resampling.LANCZOS)
    # 2. Flip.
    if flip and torch.rand(()) < 0.5:
        image = ImageOps.mirror(image)
    # 3. Crop.
    room = scaled[0] - size[0], scaled[1] - size[1]  # pixels above and below, left and right
    if crop == "random":
        top, left = (int(torch.randint(side + 1, ())) for side in room)
    else:
        top, left = room[0] // 2, room[1] // 2  # the middle
    image = image.crop((left, top, left + size[1], top + size[0]))
    return image, torch.tensor([*before, top, left, *size], dtype=torch.float32)


def to_pixels(image: Image.Image) -> Tensor:
    """Converts an RGB image to (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 127.5 - 1
