"""The loop state of a checkpoint, put so that Lightning goes on with the batch at which the run stopped.

Lightning counts epochs and batches as ready, started, processed and completed, and tells from these where a checkpoint
was written. Three places it takes for another one (2.6.6):

- the end of an epoch in a run with `max_steps`, which begins again with an epoch of one batch;
- the last batch of an epoch that no validation follows: the epoch is not counted, and a run resumed once more goes on
  elsewhere;
- the end of an epoch that `max_steps` cut short: a longer run would not see the rest of it, or count it twice.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from pera_lightning.errors import CheckpointError
from pera_lightning.training import _lightning_internals as internals


def check_resumable(module: LightningModule, checkpoint: dict[str, Any], source: str) -> None:
    """Raises `CheckpointError` where a fit would go on from a checkpoint (from the file `source`) of weights only."""
    trainer = internals.attached_trainer(module)
    if trainer is not None and trainer.state.fn == TrainerFn.FITTING and "optimizer_states" not in checkpoint:
        raise CheckpointError(
            f"{source} holds weights only (save_weights_only=True), without the states of optimizer, data and random "
            "numbers that a fit goes on from: give another checkpoint, or load_adapted(module, file) and fit without"
        )


def go_on_where_it_stopped(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Changes a checkpoint's loop state in place for a fit; to be called after `validate_before_going_on`."""
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if loops is None or trainer.state.fn != TrainerFn.FITTING:
        return
    internals.restart_by_epochs(trainer)
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    epoch_ended = epochs["current"]["processed"] == epochs["current"]["started"]
    # A batch is completed after the callbacks of its end.
    in_batch_end = batches["current"]["completed"] == batches["current"]["processed"] - 1
    if batches["is_last_batch"] and in_batch_end and not epoch_ended:
        _count(batches, "completed", 1)
        _count(epochs, "processed", 1)
    elif epoch_ended and batches["current"]["processed"] and not batches["is_last_batch"]:
        if epochs["current"]["completed"] == epochs["current"]["processed"]:  # written after the fit
            _count(epochs, "completed", -1)
        _count(epochs, "processed", -1)


def warn_of_plateau(trainer: Trainer) -> None:
    """Warns where a resumed run has a schedule by a metric: Lightning saves no metrics, and misses an update."""
    if trainer.ckpt_path and any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
        rank_zero_warn(
            "ReduceLROnPlateau watches a metric, which no checkpoint holds: the update of the epoch that this run goes "
            "on from is missed or is of that epoch's rest, so the run may differ from one that was never stopped"
        )


def _count(progress: dict[str, Any], name: str, change: int) -> None:
    for counts in (progress["total"], progress["current"]):
        counts[name] += change
