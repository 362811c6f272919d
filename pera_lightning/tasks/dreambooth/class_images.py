"""The folder of class images for prior preservation: which are there, which are missing, and how those are generated.

Images that the base model generated lie there under their numbers, and ``class_images.json`` beside them says of which
prompt and how. A folder with images and without that file holds the user's own photographs, and nothing is added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pera_lightning.data.image_files import image_files, warn_of_other_files
from pera_lightning.errors import DataError, listed
from pera_lightning.files import atomic_write, parse_json, png
from pera_lightning.tasks.dreambooth.generate import ImageGenerator
from pera_lightning.tasks.dreambooth.latent_cache import together, writing
from pera_lightning.tasks.dreambooth.photographs import Photograph, read_photographs
from pera_lightning.training.distributed import all_gather_object

if TYPE_CHECKING:
    from PIL import Image

RECORD = "class_images.json"
_NUMBER = re.compile(r"\d{5,}\.png")  # see `class_image_name`
_PROMPT = "prompt"
_WHAT = (_PROMPT, "model_name")  # what images are of and by; how they were sampled matters while some are missing only


def class_image_name(number: int) -> str:
    """Names the file of a generated class image, by its number from 0."""
    return f"{number:05d}.png"


class ClassImages:
    """A folder of class images.

    Args:
        folder: the folder; made by `claim`.
        prompt: the prompt of the class.
        count: images wanted; 0 takes those that are there.

    Attributes:
        own: whether the images are the user's own.
        generated: whether the base model generates them, up to `count`.

    Raises:
        DataError: a folder that is a file, or whose images are of another prompt, or whose record is damaged; fewer
            images of the user's own than `count`; none at all where `count` is 0.
    """

    def __init__(self, folder: str | Path, prompt: str, count: int) -> None:
        self.folder, self.prompt, self.count = Path(folder).expanduser(), prompt, count
        if self.folder.is_file():
            raise DataError(f"class_folder {folder} is a file; give a folder of class images, or one to be made")
        there = image_files(self.folder) if self.folder.is_dir() else []
        record = self._record()
        self.own = record is None and bool(there)  # images that nobody said were generated
        self.generated = not self.own and count > 0
        if record is not None:
            self._check({_PROMPT: prompt}, record)  # before anything takes long
            there = [name for name in there if _NUMBER.fullmatch(name)]  # a grid laid beside them is not one
        if not self.own and self.folder.is_dir():  # of the user's own `read_photographs` says it
            warn_of_other_files(self.folder, {*there, RECORD})
        if (not self.generated and len(there) < count) or not (there or count):
            has = f"has {len(there)} images of your own, and num_class_images={count}"
            raise DataError(f"class_folder {folder} {has}: add some, or give an empty folder to have all of them made")
        # The names that generated ones have, or will have.
        self._generated = list(map(class_image_name, range(count))) if count else there

    def photographs(self) -> list[Photograph]:
        """Lists the images to train with, in their order, with those still `missing`."""
        if self.own:  # with their captions; the first of them if fewer are wanted
            return read_photographs(str(self.folder), self.prompt, "class_folder")[: self.count or None]
        return [Photograph(self.folder / name, self.prompt) for name in self._generated]

    def missing(self) -> list[int]:
        """Gives the numbers of the images that are still to be generated."""
        wanted = range(self.count if self.generated else 0)  # the user's own are never added to
        return [number for number in wanted if not (self.folder / class_image_name(number)).is_file()]

    def claim(self, made_by: Mapping[str, Any]) -> None:
        """Writes down, before the first image, what they are generated with; on one process only.

        Refuses a folder with images of another prompt or model, or with images that were sampled otherwise while some
        are missing.
        """
        claimed = {_PROMPT: self.prompt, **json.loads(json.dumps(dict(made_by)))}  # tuples become lists, as in the file
        record = self._record()
        if record is None:
            with writing(self.folder / RECORD):
                self.folder.mkdir(parents=True, exist_ok=True)
                atomic_write(self.folder / RECORD, (json.dumps(claimed, indent=1) + "\n").encode())
        else:
            # Sampling settings matter only while some are missing: all are to be alike.
            names = claimed if self.missing() else _WHAT
            self._check({name: claimed[name] for name in names if name in claimed}, record)

    def add(self, number: int, image: Image.Image) -> None:
        """Writes a class image as PNG atomically, so that a fit that is killed goes on from there."""
        path = self.folder / class_image_name(number)
        with writing(path):
            atomic_write(path, png(image))

    def require_all(self) -> None:
        """Raises `DataError` while images are missing."""
        if missing := self.missing():
            lacks = f"{len(missing)} of {self.count} class images are missing in {self.folder}"
            raise DataError(f"{lacks}: the fit generates them at its start, in a folder that all processes must see")

    def _record(self) -> dict[str, Any] | None:
        path = self.folder / RECORD
        try:
            record = parse_json(path.read_text(encoding="utf-8"))
            return {_PROMPT: record[_PROMPT], **record}
        except (FileNotFoundError, NotADirectoryError):  # not made by us, or not made yet
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} cannot be read ({error}); give another class_folder, or delete it") from error

    def _check(self, wanted: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Refuses images that were generated otherwise."""
        wrong = [name for name in wanted if record.get(name) != wanted[name]]  # what the record lacks too
        if wrong:
            were = listed([f"{name} {record.get(name)!r}, not {wanted[name]!r}" for name in wrong], 3)
            raise DataError(f"class_folder {self.folder} holds images made with {were}; give another, or delete it")


def generate_missing(
    classes: ClassImages, generator: ImageGenerator, *, is_trained: bool, rank: int = 0, world: int = 1
) -> None:
    """Generates the images that a folder lacks, number n with seed n, by the network as it is; called by all processes.

    A network that is trained (`is_trained`) is not the base any more and generates none: that is a `DataError`.
    """

    def look() -> list[int]:
        # Only the first process: others may look when the first has generated some already.
        missing = classes.missing() if rank == 0 else []
        if missing and is_trained:
            lacks = f"{len(missing)} of {classes.count} class images are missing in {classes.folder}"
            raise DataError(f"{lacks}, and a trained network makes none: fit without --ckpt_path, or give your own")
        if rank == 0 and classes.generated:
            classes.claim(generator.made_by())
        return missing

    missing = all_gather_object(together(look))[0]  # the first process's list, the same for all
    if missing and rank == 0:
        print(f"Class images: {len(missing)} of {classes.count} are generated by the base", flush=True)
    if missing:
        generator.embed_beforehand([classes.prompt])  # UNet and VAE need the text encoders' memory

    def generate() -> None:
        # Each process a share of them; under FSDP2 all together each one, which the first writes.
        for number in missing if generator.is_sharded else missing[rank::world]:
            image = generator.generate([classes.prompt], [number])[0]  # its number is its seed
            if rank == 0 or not generator.is_sharded:
                classes.add(number, image)

    together(generate)  # one that fails stops all
    together(classes.require_all)  # files of other machines may not be seen here
