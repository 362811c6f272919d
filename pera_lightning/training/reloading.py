"""Reloading the Lightning checkpoint of an adapted module in one call."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

from pera_lightning.injection.state import METADATA, adopt_training_data, find_injected, inject_spec
from pera_lightning.training.checkpoint_io import (
    allow_missing_base,
    check_checkpoint,
    check_has_adapters,
    read_checkpoint,
    take_own_names,
    training_data,
)

ModuleType = TypeVar("ModuleType", bound=LightningModule)


def load_adapted(module: type[ModuleType] | ModuleType, path: str | Path, **init_args: Any) -> ModuleType:
    """Reloads anybody's LightningModule from a checkpoint that `AdapterInjection` wrote.

    The base comes from the module itself (its constructor, or the instance), adapters and heads from the checkpoint.
    Our own modules also reload by their `load_from_checkpoint`.

    Args:
        module: a LightningModule with its base weights, or a class that is built with the checkpoint's hyperparameters.
        path: the checkpoint file.
        init_args: arguments for a class, which win over the checkpoint's.

    Returns:
        The module, adapted, in eval mode.

    Raises:
        CheckpointError: where the file is missing, damaged, holds no adapters, or does not fit the module.
    """
    checkpoint = read_checkpoint(path)
    check_has_adapters(checkpoint, path)
    if isinstance(module, type):
        # Not strict: adapters come afterwards, and the frozen base is not in the file. Both are checked below.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found keys that are")
            module = module.load_from_checkpoint(path, map_location="cpu", strict=False, **init_args)
    inject_from(module, checkpoint)
    check_checkpoint(checkpoint, module, str(path))
    module.load_state_dict(checkpoint["state_dict"])  # strict, but for the base
    adopt_training_data(find_injected(module)[1], training_data(checkpoint))  # type: ignore[index]
    return module.eval()


def inject_from(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Injects what a checkpoint describes into the submodule that it names, if plain, and lets the base be missing."""
    take_own_names(checkpoint, module)
    if find_injected(module) is None:
        spec = checkpoint[METADATA]
        inject_spec(module.get_submodule(spec["root"]), spec)
    allow_missing_base(module)
