"""The gradients of a checkpoint that is written between two batches of one optimizer step: kept, and put back.

Validation, and the checkpoint with it, may come in the middle of an accumulation.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.distributed.tensor import DTensor

from pera_lightning.adapters.base import plain_name
from pera_lightning.training.distributed import all_gather_object
from pera_lightning.training.sharding import full_tensors, sharded_like

GRADIENTS = "pera_lightning_gradients"


def save_gradients(module: torch.nn.Module, checkpoint: dict[str, Any]) -> None:
    """Puts into a checkpoint what every process has gathered, by rank; every process must call it."""
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    # Copies: the next batch adds to the gradients while the checkpoint may still be written.
    own = {plain_name(name): full_tensors(gradient).detach().cpu().clone() for name, gradient in gradients.items()}
    checkpoint[GRADIENTS] = all_gather_object(own)


def saved_gradients(trainer: Trainer, module: torch.nn.Module, checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The gradients that this process goes on with, by parameter name.

    They are its own where each process has gradients of its own and there are as many processes as before. Else they
    are the mean, which is what the optimizer step takes in the end.
    """
    ranks = checkpoint.get(GRADIENTS, [])
    # FSDP2 reduces the gradients of every batch: all processes have saved the same.
    sharded = any(isinstance(p, DTensor) for p in module.parameters())
    if len(ranks) == trainer.world_size and not sharded:
        return ranks[trainer.global_rank]
    # The mean over the processes of then; one without a gradient counts as zero.
    names = {name: None for own in ranks for name in own}
    return {name: sum(own[name] for own in ranks if name in own) / len(ranks) for name in names}


def put_gradients(module: torch.nn.Module, gradients: dict[str, torch.Tensor]) -> None:
    """Gives the parameters their gradients, sharded where they are."""
    for name, gradient in gradients.items():
        parameter = module.get_parameter(plain_name(name))  # names: the checkpoint may be of another strategy
        parameter.grad = sharded_like(gradient.to(parameter.device), parameter)  # the next batch adds to it
