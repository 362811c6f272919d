"""Which rows of which split train, select, are scored on, and are predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pera_lightning.data import splits
from pera_lightning.errors import DataError
from pera_lightning.tasks.sequence_classification.examples import SequenceRows
from pera_lightning.tasks.sequence_classification.tasks import GLUETask

# What a stage has loaders for; that it knows more is for the record of the split.
LOADED = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}


@dataclass(frozen=True)
class Part:
    """Rows of a split, by their numbers there, in order."""

    split: str
    numbers: np.ndarray

    def record(self, ids: Sequence[str]) -> dict[str, Any]:
        """The split that it is "of", its "rows" there, and where they are not all their "ids".

        Args:
            ids: of all rows of the split.
        """
        if len(self.numbers) == len(ids):
            return {"of": self.split, "rows": "all"}
        return {"of": self.split, "rows": self.numbers.tolist(), "ids": [ids[row] for row in self.numbers]}


@dataclass(frozen=True)
class Plan:
    """How the parts of a run are made of the splits there are.

    Attributes:
        cut: the split protocol.
        seed: of its draw, and of that of the training rows.
        train_limit: training rows at most.
    """

    cut: splits.Cut
    seed: int
    train_limit: int | None

    def limited(self, count: int) -> np.ndarray:
        """The numbers of the training rows that are used, of `count`."""
        if self.train_limit is None:
            return np.arange(count)
        order = splits.random_order(np.random.Generator(np.random.PCG64(self.seed)), count)
        return np.sort(order[: self.train_limit])

    def needed(self, task: GLUETask, stage: str) -> Iterator[str]:
        """The splits that a stage reads."""
        own_test = self.cut is splits.own_test
        kinds = {
            # A test set that cannot be scored on is found before hours of training, not after.
            "fit": ("train", "validation", *(["test"] if own_test else [])),
            "validate": ("validation",),
            "test": ("test" if own_test else "validation",),
            "predict": ("test",),
        }[stage]
        for kind in kinds:
            yield from [kind] if kind == "train" else [task.named(kind, name) for name in task.sets]

    def parts(self, task: GLUETask, stage: str, rows: Callable[[str], SequenceRows]) -> dict[str, Part]:
        """The parts that a stage knows of: ``train``, ``validation``, ``test_mismatched`` and so on.

        Args:
            task: gives the sets.
            stage: "fit", "validate", "test" or "predict".
            rows: called with a split, gives its rows.

        Raises:
            DataError: for a validation set that is too small, or a test set without labels that is to be scored on.
        """
        chosen: dict[str, Part] = {}
        for split in self.needed(task, stage):
            of_split = rows(split)
            kind, _, name = split.partition("_")
            if kind == "train":
                chosen[split] = Part(split, self.limited(len(of_split)))
            elif kind == "validation":
                selection, scored = self.cut(len(of_split), self.seed)
                chosen[split] = Part(split, selection)
                if scored is not None:
                    chosen[task.named("test", name)] = Part(split, scored)
            elif stage != "predict" and not of_split.labelled:
                raise DataError(
                    f"protocol=own_test scores on the {split} split, which has rows without label (GLUE's are hidden); "
                    "give labels, or protocol=red"
                )
            else:
                own = "predict" if stage == "predict" else "test"
                chosen[task.named(own, name)] = Part(split, np.arange(len(of_split)))
        return chosen
