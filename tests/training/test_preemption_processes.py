"""Several processes stop together, whichever of them had the signal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.run_helpers import QUICKSTART
from tests.training.distributed.node_helpers import environment, free_port, run_together, torchrun_words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# Optimizer step after which a run stops; epoch, batch and ranks of the signal.
STOPS = {2: "0 1 0", 6: "1 0 1", 8: "1 2 0,1"}

# The command line, run after run in the same processes, each with a signal to some ranks before one batch.
SIGNALLED = """
import json, os, signal, sys
from lightning.pytorch.callbacks import LearningRateMonitor
from pera_lightning.cli.main import main

def on_train_batch_start(self, trainer, module, batch, batch_idx):
    epoch, index, ranks = signalled.split()
    if (trainer.current_epoch, batch_idx) == (int(epoch), int(index)) and str(trainer.global_rank) in ranks.split(","):
        os.kill(os.getpid(), signal.SIGTERM)

LearningRateMonitor.on_train_batch_start = on_train_batch_start
for words, signalled in json.loads(os.environ["RUNS"]):
    try:
        main(words)
    except SystemExit as end:  # so a stopped run ends
        assert not end.code, end.code
"""


def words(folder: Path, name: str, strategy: str) -> list[str]:
    options = {
        "max_epochs": 2,
        "limit_train_batches": 5,
        "devices": 2,
        "strategy": strategy,
        "enable_progress_bar": "false",
        "enable_model_summary": "false",
        "logger.init_args.save_dir": folder,
        "logger.init_args.name": name,
        "default_root_dir": folder,
    }
    fit = ["fit", "--config", str(QUICKSTART), "--ckpt_path=last"]
    return [*fit, *(f"--trainer.{key}={value}" for key, value in options.items())]


def run(folder: Path, runs: list[tuple[list[str], str]], start: object = None) -> str:
    script = folder / "signalled.py"
    script.write_text(SIGNALLED)
    command = [sys.executable, str(script)]
    if start is not None:
        command = torchrun_words(command, nodes=1, node=0, port=free_port(), processes=2)
    (done,) = run_together([(command, environment(RUNS=json.dumps(runs)))], folder, 400)
    assert done.code == 0, done.text[-2000:]
    return done.text


def test_two_processes_stop_together(tmp_path: Path) -> None:
    """The first has the signal, then the second, then both; the run goes on as if it had never stopped."""
    runs = []
    for strategy in ("ddp", "fsdp2"):
        runs.append((words(tmp_path, f"{strategy} whole", strategy), "-1 0 -"))
        runs += [(words(tmp_path, f"{strategy} cut", strategy), signalled) for signalled in (*STOPS.values(), "-1 0 -")]
    said = run(tmp_path, runs, start="torchrun")
    for step in STOPS:
        assert said.count(f"stopped by a signal after optimizer step {step}: saved") == 2  # once of each strategy
    for strategy in ("ddp", "fsdp2"):
        files = [tmp_path / f"{strategy} {name}" / "checkpoints" / "last.ckpt" for name in ("whole", "cut")]
        whole, cut = (torch.load(file, weights_only=True) for file in files)
        assert whole["global_step"] == cut["global_step"] == 10
        for name, value in whole["state_dict"].items():
            assert torch.equal(value, cut["state_dict"][name]), name


def test_processes_that_lightning_started(tmp_path: Path) -> None:
    """Lightning hands the first process's signal on to those that it started."""
    said = run(tmp_path, [(words(tmp_path, "cut", "ddp"), STOPS[2])])
    assert said.count("stopped by a signal after optimizer step 2: saved") == 1
    assert torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
