"""The base of the tasks' data modules: the handshake with a module, and loaders that suit the device.

The handshake: what module and data module must agree on is exchanged here and nowhere else. A data module asks once,
in its `setup`, for `requirements` (tokenizer, image size and mean …), which a module states in `data_requirements`.
A module asks once, in its own `setup`, which Lightning calls afterwards, for `description` (number and names of the
classes …). Neither reads another attribute of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader


class TaskDataModule(LightningDataModule):
    """Base of the data modules of this package; subclasses set `num_workers` in their `__init__`."""

    num_workers: int = 0

    def requirements(self) -> Mapping[str, Any]:
        """What the trainer's module asks of its data; empty without a trainer, or for somebody else's module."""
        ask = getattr(getattr(self.trainer, "lightning_module", None), "data_requirements", None)
        return ask() if callable(ask) else {}

    def description(self) -> dict[str, Any]:
        """What a module must know of these data, after `setup`: ``class_names``, ``num_classes`` and the like."""
        return {}

    def make_loader(self, dataset: Any, **options: Any) -> DataLoader:
        """A loader with this module's workers, whose memory is pinned where the batches go to a CUDA device.

        Args:
            dataset: the examples.
            options: of `DataLoader`.
        """
        device = getattr(getattr(self.trainer, "strategy", None), "root_device", None)
        pin = device is not None and device.type not in ("cpu", "mps")
        return DataLoader(dataset, **{"num_workers": self.num_workers, "pin_memory": pin, **options})
