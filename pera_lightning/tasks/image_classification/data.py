"""Images for classification: the data module over the catalogue, the hub, local folders and digits.

What an image goes through is in `transforms.py`, where it comes from in `reading.py` and `sources.py`, how splits are
cut in `pera_lightning.data.splits`. Here is the Lightning side of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from pera_lightning.data import splits
from pera_lightning.data.base import TaskDataModule, draw_batches
from pera_lightning.data.distributed_sampler import padded_shard
from pera_lightning.data.example_hashes import as_array
from pera_lightning.errors import ConfigurationError, DataError, listed
from pera_lightning.tasks.image_classification import datasets, sources, transforms
from pera_lightning.tasks.image_classification.reading import ImageDataset
from pera_lightning.validation import check_in_range


class ImageDataModule(TaskDataModule):
    """Batches of images and classes.

    Training, validation and test batches are ``(images, labels)``: (B, 3, H, W) float32 and (B,) int64. Prediction
    batches are ``(images, labels, ids)``, where a label is -1 if unknown and ids are file names relative to the
    folder, or indices in the source. Over several processes each image is in one batch of one of them; shards that
    do not come out even are filled up with the last image, labelled -100. A split that the source lacks is cut from its
    training examples by a seed of its own: the test examples first, then the validation examples from what remains.
    Which example went where is written to ``splits/`` in the run's log folder.

    Args:
        dataset: a name of the catalogue (oxford_pets, stanford_cars, cifar10, dtd, eurosat, fgvc, resisc45,
            cifar100), ``digits`` (scikit-learn's), a local folder (of class folders, or of train/, validation/ and
            test/ that hold them), or a data set of the hub as ``org/name``. A folder that is called like the former
            is given as ``./name``.
        classes: keep these classes only, by name or by original number, and number them in this order from 0. The
            split is made before, so that runs on different classes share no test image with another's training.
        transform: how images are prepared, one of `transforms.TRANSFORMS`: ``fourierft`` (the papers': random
            resized crop and flip), ``center``, ``timm`` or ``none``.
        image_size: height and width in pixels. This and the next four are by default the transform's own
            (``fourierft``: bilinear, crop_pct 1) or else those that the trainer's module requires.
        mean: mean of red, green and blue, on a scale of 0 to 1.
        std: standard deviation of red, green and blue.
        interpolation: interpolation of resizing: nearest, bilinear, bicubic, box, hamming or lanczos.
        crop_pct: side of the evaluation crop over the side resized to.
        batch_size: images in a training batch, per process.
        eval_batch_size: images in every other batch; by default `batch_size`.
        drop_last: leaves out the last training batch if it is smaller.
        num_workers: processes that load images; 0 loads in the main one.
        validation_fraction: share of the training examples for a validation split that the source lacks; by default a
            tenth.
        test_fraction: share of the training examples for a test split that the source lacks; by default a fifth.
        split_seed: seed of the cuts, and of nothing else.
        predict_folder: predict on all images under this folder, at any depth, or on these files, in place of the test
            split. The given folder, or one within it, that is called like a class is their label. With a checkpoint
            that has the names of the classes, the data set itself need not be there.
        config_name: configuration of a data set of the hub.
        image_column: image column of a data set of the hub, by default ``image``.
        label_column: label column of a data set of the hub, by default ``label``.
        train_split: training split of a data set of the hub, by default ``train``.
        validation_split: validation split of a data set of the hub, by default cut from the training split.
        test_split: test split of a data set of the hub, by default cut from the training split.

    Raises:
        ConfigurationError, UnknownNameError: for values out of range, unknown or without effect on this data set.
        DataError: from `prepare_data` and `setup`, for data that is missing, empty or broken.
    """

    def __init__(
        self,
        dataset: str,
        *,
        classes: list[int | str] | None = None,
        transform: str = "fourierft",
        image_size: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        batch_size: int = 50,
        eval_batch_size: int | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        validation_fraction: float | None = None,
        test_fraction: float | None = None,
        split_seed: int = 0,
        predict_folder: str | list[str] | None = None,
        config_name: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str | None = None,
        validation_split: str | None = None,
        test_split: str | None = None,
    ) -> None:
        super().__init__()
        self.dataset, self.classes, self.transform = dataset, classes, transform
        sizes = {"image_size": image_size, "interpolation": interpolation, "crop_pct": crop_pct}
        self.given = transforms.check_given(transform, mean=mean, std=std, **sizes)
        self.batch_size, self.drop_last, self.num_workers = batch_size, drop_last, num_workers
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.fractions = {"validation": validation_fraction, "test": test_fraction}
        self.split_seed, self.predict_folder = split_seed, predict_folder
        for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("num_workers", 0), ("split_seed", 0)):
            check_in_range(getattr(self, name), name, ge=least, integer=True)
        for split, fraction in self.fractions.items():
            if fraction is not None:
                check_in_range(fraction, f"{split}_fraction", gt=0, lt=1)
        options = {"config_name": config_name, "image_column": image_column, "label_column": label_column}
        named = {"train_split": train_split, "validation_split": validation_split, "test_split": test_split}
        self._read = ImageDataset(dataset, {**options, **named})
        self._sources: dict[str, sources.ImageSource] = {}
        self._indices: dict[str, np.ndarray] = {}  # of each split, indices in its source
        self._kept: list[int] = []  # original numbers of the classes, in their new order
        self._to_predict: sources.FolderSource | None = None
        self._hashes: dict[str, np.ndarray] = {}  # by split

    # ---- what there is ----------------------------------------------------------------------------------------------

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label. Known after `setup`."""
        if self._sources:
            names = self._sources["train"].class_names
            return [names[label] for label in self._kept]
        if names := self._names_without_data():
            return names
        raise ConfigurationError(f"the classes of {self.dataset} are known after setup(); call it first")

    def _names_without_data(self) -> list[str]:
        """The checkpoint's class names where `predict_folder` needs no other data, else none."""
        predicts = getattr(getattr(self.trainer, "state", None), "fn", None) == TrainerFn.PREDICTING
        return self.requirements().get("class_names") or [] if predicts and self.predict_folder is not None else []

    @property
    def num_classes(self) -> int:
        """How many classes there are. Known after `setup`."""
        return len(self.class_names)

    def description(self) -> dict[str, Any]:
        """What a module must know of these data, after `setup`: number and names of the classes, and the protocol."""
        if not self._sources:
            return {}  # nothing was read
        return {"num_classes": self.num_classes, "class_names": self.class_names, "protocol": self.protocol()}

    def number_classes(self, names: list[str]) -> None:
        """Numbers the classes in another order, a checkpoint's; `names` are those of `class_names`."""
        own = self.class_names
        self._kept = [self._kept[own.index(name)] for name in names]
        self._to_predict = None  # its labels are numbers

    def example_hashes(self, split: str) -> np.ndarray:
        """A hash of the content of each image of a split, (n,) int64; of files, by size, beginning and end."""
        if split not in self._hashes:
            source, indices = self._sources.get(split, self._sources["train"]), self._indices[split]
            self._hashes[split] = as_array(source.hashes(indices))
        return self._hashes[split]

    def expected_classes(self) -> int:
        """How many classes there are; for the catalogue and for chosen classes without reading any data."""
        if self.classes is not None:
            return len(self.classes)
        if name := datasets.canonical(self.dataset):
            return datasets.CATALOGUE[name].classes
        self.setup("fit")
        return self.num_classes

    def preprocessing(self) -> transforms.Preprocessing:
        """Image size, mean and the like: what was given, else the transform's own, else what the module requires."""
        return transforms.resolve(self.transform, self.given, self.requirements().get("data_config"))

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Downloads, on one process, what the hub holds; keeps nothing."""
        if self._names_without_data():
            return
        self._check_fractions(self._read.hub_splits())
        self._read.tables()

    def setup(self, stage: str | None = None) -> None:
        """Reads labels and file names and makes the splits, once; for "predict" (or None) also `predict_folder`."""
        predicts = self.predict_folder is not None and stage in ("predict", None)
        if not self._sources and not (predicts and self._names_without_data()):
            self._build()
        if predicts and self._to_predict is None:
            self._to_predict = sources.predict_source(self.predict_folder, self.class_names)
        if stage != "predict":
            splits.record_run(self.trainer, self._read.short_name, self.split_record, stage)

    def train_dataloader(self) -> DataLoader:
        """Shuffled and augmented ``(images, labels)``."""
        images = self._images("train", training=True)
        if self.drop_last and len(images) < self.batch_size:
            counts = f"{len(images)} training images, and batch_size is {self.batch_size}"
            raise ConfigurationError(f"drop_last leaves no batch: {counts}; lower it")
        return self.make_loader(images, shuffle=True, batch_size=self.batch_size, drop_last=self.drop_last)

    def val_dataloader(self) -> DataLoader:
        """``(images, labels)`` in a fixed order."""
        return self._evaluated(self._images("validation"))

    def test_dataloader(self) -> DataLoader:
        """``(images, labels)`` in a fixed order; a test split without labels is refused."""
        images = self._images("test")
        if unknown := int((images.labels < 0).sum()):
            lack = f"{unknown} of {len(images)} test images of {self.dataset} have no label"
            raise DataError(f"{lack}; give another test_split, or predict")
        return self._evaluated(images)

    def predict_dataloader(self) -> DataLoader:
        """``(images, labels, ids)`` of `predict_folder`, else of the test split."""
        if self.predict_folder is None:
            return self._evaluated(self._images("test", with_identifier=True))
        source = self._to_predict or sources.predict_source(self.predict_folder, self.class_names)
        transform = transforms.build(self.transform, self.preprocessing(), training=False)
        every = np.arange(len(source.files))  # all files, in the order of their names
        return self._evaluated(sources.ImageExamples(source, every, source.labels, transform, with_identifier=True))

    def calibration_batches(self, count: int) -> list[Any]:
        """Draws training batches without augmentation."""
        return draw_batches(self._evaluated(self._images("train")), count, self.batch_size)

    # ---- building ---------------------------------------------------------------------------------------------------

    def _check_fractions(self, existing: Iterable[str]) -> None:
        for split in existing:
            if (fraction := self.fractions.get(split)) is not None:
                why = f"{self.dataset} has its own {split} split"
                raise ConfigurationError(f"{split}_fraction={fraction} would do nothing: {why}")

    def _build(self) -> None:
        """Reads the sources, cuts the splits and keeps the chosen classes."""
        found, kind = self._read.read(), self._read.kind
        self._check_fractions(found)  # also for folders, whose splits are known only now
        if kind == "catalogue":
            counts = {split: len(source.labels) for split, source in found.items()}
            if note := datasets.count_note(datasets.canonical(self.dataset) or "", counts):
                rank_zero_warn(note)
        names = found["train"].class_names
        kept = list(range(len(names))) if self.classes is None else sources.choose_classes(names, self.classes)
        if len(kept) < 2:
            only = listed(names[label] for label in kept) or "none"
            raise DataError(f"{self.dataset}: classifying needs at least two classes; chosen: {only}")
        # Before the classes are chosen, so that the same image is in the same split whatever they are.
        indices = splits.cut(
            {split: np.arange(len(source.labels)) for split, source in found.items()},
            found["train"].labels,
            validation_fraction=self.fractions["validation"] or datasets.VALIDATION_FRACTION,
            test_fraction=self.fractions["test"] or datasets.TEST_FRACTION,
            seed=self.split_seed,
            stratify=kind != "catalogue",  # the papers draw theirs regardless of class
        )
        for split in indices:  # "train" first, whose classes the others are compared with
            labels = found.get(split, found["train"]).labels[indices[split]]
            if self.classes is not None:
                chosen = np.isin(labels, kept)
                indices[split], labels = indices[split][chosen], labels[chosen]  # examples of other classes go
            if split != "test" and (labels < 0).any():
                raise DataError(f"{int((labels < 0).sum())} {split} images of {self.dataset} have no label")
            if not len(labels):
                raise DataError(f"the {split} split of {self.dataset} has no image of {listed(names[k] for k in kept)}")
            if split == "train":
                learnt = labels
            elif unseen := sorted(set(labels[labels >= 0].tolist()) - set(learnt.tolist())):
                of = listed(names[label] for label in unseen)
                raise DataError(f"{self.dataset}: no training image of {of}, but {split} has some")
        self._sources, self._indices, self._kept = found, indices, kept

    def _images(self, split: str, *, training: bool = False, with_identifier: bool = False) -> sources.ImageExamples:
        if not self._sources:
            raise ConfigurationError(f"the images of {self.dataset} are there after setup(); call it first")
        # A split that was cut has its images in the training source; classes are numbered anew.
        source = self._sources.get(split, self._sources["train"])
        number = np.full(len(source.class_names) + 1, -1, dtype=np.int64)  # the last one serves -1, unknown
        number[self._kept] = np.arange(len(self._kept))  # original label -> label
        indices = self._indices[split]
        labels = number[source.labels[indices]]
        transform = transforms.build(self.transform, self.preprocessing(), training=training)
        return sources.ImageExamples(source, indices, labels, transform, with_identifier=with_identifier)

    def _evaluated(self, images: sources.ImageExamples) -> DataLoader:
        shard = padded_shard(images, self.trainer, sources.without_label)
        collate = sources.collate_identified if images.with_identifier else None
        return self.make_loader(**shard, batch_size=self.eval_batch_size, collate_fn=collate)

    # ---- what is said of it -----------------------------------------------------------------------------------------

    def _sizes(self) -> dict[str, int]:
        return {split: len(indices) for split, indices in self._indices.items()}

    def protocol(self) -> dict[str, Any]:
        """How images are seen and split, as primitives, for results: data set, transform, preprocessing, split."""
        return {
            "dataset": self.dataset,
            "transform": self.transform,
            "preprocessing": dataclasses.asdict(self.preprocessing()),
            "split_seed": self.split_seed,
            "sizes": self._sizes(),
        }

    def split_record(self) -> dict[str, Any]:
        """What ``splits/<dataset>.json`` says: data set, seed, classes, sizes and the examples of every split.

        Under "indices" stand, for each split, the source split it is "of", and its "rows" there: indices, file names
        for folders, or "all".
        """
        indices = {}
        for split, own in self._indices.items():
            source = self._sources.get(split, self._sources["train"])
            chosen: str | list[Any] = own.tolist()
            if len(own) == len(source.labels):
                chosen = "all"  # short where a split is taken as it is
            elif isinstance(source, sources.FolderSource):
                chosen = [source.identifier(index) for index in own.tolist()]
            indices[split] = {"of": split if split in self._sources else "train", "rows": chosen}
        return {
            "dataset": self.dataset,
            "seed": self.split_seed,
            "classes": self.class_names,
            "sizes": self._sizes(),
            "indices": indices,
        }
