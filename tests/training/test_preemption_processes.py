"""Several processes stop together, whichever of them had the signal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.run_helpers import QUICKSTART
from tests.training import signalled_runs
from tests.training.distributed.forked import run_forked
from tests.training.distributed.node_helpers import environment, run_together

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# Optimizer step after which a run stops; epoch, batch and ranks of the signal.
STOPS = {2: "0 1 0", 6: "1 0 1", 8: "1 2 0,1"}


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


def test_two_processes_stop_together(tmp_path: Path) -> None:
    """The first has the signal, then the second, then both; the run goes on as if it had never stopped."""
    runs = []
    for strategy in ("ddp", "fsdp2"):
        runs.append((words(tmp_path, f"{strategy} whole", strategy), "-1 0 -"))
        runs += [(words(tmp_path, f"{strategy} cut", strategy), signalled) for signalled in (*STOPS.values(), "-1 0 -")]
    said = run_forked(lambda: signalled_runs.run(runs), 2, tmp_path, 400)
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
    variables = environment(RUNS=json.dumps([(words(tmp_path, "cut", "ddp"), STOPS[2])]))
    (done,) = run_together([([sys.executable, signalled_runs.__file__], variables)], tmp_path, 400)
    assert done.code == 0, done.text[-2000:]
    assert done.text.count("stopped by a signal after optimizer step 2: saved") == 1
    assert torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
