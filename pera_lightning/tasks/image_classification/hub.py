"""Images of the hub: one split of a data set, with its labels read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pera_lightning.data.example_hashes import hash_bytes, hash_file
from pera_lightning.data.image_files import open_lazily, to_rgb
from pera_lightning.errors import DataError, listed
from pera_lightning.files import nfc
from pera_lightning.tasks.image_classification.sources import same_classes

if TYPE_CHECKING:
    import datasets
    from PIL import Image


@dataclass
class HubSource:
    """One split of a data set of the hub, as Arrow keeps it on disk."""

    table: datasets.Dataset
    column: str
    labels: np.ndarray
    class_names: list[str]

    def image(self, index: int) -> Image.Image:
        """The image at an index, upright and RGB."""
        encoded = self.table[index][self.column] or {}  # bytes, or the path of a file in the cache
        if encoded.get("bytes") is None and encoded.get("path") is None:
            raise ValueError("the example has no image")
        content = encoded.get("bytes")
        with open_lazily(Path(encoded["path"]) if content is None else io.BytesIO(content)) as image:
            return to_rgb(image)

    def identifier(self, index: int) -> str:
        """The index in the table."""
        return str(index)

    def hashes(self, indices: np.ndarray) -> Iterator[int]:
        """A hash of each image as it is stored."""
        for index in indices.tolist():
            encoded = self.table[index][self.column] or {}
            path, content = encoded.get("path"), encoded.get("bytes")
            yield hash_file(Path(path)) if content is None and path else hash_bytes(content or b"")


def _words(kind: object) -> str:
    """A feature's type, short enough for a message."""
    return str(getattr(kind, "dtype", None) or type(kind).__name__)


def hub_source(
    table: datasets.Dataset, where: str, image_column: str, label_column: str, training_names: list[str] | None
) -> HubSource:
    """One split of a data set of the hub, its labels read and its images left where they are.

    Args:
        table: the split.
        where: words for it in messages.
        image_column: column of the images.
        label_column: column of the classes: class labels, integers or text.
        training_names: class names of the training split; None for that split itself.
    """
    import datasets

    for argument, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in table.column_names:
            names = table.column_names
            raise DataError(f"{where} has no column {column!r}: give {argument}, one of {', '.join(names)}")
    if not len(table):
        raise DataError(f"{where} has no examples")
    kind = table.features[image_column]
    # Images that were saved as plain bytes are taken too.
    plain = kind == datasets.Value("binary") or (isinstance(kind, dict) and "bytes" in kind)
    if not (plain or isinstance(kind, datasets.Image)):
        raise DataError(f"{where}: column {image_column!r} holds no images but {_words(kind)}; give image_column")
    # Decoded here: datasets would take any format that Pillow knows.
    table = table.cast_column(image_column, datasets.Image(decode=False))
    labels, names = read_labels(table, label_column, training_names, where)
    return HubSource(table.select_columns([image_column]), image_column, labels, names)


def read_labels(
    table: datasets.Dataset, column: str, training_names: list[str] | None, where: str
) -> tuple[np.ndarray, list[str]]:
    """Reads a label column in the numbering of the training split.

    Class labels are numbered as declared, integers and text in sorted order.

    Returns:
        (n,) int64, -1 for a label that is missing or negative; and the class names.
    """
    import datasets

    kind = table.features[column]
    values = table.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()  # reads no image
    if isinstance(kind, datasets.ClassLabel):
        own = [nfc(name) for name in kind.names]
        if twice := sorted({name for name in own if own.count(name) > 1}):
            raise DataError(f"{where}: column {column!r} has the classes {listed(twice)} twice; give label_column")
        if training_names is not None:
            same_classes(where, own, training_names)
        values = [None if value is None or value < 0 else own[value] for value in values]
    elif isinstance(kind, datasets.Value) and (kind.dtype == "string" or kind.dtype.startswith(("int", "uint"))):
        values = [nfc(value) if isinstance(value, str) else value for value in values]
        known = {value for value in values if value is not None and (isinstance(value, str) or value >= 0)}
        own = [str(value) for value in sorted(known)]
        values = [str(value) if value in known else None for value in values]
        # A small evaluation split may lack a class here: values are what is there, not what is declared.
        if training_names is not None and (extra := [name for name in own if name not in set(training_names)]):
            raise DataError(f"{where} has {listed(extra)} in column {column!r} that training lacks")
    else:
        raise DataError(f"{where}: column {column!r} holds no classes but {_words(kind)}; give label_column")
    names = own if training_names is None else training_names
    number = {name: index for index, name in enumerate(names)}
    return np.array([-1 if value is None else number[value] for value in values], dtype=np.int64), names
