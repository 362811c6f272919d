"""Fits and tests of the strategies, and what each of them keeps for the tests."""

import json
import os
import time
from functools import partialmethod
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, DistributedSampler

from pera_lightning import AdapterInjection
from pera_lightning.adapters import PERA, AuroRA, HiLoRA, HiRA, LoRA
from pera_lightning.training.distributed import all_gather_object
from pera_lightning.training.sharding import full_tensors, sharded_like
from tests.tasks.causal_lm.evaluator_helpers import data
from tests.tasks.causal_lm.language_helpers import QV, module
from tests.tasks.image_classification.vision_helpers import Images
from tests.tasks.image_classification.vision_helpers import module as image_module

METHODS = {
    "LoRA": LoRA(rank=2),
    "PERA": PERA(rank=2),
    "HiRA": HiRA(rank=2),
    "HiRA svd": HiRA(rank=2, reference="svd", reference_rank=2),  # taken from the weights at the injection
    "HiLoRA": HiLoRA(hira_rank=2, lora_rank=2),
    "PiSSA": LoRA(rank=2, init="pissa"),  # changes the frozen weights at the injection
    "AuroRA": AuroRA(rank=2),
}


class Watch(Callback):
    """Starts from random adapters; keeps the losses of batches, the gradients of optimizer steps, and the end."""

    def __init__(self, folder):
        self.folder, self.losses, self.gradients = Path(folder), [], []

    def on_fit_start(self, trainer, pl_module):
        if trainer.ckpt_path is None:
            generator = torch.Generator().manual_seed(3)
            for _, parameter in sorted(pl_module.named_parameters()):
                if parameter.requires_grad:
                    values = 0.2 * torch.randn(parameter.shape, generator=generator)
                    with torch.no_grad():
                        parameter.copy_(sharded_like(values, parameter))

    def on_train_start(self, trainer, pl_module):
        self.steps_before = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ranks = all_gather_object(outputs["loss"].item())
        self.losses.append(sum(ranks) / len(ranks))
        if trainer.global_step > len(self.gradients) + self.steps_before:  # clipped; the next batch empties them
            named = {n: p.grad.detach() for n, p in pl_module.named_parameters() if p.grad is not None}
            self.gradients.append({name: value.clone() for name, value in full_tensors(named).items()})

    def on_fit_end(self, trainer, pl_module):
        trained, frozen = (
            full_tensors({n: p.detach() for n, p in pl_module.named_parameters() if p.requires_grad is wanted})
            for wanted in (True, False)
        )
        sharded = [type(p).__name__ == "DTensor" for p in pl_module.parameters()]
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            logged = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val")}
            kept = {"losses": self.losses, "trained": trained, "frozen": frozen, "sharded": sharded, "logged": logged}
            names = {id(p): name for name, p in pl_module.named_parameters()}
            order = [names[id(p)] for group in trainer.optimizers[0].param_groups for p in group["params"]]
            torch.save({**kept, "gradients": self.gradients, "order": order}, self.folder / "end.pt")


class Dies(Callback):
    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            raise InterruptedError

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.on_train_batch_start(trainer, pl_module, batch, batch_idx)


class Dealt(LightningDataModule):
    """Sixteen images, the same ones in a step on any number of processes."""

    num_classes = 3

    def train_dataloader(self):
        images, (rank, world) = Images(16), own_rank()
        sampler = DistributedSampler(images, num_replicas=world, rank=rank, seed=5)
        return DataLoader(images, batch_size=4 // world, sampler=sampler)


def own_rank():
    """This process's rank, and how many processes there are."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def build(case):
    """Network and data of a case."""
    options = {"weight_decay": 0.01, **case.get("module", {})}
    if case["kind"] == "vit":
        return image_module(case["network"], **options), Dealt(), ["attn.qkv[q,v]"], ["head"]
    protocol = case.get("protocol", "llm_adapters")
    batch_size = case.get("batch", 4) // own_rank()[1]
    rows = data(Path(case["sets"]), protocol, batch_size=batch_size, eval_batch_size=2, validation_size=3)
    return module(case["network"], **options), rows, QV, []


def run(cases):
    """Runs cases after each other, in a process that does nothing else."""
    # The other backends are slow, and tested elsewhere.
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="eager")
    for case in cases:
        run_case(case)


def run_case(case):
    """Fits or tests as a case says."""
    folder, (rank, world) = Path(case["folder"]), own_rank()
    if "forgets" in case and rank == 0:  # the others wait for it where the network is sharded
        # The other rank may still be writing its file of the case before.
        deadline = time.monotonic() + 60
        while len(files := sorted(folder.glob(case["forgets"]))) < world and time.monotonic() < deadline:
            time.sleep(0.05)
        (folder / "answered.json").write_text(json.dumps([len(file.read_text().splitlines()) for file in files]))
        files[-1].unlink()
    seed_everything(0, verbose=False)
    network, rows, targets, trainable = build(case)
    strategy = case["strategy"]
    if strategy == "model_parallel":
        strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    often = case.get("keep", {"every_n_train_steps": 1})
    keep = ModelCheckpoint(folder, filename="last", enable_version_counter=False, **often)
    dies = [Dies(case["dies"])] if "dies" in case else []
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        callbacks=[AdapterInjection(METHODS[case["method"]], targets, trainable), Watch(folder), *dies, keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **{"max_steps": 3, **case.get("trainer", {})},
    )
    command = case.get("command", "fit")
    try:
        getattr(trainer, command)(network, datamodule=rows, ckpt_path=case.get("ckpt"))
    except InterruptedError:
        return
    if command != "fit" and trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps({k: v.item() for k, v in trainer.callback_metrics.items()}))
