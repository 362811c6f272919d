"""Image files under a folder: finding them, checking their headers, and reading them upright and in RGB."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from pera_lightning.data.folder_files import files_under, warn_of_unread
from pera_lightning.errors import DataError, closest, listed, shorten
from pera_lightning.files import require_regular

if TYPE_CHECKING:
    from PIL import Image

# What is read, by Pillow's names: a file is found by its suffix and decoded as one of these formats, never as another
# that its content may say. (Of an EPS called .png Pillow would start Ghostscript.)
FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
}
SUFFIXES = tuple(suffix for own in FORMATS.values() for suffix in own)

_WIDTH, _LENGTH, _BITS = 256, 257, 258  # TIFF's tags: columns, rows, bits per sample
_ORIENTATION, _SIDEWAYS = 0x0112, range(5, 9)  # EXIF's tag, and its values that swap height and width


def open_lazily(file: Path | IO[bytes]) -> Image.Image:
    """Opens an image, of which only the header is read yet, as one of `FORMATS`.

    Raises:
        OSError: for another format, and for a path that is no regular file.
    """
    from PIL import Image

    if isinstance(file, Path):
        require_regular(file)
    return Image.open(file, formats=list(FORMATS))


def size_of(image: Image.Image) -> tuple[int, int]:
    """Gives height and width in pixels of an opened image once it is upright; reads its header only."""
    width, height = image.size
    if image.format == "TIFF":  # some versions of Pillow have turned this size already
        width, height = image.tag_v2[_WIDTH], image.tag_v2[_LENGTH]  # type: ignore[attr-defined]
    return (width, height) if image.getexif().get(_ORIENTATION) in _SIDEWAYS else (height, width)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turns an opened image of any mode upright (EXIF) and into RGB.

    Transparency is composited on white; 16-bit grey is scaled down to 8 (Pillow would clip it to white).

    Raises:
        ValueError: for pixels without a known range (32-bit integers, signed ones, floats).
    """
    from PIL import Image, ImageOps

    bits = _grey_bits(image)  # before turning, which forgets the format
    image = ImageOps.exif_transpose(image)
    if bits is not None:
        return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey_bits(image: Image.Image) -> int | None:
    """Bits per pixel of a grey image of more than 8; None for all other images."""
    tags = getattr(image, "tag_v2", {})  # TIFF's; 12 bits are among what Pillow calls I;16
    if image.mode.startswith("I;16"):
        return tags.get(_BITS, (16,))[0]
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits: neither format has 32
        return 16
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no known range of values; save it with 8 or 16 bits a channel")
    return None


def image_files(folder: Path) -> list[str]:
    """Image files under a folder at any depth: sorted relative paths; hidden files and other types are left out."""
    return [name for name in files_under(folder) if Path(name).suffix.lower() in SUFFIXES]


def warn_of_other_files(folder: Path, read: Collection[str], also: str = "") -> None:
    """Warns of files under a folder that are not among those that are `read`, such as photographs in HEIC.

    `also` says what is read beside images.
    """
    others = [name for name in files_under(folder) if name not in read]
    kinds = f"images are read from {', '.join(SUFFIXES)}{also and f', {also}'}"
    warn_of_unread(folder, others, f"{kinds}; convert images of other kinds")


def check_headers(root: Path, files: Collection[str]) -> None:
    """Opens every image's header (a tenth of a millisecond each); raises a `DataError` that names the broken ones.

    Damage further in shows when an image is decoded, and is named there. Says once how many are transparent.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # which takes seconds, and `grid` does without

    broken, transparent, why = [], [], ""
    for name in files:
        try:
            with open_lazily(root / name) as image:
                transparent += [name] if image.has_transparency_data else []
                image.verify()
        except Exception as error:  # as many kinds as there are formats
            why = why if broken else shorten(str(error)) or type(error).__name__
            broken.append(name)
    if broken:
        raise DataError(
            f"{len(broken)} broken image(s) under {root}: {listed(broken)}; replace or remove them (the first: "
            f"{why}; a file's content must be {', '.join(FORMATS)})"
        )
    if transparent:
        rank_zero_warn(
            f"{len(transparent)} of {len(files)} images under {root} have an alpha channel: what is transparent "
            f"becomes white ({listed(transparent, 3)})"
        )


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
