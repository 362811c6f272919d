"""A few photographs of a subject, images of its class, and prompts: the data module of DreamBooth (arXiv 2208.12242).

Photographs and captions are read in `dreambooth_images.py`, batched in `dreambooth_rows.py` and kept as latents by
`dreambooth_encoding.py` and `dreambooth_cache.py`; class images are counted in `dreambooth_class_images.py`, prompts
put together in `dreambooth_prompts.py`. Here is the Lightning side of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from pera_lightning.data.distributed_sampler import padded_shard
from pera_lightning.errors import ConfigurationError, UnknownNameError, closest
from pera_lightning.tasks.dreambooth import latent_cache as cache_files
from pera_lightning.tasks.dreambooth import photographs as pictures
from pera_lightning.tasks.dreambooth import prompts as texts
from pera_lightning.tasks.dreambooth import subject_prompts
from pera_lightning.tasks.dreambooth.class_images import ClassImages
from pera_lightning.tasks.dreambooth.encoding import encode
from pera_lightning.tasks.dreambooth.hub import local_folder
from pera_lightning.tasks.dreambooth.photographs import Photograph
from pera_lightning.tasks.dreambooth.training_examples import TrainingRows, collate
from pera_lightning.training.distributed import all_gather_object

if TYPE_CHECKING:
    from PIL import Image


class DreamBoothDataModule(L.LightningDataModule):
    """Photographs of a subject to train on, and prompts to make images of.

    Training batches are dicts: ``pixel_values`` (B, 3, H, W) float32 in [-1, 1], ``prompts``, ``time_ids`` (B, 6)
    float32 (height and width of the file, top and left of the crop, height and width now), ``is_prior`` (B,) bool and
    ``ids``, the files. After `encode_with` they have ``latent_mean`` and ``latent_std`` (B, 4, H/8, W/8),
    ``prompt_embeds`` (B, 77, D) and ``pooled_prompt_embeds`` (B, P), float32, in place of pixels and prompts. With
    class images a batch of b is b photographs and then b of those. All other batches are dicts of one image to be
    made: ``prompt``, ``seed`` (1,) int64 and ``name``, a file stem; over several processes rows with seed -1 fill up.

    A photograph's caption is its row's in ``metadata.jsonl`` (``file_name``, ``text``), or the text of ``NAME.txt``
    beside it, or `instance_prompt`.

    Args:
        instance_folder: the subject's photographs, at any depth; a folder, or a data set of the hub as ``org/name``
            whose files they are.
        instance_prompt: of photographs without a caption, such as "a photo of sks dog".
        identifier: the subject's word in the prompts, "sks"; by default `instance_prompt` tells, together with
            `class_prompt`.
        class_folder: images of the subject's class, which preserve the prior: your own, or made by the base model at
            the start of the fit and kept there.
        class_prompt: of these, such as "a photo of dog".
        num_class_images: of these; what is missing is made. 0 takes those that are there.
        resolution: of what is trained on and made, in pixels; one side of a square, or height and width.
        crop: of what a photograph has beyond that: the middle, or at random.
        flip: mirrors photographs at random.
        batch_size: photographs in a training batch, per process.
        repeats: times that each photograph comes in an epoch; more where there are more class images.
        cache: keeps latents and embeddings of prompts, in memory and in files, so that the encoders can go.
        cache_dir: of the files; by default in the cache of the library datasets.
        num_workers: processes that load images; those that are cached need none.
        validation_prompts: of the images made at validation; ``{}`` stands for the subject ("sks dog"). None are made
            by default.
        validation_seeds: each makes an image of each prompt.
        prompts: the same for test and predict, as a list or a file of `read_prompts`; by default a short list of ours.
        seeds: of test and predict.

    Raises:
        ConfigurationError, UnknownNameError: for values out of range, or that do not go together.
        DataError: from `setup`, for folders and files that are missing, empty or broken.
    """

    def __init__(
        self,
        instance_folder: str,
        instance_prompt: str,
        *,
        identifier: str | None = None,
        class_folder: str | None = None,
        class_prompt: str | None = None,
        num_class_images: int = 0,
        resolution: int | list[int] = 1024,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        batch_size: int = 1,
        repeats: int = 1,
        cache: bool = True,
        cache_dir: str | None = None,
        num_workers: int = 0,
        validation_prompts: list[str] | None = None,
        validation_seeds: Sequence[int] = (0,),
        prompts: list[str] | str | None = None,
        seeds: Sequence[int] = (0, 1, 2, 3),
    ) -> None:
        super().__init__()
        self.instance_folder, self.instance_prompt = instance_folder, instance_prompt
        self.class_folder, self.class_prompt = class_folder, class_prompt
        self.num_class_images = num_class_images
        self.size = pictures.sides(resolution)
        self.crop, self.flip = crop, flip
        self.batch_size, self.repeats, self.num_workers = batch_size, repeats, num_workers
        self.cache = cache
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.validation_prompts = validation_prompts or []
        self.validation_seeds, self.prompts, self.seeds = list(validation_seeds), prompts, list(seeds)
        self._check(identifier)
        self.subject = texts.subject_of(instance_prompt, identifier, class_prompt)
        self._root = Path(instance_folder)
        self._photographs: list[Photograph] = []
        self._digests: dict[str, str] = {}
        self._classes: ClassImages | None = None
        self._rows: TrainingRows | None = None
        self._asked: dict[str, list[dict[str, Any]]] = {}

    def _check(self, identifier: str | None) -> None:
        for name, least in (("num_class_images", 0), ("batch_size", 1), ("repeats", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} must be at least {least}; given {getattr(self, name)}")
        if self.crop not in pictures.CROPS:
            known = ", ".join(pictures.CROPS)
            raise UnknownNameError(
                f"unknown crop {self.crop!r}; there are {known}{closest(str(self.crop), pictures.CROPS)}"
            )
        for name, text in (
            ("instance_folder", self.instance_folder),
            ("instance_prompt", self.instance_prompt),
            ("identifier", identifier),
            ("class_folder", self.class_folder),
            ("class_prompt", self.class_prompt),
        ):
            if text is not None and not text.strip():
                raise ConfigurationError(f"{name} is empty; give one, such as 'a photo of sks dog' for a prompt")
        if (self.class_folder is None) != (self.class_prompt is None):
            has, lacks = ("class_prompt", "class_folder")[:: 1 if self.class_folder is None else -1]
            raise ConfigurationError(f"{has} without {lacks}: class images need both; give both or neither")
        if self.num_class_images and self.class_folder is None:
            raise ConfigurationError(
                f"num_class_images={self.num_class_images} without class_folder and class_prompt, which say where "
                "they lie and what of; give both, or leave it out"
            )
        if self.class_folder is not None:
            one, other = (Path(f).expanduser().resolve() for f in (self.instance_folder, self.class_folder))
            if one == other or one in other.parents or other in one.parents:
                raise ConfigurationError(
                    f"class_folder {self.class_folder} and instance_folder {self.instance_folder} lie in one another; "
                    "give folders that share no image"
                )
        texts.check_seeds(self.validation_seeds, "validation_seeds")
        texts.check_seeds(self.seeds, "seeds")
        if self.validation_prompts:
            texts.check_prompts(self.validation_prompts, "validation_prompts")
        if self.prompts is not None and not isinstance(self.prompts, str):
            texts.check_prompts(self.prompts, "prompts")
        self.check_cacheable()

    def check_cacheable(self, adapted_text_encoders: bool = False) -> None:
        """Refuses to cache what changes from step to step.

        Args:
            adapted_text_encoders: whether the text encoders are trained.

        Raises:
            ConfigurationError: with what changes.
        """
        changing = [
            reason
            for reason, holds in (
                ("crop=random draws another part of an image each time", self.crop == "random"),
                ("flip=true mirrors images at random", self.flip),
                ("text encoders with adapters change what a prompt becomes", adapted_text_encoders),
            )
            if holds
        ]
        if self.cache and changing:
            raise ConfigurationError(
                f"cache=true keeps one result for good, but {'; '.join(changing)}: set cache=false"
            )

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fetches, on one process, what the hub holds; keeps nothing."""
        if getattr(getattr(self.trainer, "state", None), "fn", None) not in ("validate", "predict"):
            local_folder(self.instance_folder, "instance_folder")

    def setup(self, stage: str | None = None) -> None:
        """Reads names, captions and prompts, once.

        Args:
            stage: "fit" and "test" read the photographs, "fit" the class images, "test" and "predict" the prompts.
        """
        if stage in ("fit", "test", None) and not self._photographs:
            self._root = Path(local_folder(self.instance_folder, "instance_folder")).expanduser()
            found = pictures.read_photographs(str(self._root), self.instance_prompt, "instance_folder")
            for one in found:
                pictures.open_image(one.path)  # what is damaged further in: class images take long to make
            self._digests = {one.id: pictures.file_sha256(one.path) for one in found}
            self._photographs = found
        if stage in ("fit", None) and self._rows is None:
            self._build_training()
        if stage in ("fit", "validate", None) and "validation" not in self._asked:
            self._ask("validation", self.validation_prompts, self.validation_seeds)
        if stage in ("test", "predict", None) and "test" not in self._asked:
            self._ask("test", self._listed_prompts(), self.seeds)

    def train_dataloader(self) -> DataLoader:
        """Shuffled photographs and class images; cached ones from when `encode_with` has run."""
        device = getattr(getattr(self.trainer, "strategy", None), "root_device", None)
        return DataLoader(
            self._require_rows(),
            batch_size=self.batch_size,
            shuffle=True,
            num_workers=0 if self.cache else self.num_workers,
            collate_fn=collate,
            pin_memory=device is not None and device.type not in ("cpu", "mps"),
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The images to make at validation, one a batch."""
        return self._to_make("validation")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """The images to make at test, one a batch."""
        return self._to_make("test")

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        """The same as at test."""
        return self._to_make("test")

    # ---- building ---------------------------------------------------------------------------------------------------

    @property
    def uses_prior(self) -> bool:
        """Whether class images are trained on."""
        return self.class_folder is not None

    def _build_training(self) -> None:
        pictures.note_unusual(self._photographs, self.instance_folder, self.size)
        captions = [one.caption for one in self._photographs]
        self._note_missing(captions, f"captions of {self.instance_folder}")
        class_images: list[Photograph] = []
        if self.class_folder is not None and self.class_prompt is not None:
            if texts.names(self.class_prompt, self.subject.identifier):
                rank_zero_warn(
                    f"class_prompt {self.class_prompt!r} has the identifier {self.subject.identifier!r} too, so class "
                    "images would unlearn the subject; leave it out there, or give identifier="
                )
            self._classes = ClassImages(self.class_folder, self.class_prompt, self.num_class_images)
            class_images = self._classes.photographs()
            if self._classes.own:
                pictures.note_unusual(class_images, self.class_folder, self.size)
        self._rows = TrainingRows(
            self._photographs, class_images, size=self.size, crop=self.crop, flip=self.flip, repeats=self.repeats
        )

    def _require_rows(self) -> TrainingRows:
        if self._rows is None:
            raise ConfigurationError("the training images are there after setup(); call it first")
        return self._rows

    def _note_missing(self, prompts: Sequence[str], of: str) -> None:
        identifier = self.subject.identifier
        if bare := texts.without(prompts, identifier):
            rank_zero_warn(
                f"{len(bare)} of {len(prompts)} {of} lack the identifier {identifier!r}, such as {bare[0]!r}: what "
                "they teach or show is not tied to the subject (identifier= says which word it is)"
            )

    def _listed_prompts(self) -> list[str]:
        if self.prompts is None:
            return list(subject_prompts.PROMPTS)
        if isinstance(self.prompts, str):
            return subject_prompts.read_prompts(self.prompts, str(self.subject))
        return self.prompts

    def _ask(self, name: str, templates: Sequence[str], seeds: Sequence[int]) -> None:
        prompts = texts.fill(templates, self.subject)
        if any("{}" in template for template in templates):
            rank_zero_info(f"In {name} prompts {{}} is {str(self.subject)!r}")
        self._note_missing(prompts, f"{name} prompts")
        self._asked[name] = texts.generation_rows(prompts, seeds)

    def _to_make(self, name: str) -> DataLoader | list[DataLoader]:
        if name not in self._asked:
            raise ConfigurationError(f"the {name} prompts are there after setup(); call it first")
        rows = self._asked[name]
        if rows:
            return DataLoader(**padded_shard(rows, self.trainer, texts.blank), batch_size=1)
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # none were asked for
        return []

    # ---- what the module asks for -----------------------------------------------------------------------------------

    def class_images_missing(self, made_by: Mapping[str, Any] | None = None) -> list[int]:
        """Numbers of the class images that are to be made, the same in every process; all must call it.

        Args:
            made_by: model and settings of the sampling, as primitives: marks the folder as one of images that were made
                so, and images made otherwise are refused.

        Raises:
            DataError: where those in the folder were made otherwise, or it cannot be written.
        """
        self._require_rows()
        if self._classes is None:
            return []
        classes, first = self._classes, getattr(self.trainer, "is_global_zero", True)

        def look() -> list[int]:
            missing = classes.missing() if first else []  # others may not look while one makes the first already
            if first and made_by is not None and classes.made:
                classes.claim(made_by)
            return missing

        return all_gather_object(cache_files.together(look))[0]

    def add_class_image(self, number: int, image: Image.Image) -> None:
        """Keeps a class image that was made, in one step, so that a run that is killed goes on from there."""
        if self._classes is None:
            raise ConfigurationError("class images are kept after setup() and with class_folder; there is none")
        self._classes.add(number, image)

    def encode_with(self, encoders: Any, device: torch.device, rank: int = 0, world: int = 1) -> None:
        """Fills the cache, each image and prompt once; from here on training batches are cached ones.

        Nothing happens with ``cache=False``. Every process must call it. What the encoders hold is the caller's to
        release.

        Args:
            encoders: with `latents`, `prompts` and `settings`, see modules/dreambooth_encoders.py.
            device: where they compute.
            rank: of this process.
            world: processes.

        Raises:
            DataError: for images that are missing or broken, latents that are not finite, and a cache that cannot be
                written.
        """
        if not self.cache:
            return
        rows = self._require_rows()
        if self._classes is not None:
            cache_files.together(self._classes.require_all)
        folder = self.cache_dir or cache_files.default_folder()
        share = {"rank": rank, "world": world}
        rows.use(encode(rows, encoders, device, folder=folder, digests=self._digests, **share))

    def texts_of(self, kind: str) -> list[str]:
        """Captions of "train", prompts of the "class", or of the images at "validation", or at "test" and predict."""
        if kind == "class":
            return [] if self.class_prompt is None else [self.class_prompt]
        if kind == "train":
            rows = self._require_rows()
            return list(dict.fromkeys(one.caption for one in (*rows.photographs, *rows.class_images)))
        return list(dict.fromkeys(row["prompt"] for row in self._asked.get(kind, ())))

    def measuring_dataloader(self) -> DataLoader:
        """Photographs without class images, from the middle, for what a merge is calibrated or measured with."""
        self._require_rows()
        rows = TrainingRows(self._photographs, [], size=self.size, crop="center", flip=False, repeats=1)
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=collate)

    def reference_images(self) -> list[Image.Image]:
        """The subject's photographs as the network sees them, from the middle; each content once."""
        if not self._photographs:
            raise ConfigurationError("the photographs are there after setup(); call it first")
        once: dict[str, Photograph] = {}
        for one in self._photographs:
            once.setdefault(self._digests[one.id], one)
        return [pictures.seen(pictures.open_image(one.path), self.size)[0] for one in once.values()]

    def protocol(self) -> dict[str, Any]:
        """What is trained on and what images are made of, as primitives; photographs once they are read."""
        asked = {name: list(dict.fromkeys(row["prompt"] for row in rows)) for name, rows in sorted(self._asked.items())}
        names = {one.id: one.path.relative_to(self._root).as_posix() for one in self._photographs}
        return {
            "instance_folder": self.instance_folder,
            "instance_prompt": self.instance_prompt,
            "identifier": self.subject.identifier,
            "subject": str(self.subject),
            "class_prompt": self.class_prompt,
            "class_images": len(self._rows.class_images) if self._rows is not None else self.num_class_images,
            "resolution": list(self.size),
            "crop": self.crop,
            "flip": self.flip,
            "repeats": self.repeats,
            "prompts": asked,
            "seeds": {"validation": self.validation_seeds, "test": self.seeds},
            "captions": {names[one.id]: one.caption for one in self._photographs},
            "sha256": {names[one.id]: self._digests[one.id] for one in self._photographs},
        }
