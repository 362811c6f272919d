"""What the name of an image data set means, and where its splits are: the catalogue, the hub, a folder or digits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pera_lightning.data.hub import load_table
from pera_lightning.errors import ConfigurationError, UnknownNameError, closest, listed
from pera_lightning.tasks.image_classification import hub, sources
from pera_lightning.tasks.image_classification.datasets import CATALOGUE, HubSplit, canonical

if TYPE_CHECKING:
    import datasets

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ImageDataset:
    """A data set by its name.

    Attributes:
        name: as given to `ImageDataModule`.
        hub: options for data sets of the hub, by their names there; None for those that are not given.
    """

    name: str
    hub: Mapping[str, str | None]

    @cached_property
    def kind(self) -> str:
        """What the name means: "catalogue", "digits", "folder" or "hub"; any other name is refused."""
        if canonical(self.name):
            kind = "catalogue"
        elif self.name.lower() == "digits":
            kind = "digits"
        elif Path(self.name).expanduser().is_dir():
            kind = "folder"
        elif _HUB_ID.fullmatch(self.name):
            kind = "hub"
        elif "/" in self.name or self.name.startswith((".", "~")):
            kind = "folder"  # that is missing, which reading it says
        else:
            known = [*CATALOGUE, "digits"]
            there = f"{', '.join(known)}, data sets of the hub as org/name, and local folders"
            raise UnknownNameError(f"unknown data set {self.name!r}; there are {there}{closest(self.name, known)}")
        ignored = [option for option, value in self.hub.items() if value is not None and kind != "hub"]
        if ignored:
            raise ConfigurationError(f"{listed(ignored)}: for data sets of the hub (org/name) only, not {self.name}")
        return kind

    @property
    def short_name(self) -> str:
        """What the file of its splits is called."""
        if self.kind == "folder":
            return Path(self.name).expanduser().absolute().name  # "." has none of its own
        return canonical(self.name) or self.name

    def hub_splits(self) -> dict[str, HubSplit]:
        """Where the splits are that come from the hub; empty for what is local."""
        if self.kind == "catalogue":
            return dict(CATALOGUE[canonical(self.name) or ""].splits)
        if self.kind == "hub":
            given = {split: self.hub[f"{split}_split"] for split in ("train", "validation", "test")}
            named = {**given, "train": given["train"] or "train"}  # "train" stays first
            return {split: HubSplit(self.name, name) for split, name in named.items() if name is not None}
        return {}

    def tables(self) -> dict[str, datasets.Dataset]:
        """The splits that come from the hub, downloaded if they are not in its cache."""
        config, instead = self.hub["config_name"], "a local folder of class folders"
        return {
            split: load_table(place.repository, config, place.split, instead=instead)
            for split, place in self.hub_splits().items()
        }

    def read(self) -> dict[str, sources.ImageSource]:
        """The splits that exist, their labels read and their images left where they are; "train" comes first."""
        if self.kind == "digits":
            return {"train": sources.digits_source()}
        if self.kind == "folder":
            return sources.folder_sources(self.name)
        columns = self.hub["image_column"] or "image", self.hub["label_column"] or "label"
        found: dict[str, sources.ImageSource] = {}
        places = self.hub_splits()
        for split, table in self.tables().items():
            where = f"data set {places[split].repository}, split {places[split].split!r}"
            # All splits take the numbering of the classes in training, which is read first.
            training_names = found["train"].class_names if found else None
            found[split] = hub.hub_source(table, where, *columns, training_names)
        return found
