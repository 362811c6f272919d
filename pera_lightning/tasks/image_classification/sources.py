"""Where images come from: a folder of class folders, or scikit-learn's digits; for the hub see `hub.py`.

Sources hold no open files and pickle, so that DataLoader workers of any start method take them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch.utils.data import Dataset, default_collate

from pera_lightning.data.batching import IGNORE
from pera_lightning.data.example_hashes import hash_bytes, hash_file
from pera_lightning.data.image_files import (
    SUFFIXES,
    check_headers,
    image_files,
    open_lazily,
    require_folder,
    to_rgb,
    warn_of_other_files,
)
from pera_lightning.errors import ConfigurationError, DataError, closest, listed, shorten
from pera_lightning.files import nfc

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from pera_lightning.tasks.image_classification.transforms import Transform

SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}


class ImageSource(Protocol):
    """What every source offers.

    Attributes:
        labels: (n,) int64, -1 for unknown ones.
        class_names: names of the classes, by label.
    """

    labels: np.ndarray
    class_names: list[str]

    def image(self, index: int) -> Image.Image:
        """The image at an index, upright and RGB."""
        ...

    def identifier(self, index: int) -> str:
        """What an example is called in predictions and split files."""
        ...

    def hashes(self, indices: np.ndarray) -> Iterable[int]:
        """A hash of each image's content."""
        ...


@dataclass
class FolderSource:
    """Image files under one folder: paths relative to `root`, with forward slashes, by which they are called."""

    root: Path
    files: list[str]
    labels: np.ndarray
    class_names: list[str]

    def image(self, index: int) -> Image.Image:
        with open_lazily(self.root / self.files[index]) as image:
            return to_rgb(image)

    def identifier(self, index: int) -> str:
        return nfc(self.files[index])

    def hashes(self, indices: np.ndarray) -> Iterable[int]:
        return (hash_file(self.root / self.files[index]) for index in indices)


@dataclass
class ArraySource:
    """Grey images in memory, `pixels` (n, H, W) uint8, called by their index."""

    pixels: np.ndarray
    labels: np.ndarray
    class_names: list[str]

    def image(self, index: int) -> Image.Image:
        from PIL import Image

        return Image.fromarray(self.pixels[index]).convert("RGB")

    def identifier(self, index: int) -> str:
        return str(index)

    def hashes(self, indices: np.ndarray) -> Iterable[int]:
        return (hash_bytes(self.pixels[index].tobytes()) for index in indices)


class ImageExamples(Dataset):
    """Some examples of a source, transformed.

    Args:
        source: where the images are.
        indices: (n,) numbers of the examples in the source.
        labels: (n,) their classes.
        transform: image to tensor (3, H, W).
        with_identifier: whether items are ``(image, label, identifier)`` in place of ``(image, label)``.
    """

    def __init__(
        self, source: ImageSource, indices: np.ndarray, labels: np.ndarray, transform: Transform, with_identifier: bool
    ) -> None:
        self.source, self.indices, self.labels = source, indices, labels
        self.transform, self.with_identifier = transform, with_identifier

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        index, label = int(self.indices[number]), int(self.labels[number])
        name = self.source.identifier(index)
        try:
            image = self.source.image(index)
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error …
            of = f" of {self.source.root}" if isinstance(self.source, FolderSource) else ""
            raise DataError(f"image {name}{of} cannot be read ({shorten(str(error))}); replace or remove it") from error
        item = (self.transform(image), label)
        return (*item, name) if self.with_identifier else item


def without_label(item: tuple[Any, ...]) -> tuple[Any, ...]:
    """An item of `ImageExamples` with `IGNORE` in place of its label."""
    return (item[0], IGNORE, *item[2:])


def collate_identified(items: list[tuple[Any, int, str]]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Makes a batch of ``(image, label, identifier)``: (B, 3, H, W), (B,) and a list of B names."""
    images, labels = default_collate([item[:2] for item in items])  # names stay a list
    return images, labels, [item[2] for item in items]


def digits_source() -> ArraySource:
    """scikit-learn's 1797 handwritten digits, 8 by 8 pixels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # they come as 0 to 16
    return ArraySource(pixels, digits.target.astype(np.int64), [str(name) for name in digits.target_names])


def choose_classes(names: list[str], wanted: list[int | str]) -> list[int]:
    """Finds classes among `names` by name or by number, their original label; gives labels in the order wanted."""
    # Where the names are numbers, a number is a name, not a position.
    numeric = all(name.isdecimal() for name in names)
    found = []
    for one in wanted:
        if (name := nfc(str(one))) in names and (isinstance(one, str) or numeric):
            found.append(names.index(name))
        elif isinstance(one, int) and not numeric and 0 <= one < len(names):
            found.append(one)
        else:
            there = f"numbers 0 to {len(names) - 1}" if isinstance(one, int) and not numeric else listed(names)
            raise DataError(f"classes={wanted}: no class {one!r}; there are {there}{closest(str(one), names)}")
    if len(set(found)) < len(found):  # by name and number, or twice by one
        raise ConfigurationError(f"classes has one twice: {wanted}")
    return found


# ---- folders --------------------------------------------------------------------------------------------------------


def _folders(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(found, key=lambda path: nfc(path.name))


def read_class_folders(folder: Path, *, root: Path) -> FolderSource:
    """Reads a folder that holds a folder of images for every class; file names are relative to `root` above it."""
    classes = _folders(folder)
    if len(classes) < 2:
        found = f"only {classes[0].name}/" if classes else "none"
        raise DataError(f"{folder} must hold a folder of images for each of at least two classes; it holds {found}")
    names = [nfc(path.name) for path in classes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{folder} has {listed(twice)} twice, written in two forms of Unicode; join the folders")
    files: list[str] = []
    labels: list[int] = []
    for label, path in enumerate(classes):  # numbered by name
        own = image_files(path)
        if not own:
            has = listed(sorted(one.name for one in path.iterdir()), 3) or "nothing"
            what = f"has no images ({', '.join(SUFFIXES)}); it has {has}"
            raise DataError(f"class folder {path} {what}: add some or remove it")
        files += [(path / name).relative_to(root).as_posix() for name in own]
        labels += [label] * len(own)
    return FolderSource(root, files, np.array(labels, dtype=np.int64), names)


def folder_sources(folder: str) -> dict[str, ImageSource]:
    """Reads a local data set: class folders, or train/, validation/ (val/, valid/) and test/ that hold them.

    Returns:
        The splits that exist, "train" first; class folders without a split are all "train".
    """
    root = require_folder(folder)
    names = [path.name for path in _folders(root)]
    # Either every folder is a split, or every folder is a class.
    splits = {name: split for split, known in SPLIT_FOLDERS.items() for name in known}
    if not any(name in splits for name in names):
        return _checked(root, {"train": read_class_folders(root, root=root)})
    folders = {splits.get(name, ""): name for name in names}
    if "" in folders or len(folders) < len(names) or "train" not in folders:
        known = "train/ and no others than validation/ (or val/, valid/) and test/, each once"
        raise DataError(f"{root} has the folders {listed(names)}; needed are {known}")
    found: dict[str, FolderSource] = {}
    for split in SPLIT_FOLDERS:
        if split in folders:
            found[split] = read_class_folders(root / folders[split], root=root)
            same_classes(f"{root}: {split}", found[split].class_names, found["train"].class_names)
    return _checked(root, found)


def _checked(root: Path, found: dict[str, FolderSource]) -> dict[str, ImageSource]:
    """Names the images of all splits that are broken, and the files that are in none."""
    files = [name for source in found.values() for name in source.files]
    check_headers(root, files)
    warn_of_other_files(root, {*files})
    return {**found}


def same_classes(where: str, names: list[str], training: list[str]) -> None:
    """Refuses a split whose class names are not those of training, naming the difference."""
    sides = {"lacks": {*training} - {*names}, "also has": {*names} - {*training}}
    if said := [f"{verb} {listed(sorted(those))}" for verb, those in sides.items() if those]:
        raise DataError(
            f"{where} {', and '.join(said)}, unlike training; every split needs the same classes (predict takes images "
            "of some, and writes the classes that are known)"
        )


def predict_source(given: str | list[str], class_names: list[str]) -> FolderSource:
    """Images to predict on: of one folder all at any depth, or several folders and files.

    A folder that is called like a class, between the given one and an image or the given one itself, is its label.
    """
    places = [given] if isinstance(given, str) else given
    number = {name: label for label, name in enumerate(class_names)}
    root, files, labels = Path(), [], []
    for place in (Path(place).expanduser() for place in places):
        is_file = place.exists() and not place.is_dir()
        above = place.parent if is_file else require_folder(str(place))
        found = [place.name] if is_file else image_files(above)
        if len(places) == 1 and not is_file:
            root, files = above, found  # files are called by their path within it
            warn_of_other_files(root, {*files})
        else:
            files += [(above / name).as_posix() for name in found]
        # Folders above the given one are somebody's home, or a project: they say nothing. Of those within it the
        # outermost counts, as in training.
        own = nfc(above.absolute().name)
        folders = ([*Path(nfc(name)).parts[:-1], own] for name in found)
        labels += [next((number[folder] for folder in those if folder in number), -1) for those in folders]
    if not files:
        raise DataError(f"predict_folder {given} has no images ({', '.join(SUFFIXES)}) at any depth")
    check_headers(root, files)
    return FolderSource(root, files, np.array(labels, dtype=np.int64), class_names)
