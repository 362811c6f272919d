"""A callback that ends one process of a run: by an error of its own, or as the kernel does when memory is short."""

import os
import signal
import time
from pathlib import Path

from lightning.pytorch.callbacks import Callback


class Dies(Callback):
    """Writes the time of its death, in seconds since 1970, to a file."""

    def __init__(self, rank: int, how: str, died: str, batch: int = 1) -> None:
        self.rank, self.how, self.died, self.batch = rank, how, died, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and batch_idx == self.batch:
            Path(self.died).write_text(str(time.time()))
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(f"process {self.rank} has had enough")
