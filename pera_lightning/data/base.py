"""The base of the tasks' data modules: the handshake with a module, and loaders that suit the device.

The handshake: what module and data module must agree on is exchanged here and nowhere else. From its `setup` on a data
module asks for `requirements` (tokenizer, image size and mean …), which a module states in `data_requirements`. In its
own `setup`, which Lightning calls afterwards, a module asks for `description` (number and names of the classes …).
Whatever else a module wants, it asks by a public method of the data module: `protocol`, `extremes`, `class_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

_ATTRIBUTES = ("tokenizer", "data_config")  # by which a module of somebody else may state the same


class TaskDataModule(LightningDataModule):
    """Base of the data modules of this package; subclasses set `num_workers` in their `__init__`."""

    num_workers: int = 0

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

    def make_loader(self, dataset: Any, **options: Any) -> DataLoader:
        """A loader with this module's workers, whose memory is pinned where the batches go to a CUDA device.

        Args:
            dataset: the examples.
            options: further arguments of `DataLoader`.
        """
        device = getattr(getattr(self.trainer, "strategy", None), "root_device", None)
        pin = device is not None and device.type not in ("cpu", "mps")
        return DataLoader(dataset, **{"num_workers": self.num_workers, "pin_memory": pin, **options})
