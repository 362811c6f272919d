"""What becomes NaN in a fit is named, and never saved as a result."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from pera_lightning.errors import NonFiniteLossError
from tests.training.foreign import Plain, train_loader, val_loader
from tests.training.short_fits import callback, trainer


class NaN(Plain):
    """From one batch on its loss is NaN, or only its gradient is: √0 has the slope 1/0."""

    def __init__(self, batch: int, loss: float) -> None:
        super().__init__()
        self.first, self.loss = batch, loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx < self.first:
            return loss
        return (self(batch[0]).sum() * 0).square().sqrt() + self.loss


@pytest.mark.parametrize("weights_only", [False, True])
def test_parameters_that_are_nan_are_not_saved(tmp_path: Path, weights_only: bool) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_weights_only=weights_only, save_top_k=-1)
    with pytest.raises(
        NonFiniteLossError, match=r"trained parameters are NaN or infinite after optimizer step 2.*all.A"
    ):
        trainer(tmp_path, callback(), keep).fit(NaN(1, 0.0), train_loader())
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["epoch=0-step=1.ckpt"]
    assert not (tmp_path / "adapter").exists()


def test_parameters_that_the_last_step_made_nan(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="after optimizer step 3"):
        trainer(tmp_path, callback(), enable_checkpointing=False).fit(NaN(2, 0.0), train_loader())
    assert not (tmp_path / "adapter").exists()


def test_a_loss_that_is_nan_stops_the_fit(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(), enable_checkpointing=False, log_every_n_steps=2)
    with pytest.raises(NonFiniteLossError, match="training loss is NaN or infinite in epoch 0, batch 2, and"):
        run.fit(NaN(1, float("nan")), train_loader())


def test_skipped_steps_are_said_for_losses_only(tmp_path: Path) -> None:
    """A scaler skips steps whose gradients are not finite; only a loss is worth a word."""

    class Scaled(NaN):
        def on_after_backward(self) -> None:
            for p in self.parameters():
                p.grad = None if p.grad is None else torch.zeros_like(p.grad)

    run = trainer(tmp_path, callback(), enable_checkpointing=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(NaN|finite)")
        run.fit(Scaled(0, 0.0), train_loader())
    run = trainer(tmp_path, callback(), enable_checkpointing=False)
    with pytest.warns(UserWarning, match="a training loss is NaN or infinite in epoch 0, batch 0; the trained"):
        run.fit(Scaled(0, float("nan")), train_loader())


def test_a_validation_without_a_label(tmp_path: Path) -> None:
    class Unlabelled(Plain):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            ignored = torch.full_like(batch[1], -100)
            self.log("val/loss", torch.nn.functional.cross_entropy(self(batch[0]), ignored))

    with pytest.warns(UserWarning, match="NaN or infinite after the evaluation: val/loss; either not one"):
        trainer(tmp_path, callback()).fit(Unlabelled(), train_loader(), val_loader())
