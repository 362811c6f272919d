"""The script that kills a fit and resumes it: a small run of it, and what it takes for a difference."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.run_helpers import ROOT

SCRIPT = ROOT / "scripts" / "kill_and_resume.py"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))  # where python finds the modules beside a script
    spec = importlib.util.spec_from_file_location("kill_and_resume_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.mark.slow
def test_a_killed_quickstart(tmp_path: Path, script, monkeypatch, capsys) -> None:
    words = ["--kills", "1", "--every", "2", "--output", str(tmp_path / "out")]
    words += ["--trainer.max_epochs", "3", "--trainer.limit_train_batches", "8"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as ended:
        script.main()
    out = capsys.readouterr().out
    assert not ended.value.code, out
    assert "undisturbed: 24 batches" in out
    assert "kill 1: " in out
    assert "EQUAL to the bit after 1 kills" in out.splitlines()[-1]


def finished(folder: Path, checkpoint: dict, adapter: bytes, losses: list[tuple[tuple[str, str], str]]):
    """What `compare` asks of a run."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "adapter").mkdir()
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    (folder / "adapter" / "adapter.safetensors").write_bytes(adapter)
    return SimpleNamespace(folder=folder, checkpoints=folder / "checkpoints", losses=lambda: iter(losses))


CHECKPOINT = {
    "state_dict": {"w": torch.ones(2)},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2), "step": torch.tensor(4.0)}}}],
    "lr_schedulers": [{"last_epoch": 4}],
    "epoch": 1,
    "global_step": 4,
}
LOSSES = [(("0", "0"), "0x1p+0"), (("0", "1"), "0x1.1p+0")]


def test_equal_runs(tmp_path: Path, script) -> None:
    one = finished(tmp_path / "a", CHECKPOINT, b"x", LOSSES)
    other = finished(tmp_path / "b", copy.deepcopy(CHECKPOINT), b"x", [*LOSSES, LOSSES[1]])
    assert script.compare(one, other) == []


def test_differences_are_named(tmp_path: Path, script) -> None:
    other = copy.deepcopy(CHECKPOINT)
    other["state_dict"]["w"][1] += 2**-23
    other["optimizer_states"][0]["state"][0]["step"] += 1
    other["lr_schedulers"][0]["last_epoch"] = 5
    trained = [LOSSES[0], (("0", "0"), "0x1.0000000000001p+0")]
    one = finished(tmp_path / "a", CHECKPOINT, b"x", LOSSES)
    assert script.compare(one, finished(tmp_path / "b", other, b"y", trained)) == [
        "last.ckpt state_dict.w",
        "last.ckpt optimizer_states.0.state.0.step",
        "last.ckpt lr_schedulers.0.last_epoch",
        "adapter/adapter.safetensors",
        "loss of epoch 0, batch 0",
        "epoch 0, batch 1 was never trained",
    ]


def test_a_folder_in_use_is_refused(tmp_path: Path, script) -> None:
    (tmp_path / "killed").mkdir()
    with pytest.raises(SystemExit, match="killed exists: give another --output"):
        script.Run("killed", SimpleNamespace(output=tmp_path, every=1, config="x"), [])
