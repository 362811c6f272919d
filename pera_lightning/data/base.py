"""The base of the tasks' data modules: the handshake with a module, and loaders that suit the device.

The handshake: what module and data module must agree on is exchanged here and nowhere else. From its `setup` on a data
module asks for `requirements` (tokenizer, image size and mean …), which a module states in `data_requirements`. In its
own `agree`, which comes afterwards, a module asks for `description`: number and names of the classes, and under
"protocol" what of the data goes into checkpoints and results, as primitives (not to be confused with a language model's
evaluation protocol, an object, nor with GLUE's split protocol). A data module with class names also has
`number_classes`, by which it takes a checkpoint's order of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, Subset

from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.pretrained import load_tokenizer

_DRAW_SEED = 0  # of merges and their errors: the same batches at every call

_ATTRIBUTES = ("tokenizer", "data_config")  # by which a module of somebody else may state the same


class TaskDataModule(LightningDataModule):
    """Base of the data modules of this package; subclasses set `num_workers` in their `__init__`."""

    num_workers: int = 0
    tokenizer_name: str | None = None

    def requirements(self) -> Mapping[str, Any]:
        """What the trainer's module asks of its data; empty without a trainer, or for a module that asks nothing."""
        module = getattr(self.trainer, "lightning_module", None)
        ask = getattr(module, "data_requirements", None)
        if callable(ask):
            return ask()
        return {name: value for name in _ATTRIBUTES if (value := getattr(module, name, None)) is not None}

    def description(self) -> dict[str, Any]:
        """What a module must know of these data, after `setup`: ``class_names``, ``num_classes`` and the like."""
        return {}

    def example_hashes(self, split: str) -> np.ndarray | None:
        """A hash of each example of "train" or "test", (n,) int64, by its content; None where that is not known."""
        return None

    def find_tokenizer(self, module: str) -> Any:
        """The tokenizer that is named, else the one that the trainer's module requires.

        Args:
            module: class of a module that has one, for the message.
        """
        named = self.tokenizer_name
        tokenizer = self.requirements().get("tokenizer") if named is None else load_tokenizer(named)
        if tokenizer is None:
            raise ConfigurationError(f"no tokenizer: give the data module tokenizer=, or train a {module}")
        return tokenizer

    def make_loader(self, dataset: Any, **options: Any) -> DataLoader:
        """A `DataLoader` with this module's workers; its memory is pinned where the batches go to a CUDA device."""
        device = getattr(getattr(self.trainer, "strategy", None), "root_device", None)
        pin = device is not None and device.type not in ("cpu", "mps")
        return DataLoader(dataset, **{"num_workers": self.num_workers, "pin_memory": pin, **options})

    # --- what merge and export ask of any data module; one without these methods is asked for its loaders ---

    measuring_note: str | None = None  # what a reader of a merge's error should know of `measuring_batches`

    def calibration_batches(self, count: int) -> list[Any]:
        """Draws training batches as evaluation sees them, after ``setup("fit")``; the same each time."""
        return draw_batches(self.train_dataloader(), count)

    def measuring_batches(self, count: int) -> list[Any]:
        """Draws validation batches, after ``setup("fit")``; the same each time, of several sets those of the first."""
        return draw_batches(self.val_dataloader(), count)


def draw_batches(loader: Any, count: int, size: int | None = None) -> list[Any]:
    """The first batches of a seeded shuffle of a loader's examples; of a loader that makes its own batches, its first.

    Args:
        loader: a DataLoader, or a list of them, of which the first counts.
        count: number of batches; fewer where the data end, but at least one.
        size: number of examples in a batch, by default the loader's.
    """
    loader = loader[0] if isinstance(loader, (list, tuple)) and loader else loader
    if not isinstance(loader, DataLoader):
        raise ConfigurationError(f"batches are drawn from a DataLoader; the data gave a {type(loader).__name__}")
    examples, size = loader.dataset, size or loader.batch_size
    if size is not None and not isinstance(examples, IterableDataset):
        # Shuffled: the examples of a folder of classes are sorted by class.
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(_DRAW_SEED))  # type: ignore
        chosen = Subset(examples, order[: count * size].tolist())
        # A new loader: the given one draws by the common generators, and may drop the last batch.
        loader = DataLoader(chosen, size, num_workers=loader.num_workers, collate_fn=loader.collate_fn)
    batches = list(islice(loader, count))
    if not batches:
        raise DataError("the data have no batch to measure on, or to calibrate with")
    return batches
