"""Short fits of the foreign module."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from pera_lightning import AdapterInjection
from pera_lightning.adapters import LoRA
from tests.training.foreign import Plain, train_loader, val_loader

TARGETS, HEAD = ["body.0", "body.3"], ["head"]


def callback(method=None, **options) -> AdapterInjection:
    return AdapterInjection(
        method or LoRA(rank=2), options.pop("targets", TARGETS), options.pop("trainable", HEAD), **options
    )


def trainer(folder: Path, *callbacks: Callback, **options) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "max_epochs": 1,
            "limit_train_batches": 3,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            **options,
        }
    )


def fitted(folder: Path, method=None, **options) -> tuple[Plain, Trainer]:
    seed_everything(0, verbose=False)
    model = Plain()
    run = trainer(folder, callback(method), ModelCheckpoint(folder, filename="best"), **options)
    run.fit(model, train_loader(), val_loader())
    return model, run
