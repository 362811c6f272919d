"""Where pictures come from: a folder of class folders, or scikit-learn's digits; for the hub see `hub.py`.

A source has `labels` (n,) int64, -1 for unknown ones, `class_names`, and two methods: `image(row)`, an RGB picture,
and `identifier(row)`, what that row is called in predictions and split files. Sources hold no open files and pickle,
so that DataLoader workers of any start method take them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch.utils.data import Dataset, default_collate

from pera_lightning.data.batching import IGNORE
from pera_lightning.data.image_files import SUFFIXES, check_headers, image_files, require_folder, to_rgb
from pera_lightning.errors import ConfigurationError, DataError, closest, listed, shorten

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from pera_lightning.tasks.image_classification.transforms import Transform

SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}


class ImageSource(Protocol):
    """What every source offers; see the head of this file."""

    labels: np.ndarray
    class_names: list[str]

    def image(self, row: int) -> Image.Image:
        """The picture of a row, upright and RGB."""
        ...

    def identifier(self, row: int) -> str:
        """What a row is called."""
        ...


@dataclass
class FolderSource:
    """Picture files under one folder.

    Attributes:
        root: the folder.
        files: paths relative to `root`, with forward slashes.
    """

    root: Path
    files: list[str]
    labels: np.ndarray
    class_names: list[str]

    def image(self, row: int) -> Image.Image:
        """The picture of a row, upright and RGB."""
        from PIL import Image

        with Image.open(self.root / self.files[row]) as image:
            return to_rgb(image)

    def identifier(self, row: int) -> str:
        """The file's path below the folder."""
        return self.files[row]


@dataclass
class ArraySource:
    """Grey pictures in memory: `pixels` (n, H, W) uint8."""

    pixels: np.ndarray
    labels: np.ndarray
    class_names: list[str]

    def image(self, row: int) -> Image.Image:
        """The picture of a row, upright and RGB."""
        from PIL import Image

        return Image.fromarray(self.pixels[row]).convert("RGB")

    def identifier(self, row: int) -> str:
        """The row's number."""
        return str(row)


class ImageExamples(Dataset):
    """Some examples of a source, transformed.

    Args:
        source: where the pictures are.
        rows: (n,) numbers of the examples in the source.
        labels: (n,) their classes.
        transform: picture to tensor (3, H, W).
        with_identifier: whether items are ``(image, label, identifier)`` in place of ``(image, label)``.
    """

    def __init__(
        self, source: ImageSource, rows: np.ndarray, labels: np.ndarray, transform: Transform, with_identifier: bool
    ) -> None:
        self.source = source
        self.rows = rows
        self.labels = labels
        self.transform = transform
        self.with_identifier = with_identifier

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        row, label = int(self.rows[index]), int(self.labels[index])
        try:
            image = self.source.image(row)
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error …
            where = getattr(self.source, "root", None)
            name = self.source.identifier(row)
            of = f"image {name} of {where}" if where else f"image of row {name}"
            raise DataError(f"{of} cannot be read ({shorten(str(error))}); replace or remove it") from error
        item = (self.transform(image), label)
        return (*item, self.source.identifier(row)) if self.with_identifier else item


def without_label(item: tuple[Any, ...]) -> tuple[Any, ...]:
    """An item of `ImageExamples` with `IGNORE` in place of its label."""
    return (item[0], IGNORE, *item[2:])


def collate_identified(items: list[tuple[Any, int, str]]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Makes a batch of ``(image, label, identifier)``: (B, 3, H, W), (B,) and a list of B names."""
    images, labels = default_collate([item[:2] for item in items])
    return images, labels, [item[2] for item in items]


def digits_source() -> ArraySource:
    """scikit-learn's 1797 handwritten digits, 8 by 8 pixels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return ArraySource(pixels, digits.target.astype(np.int64), [str(name) for name in digits.target_names])


def choose_classes(names: list[str], wanted: list[int | str]) -> list[int]:
    """Finds classes by name or number.

    Args:
        names: names of all classes, in their order.
        wanted: names, or numbers: original labels, which are the names themselves if these are numbers.

    Returns:
        Positions in `names`, in the order wanted.

    Raises:
        DataError: for a class that does not exist.
        ConfigurationError: for a class that is given twice.
    """
    # Where the names are numbers, a number is a name, not a position.
    numeric = all(name.isdecimal() for name in names)
    found = []
    for one in wanted:
        if str(one) in names and (isinstance(one, str) or numeric):
            found.append(names.index(str(one)))
        elif isinstance(one, int) and not numeric and 0 <= one < len(names):
            found.append(one)
        else:
            there = f"numbers 0 to {len(names) - 1}" if isinstance(one, int) and not numeric else listed(names)
            raise DataError(f"no class {one!r}; there are {there}{closest(str(one), names)}")
    if len(set(found)) < len(found):
        raise ConfigurationError(f"classes has one twice: {wanted}")
    return found


# ---- folders --------------------------------------------------------------------------------------------------------


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_class_folders(folder: Path, *, root: Path) -> FolderSource:
    """Reads a folder that holds a folder of pictures for every class.

    Args:
        folder: folder that holds the class folders.
        root: what the file names are relative to: `folder`, or the data set's own folder above it.

    Raises:
        DataError: for fewer than two classes, an empty class or a broken picture.
    """
    classes = _folders(folder)
    if len(classes) < 2:
        found = f"only {classes[0].name}/" if classes else "none"
        raise DataError(f"{folder} must hold a folder of images for each of at least two classes; it holds {found}")
    files: list[str] = []
    labels: list[int] = []
    for label, path in enumerate(classes):
        own = image_files(path)
        if not own:
            raise DataError(f"class folder {path} has no images ({', '.join(SUFFIXES)}); add some or remove it")
        files += [(path / name).relative_to(root).as_posix() for name in own]
        labels += [label] * len(own)
    check_headers(root, files)
    return FolderSource(root, files, np.array(labels, dtype=np.int64), [path.name for path in classes])


def folder_sources(folder: str) -> dict[str, ImageSource]:
    """Reads a local data set: class folders, or train/, validation/ (val/, valid/) and test/ that hold them.

    Returns:
        The splits that exist; class folders without a split are all "train".

    Raises:
        DataError: for a missing folder, an unknown name of a split, or splits with different classes.
    """
    root = require_folder(folder)
    names = [path.name for path in _folders(root)]
    # Either every folder is a split, or every folder is a class.
    splits = {name: split for split, known in SPLIT_FOLDERS.items() for name in known}
    if not any(name in splits for name in names):
        return {"train": read_class_folders(root, root=root)}
    known = "train/, validation/ (or val/, valid/) and test/"
    if strange := [name for name in names if name not in splits]:
        raise DataError(f"{root} has split folders and also {listed(strange)}; beside {known} nothing is expected")
    if len({splits[name] for name in names}) < len(names):
        raise DataError(f"{root} has more than one validation folder: {listed(names)}; keep one")
    if "train" not in names:
        raise DataError(f"{root} has {listed(names)} but no train/; expected {known}, or class folders alone")
    found: dict[str, ImageSource] = {
        split: read_class_folders(root / name, root=root)
        for split in SPLIT_FOLDERS
        for name in names
        if splits[name] == split
    }
    for split, source in found.items():
        same_classes(f"{root}: {split}", source.class_names, found["train"].class_names)
    return found


def same_classes(where: str, names: list[str], training: list[str]) -> None:
    """Refuses a split whose class names are not those of training, naming the difference."""
    extra = [name for name in names if name not in set(training)]
    lacking = [name for name in training if name not in set(names)]
    if extra or lacking:
        parts = [f"has {listed(extra)} that training lacks"] * bool(extra)
        parts += [f"lacks {listed(lacking)} that training has"] * bool(lacking)
        raise DataError(f"{where} {' and '.join(parts)}; every split needs the same classes")


def predict_source(folder: str, class_names: list[str]) -> FolderSource:
    """All pictures under a folder, at any depth; a folder on their path that is called like a class is their label.

    Raises:
        DataError: for a folder without pictures, or with a broken one.
    """
    root = require_folder(folder)
    files = image_files(root)
    if not files:
        raise DataError(f"predict_folder {folder} has no images ({', '.join(SUFFIXES)}) at any depth")
    check_headers(root, files)
    number = {name: label for label, name in enumerate(class_names)}
    # The outermost folder that is called like a class counts.
    labels = [next((number[part] for part in Path(file).parts[:-1] if part in number), -1) for file in files]
    return FolderSource(root, files, np.array(labels, dtype=np.int64), class_names)
