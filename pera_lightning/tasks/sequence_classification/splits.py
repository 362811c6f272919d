"""Which examples of which split train, select, are scored on, and are predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pera_lightning.data import splits
from pera_lightning.errors import DataError
from pera_lightning.tasks.sequence_classification.examples import Examples
from pera_lightning.tasks.sequence_classification.tasks import GLUETask

# What a stage has loaders for; that it knows more is for the record of the split.
LOADED = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}


@dataclass(frozen=True)
class Subset:
    """Examples of a source's split, by their numbers there, in order."""

    split: str
    numbers: np.ndarray

    def record(self, ids: Sequence[str]) -> dict[str, Any]:
        """The split that it is "of", its "rows" there, numbers or "all", and if not all their "ids" of the split's."""
        if len(self.numbers) == len(ids):
            return {"of": self.split, "rows": "all"}
        return {"of": self.split, "rows": self.numbers.tolist(), "ids": [ids[number] for number in self.numbers]}


@dataclass(frozen=True)
class Plan:
    """How the splits of a run are made of those of the source."""

    cut: splits.Cut  # the split protocol
    seed: int  # of its draw, and of that of the training examples
    train_limit: int | None  # most training examples to use; None for all

    def limited(self, count: int) -> np.ndarray:
        """The numbers of the training examples that are used, of `count`."""
        if self.train_limit is None:
            return np.arange(count)
        # The first of one random order, so that a smaller limit's examples are among a larger one's.
        order = splits.random_order(np.random.Generator(np.random.PCG64(self.seed)), count)
        return np.sort(order[: self.train_limit])

    def needed(self, task: GLUETask, stage: str) -> Iterator[str]:
        """The source's splits that a stage reads."""
        own_test = self.cut is splits.own_test
        kinds = {
            # A test set that cannot be scored on is found before hours of training, not after.
            "fit": ["train", "validation", *(["test"] if own_test else [])],
            "validate": ["validation"],
            "test": ["test" if own_test else "validation"],
            "predict": ["test"],
        }[stage]
        for kind in kinds:
            yield from [kind] if kind == "train" else [task.named(kind, name) for name in task.sets]

    def subsets(self, task: GLUETask, stage: str, read: Callable[[str], Examples]) -> dict[str, Subset]:
        """The splits that a stage knows of: ``train``, ``validation``, ``test_mismatched`` and so on.

        Args:
            task: the task, which says what sets there are.
            stage: "fit", "validate", "test" or "predict".
            read: called with a source's split, gives its examples.
        """
        chosen: dict[str, Subset] = {}
        for split in self.needed(task, stage):
            examples = read(split)
            kind, _, name = split.partition("_")  # of MNLI "validation_mismatched", else "validation"
            if kind == "train":
                chosen[split] = Subset(split, self.limited(len(examples)))
            elif kind == "validation":
                # The validation set serves twice, as the split protocol says: to select, and to be scored on.
                selection, scored = self.cut(len(examples), self.seed)
                chosen[split] = Subset(split, selection)
                if scored is not None:
                    chosen[task.named("test", name)] = Subset(split, scored)
            elif stage != "predict" and not examples.labelled:
                raise DataError(
                    f"split_protocol=own_test scores on the {split} split, which has examples without label (hidden in "
                    "GLUE); give labels, or split_protocol=red"
                )
            else:
                own = "predict" if stage == "predict" else "test"
                chosen[task.named(own, name)] = Subset(split, np.arange(len(examples)))
        return chosen
