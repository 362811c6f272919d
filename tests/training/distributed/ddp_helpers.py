"""Runs on several processes within a test, and what each of them had."""

from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback

# The tiny networks and the foreign modules are those of other tests.
from pera_lightning import AdapterInjection
from pera_lightning.adapters import LoRA

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


def processes(world):
    """The trainer's options for so many processes in this one's place."""
    return {"devices": world, "strategy": "ddp_fork" if world > 1 else "auto"}


def make(folder, world=1, method=None, targets=("attn.qkv[q,v]",), trainable=("head",), callbacks=(), **options):
    """A trainer on so many processes."""
    first = AdapterInjection(method or LoRA(rank=2), list(targets), list(trainable))
    usual = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "default_root_dir": folder}
    return Trainer(
        accelerator="cpu", callbacks=[first, *callbacks], **{**QUIET, **usual, **processes(world), **options}
    )


class Keeps(Callback):
    """What a process had, into a file for each rank: a child's memory is gone when it ends."""

    def __init__(self, folder):
        self.folder, self.kept = Path(folder), {}

    def add(self, name, value):
        self.kept.setdefault(name, []).append(value)

    def teardown(self, trainer, pl_module, stage):
        torch.save(self.kept, self.folder / f"kept{trainer.global_rank}.pt")


def kept(folder, world=1):
    """Of each rank what its `Keeps` had."""
    ranks = [torch.load(Path(folder) / f"kept{rank}.pt", weights_only=False) for rank in range(world)]
    return [SimpleNamespace(**rank) for rank in ranks]


def trained(network):
    return {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}


class Randomise(Callback):
    """The same random trained parameters everywhere: where B is zero, most gradients are, and mistakes would hide."""

    def on_fit_start(self, trainer, pl_module):
        generator = torch.Generator().manual_seed(3)
        for _, parameter in sorted(pl_module.named_parameters()):
            if parameter.requires_grad:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


class Steps(Keeps):
    """The first batch's parameters, the gradients of every optimizer step before and after clipping, and the end."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not trainer.fit_loop.total_batch_idx:
            self.add("start", trained(pl_module))
            self.add("searches", getattr(trainer.strategy.model, "find_unused_parameters", False))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.add("gradients", gradients(pl_module))

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if "gradients" in self.kept:
            self.add("clipped", gradients(pl_module))

    def on_train_end(self, trainer, pl_module):
        self.add("end", trained(pl_module))
        self.add("logged", {k: v.item() for k, v in trainer.callback_metrics.items()})


def gradients(network):
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert one
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def assert_close(one, other, rtol=1e-5, atol=1e-6):
    """Holds that all are equal to `rtol`, or to `atol` times the largest element of a tensor."""
    assert one.keys() == other.keys()
    assert one
    for name, value in one.items():
        largest = value.abs().max().item()
        assert largest > 0, name  # zeros would agree with anything
        torch.testing.assert_close(
            other[name], value, rtol=rtol, atol=atol * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


def seeded():
    seed_everything(0, verbose=False)
