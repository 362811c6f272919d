"""A subject's photographs: found in a folder, with their captions, and cut to what the network sees.

SDXL is told of each picture the size it had, where it was cropped and the size it has now (its micro-conditioning,
arXiv 2307.01952, section 2.2). A flip comes before the crop, so that the crop's place is one in what is seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from pera_lightning.data.image_files import SUFFIXES, check_headers, image_files, require_folder, to_rgb
from pera_lightning.data.json_files import read_json
from pera_lightning.errors import ConfigurationError, DataError, listed, shorten
from pera_lightning.files import read_text

if TYPE_CHECKING:
    from PIL import Image

CROPS = ("center", "random")
METADATA = "metadata.jsonl"
_STEP = 8  # pixels of a latent's side: SDXL's VAE
_ORIENTATION, _SIDEWAYS = 0x0112, range(5, 9)  # EXIF's tag, and its values that swap height and width


@dataclass(frozen=True)
class Photograph:
    """A picture file and the prompt that it is trained with."""

    path: Path
    caption: str

    @property
    def id(self) -> str:
        """What batches and messages call it."""
        return str(self.path)


# ---- what a folder holds --------------------------------------------------------------------------------------------


def read_photographs(folder: str, prompt: str, argument: str) -> list[Photograph]:
    """The pictures of a folder at any depth, by name, each with its own caption or else the prompt.

    Args:
        folder: with the pictures.
        prompt: of those without a caption.
        argument: that gave the folder, for messages.

    Raises:
        DataError: for a folder that is missing, a file or without pictures, a broken picture, and as `read_captions`.
    """
    root = require_folder(folder)
    files = image_files(root)
    if not files:
        others = sorted(path.name for path in root.iterdir())
        raise DataError(
            f"{argument} {folder} has no images ({', '.join(SUFFIXES)}) at any depth; it has "
            f"{listed(others, 3) or 'nothing'}"
        )
    check_headers(root, files)
    captions = read_captions(root, files)
    bare = [name for name in files if name not in captions]
    if captions and bare:
        rank_zero_warn(
            f"{len(bare)} of {len(files)} images in {folder} have no caption of their own and take {prompt!r}: "
            f"{listed(bare, 3)}"
        )
    return [Photograph(root / name, captions.get(name, prompt)) for name in files]


def read_captions(root: Path, files: Sequence[str]) -> dict[str, str]:
    """Captions of picture files: of ``metadata.jsonl`` (``file_name``, ``text``), and of ``NAME.txt`` beside them.

    Args:
        root: the folder.
        files: paths of the pictures below it.

    Returns:
        The captions that there are, by file, line breaks folded.

    Raises:
        DataError: for a caption that is empty, a row of a file that is not there, and two captions for one file.
    """
    captions = _metadata(root, files) if (root / METADATA).is_file() else {}
    for name in files:
        beside = (root / name).with_suffix(".txt")
        if not beside.is_file():
            continue
        text = shorten(read_text(beside))
        if not text:
            raise DataError(f"caption {beside} is empty; write one, or remove the file to train with the prompt")
        if captions.setdefault(name, text) != text:
            raise DataError(f"{name} has two captions, in {root / METADATA} and in {beside}; remove one of them")
    return captions


def _metadata(root: Path, files: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    path, known = root / METADATA, set(files)
    absent = []
    for number, row in enumerate(read_json(path)):
        values = [row.get(key) if isinstance(row, Mapping) else None for key in ("file_name", "text")]
        if not all(isinstance(value, str) and value.strip() for value in values):
            has = listed(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise DataError(f"row {number} of {path} needs a file_name and a text, neither of them empty; it has {has}")
        name, text = Path(values[0]).as_posix(), shorten(values[1])
        if name not in known:
            absent.append(name)
        elif found.setdefault(name, text) != text:
            raise DataError(f"{name} has two captions in {path}; keep one, or copy the image to train with both")
    if absent:
        raise DataError(
            f"{path} has {len(absent)} row(s) for images that are not there: {listed(absent, 3)}; correct file_name "
            "or remove them"
        )
    return found


def size_of(image: Image.Image) -> tuple[int, int]:
    """Height and width in pixels of an opened picture once it is upright; reads its header only."""
    width, height = image.size
    return (width, height) if image.getexif().get(_ORIENTATION) in _SIDEWAYS else (height, width)


def note_unusual(photographs: Sequence[Photograph], folder: str, size: tuple[int, int]) -> None:
    """Warns, once each, of pictures that are enlarged and of animations, of which the first frame is taken.

    Args:
        photographs: readable.
        folder: names them.
        size: height and width that they are cut to.
    """
    from PIL import Image

    small: list[tuple[int, int]] = []
    animated: list[str] = []
    for photograph in photographs:
        with Image.open(photograph.path) as image:
            height, width = size_of(image)
            if height < size[0] or width < size[1]:
                small.append((height, width))
            # Phones write JPEGs with a second picture in them (MPO), and they are no animations.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                animated.append(photograph.path.name)
    of = f"of {len(photographs)} images in {folder}"
    if small:
        least = min(small, key=lambda one: one[0] * one[1])
        rank_zero_warn(
            f"{len(small)} {of} are smaller than {size[0]}x{size[1]} and are enlarged, the smallest from "
            f"{least[0]}x{least[1]} (height x width); a lower resolution loses nothing of them"
        )
    if animated:
        rank_zero_warn(f"{len(animated)} {of} have several frames, and the first is taken: {listed(animated, 3)}")


def file_sha256(path: Path) -> str:
    """Sha256 of a file, in hex.

    Raises:
        DataError: where it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error.strerror}") from error


# ---- what the network sees ------------------------------------------------------------------------------------------


def sides(resolution: int | Sequence[int]) -> tuple[int, int]:
    """Height and width in pixels of one number or two.

    Raises:
        ConfigurationError: where a side is not divisible by 8, naming the nearest that are.
    """
    given = [resolution] * 2 if isinstance(resolution, int) else list(resolution)
    if len(given) != 2 or not all(isinstance(side, int) for side in given):
        raise ConfigurationError(f"resolution takes one side or [height, width], in pixels; given {given}")
    for side in given:
        if side < _STEP or side % _STEP:
            below = side // _STEP * _STEP
            near = " or ".join(str(one) for one in (below, below + _STEP) if one > 0) or str(_STEP)
            raise ConfigurationError(
                f"resolution must be divisible by {_STEP}, a latent's side in pixels; given {side}: take {near}"
            )
    return given[0], given[1]


def open_image(path: Path) -> Image.Image:
    """The picture of a file: upright, RGB, of an animation the first frame.

    Raises:
        DataError: where it cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error …
        raise DataError(f"image {path} cannot be read ({shorten(str(error))}); replace or remove it") from error


def cover(given: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest height and width in the proportions of `given` that cover `size`, in pixels."""
    factor = max(size[0] / given[0], size[1] / given[1])
    return max(size[0], round(given[0] * factor)), max(size[1], round(given[1] * factor))


def seen(
    image: Image.Image, size: tuple[int, int], *, crop: str = "center", flip: bool = False
) -> tuple[Image.Image, Tensor]:
    """Scales a picture to cover a size and cuts it out, after a flip.

    Args:
        image: RGB.
        size: height and width in pixels.
        crop: "center", or "random", drawn from torch's global generator, which a loader seeds in its workers.
        flip: mirror every other picture, by a draw from the same.

    Returns:
        The picture of that size, and (6,) float32: height and width before, top and left of the crop in the scaled
        picture, height and width now.
    """
    from PIL import Image as pillow
    from PIL import ImageOps

    before = image.height, image.width
    scaled = cover(before, size)
    if scaled != before:
        image = image.resize((scaled[1], scaled[0]), pillow.Resampling.LANCZOS)
    if flip and torch.rand(()) < 0.5:
        image = ImageOps.mirror(image)
    room = scaled[0] - size[0], scaled[1] - size[1]
    if crop == "random":
        top, left = (int(torch.randint(side + 1, ())) for side in room)
    else:
        top, left = room[0] // 2, room[1] // 2
    image = image.crop((left, top, left + size[1], top + size[0]))
    return image, torch.tensor([*before, top, left, *size], dtype=torch.float32)


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture as (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 127.5 - 1
