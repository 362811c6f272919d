"""Under SLURM a signal saves and requeues, and the requeued job goes on by itself."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.training.interrupted_fits import Sends, fit


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a job step of one task, with a `scontrol` that writes down what it is asked."""
    asked = tmp_path / "scontrol.txt"
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "scontrol"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    values = {"JOB_ID": 7, "JOB_NAME": "job", "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NODELIST": "a1"}
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    return asked


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, "requeue 7\n"), (signal.SIGTERM, None)])
@pytest.mark.parametrize(("where", "batch"), [("training", 4), ("validation", 1)])
def test_slurm(tmp_path: Path, slurm: Path, number: int, requeued: str | None, where: str, batch: int, capsys) -> None:
    """The requeued job is the same command; it finds its checkpoint by itself and ends as the undisturbed run."""
    whole, adapters, _, _ = fit(tmp_path / "a")
    first, _, _, stopped = fit(tmp_path / "b", Sends(where, 1, batch, number))
    assert stopped
    assert (slurm.read_text() if slurm.exists() else None) == requeued
    saved = torch.load(tmp_path / "b" / "hpc_ckpt_1.ckpt", weights_only=True)
    assert "body.0.weight" not in saved["state_dict"]
    assert "body.0.adapters.all.A" in saved["state_dict"]
    second, _, _, stopped = fit(tmp_path / "b", Sends("training", 2, 3, number), seed=99)
    assert stopped
    assert [p.name for p in (tmp_path / "b").glob("hpc*")] == ["hpc_ckpt_2.ckpt"]
    out = capsys.readouterr().out
    job = "the requeued job goes on" if number == signal.SIGUSR1 else "the job, if it is requeued, goes on"
    assert f"{job} from {tmp_path / 'b' / 'hpc_ckpt_2.ckpt'} by itself" in out
    third, resumed, _, stopped = fit(tmp_path / "b", seed=98)
    assert not stopped
    assert first.losses | second.losses | third.losses == whole.losses
    assert first.validations | second.validations | third.validations == whole.validations
    for name, value in adapters.items():
        assert torch.equal(value, resumed[name]), name
    assert not list((tmp_path / "b").glob("hpc*"))  # with which the next run of this folder would begin


def test_a_requeued_command_that_has_a_checkpoint(slurm, quick, fitted, tmp_path, monkeypatch) -> None:
    """It goes on from what the job wrote, not again from where it began the first time."""
    folder = tmp_path / "job"
    folder.mkdir()
    shutil.copy(fitted.checkpoint, folder / "hpc_ckpt_1.ckpt")
    words = ["--ckpt_path", tmp_path / "first.ckpt", "--trainer.default_root_dir", folder, "--trainer.max_epochs", 2]
    assert quick(*words).code == 2  # which is not there
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.warns(UserWarning, match=r"going on from .*hpc_ckpt_1.ckpt, not from --ckpt_path"):
        done = quick(*words)
    assert done.code == 0, done.err
    assert not list(folder.glob("hpc*"))
