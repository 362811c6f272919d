"""Reloading the Lightning checkpoint of an adapted module in one call."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule

from pera_lightning.errors import CheckpointError, PeraError
from pera_lightning.files import check_crcs, what_failed
from pera_lightning.injection.all_or_nothing import as_it_was
from pera_lightning.injection.description import UNFROZEN
from pera_lightning.injection.state import METADATA, check_plain, find_injected, inject_spec, without
from pera_lightning.training.checkpoint_files import fetched, is_url
from pera_lightning.training.checkpoint_io import (
    allow_missing_base,
    check_checkpoint,
    check_has_adapters,
    read_checkpoint,
    state_within,
    take_own_names,
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
            source = _without_base(checkpoint) or path
            module = built(module.load_from_checkpoint, source, map_location="cpu", strict=False, **init_args)
    inject_from(module, checkpoint, str(path))
    module.load_state_dict(checkpoint["state_dict"])  # strict, but for the base
    return module.eval()


def built(load: Callable[..., ModuleType], path: Any, weights_only: bool = True, **options: Any) -> ModuleType:
    """What Lightning's `load_from_checkpoint` of a class makes of a file, of what is at a URL, or of an open file.

    Args:
        load: the class's method.
        path: the checkpoint.
        weights_only: whether nothing but tensors and primitives is taken out of it.
        options: further arguments of `load`.

    Raises:
        CheckpointError: where it is missing or damaged, and for whatever of it the class does not take.
    """
    content = fetched(str(path)) if is_url(path) else path
    try:
        if isinstance(content, (str, Path, io.BytesIO)):
            check_crcs(content if isinstance(content, io.BytesIO) else Path(content))
        return load(content, weights_only=weights_only, **options)
    except PeraError:
        raise
    except Exception as error:  # hyperparameters of a file can be anything, and so can what a class says to them
        raise CheckpointError(f"no module can be built from the checkpoint {path} ({what_failed(error)})") from error


def _without_base(checkpoint: dict[str, Any]) -> io.BytesIO | None:
    """The checkpoint without base weights that other code had unfrozen, as a file; None where it holds none.

    A class loads what it finds as it is built, and the base is compared with the one trained on after that.
    """
    spec = checkpoint[METADATA]
    prefix = f"{spec['root']}." if spec["root"] else ""
    if not spec.get(UNFROZEN):
        return None
    file = io.BytesIO()
    state = without(checkpoint["state_dict"], [f"{prefix}{name}" for name in spec[UNFROZEN]])
    torch.save({**checkpoint, "state_dict": state}, file)
    file.seek(0)
    return file


def inject_from(module: LightningModule, checkpoint: dict[str, Any], source: str) -> None:
    """Injects what a checkpoint describes into the submodule that it names, if plain, and lets the base be missing.

    Raises:
        CheckpointError: where the checkpoint (from the file `source`) does not fit; a plain module is as it was.
    """
    check_has_adapters(checkpoint, source)
    take_own_names(checkpoint, module)
    with as_it_was(module, source):
        if find_injected(module) is None:
            spec = checkpoint[METADATA]
            root = module.get_submodule(spec["root"])
            state = state_within(spec["root"], checkpoint["state_dict"])
            # The adapters' shapes before they take memory; base and heads are checked below, by the module's names.
            adapters = {name: value for name, value in state.items() if ".adapters." in name}
            check_plain(root, adapters, spec, source, check_base=False)
            inject_spec(root, spec)
        allow_missing_base(module)
        check_checkpoint(checkpoint, module, source)
