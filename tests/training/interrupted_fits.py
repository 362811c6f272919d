"""Fits that a signal interrupts, and what was seen of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from pera_lightning.adapters import PERA
from pera_lightning.injection.state import adapter_state_dict
from tests.training.foreign import Plain, train_loader, val_loader
from tests.training.short_fits import callback, trainer

BATCHES = 10


class Seen(Callback):
    """Training losses by batch, and validation losses with the number of batches they are of, by optimizer step."""

    def __init__(self) -> None:
        self.losses: dict[tuple[int, int], float] = {}
        self.validations: dict[int, tuple[int, float]] = {}
        self.batches = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Plain, outputs: dict, batch: list, batch_idx: int
    ) -> None:
        self.losses[trainer.current_epoch, batch_idx] = outputs["loss"].item()

    def on_validation_start(self, trainer: Trainer, pl_module: Plain) -> None:
        self.batches = 0

    def on_validation_batch_end(self, *_: object) -> None:
        self.batches += 1

    def on_validation_end(self, trainer: Trainer, pl_module: Plain) -> None:
        self.validations[trainer.global_step] = (self.batches, trainer.callback_metrics["val/loss"].item())


class Sends(Callback):
    """Sends a signal to this process before one batch."""

    def __init__(self, where: str, epoch: int, batch: int, number: int = signal.SIGTERM) -> None:
        self.when, self.number = (where, epoch, batch), number

    def _send(self, where: str, trainer: Trainer, batch_idx: int) -> None:
        if (where, trainer.current_epoch, batch_idx) == self.when and not trainer.sanity_checking:
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Plain, batch: list, batch_idx: int) -> None:
        self._send("training", trainer, batch_idx)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Plain, batch: list, batch_idx: int) -> None:
        self._send("validation", trainer, batch_idx)


def fit(folder: Path, *more: Callback, ckpt: str | None = None, seed: int = 3, **options):
    """Trains `Plain`; returns what was seen, the final adapters and optimizer state, and whether it was stopped."""
    seed_everything(seed, verbose=False)
    model, seen = Plain(), Seen()
    keep = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    options = {"max_epochs": 3, "limit_train_batches": BATCHES, **options}
    run = trainer(folder, callback(PERA(rank=2, dropout=0.2)), seen, *more, keep, **options)
    stopped = False
    try:
        run.fit(model, train_loader(), val_loader(), ckpt_path=ckpt)
    except SystemExit as end:
        stopped = end.code is None  # for which the interpreter exits with 0
    optimizer = run.optimizers[0].state_dict()["state"] if run.optimizers else {}
    return seen, adapter_state_dict(model), optimizer, stopped
