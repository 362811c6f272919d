"""The folder of generated images: a PNG for each prompt and seed, and `images.json`, which says what they are of.

`predict` writes RUN/images/ and `grid` reads it. Without torch, so that `grid` refuses wrong input at once.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pera_lightning.data.image_files import open_lazily
from pera_lightning.errors import DataError, shorten
from pera_lightning.files import atomic_write, parse_json, png, read_text

if TYPE_CHECKING:
    from torch import Tensor

FOLDER, FILE, GRID = "images", "images.json", "grid.png"


@dataclass(frozen=True)
class GeneratedImage:
    """One image: its file's name in the folder, and what it was generated from."""

    file: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class GeneratedImages:
    """What `images.json` says.

    Attributes:
        model_name: hub id or folder of the pipeline.
        adapter: the method as `Method.spec` gives it; None for the base itself.
        step: optimizer steps that the adapter was trained for.
        sampling: settings that the images depend on (height, width, steps, guidance scale …), as primitives.
        images: the images in the order of prompts and seeds.
    """

    model_name: str
    adapter: Mapping[str, Any] | None
    step: int
    sampling: Mapping[str, Any]
    images: tuple[GeneratedImage, ...]


def to_pil(images: Tensor) -> list[Image.Image]:
    """Converts images (B, 3, H, W) in [0, 1]; values that are not finite become black, with a warning."""
    images = images.detach().float().cpu()  # bfloat16 has no numpy type
    if broken := int((~images.isfinite()).flatten(1).any(1).sum()):
        warnings.warn(
            f"{broken} of {len(images)} generated images have NaN or infinite values, drawn black: decode with the "
            "VAE in float32 or one made for float16, and look at the loss",
            stacklevel=2,
        )
    # (B, 3, H, W) -> (B, H, W, 3), the order that Pillow takes.
    pixels = images.nan_to_num(0, 0, 0).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(one) for one in pixels]


def save_image(image: Image.Image, path: Path) -> int:
    """Writes a PNG atomically, with the folder it lies in; returns its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = png(image)
    atomic_write(path, data)
    return len(data)


def unlist_images(folder: str | Path) -> list[Path]:
    """Removes `images.json` and the grid of an earlier stage, so that one cut short leaves no list of others' images.

    One rank calls it. The images that were listed stay, and are returned.
    """
    file = Path(folder) / FILE
    try:
        earlier = [file.with_name(image.file) for image in read_images(folder).images]
    except DataError:  # a missing list names no file, a damaged one none for sure
        earlier = []
    for one in (file, file.with_name(GRID)):
        one.unlink(missing_ok=True)
    return earlier


def write_images(folder: str | Path, generated: GeneratedImages) -> Path:
    """Writes `images.json` atomically; one rank calls it, once all PNGs are there."""
    file = Path(folder) / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, (json.dumps(asdict(generated), indent=1) + "\n").encode())
    return file


def read_images(folder: str | Path) -> GeneratedImages:
    """Reads `images.json`; `read_image` opens the images."""
    file = Path(folder) / FILE
    text = read_text(file)  # a missing or foreign file is refused there
    try:
        found = parse_json(text)
        images = tuple(GeneratedImage(**one) for one in found.pop("images"))
        generated = GeneratedImages(**found, images=images)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"{file} is damaged ({shorten(str(error))}); run predict again") from None
    # The list may come from elsewhere: it must not lead out of its folder.
    fits = images and all(
        isinstance(one.prompt, str) and isinstance(one.seed, int) and Path(str(one.file)).name == one.file
        for one in images
    )
    if not (fits and isinstance(generated.sampling, dict) and isinstance(generated.adapter, dict | None)):
        raise DataError(f"{file} is damaged (a value is of another type, or a file elsewhere); run predict again")
    return generated


def read_image(path: Path, side: int | None = None) -> Image.Image:
    """Reads a generated image into memory, its longer side scaled down to `side` pixels."""
    try:
        with open_lazily(path) as image:
            image.load()  # now, so that damage is told here
            if side is not None:
                image.thumbnail((side, side), Image.Resampling.LANCZOS)
            return image
    except FileNotFoundError:
        raise DataError(f"{path} is listed in {FILE}, but is not there; run predict again") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error …
        raise DataError(f"{path} cannot be read ({shorten(str(error))}); run predict again") from error
