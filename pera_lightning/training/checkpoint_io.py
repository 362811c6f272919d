"""Checkpoints without the frozen base, for anybody's LightningModule.

Every strategy writes and reads files through a `CheckpointIO`, with ``save_weights_only=True`` too, where callbacks are
not asked. Filtering there leaves the module's own `state_dict()` complete for everyone else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from pera_lightning import __version__
from pera_lightning.adapters.base import plain_name
from pera_lightning.errors import CheckpointError, PeraError, listed
from pera_lightning.files import check_crcs, what_failed
from pera_lightning.injection.compiled import own_description, own_state, plain_description, plain_state
from pera_lightning.injection.description import UNFROZEN, checked_description
from pera_lightning.injection.inject import injection_of
from pera_lightning.injection.state import (
    METADATA,
    adopt_training_data,
    check_injection,
    check_state,
    find_injected,
    forgive_missing_base,
    frozen_names,
    metadata,
    take_as_unfrozen,
    without,
)
from pera_lightning.training import _lightning_internals as internals
from pera_lightning.training.checkpoint_files import fetched, is_url, local_file, with_atomic_writes
from pera_lightning.training.checks import check_adapters
from pera_lightning.training.finite import check_parameters
from pera_lightning.training.loop_state import check_resumable
from pera_lightning.training.run_folder import RunFolder
from pera_lightning.training.training_data import number_classes_alike

# Where a checkpoint may hold a state dict: Lightning's own, and WeightAveraging's second copy.
_STATES = ("state_dict", "current_model_state")


def trim(checkpoint: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """A copy of what Lightning is about to write without the frozen base of a module, with the injection described."""
    # A copy: the strategy and the callbacks go on with the dict that they have.
    frozen = frozen_names(module)
    trimmed = {key: plain_state(without(v, frozen)) if key in _STATES else v for key, v in checkpoint.items()}
    # Beside the tensors what they are: another method, target or base is told apart before they are loaded.
    trimmed[METADATA] = plain_description(metadata(module, __version__))
    return trimmed


def take_own_names(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Gives what a checkpoint holds, in place, the names of a module, whatever of either is compiled."""
    for key in _STATES:
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint[key] = own_state(module, checkpoint[key])
    if isinstance(spec := checkpoint.get(METADATA), Mapping):
        root = spec.get("root", "")
        for part in plain_name(root).split(".") if isinstance(root, str) and root else ():
            module = getattr(module, part, module)
        checkpoint[METADATA] = own_description(module, spec)


def check_has_adapters(checkpoint: dict[str, Any], source: Any) -> None:
    """Raises `CheckpointError` where a checkpoint was written without `AdapterInjection`, or describes no injection."""
    if METADATA not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"{source} holds no adapters: it was written without AdapterInjection; give a checkpoint of this method"
        )
    checked_description(checkpoint[METADATA], str(source), in_checkpoint=True)
    for state in (checkpoint[name] for name in _STATES if name in checkpoint):
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            raise CheckpointError(f"{source} is damaged: a {type(state).__name__} is where tensors by name belong")


def check_checkpoint(checkpoint: dict[str, Any], module: nn.Module, source: str) -> None:
    """Raises `CheckpointError` where a checkpoint (from the file `source`) is of other adapters or another base.

    One that fits is about to be loaded: the module remembers what was trained with, and data count classes as it does.
    """
    found = find_injected(module)
    if found is None:  # not built yet: `on_load_checkpoint` checks
        return
    present = injection_of(found[1])
    check_has_adapters(checkpoint, source)
    # The classes first: where there are more or fewer, the head does not fit either, and its shape says less.
    number_classes_alike(module, training_data(checkpoint), source)
    spec = checkpoint[METADATA]
    held = {name.removeprefix(found[0]) for name in checkpoint["state_dict"]}
    check_injection(spec, present, source, held=held)  # type: ignore[arg-type]
    strict = getattr(module, "strict_loading", True)  # as Lightning asks it
    for state in (checkpoint[name] for name in _STATES if name in checkpoint):
        check_state(module, state, source, unfrozen=spec.get(UNFROZEN), strict=strict)
    take_as_unfrozen(found[1], spec)
    adopt_training_data(found[1], training_data(checkpoint))


class AdapterCheckpointIO(CheckpointIO):
    """Trims what is saved of a module and checks what is loaded; the files are another `CheckpointIO`'s, `inner`.

    A checkpoint names the run that it is of, as `run_folder` has it when it is saved.
    """

    def __init__(self, inner: CheckpointIO, module: nn.Module, run_folder: RunFolder) -> None:
        # One trainer fits and then tests: its `CheckpointIO` is this one already.
        self.inner = inner.inner if isinstance(inner, AdapterCheckpointIO) else with_atomic_writes(inner)
        self.module, self.run_folder = module, run_folder

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "callbacks" not in checkpoint:  # with save_weights_only=True they are not asked
            check_adapters(self.module)  # type: ignore[arg-type]
            check_parameters(self.module)  # type: ignore[arg-type]
        trimmed = trim(checkpoint, self.module)
        if self.run_folder.run is not None:
            trimmed[METADATA]["run"] = self.run_folder.run
        self.inner.save_checkpoint(trimmed, path, storage_options=storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not args and kwargs.get("weights_only") is None:  # torch's default, and for URLs not Lightning's
            kwargs["weights_only"] = True
        # A URL is read here: Lightning takes an earlier download of the same file name for it. Other people's
        # `CheckpointIO` knows how to read its own.
        ours = is_url(path) and isinstance(self.inner, TorchCheckpointIO)
        theirs = None if ours else partial(self.inner.load_checkpoint, path, *args, **kwargs)
        checkpoint = read_checkpoint(path, theirs)
        take_own_names(checkpoint, self.module)
        check_checkpoint(checkpoint, self.module, str(path))
        check_resumable(self.module, checkpoint, str(path))  # type: ignore[arg-type]
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        self.inner.teardown()


def in_one_line(restore: Callable[[], None]) -> None:
    """Turns what Lightning, a callback or an optimizer raises at a checkpoint's entries into a `CheckpointError`."""
    try:
        restore()
    except PeraError:
        raise
    except MisconfigurationException as error:  # the checkpoint may be right, and the trainer's settings not
        raise CheckpointError(f"the checkpoint cannot be gone on from with these settings: {error}") from error
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"the checkpoint is damaged, or of another trainer, module or data than these: it cannot be gone on from "
            f"({what})"
        ) from error


def read_checkpoint(path: Any, load: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Reads a Lightning checkpoint.

    Args:
        path: the file.
        load: reads it; by default torch does, onto the CPU, tensors and primitives only, of a URL too.

    Raises:
        CheckpointError: where the file is missing, damaged or something else; it names others of its folder.
    """
    local = None if is_url(path) else local_file(path)
    if local is not None and local.is_dir():
        places = (local, local / "checkpoints", local.parent / "checkpoints")  # of a run, or beside its adapter folder
        beside = listed(sorted({str(file) for place in places for file in place.glob("*.ckpt")}), 3)
        raise CheckpointError(
            f"{local} is a folder; here a .ckpt file is needed{beside and f': {beside}'} (adapter folders are for "
            "merge, export and load_adapter)"
        )
    if local is not None and local.exists() and not local.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{local} is not a file; here a .ckpt file is needed")
    try:
        checkpoint = _loaded(path, local, load)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist{_others(local)}") from None
    except Exception as error:  # torch, pickle and zipfile raise eight kinds of error for other bytes
        raise CheckpointError(
            f"checkpoint {path} is damaged, or another kind of file ({what_failed(error)}){_others(local)}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a Lightning checkpoint")
    return checkpoint


def _loaded(path: Any, local: Path | None, load: Callable[[], Any] | None) -> Any:
    """The content of a checkpoint, whose bits are those that were written."""
    if load is None and is_url(path):
        content = fetched(str(path))
        check_crcs(content)
        return torch.load(content, map_location="cpu", weights_only=True)
    if local is not None:
        check_crcs(local)
    return (load or partial(TorchCheckpointIO().load_checkpoint, path, map_location="cpu", weights_only=True))()


def _others(file: Path | None) -> str:
    """Ends a message with the other checkpoints of the folder, which are not read."""
    names = sorted(p.name for p in file.parent.glob("*.ckpt") if p != file) if file else []
    return f"; {file.parent} has {listed(names)}" if names else ""  # type: ignore[union-attr]


def training_data(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the data it was trained with, as `adopt_training_data` takes it."""
    # Earlier versions kept the protocol elsewhere.
    return {"trained_on": checkpoint.get("training_protocol"), **(checkpoint.get(METADATA) or {})}


def allow_missing_base(module: LightningModule) -> None:
    """Lets a LightningModule load state dicts that lack its frozen base."""
    # Once: a module is set up for each fit and test.
    if forgive_missing_base not in module._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(forgive_missing_base)
        module.register_state_dict_post_hook(_say_that_base_is_saved)


def _say_that_base_is_saved(module: LightningModule, *_: Any) -> None:
    """Warns where an adapted module is saved in a fit without `AdapterInjection`: this hook is what stays with it."""
    trainer = internals.attached_trainer(module) if isinstance(module, LightningModule) else None
    if trainer is None or trainer.state.fn != TrainerFn.FITTING or find_injected(module) is None:
        return
    if not isinstance(trainer.strategy.checkpoint_io, AdapterCheckpointIO):
        rank_zero_warn(
            f"{type(module).__name__} is adapted, and this trainer has no AdapterInjection: its checkpoints hold all "
            "of the base, and a run resumed from them differs; put AdapterInjection(…) first in callbacks"
        )


def checkpoint_adapters(path: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Adapters, heads and buffers of a checkpoint by their names in the network, and the injection's description."""
    checkpoint = read_checkpoint(path)
    check_has_adapters(checkpoint, path)
    spec = plain_description(training_data(checkpoint))  # all that its description has
    return state_within(spec["root"], plain_state(checkpoint["state_dict"])), spec


def state_within(root: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a module's state that belongs to the network at the path `root`, by its names there."""
    prefix = f"{root}." if root else ""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
