"""A subject's photographs and their captions, found in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pera_lightning.data.image_files import SUFFIXES, check_headers, image_files, require_folder
from pera_lightning.data.json_files import read_json
from pera_lightning.errors import DataError, listed, shorten
from pera_lightning.files import read_text
from pera_lightning.tasks.dreambooth.preprocessing import size_of

METADATA = "metadata.jsonl"


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
    captions = read_captions(root, files)
    bare = [name for name in files if name not in captions]  # only some: perhaps forgotten
    if captions and bare:
        rank_zero_warn(
            f"{len(bare)} of {len(files)} images in {folder} have no caption of their own and take {prompt!r}: "
            f"{listed(bare, 3)}"
        )
    return [Photograph(root / name, captions.get(name, prompt)) for name in files]


def read_captions(root: Path, files: Sequence[str]) -> dict[str, str]:
    """Reads captions by file, from ``metadata.jsonl`` (``file_name``, ``text``) and ``NAME.txt`` beside the images."""
    captions = _metadata(root, files) if (root / METADATA).is_file() else {}
    for name in files:
        beside = (root / name).with_suffix(".txt")  # a.txt for a.png
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
    for number, line in enumerate(read_json(path)):
        # Both, and neither empty.
        values = [line.get(key) if isinstance(line, Mapping) else None for key in ("file_name", "text")]
        if not all(isinstance(value, str) and value.strip() for value in values):
            has = listed(map(str, line)) if isinstance(line, Mapping) else type(line).__name__
            raise DataError(f"entry {number} of {path} needs a file_name and a text, neither empty; it has {has}")
        name, text = Path(values[0]).as_posix(), shorten(values[1])  # "./a.png" is a.png
        if found.setdefault(name, text) != text:
            raise DataError(f"{name} has two captions in {path}; keep one, or copy the image to train with both")
    if absent := [name for name in found if name not in known]:
        raise DataError(f"{path} names {len(absent)} image(s) that are not there: {listed(absent, 3)}; remove them")
    return found


def warn_of_unusual(photographs: Sequence[Photograph], folder: str, size: tuple[int, int]) -> None:
    """Warns, once each, of images that are enlarged and of animations, of which the first frame is taken."""
    from PIL import Image

    small: list[tuple[int, int]] = []
    animated: list[str] = []
    for photograph in photographs:
        with Image.open(photograph.path) as image:
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
