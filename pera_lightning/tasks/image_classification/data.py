"""Images for classification: the data module over the catalogue, the hub, local folders and digits.

What a picture goes through is in `transforms.py`, where it comes from in `image_sources.py`, which rows belong to
which split in `splits.py` and `image_datasets.py`. Here is the Lightning side of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from pera_lightning.data import splits
from pera_lightning.data.distributed_sampler import padded_shard
from pera_lightning.errors import ConfigurationError, DataError, UnknownNameError, closest, listed
from pera_lightning.tasks.image_classification import datasets as image_datasets
from pera_lightning.tasks.image_classification import hub as image_hub
from pera_lightning.tasks.image_classification import sources, transforms

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class ImageDataModule(L.LightningDataModule):
    """Batches of images and classes.

    Training, validation and test batches are ``(images, labels)``: (B, 3, H, W) float32 and (B,) int64. Prediction
    batches are ``(images, labels, ids)``, where a label is -1 if unknown and ids are file names relative to the
    folder, or row numbers of the source. Over several processes each image is in one batch of one of them; where they
    do not come out even, the last image fills up, with the label -100. Where a source lacks a split, it is cut from its
    training rows by a seed of its own: the test rows first, then the validation rows from what remains. Which rows went
    where is written to ``splits/`` in the run's log folder.

    Args:
        dataset: a name of the catalogue (oxford_pets, stanford_cars, cifar10, dtd, eurosat, fgvc, resisc45,
            cifar100), ``digits`` (scikit-learn's), a local folder (of class folders, or of train/, validation/ and
            test/ that hold them), or a data set of the hub as ``org/name``. A folder that is called like the former
            is given as ``./name``.
        classes: keep these classes only, by name or by original number, and number them in this order from 0. The
            split is made before, so that runs on different classes share no test image with another's training.
        transform: how pictures are prepared, one of `transforms.PROTOCOLS`: ``fourierft`` (the papers': random
            resized crop and flip), ``center``, ``timm`` or ``none``.
        image_size: height and width in pixels. This and the next four are, where not given, the transform's own
            (``fourierft``: bilinear, crop_pct 1) and else asked of the model: the `data_config` of the trainer's
            module.
        mean: of red, green and blue, on a scale of 0 to 1.
        std: standard deviation of the same.
        interpolation: of resizing: nearest, bilinear, bicubic, box, hamming or lanczos.
        crop_pct: side of the evaluation crop over the side resized to.
        batch_size: images in a training batch, per process.
        eval_batch_size: images in every other batch; as `batch_size` where not given.
        drop_last: leave out the last training batch where it is smaller.
        num_workers: processes that load images; 0 loads in the main one.
        validation_fraction: of the training rows, where the source has no validation split; a tenth if not given.
        test_fraction: of the training rows, where the source has no test split; a fifth if not given.
        split_seed: of the cuts, and of nothing else.
        predict_folder: predict on all pictures under this folder, at any depth, in place of the test split. A folder
            on their path that is called like a class is their label.
        config_name: for the hub: the data set's configuration.
        image_column: for the hub: ``image`` if not given.
        label_column: for the hub: ``label`` if not given.
        train_split: for the hub: ``train`` if not given.
        validation_split: for the hub: cut from the training rows if not given.
        test_split: for the hub: cut from the training rows if not given.

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
        predict_folder: str | None = None,
        config_name: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str | None = None,
        validation_split: str | None = None,
        test_split: str | None = None,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.classes = classes
        self.transform = transform
        self.given = transforms.check_given(transform, image_size, mean, std, interpolation, crop_pct)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.fractions = {"validation": validation_fraction, "test": test_fraction}
        self.split_seed = split_seed
        self.predict_folder = predict_folder
        self.hub = {
            "config_name": config_name,
            "image_column": image_column,
            "label_column": label_column,
            "train_split": train_split,
            "validation_split": validation_split,
            "test_split": test_split,
        }
        self._check_numbers()
        self._sources: dict[str, sources.ImageSource] = {}
        self._rows: dict[str, np.ndarray] = {}
        self._kept: list[int] = []  # original numbers of the classes, in their new order
        self._to_predict: sources.FolderSource | None = None

    def _check_numbers(self) -> None:
        for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("num_workers", 0), ("split_seed", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} must be at least {least}; given {getattr(self, name)}")
        for split, fraction in self.fractions.items():
            if fraction is not None and not 0 < fraction < 1:
                raise ConfigurationError(f"{split}_fraction must lie between 0 and 1, both excluded; given {fraction}")

    def _check_fractions(self, existing: Iterable[str]) -> None:
        for split in existing:
            if self.fractions.get(split) is not None:
                raise ConfigurationError(
                    f"{split}_fraction={self.fractions[split]} would do nothing: {self.dataset} has its own {split} "
                    "split"
                )

    # ---- what there is ----------------------------------------------------------------------------------------------

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label. Known after `setup`."""
        if not self._sources:
            raise ConfigurationError(f"the classes of {self.dataset} are known after setup(); call it first")
        names = self._sources["train"].class_names
        return [names[label] for label in self._kept]

    @property
    def num_classes(self) -> int:
        """How many classes there are. Known after `setup`."""
        return len(self.class_names)

    def expected_classes(self) -> int:
        """How many classes there are; for the catalogue and for chosen classes without reading any data."""
        if self.classes is not None:
            return len(self.classes)
        if name := image_datasets.canonical(self.dataset):
            return image_datasets.CATALOGUE[name].classes
        self.setup("fit")
        return self.num_classes

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Downloads, on one process, what the hub holds; keeps nothing."""
        places = self._hub_splits(self._kind())
        self._check_fractions(places)
        for place in places.values():
            image_hub.load_table(place.repository, self.hub["config_name"], place.split)

    def setup(self, stage: str | None = None) -> None:
        """Reads labels and file names and makes the splits, once.

        Args:
            stage: "fit", "validate", "test" or "predict"; only "predict" (or None) reads `predict_folder`.
        """
        if not self._sources:
            self._build()
        if self.predict_folder is not None and stage in ("predict", None) and self._to_predict is None:
            self._to_predict = sources.predict_source(self.predict_folder, self.class_names)
        splits.record_run(self.trainer, self._short_name(), self.split_record)

    def train_dataloader(self) -> DataLoader:
        """Shuffled and augmented ``(images, labels)``."""
        return self._loader(self._part("train", training=True), training=True)

    def val_dataloader(self) -> DataLoader:
        """``(images, labels)`` in a fixed order."""
        return self._loader(self._part("validation"))

    def test_dataloader(self) -> DataLoader:
        """``(images, labels)`` in a fixed order.

        Raises:
            DataError: where the test split has no labels.
        """
        part = self._part("test")
        if unknown := int((part.labels < 0).sum()):
            raise DataError(
                f"{unknown} of {len(part)} test images of {self.dataset} have no label, so nothing can be measured; "
                "give another test_split, or predict"
            )
        return self._loader(part)

    def predict_dataloader(self) -> DataLoader:
        """``(images, labels, ids)`` of `predict_folder`, else of the test split."""
        if self._to_predict is None:
            return self._loader(self._part("test", with_identifier=True))
        source = self._to_predict
        everything = np.arange(len(source.files))
        return self._loader(
            sources.ImageRows(source, everything, source.labels, self._transform(False), with_identifier=True)
        )

    def _kind(self) -> str:
        """What `dataset` means: "catalogue", "digits", "folder" or "hub"; refuses arguments it would ignore."""
        name = self.dataset
        if image_datasets.canonical(name):
            kind = "catalogue"
        elif name.lower() == "digits":
            kind = "digits"
        elif Path(name).expanduser().is_dir():
            kind = "folder"
        elif _HUB_ID.fullmatch(name):
            kind = "hub"
        elif "/" in name or name.startswith((".", "~")):
            kind = "folder"
        else:
            known = [*image_datasets.CATALOGUE, "digits"]
            raise UnknownNameError(
                f"unknown data set {name!r}; there are {', '.join(known)}, data sets of the hub as org/name, and "
                f"local folders{closest(name, known)}"
            )
        ignored = [argument for argument, value in self.hub.items() if value is not None and kind != "hub"]
        if ignored:
            raise ConfigurationError(f"{listed(ignored)}: for data sets of the hub (org/name) only, not for {name}")
        return kind

    def _hub_splits(self, kind: str) -> dict[str, image_datasets.HubSplit]:
        """Where the splits are that come from the hub; empty for what is local."""
        if kind == "catalogue":
            entry = image_datasets.CATALOGUE[image_datasets.canonical(self.dataset) or ""]
            found = {"train": entry.train, "validation": entry.validation, "test": entry.test}
        elif kind == "hub":
            named = {split: self.hub[f"{split}_split"] for split in ("train", "validation", "test")}
            named["train"] = named["train"] or "train"
            found = {
                split: None if name is None else image_datasets.HubSplit(self.dataset, name)
                for split, name in named.items()
            }
        else:
            found = {}
        return {split: place for split, place in found.items() if place is not None}

    def _read_sources(self, kind: str) -> dict[str, sources.ImageSource]:
        if kind == "digits":
            return {"train": sources.digits_source()}
        if kind == "folder":
            return sources.folder_sources(self.dataset)
        found: dict[str, sources.ImageSource] = {}
        for split, place in self._hub_splits(kind).items():
            found[split] = image_hub.hub_source(
                place.repository,
                place.split,
                config_name=self.hub["config_name"],
                image_column=self.hub["image_column"] or "image",
                label_column=self.hub["label_column"] or "label",
                training_names=found["train"].class_names if found else None,
            )
        return found

    def _build(self) -> None:
        """Reads the sources, cuts the splits and keeps the chosen classes."""
        kind = self._kind()
        found = self._read_sources(kind)
        self._check_fractions(found)
        if kind == "catalogue":
            counts = {split: len(source.labels) for split, source in found.items()}
            if note := image_datasets.count_note(image_datasets.canonical(self.dataset) or "", counts):
                rank_zero_warn(note)
        names = found["train"].class_names
        kept = list(range(len(names))) if self.classes is None else sources.choose_classes(names, self.classes)
        if len(kept) < 2:
            only = listed(names[label] for label in kept) or "none"
            raise DataError(f"{self.dataset}: classifying needs at least two classes; chosen: {only}")
        rows = splits.cut(
            {split: np.arange(len(source.labels)) for split, source in found.items()},
            found["train"].labels,
            validation_fraction=self.fractions["validation"] or image_datasets.VALIDATION_FRACTION,
            test_fraction=self.fractions["test"] or image_datasets.TEST_FRACTION,
            seed=self.split_seed,
            stratify=kind != "catalogue",  # the papers draw theirs regardless of class
        )
        for split in rows:
            labels = found.get(split, found["train"]).labels[rows[split]]
            if self.classes is not None:
                rows[split] = rows[split][np.isin(labels, kept)]
                labels = labels[np.isin(labels, kept)]
            if split != "test" and (labels < 0).any():
                raise DataError(f"{int((labels < 0).sum())} {split} images of {self.dataset} have no label")
            if not len(labels):
                raise DataError(f"the {split} split of {self.dataset} has no image of {listed(names[k] for k in kept)}")
            if split == "train":
                learnt = labels
            elif unseen := set(labels[labels >= 0].tolist()) - set(learnt.tolist()):
                raise DataError(
                    f"{self.dataset}: no training image of {listed(names[label] for label in sorted(unseen))}, but "
                    f"{split} has some"
                )
        self._sources, self._rows, self._kept = found, rows, kept

    def _short_name(self) -> str:
        known = image_datasets.canonical(self.dataset)
        path = Path(self.dataset).expanduser()
        return known or (path.absolute().name if path.is_dir() and self.dataset.lower() != "digits" else self.dataset)

    def protocol(self) -> dict[str, Any]:
        """How images are seen and split, as primitives, for results: data set, transform, preprocessing, split."""
        return {
            "dataset": self.dataset,
            "transform": self.transform,
            "preprocessing": dataclasses.asdict(self._preprocessing()),
            "split_seed": self.split_seed,
            "sizes": {split: len(rows) for split, rows in self._rows.items()},
        }

    def split_record(self) -> dict[str, Any]:
        """What ``splits/<dataset>.json`` says: data set, seed, classes, sizes and the rows of every split.

        Returns:
            Primitives. Under "indices", for each split: the source split it is "of", and its "rows" there, which are
            numbers, file names for folders, or "all".
        """
        parts = {}
        for split, rows in self._rows.items():
            source = self._sources.get(split, self._sources["train"])
            if len(rows) == len(source.labels):
                chosen: str | list[Any] = "all"
            elif isinstance(source, sources.FolderSource):
                chosen = [source.identifier(row) for row in rows.tolist()]
            else:
                chosen = rows.tolist()
            parts[split] = {"of": split if split in self._sources else "train", "rows": chosen}
        return {
            "dataset": self.dataset,
            "seed": self.split_seed,
            "classes": self.class_names,
            "sizes": {split: len(rows) for split, rows in self._rows.items()},
            "indices": parts,
        }

    # ---- loaders ----------------------------------------------------------------------------------------------------

    def _transform(self, training: bool) -> transforms.Transform:
        return transforms.build(self.transform, self._preprocessing(), training=training)

    def _preprocessing(self) -> transforms.Preprocessing:
        module = getattr(self.trainer, "lightning_module", None)
        return transforms.resolve(self.transform, self.given, getattr(module, "data_config", None))

    def _part(self, split: str, *, training: bool = False, with_identifier: bool = False) -> sources.ImageRows:
        if not self._sources:
            raise ConfigurationError(f"the images of {self.dataset} are there after setup(); call it first")
        source = self._sources.get(split, self._sources["train"])
        number = np.full(len(source.class_names) + 1, -1, dtype=np.int64)  # the last one serves -1, unknown
        number[self._kept] = np.arange(len(self._kept))
        rows = self._rows[split]
        return sources.ImageRows(
            source, rows, number[source.labels[rows]], self._transform(training), with_identifier=with_identifier
        )

    def _loader(self, part: sources.ImageRows, *, training: bool = False) -> DataLoader:
        batch_size = self.batch_size if training else self.eval_batch_size
        if training and self.drop_last and len(part) < batch_size:
            raise ConfigurationError(
                f"drop_last leaves no batch: {len(part)} training images of {self.dataset}, batch_size {batch_size}"
            )
        device = getattr(getattr(self.trainer, "strategy", None), "root_device", None)
        rows = (
            {"dataset": part, "shuffle": True} if training else padded_shard(part, self.trainer, sources.without_label)
        )
        return DataLoader(
            **rows,
            batch_size=batch_size,
            drop_last=training and self.drop_last,
            num_workers=self.num_workers,
            collate_fn=sources.collate_identified if part.with_identifier else None,
            pin_memory=device is not None and device.type not in ("cpu", "mps"),
        )
