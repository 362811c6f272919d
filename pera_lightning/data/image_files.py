"""Image files under a folder: finding them, checking their headers, and reading them upright and in RGB."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pera_lightning.errors import DataError, closest, listed

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def to_rgb(image: Image.Image) -> Image.Image:
    """Turns an image of any mode upright (EXIF) and into RGB.

    Transparency is dropped, as torchvision, timm and datasets do; 16-bit grey is scaled down to 8 (Pillow would clip
    it to white).

    Raises:
        ValueError: for pixels without a known range (32-bit integers, floats).
    """
    from PIL import Image, ImageOps

    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no known range of values; save it with 8 or 16 bits a channel")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns on the direct way
    return image.convert("RGB")


def image_files(folder: Path) -> list[str]:
    """Image files under a folder at any depth: sorted relative paths; hidden files and other types are left out."""
    found = []
    for top in sorted(folder.iterdir()):
        if top.is_dir():  # walked one by one, so that links to folders at the top are followed and loops are not
            found += [Path(at, name) for at, _, names in os.walk(top) for name in names]
        else:
            found.append(top)
    relative = [path.relative_to(folder) for path in found if path.suffix.lower() in SUFFIXES]
    return sorted(path.as_posix() for path in relative if not any(part.startswith(".") for part in path.parts))


def check_headers(root: Path, files: list[str]) -> None:
    """Opens every image's header (a tenth of a millisecond each); raises a `DataError` that names the broken ones.

    Damage further in shows when an image is decoded, and is named there.
    """
    from PIL import Image

    broken = []
    for name in files:
        try:
            with Image.open(root / name) as image:
                image.verify()
        except Exception:  # as many kinds as there are formats
            broken.append(name)
    if broken:
        raise DataError(f"{len(broken)} broken image(s) under {root}: {listed(broken)}; replace or remove them")


def require_folder(folder: str) -> Path:
    """The folder as a path; raises `DataError` for a file, and, with the closest names, where it does not exist."""
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise DataError(f"{folder} is a file, not a folder of images; unpack it and give the folder")
    # The first folder above that exists, to name what lies beside the one that is missing.
    parent = path.absolute().parent
    missing = path.name
    while not parent.is_dir():  # ends at the root, which is one
        parent, missing = parent.parent, parent.name
    beside = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    raise DataError(f"folder {folder} does not exist: no {missing!r} in {parent}{closest(missing, beside)}")
