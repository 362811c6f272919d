"""A sweep of real runs: stopped in the middle of a fit, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.run_helpers import QUICKSTART, ROOT

pytestmark = pytest.mark.usefixtures("interruptible")
WORDS = ["sweep", "--config", QUICKSTART, "--seeds", "3"]
SMALL = ["--trainer.max_epochs", "16", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
SMALL += ["--trainer.enable_progress_bar", "false"]


def start(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *WORDS, *SMALL, "--output", str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(sweep: subprocess.Popen) -> None:
    """Ends a sweep that still runs; its second signal kills the run, which has a session of its own."""
    for _ in range(2):
        if sweep.poll() is None:
            sweep.terminate()
            time.sleep(0.5)
    sweep.wait(60)


@pytest.mark.slow
def test_a_sweep_stopped_in_the_middle_of_a_fit_goes_on_there(pera, monkeypatch, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    last = folder / "seed3" / "checkpoints" / "last.ckpt"
    sweep = start(folder)
    try:
        limit = time.monotonic() + 120
        while not last.is_file() and sweep.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        sweep.send_signal(signal.SIGINT)
        out, _ = sweep.communicate(timeout=60)
        assert sweep.returncode == 130, out
        assert "stopped by SIGINT with 0 of 1 runs complete; seed3: its fit was stopped, with a checkpoint" in out
        assert json.loads((folder / "sweep.json").read_text())["runs"][0]["status"] == "interrupted"
        assert not (folder / "seed3" / "results.json").exists()
    finally:
        end(sweep)
    monkeypatch.setattr("pera_lightning.cli.sweeps.running.program", lambda: [sys.executable, str(ROOT / "cli.py")])
    again = pera(*WORDS, *SMALL, "--output", folder)
    assert again.code == 0, again.err
    log = (folder / "seed3" / "sweep.log").read_text()
    begun = [line.endswith(" --ckpt_path last") for line in log.splitlines() if line.startswith("$ ")]
    assert begun == [False, True, False]  # fit, the fit again, test
    found = json.loads((folder / "sweep.json").read_text())["runs"][0]
    assert found["status"] == "complete"
    results = json.loads((folder / "seed3" / "results.json").read_text())
    assert found["metrics"] == results["metrics"]
    assert (found["selection"]["name"], found["selection"]["mode"]) == ("val/accuracy", "max")
    assert found["protocol"]["data.split_seed"] == 0
