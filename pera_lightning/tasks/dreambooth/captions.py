"""Captions of photographs, in the forms that tools of this field write.

``metadata.jsonl`` and ``metadata.csv`` (Hugging Face's imagefolder: ``file_name``, relative to the file's own folder,
and ``text``), at any depth; ``NAME.txt`` and ``NAME.caption`` (kohya's) beside ``NAME.jpg``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pera_lightning.data.csv_files import read_csv
from pera_lightning.data.folder_files import files_under
from pera_lightning.data.json_files import read_json
from pera_lightning.errors import DataError, listed, shorten
from pera_lightning.files import nfc, read_text

METADATA = ("metadata.jsonl", "metadata.csv")
BESIDE = (".txt", ".caption")
FORMS = ", ".join([*METADATA, *(f"NAME{suffix}" for suffix in BESIDE)])  # in words


class Captions:
    """The captions of the images of a folder.

    Args:
        root: the folder.
        files: its images, relative to it.

    Attributes:
        texts: captions, by image.
        files: the files that they were read from, relative to the folder.

    Raises:
        DataError: for a caption that is empty or of an image that is not there, and for an image with two.
    """

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self.root = root
        self.texts: dict[str, str] = {}
        self.files: dict[str, None] = {}
        self._sources: dict[str, str] = {}  # by image
        there = files_under(root)
        # By names in NFC, since one of the two may have been written on a Mac.
        images = {nfc(name): name for name in files}
        for file in there:
            if Path(file).name in METADATA:
                self._read_metadata(file, images, {nfc(name) for name in there})
        # A suffix may be in capitals, as an image's may: A.TXT beside A.JPG.
        existing = {nfc(Path(name).with_suffix(Path(name).suffix.lower()).as_posix()): name for name in there}
        for name in files:
            for suffix in BESIDE:  # a.txt for a.png
                if file := existing.get(nfc(Path(name).with_suffix(suffix).as_posix())):
                    self._read_beside(file, name)

    def _read_metadata(self, file: str, images: Mapping[str, str], there: Collection[str]) -> None:
        path, absent, unread = self.root / file, [], []
        for number, entry in enumerate(_entries(path)):
            # Both, and neither empty.
            values = [entry.get(key) if isinstance(entry, Mapping) else None for key in ("file_name", "text")]
            if not all(isinstance(value, str) and value.strip() for value in values):
                has = listed(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
                raise DataError(f"entry {number} of {path} needs a file_name and a text, neither empty; it has {has}")
            name = nfc(Path(os.path.normpath(Path(file).parent / values[0])).as_posix())  # "./a.png" is a.png
            if name in images:
                self._add(images[name], shorten(values[1]), file)
            else:
                (unread if name in there else absent).append(name)
        for names, what, advice in (
            (absent, "image(s) that are not there", "remove them (a file_name is relative to that file's folder)"),
            (unread, "file(s) that are not read as images", "convert or remove them"),
        ):
            if names:
                raise DataError(f"{path} names {len(names)} {what}: {listed(names, 3)}; {advice}")

    def _read_beside(self, file: str, image: str) -> None:
        text = shorten(read_text(self.root / file))
        if not text:
            path = self.root / file
            raise DataError(f"caption {path} is empty; write one, or remove the file to train with the prompt")
        self._add(image, text, file)

    def _add(self, image: str, text: str, file: str) -> None:
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # JSON can say it; UTF-8 and tokenizers cannot
            raise DataError(f"{self.root / file}: the caption of {image} holds half a character, a lone surrogate")
        self.files[file] = None
        source = self._sources.setdefault(image, file)
        if self.texts.setdefault(image, text) == text:
            return
        where, what = f"in {self.root / file}", "keep one, or copy the image to train with both"
        if source != file:
            where, what = f"in {self.root / source} and {where}", "remove one of them"
        raise DataError(f"{image} has two captions, {where}; {what}")


def _entries(path: Path) -> list[Any]:
    if path.suffix != ".csv":
        return read_json(path)
    header, rows = read_csv(path)
    if not rows:
        raise DataError(f"{path} has no examples; give a header and at least one line below it")
    return [dict(zip(header, row, strict=True)) for row in rows]
