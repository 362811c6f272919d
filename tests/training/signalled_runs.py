"""The command line, run after run in the same process, each with a signal to some ranks before one batch.

As a script, its runs are the JSON of the variable RUNS: pairs of words, and of epoch, batch and ranks ("1 0 0,1").
"""

import json
import os
import signal

from lightning.pytorch.callbacks import LearningRateMonitor

from tests.run_helpers import run_pera


def run(runs):
    for words, signalled in runs:
        epoch, index, ranks = signalled.split()

        def on_train_batch_start(self, trainer, module, batch, batch_idx, at=(int(epoch), int(index)), ranks=ranks):
            if (trainer.current_epoch, batch_idx) == at and str(trainer.global_rank) in ranks.split(","):
                os.kill(os.getpid(), signal.SIGTERM)

        LearningRateMonitor.on_train_batch_start = on_train_batch_start
        assert run_pera(*words) == 0  # of a stopped run too


if __name__ == "__main__":
    run(json.loads(os.environ["RUNS"]))
