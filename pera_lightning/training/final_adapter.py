"""The adapter folder that a fit leaves, from its best checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from pera_lightning.errors import CheckpointError, listed
from pera_lightning.injection.adapter_folder import CONFIG_FILE, write_adapter
from pera_lightning.injection.description import UNFROZEN
from pera_lightning.injection.state import adapter_state_dict, describe, find_injected
from pera_lightning.training.checkpoint_io import checkpoint_adapters
from pera_lightning.training.finite import check_parameters
from pera_lightning.training.sharding import full_tensors


def write_final_adapter(
    trainer: Trainer, module: LightningModule, run: str | None, *, older_than: str | None = None, averaged: bool = False
) -> None:
    """Writes ``adapter/`` into the run's folder on the first process; every process must call it.

    From the best checkpoint, else the last, else what the module ended with; from that in any case where it is
    `averaged`, since no checkpoint holds it. A checkpoint counts only if it is of this `run`, by the name that its
    checkpoints have. That of a fit which was stopped is dated before its checkpoint, the file `older_than`: a folder
    that is newer than all checkpoints is the sign of a finished fit.

    Raises:
        CheckpointError: where the folder cannot be written.
    """
    folder = trainer.log_dir  # asked on every rank
    if folder is None or trainer.fast_dev_run or not trainer.global_step:
        return
    root = find_injected(module)[1]  # type: ignore[index]
    state = full_tensors(adapter_state_dict(root), keep=trainer.is_global_zero)  # every process sends its shards
    if not trainer.is_global_zero:
        return
    source = ended = "the averaged weights" if averaged else "the last step"
    spec = describe(root)
    # What the run's `ModelCheckpoint` has kept, the best first.
    keeper = trainer.checkpoint_callback
    best = "the best checkpoint" if getattr(keeper, "monitor", None) else "the last checkpoint"
    for kind, attribute in ((best, "best_model_path"), ("the last checkpoint", "last_model_path")):
        path = getattr(keeper, attribute, "")
        if averaged or not path or not Path(path).is_file():
            continue
        try:
            found, saved = checkpoint_adapters(path)
            if saved.get("run") != run:
                raise CheckpointError(f"{path} is of another run")
        except CheckpointError as error:
            rank_zero_warn(f"the adapter folder is not written from {kind}: {error}")
        else:
            state, source = found, kind
            spec = {**spec, UNFROZEN: saved.get(UNFROZEN, spec[UNFROZEN])}  # those of then
            break
    if source == ended:
        check_parameters(module)
    try:
        written = write_adapter(Path(folder) / "adapter", state, spec)
        if older_than is not None:
            before = Path(older_than).stat().st_mtime - 10
            os.utime(written / CONFIG_FILE, (before, before))
    except OSError as error:
        kept = f"; {path} has the same" if source != ended else ""
        raise CheckpointError(f"{Path(folder) / 'adapter'} could not be written ({error.strerror}){kept}") from None
    print(f"Adapter of {source}: {written}\nLogs and checkpoints: {folder}", flush=True)
    if old := _outdated(Path(folder), keeper):
        print(
            f"{Path(folder)} has {listed(old)} from before this fit, which has replaced the checkpoints: measure again",
            flush=True,
        )


def _outdated(folder: Path, keeper: Any) -> list[str]:
    """What was measured and predicted with an earlier checkpoint of a name, before this fit went on in place."""
    last = folder / "checkpoints" / "last.ckpt"
    kept = ((getattr(keeper, "best_model_path", "") or last, ""), (last, "-last"))  # and how names of results end
    found = []
    for checkpoint, end in kept:
        names = (f"results{end}.json", *(f"{name}{end}" for name in ("predictions", "images", "test_images")))
        if (file := Path(checkpoint)).is_file():
            there = (name for name in names if (folder / name).exists())
            found += [name for name in there if (folder / name).stat().st_mtime_ns < file.stat().st_mtime_ns]
    return found
