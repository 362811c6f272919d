"""Generated images: the folder that predict writes and `grid` reads, and grids of them with labels.

The folder is RUN/images/: a PNG for each prompt and seed, and `images.json`, which says what they are of. Nothing here
imports torch: a grid is drawn in less time than that takes.
"""

from __future__ import annotations

import json
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from pera_lightning.errors import ConfigurationError, DataError, listed, shorten
from pera_lightning.files import atomic_write, png, read_text

if TYPE_CHECKING:
    from torch import Tensor

FOLDER, FILE, GRID = "images", "images.json", "grid.png"
MOST_PIXELS = 30_000_000  # of a grid; a PNG of photographs has about a byte a pixel
# Of a grid, and of a row or column: as many as stay below `MOST_PIXELS` in the smallest cells.
MOST_CELLS, MOST_BESIDE = 2500, 500
_SMALLEST = 256  # pixels; smaller images are enlarged, for labels would not fit beside them
_SHORTEST = 64  # likewise, the other side
_INK, _GREY, _EMPTY = (0, 0, 0), (110, 110, 110), (240, 240, 240)
# What Pillow's own font lacks, and what reads the same.
_LIKE = str.maketrans({"–": "-", "—": "-", "−": "-", "×": "x", "ß": "ss", "ø": "o", "Ø": "O", "æ": "ae", "ł": "l"})


# --- the folder ---


@dataclass(frozen=True)
class GeneratedImage:
    """One image: its file's name in the folder, and what it was made from."""

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
        images: in the order of prompts and seeds.
    """

    model_name: str
    adapter: Mapping[str, Any] | None
    step: int
    sampling: Mapping[str, Any]
    images: tuple[GeneratedImage, ...]


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images of a network as pictures.

    Args:
        images: (B, 3, H, W), values in [0, 1]; what lies outside is cut off, and what is not finite becomes black,
            with a warning.
    """
    images = images.detach().float().cpu()
    broken = int((~images.isfinite()).flatten(1).any(1).sum())
    if broken:
        warnings.warn(
            f"{broken} of {len(images)} generated images have NaN or infinite values, which are drawn black: decode "
            "with the VAE in float32 or one made for float16, and look at the loss",
            stacklevel=2,
        )
    pixels = images.nan_to_num(0, 0, 0).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(one) for one in pixels]


def save_images(images: Sequence[Image.Image], names: Sequence[str], folder: str | Path) -> list[Path]:
    """Writes pictures as NAME.png, each atomically; any number of ranks may write their own into one folder.

    Args:
        images: the pictures.
        names: of the files, without their ending.
        folder: made where it does not exist.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = [Path(folder) / f"{name}.png" for name in names]
    for image, path in zip(images, paths, strict=True):
        save_picture(image, path)
    return paths


def save_picture(image: Image.Image, path: Path) -> int:
    """Writes a PNG atomically; returns its bytes."""
    data = png(image)
    atomic_write(path, data)
    return len(data)


def unlist_images(folder: str | Path) -> list[Path]:
    """Removes the list and the grid of images that were made before, so that one cut short leaves no list of others.

    To be called by one rank.

    Returns:
        The images that were listed; they are still there.
    """
    file = Path(folder) / FILE
    try:
        listed_images = [file.with_name(image.file) for image in read_images(folder).images]
    except DataError:  # none, or a damaged one, which names no file for sure
        listed_images = []
    for one in (file, file.with_name(GRID)):
        one.unlink(missing_ok=True)
    return listed_images


def write_images(folder: str | Path, generated: GeneratedImages) -> Path:
    """Writes `images.json`, atomically; by one rank, when the PNGs of all are there."""
    file = Path(folder) / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, (json.dumps(asdict(generated), indent=1) + "\n").encode())
    return file


def read_images(folder: str | Path) -> GeneratedImages:
    """Reads `images.json`; `read_picture` opens the images.

    Raises:
        DataError: where it is missing, damaged or lists no image.
    """
    file = Path(folder) / FILE
    try:
        found = json.loads(read_text(file))
        images = tuple(GeneratedImage(**one) for one in found.pop("images"))
        generated = GeneratedImages(**found, images=images)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is damaged ({shorten(str(error))}); run predict again") from None
    kinds = (generated.model_name, str), (generated.sampling, Mapping), (generated.adapter or {}, Mapping)
    for value, kind in kinds + tuple(pair for one in images for pair in ((one.prompt, str), (one.seed, int))):
        if not isinstance(value, kind):
            raise DataError(f"{file} is damaged ({shorten(repr(value))[:60]} is no {kind.__name__}); run predict again")
    for one in images:
        if not isinstance(one.file, str) or Path(one.file).name != one.file:
            raise DataError(f"{file} names {one.file!r}, which is no file of its folder; run predict again")
    if not images:
        raise DataError(f"{file} lists no image; run predict again")
    return generated


def read_picture(path: Path, most_pixels: float = MOST_PIXELS) -> Image.Image:
    """A generated image, in memory.

    Args:
        path: of the file.
        most_pixels: larger ones are scaled down to this, so that those of a large grid have room in memory.

    Raises:
        DataError: where it is missing or broken, naming it.
    """
    try:
        with Image.open(path) as image:
            factor = (most_pixels / (image.width * image.height)) ** 0.5
            image.load()
            return image if factor >= 1 else _fitted(image, (int(image.width * factor), int(image.height * factor)))
    except FileNotFoundError:
        raise DataError(f"{path} is listed in {FILE}, but is not there; run predict again") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error …
        raise DataError(f"{path} cannot be read ({shorten(str(error))}); run predict again") from error


# --- grids ---


def labelled_grid(
    images: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
) -> Image.Image:
    """Draws images in rows and columns, with labels, on white.

    All cells have one size, that of the largest image, or less where the whole would have more than `MOST_PIXELS`;
    other images are fitted into them, whole and undistorted. What follows a line break in a label is a detail: it is
    written below in grey. Long labels are wrapped, then cut with an ellipsis, the detail last.

    Args:
        images: rows of equal length; None leaves a cell empty.
        row_labels: one a row; they stand at the left. All may be empty.
        column_labels: one a column; they stand above. All may be empty.
        title: stands at the top; may be empty.

    Raises:
        ConfigurationError: for no image, too many, or labels that do not fit the images.
    """
    shape = (len(images), len(images[0]) if images else 0)
    check_shape(*shape)
    if any(len(row) != shape[1] for row in images) or (len(row_labels), len(column_labels)) != shape:
        lengths = listed(dict.fromkeys(str(len(row)) for row in images))
        raise ConfigurationError(
            f"{shape[0]} rows of {lengths} images, {len(row_labels)} row labels and {len(column_labels)} column labels "
            "do not make a grid"
        )
    there = [image for row in images for image in row if image is not None]
    width, height = (max((getattr(image, side) for image in there), default=1) for side in ("width", "height"))
    scale = max(1.0, _SMALLEST / max(width, height))
    while True:
        cell = (max(_SHORTEST, round(width * scale)), max(_SHORTEST, round(height * scale)))
        plan = _Plan(cell, row_labels, column_labels, title)
        pixels = plan.width * plan.height
        if pixels <= MOST_PIXELS or cell == (_SHORTEST, _SHORTEST):
            return plan.draw(images)
        scale *= 0.99 * (MOST_PIXELS / pixels) ** 0.5


def check_shape(rows: int, columns: int) -> None:
    """Raises `ConfigurationError` for a grid of no images, or of more than can be seen."""
    if not (0 < rows <= MOST_BESIDE and 0 < columns <= MOST_BESIDE and rows * columns <= MOST_CELLS):
        raise ConfigurationError(
            f"a grid of {rows} x {columns} images cannot be drawn: 1 to {MOST_CELLS} are needed, and at most "
            f"{MOST_BESIDE} in a row or column; choose among them"
        )


class _Plan:
    """Where everything stands in a grid whose cells have a given size.

    Args:
        cell: width and height in pixels.
        row_labels: see `labelled_grid`.
        column_labels: likewise.
        title: likewise.
    """

    def __init__(
        self, cell: tuple[int, int], row_labels: Sequence[str], column_labels: Sequence[str], title: str
    ) -> None:
        self.cell, self.columns = cell, len(column_labels)
        size = max(11, round(min(cell[0], 1.5 * cell[1]) / 16))
        self.font, self.title_font = _font(size), _font(round(1.25 * size))
        self.line, self.margin, self.gap = round(1.3 * size), round(1.2 * size), max(4, round(0.4 * size))
        most = max(2, cell[1] // self.line)
        self.row_texts = [_label(text, self.font, max(round(0.8 * cell[0]), 9 * size), most) for text in row_labels]
        self.column_texts = [_label(text, self.font, cell[0], 4) for text in column_labels]
        across = self.columns * (cell[0] + self.gap) - self.gap
        self.title_text = _label(title, self.title_font, across, 3)

        beside = max(self.font.getlength(line) for text in self.row_texts for line, _ in [*text, ("", _INK)])
        above = self.line * max(map(len, self.column_texts))
        self.title_height = round(1.3 * self.title_font.size) * len(self.title_text)
        self.row_height = max(cell[1], self.line * max(map(len, self.row_texts)))
        self.left = self.margin + (round(beside) + size if beside else 0)
        self.top = (
            self.margin + self.title_height + (size if self.title_text else 0) + above + (self.gap if above else 0)
        )
        self.width = self.left + across + self.margin
        self.height = self.top + len(row_labels) * (self.row_height + self.gap) - self.gap + self.margin

    def draw(self, images: Sequence[Sequence[Image.Image | None]]) -> Image.Image:
        """The grid as a picture."""
        whole = Image.new("RGB", (self.width, self.height), "white")
        pen = ImageDraw.Draw(whole)
        middle = (self.left + self.width - self.margin) / 2
        self._write(pen, self.title_text, self.title_font, middle, self.margin, centred=True)
        for j, text in enumerate(self.column_texts):
            x = self.left + j * (self.cell[0] + self.gap) + self.cell[0] / 2
            self._write(pen, text, self.font, x, self.top - self.gap - self.line * len(text), centred=True)
        for i, row in enumerate(images):
            y = self.top + i * (self.row_height + self.gap)
            text = self.row_texts[i]
            self._write(pen, text, self.font, self.margin, y + (self.row_height - self.line * len(text)) / 2)
            for j, image in enumerate(row):
                x = self.left + j * (self.cell[0] + self.gap)
                if image is None:
                    pen.rectangle((x, y, x + self.cell[0] - 1, y + self.row_height - 1), fill=_EMPTY)
                    continue
                fitted = _fitted(image, self.cell)
                whole.paste(
                    fitted, (x + (self.cell[0] - fitted.width) // 2, y + (self.row_height - fitted.height) // 2)
                )
        return whole

    @staticmethod
    def _write(
        pen: ImageDraw.ImageDraw,
        text: list[tuple[str, tuple[int, int, int]]],
        font: ImageFont.FreeTypeFont,
        x: float,
        y: float,
        *,
        centred: bool = False,
    ) -> None:
        step = round(1.3 * font.size)
        for k, (line, colour) in enumerate(text):
            # "m": the middle between ascender and descender, the same in lines with and without descenders
            pen.text((x, y + (k + 0.5) * step), line, fill=colour, font=font, anchor="mm" if centred else "lm")


def _fitted(image: Image.Image, cell: tuple[int, int]) -> Image.Image:
    """An image in RGB, as large as goes into a cell."""
    factor = min(max(1, cell[0]) / image.width, max(1, cell[1]) / image.height)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _label(text: str, font: ImageFont.FreeTypeFont, width: float, most: int) -> list[tuple[str, tuple[int, int, int]]]:
    """A label as lines with their colours; see `labelled_grid` for what a line break in it means."""
    head, _, detail = text.partition("\n")
    below = _wrapped(_drawable(detail), font, width, max(1, most // 2))
    above = _wrapped(_drawable(head), font, width, max(1, most - len(below)))
    return [(line, _INK) for line in above] + [(line, _GREY) for line in below]


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float, most: int) -> list[str]:
    """At most `most` lines of at most `width` pixels, broken between words, and within those that are wider."""
    lines: list[str] = []
    rest = text
    while rest:
        end = len(rest)
        if font.getlength(rest) > width:
            end = next((k for k in range(1, len(rest)) if font.getlength(rest[: k + 1]) > width), len(rest))
            # Between words; else after a sign, as in names of folders; else anywhere.
            space, sign = rest.rfind(" ", 1, end + 1), max(rest.rfind(one, 0, end) for one in "_-/=,")
            end = space if space > 0 else sign + 1 or end
        if len(lines) == most - 1 and end < len(rest):
            end = len(rest)
            while end > 1 and font.getlength(rest[:end].rstrip() + "…") > width:
                end -= 1
            return [*lines, rest[:end].rstrip() + "…"]
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return lines


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # type: ignore[return-value]


def _drawable(text: str) -> str:
    """Text on one line, at most 500 characters, with letters that the font lacks replaced where one reads the same.

    Others are drawn as the font's empty box.
    """
    text = shorten(text[:500]).translate(_LIKE)
    letters = (one if _has_glyph(one) else unicodedata.normalize("NFKD", one) for one in text)
    # Accents that the line above parted, marks of direction, joiners, control characters, halves of surrogate pairs.
    return "".join(one for one in "".join(letters) if unicodedata.category(one) not in ("Mn", "Cf", "Cc", "Cs"))


@lru_cache(maxsize=4096)
def _has_glyph(letter: str) -> bool:
    drawn, missing = (_font(20).getmask(one) for one in (letter, "\uffff"))  # U+FFFF is no character
    return (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))
