"""A subject's photographs and their captions, found in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pera_lightning.data.image_files import (
    SUFFIXES,
    check_headers,
    image_files,
    open_lazily,
    require_folder,
    size_of,
    warn_of_other_files,
)
from pera_lightning.errors import DataError, listed
from pera_lightning.tasks.dreambooth.captions import FORMS, Captions


@dataclass(frozen=True)
class Photograph:
    """An image file and the caption that it is trained with."""

    path: Path
    caption: str

    @property
    def id(self) -> str:
        """What batches and messages call it."""
        return str(self.path)


def read_photographs(folder: str, prompt: str, argument: str) -> list[Photograph]:
    """Lists the images of a folder at any depth, by name, each with its own caption or else the prompt."""
    root = require_folder(folder)
    files = image_files(root)
    if not files:
        others = sorted(path.name for path in root.iterdir())
        has = listed(others, 3) or "nothing"
        raise DataError(f"{argument} {folder} has no images ({', '.join(SUFFIXES)}) at any depth; it has {has}")
    check_headers(root, files)  # every damaged one is named at once
    captions = Captions(root, files)
    warn_of_other_files(root, {*files, *captions.files}, f"captions from {FORMS}")
    bare = [name for name in files if name not in captions.texts]  # only some: perhaps forgotten
    if captions.texts and bare:
        rank_zero_warn(
            f"{len(bare)} of {len(files)} images in {folder} have no caption of their own and take {prompt!r}: "
            f"{listed(bare, 3)}"
        )
    return [Photograph(root / name, captions.texts.get(name, prompt)) for name in files]


def warn_of_unusual(photographs: Sequence[Photograph], folder: str, size: tuple[int, int]) -> None:
    """Warns, once each, of images that are enlarged and of animations, of which the first frame is taken."""
    small: list[tuple[int, int]] = []
    animated: list[str] = []
    for photograph in photographs:
        with open_lazily(photograph.path) as image:
            height, width = size_of(image)
            if height < size[0] or width < size[1]:  # scaled up, so blurred
                small.append((height, width))
            # Phones write JPEGs with a second image in them (MPO), which are not animations.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                animated.append(photograph.path.name)
    of = f"of {len(photographs)} images in {folder}"
    if small:
        least = min(small, key=lambda one: one[0] * one[1])  # by area
        rank_zero_warn(
            f"{len(small)} {of} are smaller than {size[0]}x{size[1]} and are enlarged, the smallest from "
            f"{least[0]}x{least[1]} (height x width); a lower resolution loses nothing of them"
        )
    if animated:
        rank_zero_warn(f"{len(animated)} {of} have several frames, and the first is taken: {listed(animated, 3)}")


def file_sha256(path: Path) -> str:
    """Hashes a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
