"""Where sequence classification gets its examples: GLUE on the hub, its files in a folder, or files of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pera_lightning.data import hub
from pera_lightning.data.folder_files import warn_of_size
from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.tasks.sequence_classification.examples import Examples, class_names_of, to_examples
from pera_lightning.tasks.sequence_classification.files import (
    Columns,
    read_columns,
    split_file,
    warn_of_other_files,
)
from pera_lightning.tasks.sequence_classification.tasks import CUSTOM, REPOSITORY, GLUETask, custom_task, find_task

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class GLUESource:
    """The splits of a task."""

    name: str  # of the task; `CUSTOM` for files of one's own
    folder: Path | None  # with GLUE's splits as files; None for those of the hub
    files: Mapping[str, Path]  # of a custom task, by split
    text_columns: tuple[str, ...] | None  # of a custom task
    label_column: str
    regression: bool  # whether a custom task's labels are numbers to predict
    class_names: tuple[str, ...] = ()  # of a custom task in a checkpoint's order; by default those of its training file

    def __post_init__(self) -> None:
        if self.name != CUSTOM:
            find_task(self.name)
            given = {f"{split}_file": True for split in self.files}
            given |= {"text_columns": self.text_columns, "regression": self.regression}
            given["label_column"] = self.label_column != "label"
            if ignored := [name for name, value in given.items() if value]:
                raise ConfigurationError(f"{listed(ignored)}: for task=custom only; {self.name} has its own")
        elif self.folder is not None or "train" not in self.files:
            raise ConfigurationError("task=custom takes train_file and validation_file, and no folder")
        elif self.text_columns is not None:
            custom_task(self.text_columns, ())  # which checks them

    @cached_property
    def task(self) -> GLUETask:
        """Columns, labels and metrics; of a custom task they are found in its training examples."""
        if self.name != CUSTOM:
            return find_task(self.name)
        columns = self.read("train")
        if not self.text_columns:
            there = ", ".join(columns.values)
            raise ConfigurationError(f"text_columns is not given; name one or two of {columns.source}: {there}")
        names = [] if self.regression else self.class_names or class_names_of(columns, self.label_column)
        return custom_task(self.text_columns, names)

    @property
    def on_hub(self) -> bool:
        """Whether the examples come from the hub."""
        return self.folder is None and self.name != CUSTOM

    def table(self, split: str) -> datasets.Dataset:
        """A split on the hub, downloaded if it is not in the cache."""
        return hub.load_table(REPOSITORY, self.name, split, instead="a folder with the same columns")

    def read(self, split: str) -> Columns:
        """The columns of a split, unchecked."""
        if self.on_hub:
            return Columns(f"{REPOSITORY}, {self.name}, split {split!r}", self.table(split).to_dict())
        if self.folder is not None:
            path = split_file(self.folder, split)
            of_task = (self.task.named(kind, name) for kind in ("validation", "test") for name in self.task.sets)
            warn_of_other_files(self.folder, ["train", *of_task])
            return read_columns(path)
        if split not in self.files:
            raise ConfigurationError(f"this run needs the {split} examples of the custom task: give {split}_file")
        return read_columns(self.files[split])

    def examples(self, split: str) -> Examples:
        """The examples of a split, checked; those of a test split may have no labels."""
        unlabelled = split.startswith("test")
        columns = self.read(split)
        found = to_examples(columns, self.task, label_column=self.label_column, unlabelled=unlabelled)
        warn_of_size(f"{self.name}'s {split} set", len(found.labels), self.task.size(split), columns.source)
        return found
