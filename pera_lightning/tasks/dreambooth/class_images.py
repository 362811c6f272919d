"""The folder of class images for prior preservation: which are there, which are missing, and whose they are.

Images that the base model made lie there under their numbers, and ``class_images.json`` beside them says of which
prompt and how. A folder with images and without that file holds the user's own photographs, and nothing is added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pera_lightning.data.image_files import image_files
from pera_lightning.errors import DataError, listed
from pera_lightning.files import png
from pera_lightning.tasks.dreambooth.latent_cache import write_in_one_step
from pera_lightning.tasks.dreambooth.photographs import Photograph, read_photographs

if TYPE_CHECKING:
    from PIL import Image

RECORD = "class_images.json"
_PROMPT = "prompt"
_WHAT = (_PROMPT, "model_name")  # what images are of and by; how they were sampled matters while some are missing only


def class_image_name(number: int) -> str:
    """The file of a class image that was made, by its number from 0."""
    return f"{number:05d}.png"


class ClassImages:
    """A folder of class images.

    Args:
        folder: made by `claim`.
        prompt: of the class.
        count: images wanted; 0 takes those that are there.

    Attributes:
        own: whether the images are the user's own.
        made: whether they are, or are to be, made by the base model up to `count`.

    Raises:
        DataError: where the folder is a file, its images are of another prompt, its record is damaged, or the user's
            own are fewer than `count`; where `count` is 0 and there are none.
    """

    def __init__(self, folder: str | Path, prompt: str, count: int) -> None:
        self.folder, self.prompt, self.count = Path(folder).expanduser(), prompt, count
        if self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"class_folder {folder} is a file; give a folder of class images, or one to be made")
        there = image_files(self.folder) if self.folder.is_dir() else []
        record = self._record()
        self.own = record is None and bool(there)
        self.made = not self.own and count > 0
        if record is not None:
            self._check({_PROMPT: prompt}, record)
            there = [name for name in there if _is_number(name)]
        if not count and not there:
            raise DataError(
                f"class_folder {folder} has no images: put some there, or give num_class_images to have them made"
            )
        if self.own and len(there) < count:
            raise DataError(
                f"class_folder {folder} has {len(there)} images of your own, fewer than num_class_images={count}: add "
                f"{count - len(there)}, lower it, or give an empty folder to have all of them made"
            )
        made = list(map(class_image_name, range(count)))
        self._files = there if not count else there[:count] if self.own else made

    def photographs(self) -> list[Photograph]:
        """The images to train with, in their order; those still `missing` among them.

        Raises:
            DataError: as `read_photographs`, where they are the user's own.
        """
        if self.own:
            return read_photographs(str(self.folder), self.prompt, "class_folder")[: len(self._files)]
        return [Photograph(self.folder / name, self.prompt) for name in self._files]

    def missing(self) -> list[int]:
        """Numbers of the images that are still to be made."""
        wanted = range(self.count if self.made else 0)
        return [number for number in wanted if not (self.folder / class_image_name(number)).is_file()]

    def claim(self, made_by: Mapping[str, Any]) -> None:
        """Writes down, before the first image, what they are made of; on one process only.

        Args:
            made_by: ``model_name`` and settings of the sampling, as primitives.

        Raises:
            DataError: where those in the folder are of another prompt or model, or some are missing and the others were
                sampled otherwise; where it cannot be written.
        """
        claimed = {_PROMPT: self.prompt, **json.loads(json.dumps(dict(made_by)))}
        record = self._record()
        if record is not None:
            compared = claimed if self.missing() else {name: claimed[name] for name in _WHAT if name in claimed}
            return self._check(compared, record)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"class_folder {self.folder} cannot be made: {error.strerror or error}; give another"
            ) from error
        write_in_one_step(self.folder / RECORD, (json.dumps(claimed, indent=1) + "\n").encode())
        return None

    def add(self, number: int, image: Image.Image) -> Path:
        """Writes a class image as PNG, in one step.

        Raises:
            DataError: where it cannot be written.
        """
        path = self.folder / class_image_name(number)
        write_in_one_step(path, png(image))
        return path

    def require_all(self) -> None:
        """Refuses to train while images are missing.

        Raises:
            DataError: naming how many.
        """
        if missing := self.missing():
            raise DataError(
                f"{len(missing)} of {self.count} class images are missing in {self.folder}, from "
                f"{class_image_name(missing[0])} on: the fit makes them at its start, where all processes must see them"
            )

    def _record(self) -> dict[str, Any] | None:
        path = self.folder / RECORD
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); give another class_folder, or delete this one"
            ) from error
        if not isinstance(record, dict) or _PROMPT not in record:
            raise DataError(f"{path} has no {_PROMPT}; give another class_folder, or delete this one")
        return record

    def _check(self, wanted: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Refuses images that were made of something else."""
        wrong = [name for name in wanted if record.get(name) != wanted[name]]
        if wrong:
            were = listed([f"{name} {record.get(name)!r}, not {wanted[name]!r}" for name in wrong], 3)
            raise DataError(
                f"class_folder {self.folder} holds images made with {were}; give another class_folder, or delete it"
            )


def _is_number(name: str) -> bool:
    stem = name.removesuffix(".png")
    return stem.isdecimal() and name == class_image_name(int(stem))
