"""Stopping on a signal: at the next batch boundary, with a checkpoint that the run goes on from bit for bit.

SIGTERM, SLURM's signal and Ctrl-C do so; a second Ctrl-C ends the run at once. In notebooks and at Python's prompt,
where Ctrl-C has a meaning of its own, it stays a `KeyboardInterrupt`.

Lightning alone stops at SIGTERM without a checkpoint; its handlers talk to processes that may be at another collective,
and under SLURM write the checkpoint in the middle of whatever the optimizer was doing. Here a handler takes a note and
nothing else. After each batch the processes agree on the notes and stop together, whichever of them had the signal.

A validation is broken off (with several processes only before its first batch) and run again by the resumed run.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pera_lightning.training import _lightning_internals as internals

# What a signal asks for; of several, the highest holds.
GO_ON, STOP, REQUEUE = 0, 1, 2


class Preemption:
    """Takes notes of SIGTERM and of SLURM's signal during one fit, and stops it with a checkpoint.

    Attributes:
        command: the run's own command without its checkpoint, for the message; by default `Trainer.fit` is named.
        watching: whether a signal is noted, from the start of the training on.
        begun: whether it ever was.
    """

    def __init__(self) -> None:
        self.command: str | None = None
        self.watching = self.begun = False
        self._asked = self._agreed = GO_ON
        self._interrupted = 0  # how often by Ctrl-C
        self._process = 0
        self._before: Any = None  # what Ctrl-C did before

    def watch(self, trainer: Trainer) -> None:
        """Takes the place of Lightning's handlers, which it registers when the fit begins."""
        self.release(trainer)
        self._interrupted = 0
        self._take_ctrl_c()  # already here: loaders may start their workers before the training
        internals.replace_signal_handlers(trainer, partial(self._note, STOP), partial(self._note, REQUEUE))

    def begin(self, trainer: Trainer) -> None:
        """Notes signals from here on, now that Lightning has its handlers and the training starts."""
        self.watching = self.begun = True
        if self._before is not None:
            internals.put_back_handler(trainer, signal.SIGINT, self._before)

    def _take_ctrl_c(self) -> None:
        before = signal.getsignal(signal.SIGINT)
        # Ours on the command line; else Python's own, in a script.
        ours = self.command is not None and callable(before)  # it is not under nohup
        script = before is signal.default_int_handler and not hasattr(sys, "ps1")
        if (ours or script) and threading.current_thread() is threading.main_thread():
            self._before, self._process = before, os.getpid()
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a data loader's worker, forked from here: its batches are still wanted
            return
        if not self.watching:
            self._before(number, frame)
            return
        self._interrupted += 1
        if self._interrupted > 1:
            signal.default_int_handler(number, frame)  # raises
        self._note(STOP)
        if rank_zero_only.rank == 0:  # not printed: this may have interrupted a print
            os.write(2, b"\nstopping after this batch; Ctrl-C again ends at once\n")

    def release(self, trainer: Trainer) -> None:
        """Undoes `watch`."""
        if self._before is not None and signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, self._before)
        self.watching, self._before = False, None
        self._asked = self._agreed = GO_ON
        internals.restore_signal_handlers(trainer)

    def _note(self, wish: int, *_: Any) -> None:
        self._asked = max(self._asked, wish)  # no more than that: it may interrupt a step or a write

    def _agree(self, trainer: Trainer) -> bool:
        """Whether to stop; every process must call it."""
        self._agreed = self._asked
        if trainer.world_size > 1:  # the signal may have come to some of them only
            asked = torch.tensor(self._asked, device=trainer.strategy.root_device)
            self._agreed = int(trainer.strategy.reduce(asked, reduce_op="max"))  # requeueing wins over stopping
        return self._agreed > GO_ON

    def after_train_batch(self, trainer: Trainer) -> None:
        """Lets Lightning stop once the other callbacks have had this batch.

        After the last batch of an epoch it does not: a run resumed from there would begin with an empty epoch. If a
        validation follows, `before_validation` stops instead; otherwise the run stops after the next batch, or ends.
        """
        if self._agree(trainer) and not internals.is_training_done(trainer):
            internals.stop_after_batch(trainer)

    def before_validation(self, trainer: Trainer) -> None:
        """Stops instead of validating."""
        if self._agree(trainer):
            raise SIGTERMException
        # An earlier validation that never began left its counts one ahead (`_not_begun`). Without this a checkpoint
        # written after this validation would look as if it were written in the middle of it.
        total = _validation(trainer).total
        total.ready = total.started = total.completed

    def after_validation_batch(self, trainer: Trainer) -> None:
        """Stops in the middle of a validation, on one process."""
        # Processes may have unlike numbers of batches here, and cannot agree.
        if self._asked and trainer.world_size == 1 and not _validation(trainer).is_last_batch:
            self._agreed = self._asked
            raise SIGTERMException

    def save(self, trainer: Trainer, exception: BaseException) -> list[str] | None:
        """Writes the checkpoint of a run that a signal has stopped; every process must call it.

        Returns the files, of which `say_how_to_go_on` tells; None where the run was not stopped, or had not trained.

        The file is ``last.ckpt`` of the `ModelCheckpoint` folder, which ``ckpt_path="last"`` finds; under SLURM with
        requeueing also the ``hpc_ckpt_N.ckpt`` that the requeued job finds by itself. To be called in `on_exception`,
        the random generators as they were after the last training batch; other exceptions than a signal's do nothing.
        """
        if not isinstance(exception, SIGTERMException) or not self._agreed:
            return None
        if self._interrupted:
            exception.code = 128 + signal.SIGINT  # so that a shell does not go on with its next command
        if trainer.sanity_checking or trainer.fast_dev_run:
            rank_zero_only(print)("stopped by a signal before the first training batch: nothing to save", flush=True)
            return None
        if trainer.validating:
            # The resumed run is to begin with all of the validation that was broken off.
            progress = _validation(trainer)
            progress.load_state_dict(_not_begun(progress.total.completed - progress.current.completed))
        files = []
        if last := last_file(trainer):
            trainer.save_checkpoint(last, weights_only=False)
            files.append(last)
        if internals.is_requeued(trainer):
            if self._agreed == REQUEUE:
                internals.requeue_job(trainer)
            else:  # whether the job comes back is up to SLURM
                trainer.save_checkpoint(internals.hpc_save_path(trainer), weights_only=False)
            files.append(str(internals.hpc_resume_path(trainer)))
            drop_requeue_file(trainer)  # the new one is written
        return files

    def say_how_to_go_on(self, trainer: Trainer, files: list[str]) -> None:
        """Prints the command that goes on with a run that was stopped, with the files that `save` gave."""
        rank_zero_only(print)(self._message(trainer, files), flush=True)

    def _message(self, trainer: Trainer, files: list[str]) -> str:
        stopped = f"stopped by a signal after optimizer step {trainer.global_step}"
        if not files:
            return f"{stopped}: nothing saved, the trainer has no ModelCheckpoint"
        saved = f"{stopped}: saved {' and '.join(files)}"
        if internals.is_requeued(trainer):
            job = "the requeued job" if self._agreed == REQUEUE else "the job, if it is requeued,"
            return f"{saved}; {job} goes on from {files[-1]} by itself; to begin anew in this folder, delete that file"
        if trainer.num_nodes > 1 or "TORCHELASTIC_RUN_ID" in os.environ:  # the launcher's words are not known here
            return f"{saved}; go on with the same command and --ckpt_path {files[0]}"
        call = f"trainer.fit(…, ckpt_path={files[0]!r})"
        return f"{saved}; go on with: {f'{self.command} --ckpt_path {files[0]}' if self.command else call}"


def last_file(trainer: Trainer) -> str | None:
    """The file that ``ckpt_path="last"`` is to find, in the folder of the run's `ModelCheckpoint`; None without one."""
    keepers = [keeper for keeper in trainer.checkpoint_callbacks if isinstance(keeper, ModelCheckpoint)]
    if not keepers:
        return None
    # The one that keeps the last checkpoint, else the first.
    lasting = (k for k in keepers if k.save_last or k.filename == k.CHECKPOINT_NAME_LAST)
    keeper = next(lasting, keepers[0])
    name = f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}{keeper.FILE_EXTENSION}"
    return keeper.last_model_path or os.path.join(str(keeper.dirpath), name)


def drop_requeue_file(trainer: Trainer) -> None:
    """Removes the ``hpc_ckpt_N.ckpt`` that the run began with, once a later one exists or the run is finished.

    Lightning loads such a file before anything else: the next run of this folder would begin with it.
    """
    begun_with = str(trainer.ckpt_path or "")
    if internals.is_requeued(trainer) and re.fullmatch(r"hpc_ckpt_\d+\.ckpt", os.path.basename(begun_with)):
        trainer.strategy.remove_checkpoint(begun_with)


def _validation(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop.val_loop.batch_progress


def _not_begun(before: int) -> dict[str, Any]:
    """The progress of a validation, after `before` batches of earlier ones, that a resumed run begins with."""

    # One batch started, none processed: then Lightning begins it anew.
    def counts(done: int) -> dict[str, int]:
        return {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}

    return {"total": counts(before), "current": counts(0), "is_last_batch": False}


def validate_before_going_on(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Lets a fit that goes on from a checkpoint of a batch that is validated after begin with that validation.

    `ModelCheckpoint(every_n_train_steps=…)` writes such a one before the validation; Lightning goes on with the next
    batch, and the best checkpoint would be chosen without this one. (Not for a `val_check_interval` that is a share of
    an epoch: how many batches it means is not known yet.) The checkpoint's loop state is changed in place.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if loops is None or trainer.state.fn != TrainerFn.FITTING:
        return
    batches = loops["epoch_loop.batch_progress"]
    # 1. Was it written before the validation? A batch is completed after the callbacks of its end.
    in_batch_end = batches["total"]["completed"] == batches["total"]["processed"] - 1
    # 2. Is a validation due after this batch? An interval counts batches of the epoch, or of the run.
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    due = every is None or (loops["epoch_progress"]["current"]["processed"] + 1) % every == 0
    if isinstance(interval, int):
        due &= batches["total" if every is None else "current"]["processed"] % interval == 0
    else:
        due &= interval == 1.0 and batches["is_last_batch"]
    # 3. Then the batch is done, and the validation is what comes next.
    if due and in_batch_end and trainer.enable_validation:
        for counts in (batches["total"], batches["current"]):
            counts["completed"] += 1
        before = loops["epoch_loop.val_loop.batch_progress"]["total"]["completed"]
        loops["epoch_loop.val_loop.batch_progress"] = _not_begun(before)
