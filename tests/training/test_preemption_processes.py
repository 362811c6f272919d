"""Several processes stop together, whichever of them had the signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.run_helpers import QUICKSTART, ROOT

STOPS = ((2, "0 1 0"), (6, "1 0 1"), (8, "1 2 0,1"))  # optimizer step; epoch, batch, ranks that have the signal


@pytest.mark.slow
@pytest.mark.timeout(600)  # five runs, one after the other
@pytest.mark.parametrize(("strategy", "stops"), [("ddp", STOPS), ("fsdp2", STOPS[1:2])])
def test_two_processes_stop_together(tmp_path: Path, strategy: str, stops: tuple[tuple[int, str], ...]) -> None:
    """The first has the signal, then the second, then both."""
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    options = {
        "max_epochs": 2,
        "limit_train_batches": 5,
        "devices": 2,
        "strategy": strategy,
        "enable_progress_bar": "false",
        "enable_model_summary": "false",
        "logger.init_args.save_dir": tmp_path,
        "default_root_dir": tmp_path,
    }
    words = [sys.executable, str(script), "fit", "--config", QUICKSTART, "--ckpt_path=last"]
    words += [f"--trainer.{key}={value}" for key, value in options.items()]

    def run(name: str, signalled: str = "") -> str:
        done = run_script([*words, f"--trainer.logger.init_args.name={name}"], SIGNALLED=signalled)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run("whole")
    for step, signalled in stops:
        assert run("cut", signalled).count(f"stopped by a signal after optimizer step {step}: saved") == 1
    run("cut")
    ends = [torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "cut")]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 10
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name]), name


# The command line, with a signal to some ranks before one batch.
SIGNALLED = """
import os, signal
from lightning.pytorch.callbacks import LearningRateMonitor

def on_train_batch_start(self, trainer, module, batch, batch_idx):
    epoch, index, ranks = (os.environ["SIGNALLED"] or "-1 0 -").split()
    if (trainer.current_epoch, batch_idx) == (int(epoch), int(index)) and str(trainer.global_rank) in ranks.split(","):
        os.kill(os.getpid(), signal.SIGTERM)

LearningRateMonitor.on_train_batch_start = on_train_batch_start
from pera_lightning.cli.main import main
main()
"""


def run_script(words: list[str], **more: str) -> subprocess.CompletedProcess:
    """Runs it outside any group of processes, in a session that is ended whole where it takes too long."""
    ranks = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "GROUP_RANK")
    kept = {name: value for name, value in os.environ.items() if name not in ranks}
    process = subprocess.Popen(
        words,
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(words, process.returncode, out, err)
