"""Checkpoint files are complete or not there, whatever interrupts their writing."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from pera_lightning.errors import CheckpointError
from pera_lightning.injection.adapter_folder import read_adapter
from pera_lightning.training.checkpoint_files import AtomicCheckpointIO, with_atomic_writes
from pera_lightning.training.checkpoint_io import read_checkpoint
from tests.run_helpers import ROOT
from tests.training.foreign import Plain, train_loader, val_loader
from tests.training.interrupted_fits import fit
from tests.training.short_fits import callback, fitted, trainer

# Writes a small checkpoint and then, again and again, a larger one under the same name.
WRITES = """
import sys, torch
from pera_lightning.training.checkpoint_files import AtomicCheckpointIO
files = AtomicCheckpointIO()
files.save_checkpoint({"global_step": 0, "state_dict": {}}, sys.argv[1])
print("ready", flush=True)
for step in range(1, 10_000):
    weights = torch.full((2_000_000,), float(step))
    files.save_checkpoint({"global_step": step, "state_dict": {"w": weights}}, sys.argv[1])
"""


def test_a_process_killed_while_it_writes(tmp_path: Path) -> None:
    """Under the final name is what was there before; the next writer removes what is left beside it."""
    path = tmp_path / "last.ckpt"
    script = tmp_path / "writes.py"
    script.write_text(WRITES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script), str(path)], env=environment, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".last.ckpt.*")) and time.monotonic() < deadline:
            pass
    finally:
        process.kill()
        process.wait()
    checkpoint = read_checkpoint(path)
    assert all((w == checkpoint["global_step"]).all() for w in checkpoint["state_dict"].values())
    part = tmp_path / ".last.ckpt.abcd1234"  # as that of a process killed before this one began
    part.write_bytes(b"PK")
    os.utime(part, (1, 1))
    running = tmp_path / ".last.ckpt.efgh5678"  # of another run that writes now
    running.write_bytes(b"PK")
    AtomicCheckpointIO().save_checkpoint({"global_step": 5}, path)
    assert not part.exists()
    assert running.exists()
    assert read_checkpoint(path) == {"global_step": 5}


@pytest.fixture
def limited():
    """Lets no file of this process grow beyond some bytes, as a quota does."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_fails(tmp_path: Path, limited) -> None:
    """One line, the checkpoint before it as it was, and nothing left beside it."""
    fitted(tmp_path)
    path = tmp_path / "best.ckpt"
    before = path.read_bytes()
    run = trainer(tmp_path, callback(), ModelCheckpoint(tmp_path, filename="best", enable_version_counter=False))
    limited(5_000)
    with pytest.raises(CheckpointError) as caught:
        run.fit(Plain(), train_loader(), val_loader())
    limited(resource.RLIM_INFINITY)
    message = str(caught.value)
    assert "\n" not in message
    assert f"checkpoint {path} of 0.0" in message
    assert "could not be written (File too large): make room, or choose another folder" in message
    assert message.endswith("the file of that name is the one before")
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_told_with_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"of 0.0\d* MB .*\(No space left on device\): make"):
        AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(100)}, tmp_path / "new" / "x.ckpt")
    assert not list((tmp_path / "new").iterdir())


def test_remote_and_other_peoples_files_are_lightnings(tmp_path: Path) -> None:
    files = AtomicCheckpointIO()
    files.save_checkpoint({"global_step": 3}, "memory://folder/x.ckpt")
    assert files.load_checkpoint("memory://folder/x.ckpt", weights_only=True) == {"global_step": 3}
    assert read_checkpoint("memory://folder/x.ckpt") == {"global_step": 3}
    files.save_checkpoint({"global_step": 4}, f"file://{tmp_path}/y.ckpt")
    assert read_checkpoint(tmp_path / "y.ckpt") == {"global_step": 4}

    class Own(TorchCheckpointIO):
        pass

    own = Own()
    assert with_atomic_writes(own) is own


def test_a_wrapped_io_writes_atomically_too(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    plugin = AsyncCheckpointIO()
    run = trainer(tmp_path, callback(), ModelCheckpoint(tmp_path, filename="best"), plugins=[plugin])
    run.fit(Plain(), train_loader(), val_loader())
    assert type(plugin.checkpoint_io) is AtomicCheckpointIO
    assert "body.0.weight" not in read_checkpoint(tmp_path / "best.ckpt")["state_dict"]


def test_a_damaged_best_checkpoint_does_not_cost_the_adapter_folder(tmp_path: Path) -> None:
    """It is named, and the folder comes from what the run ended with."""

    class Damages(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            best = Path(trainer.checkpoint_callback.best_model_path)
            best.write_bytes(best.read_bytes()[:-200])

    with pytest.warns(UserWarning, match=r"not written from the last checkpoint: .*last\.ckpt is damaged"):
        _, adapters, _, _ = fit(tmp_path, Damages(), max_epochs=1)
    written, _ = read_adapter(tmp_path / "adapter")
    assert written.keys() == {name.removeprefix("model.") for name in adapters}
    assert all(torch.equal(written[name.removeprefix("model.")], value) for name, value in adapters.items())
