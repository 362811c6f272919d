"""Random numbers on several processes: dropout and augmentation differ between them, the order of the data does not.

Lightning seeds every process alike, so that all would drop the same units and crop alike. Here each process but the
first gets a seed of its own, from the state of the first's generators, where the train loader is made: after the
network is built and before the state of its first epoch is taken, from which a resumed run starts. A single process
draws what it always drew.

Samplers must still draw alike on all processes. Lightning's `DistributedSampler` and this package's samplers have a
seed; a sampler of another kind draws from the common generators, and is given the same ones on every process, anew each
epoch.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage

from pera_lightning.training import _lightning_internals as internals
from pera_lightning.training.distributed import all_gather_object
from pera_lightning.training.random_state import capture, restore


def seed_ranks_apart(trainer: Trainer) -> None:
    """Gives each process a seed of its own when a fit's first train loader is handed to the strategy.

    To be called after `resume_data_order`.
    """
    seeded = False

    def change(loader: Any) -> Any:
        nonlocal seeded
        if trainer.state.stage == RunningStage.TRAINING and not seeded:  # a sanity check takes back what it draws
            seeded = True  # once a fit: epochs go on with the same generators
            # The rank among processes that see different data: those that share a layer's input (tensor parallelism)
            # see the same data and need the same dropout.
            rank = (trainer.distributed_sampler_kwargs or {}).get("rank", 0)
            # By the first's state: under FSDP2 the others built on the meta device, and drew less.
            first = all_gather_object(capture())[0]
            if not trainer.is_global_zero:
                restore(first)
            if rank:
                seed_all(first["torch"].numpy().tobytes(), rank)
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, DistributedSamplerWrapper) and sampler.num_replicas > 1:
            internals.wrap_draws(sampler, lambda draw: _draw_alike(draw, sampler.epoch))
        return loader

    internals.intercept_loaders(trainer, change)


def _draw_alike(draw: Callable[[], None], epoch: int) -> None:
    """Draws an order that depends on the run's seed and the epoch alone; dropout goes on as if nothing was drawn."""
    own = capture()  # this process's
    seed_all(int(os.environ.get("PL_GLOBAL_SEED", 0)), epoch)
    try:
        draw()
    finally:
        restore(own)


def share_first_ranks_generators() -> None:
    """Gives every process the generators of the first: what is built after a fit is alike on all of them."""
    ranks = all_gather_object(capture())
    if len(ranks) > 1:
        restore(ranks[0])  # tensors on the CPU, so any process takes them


def seed_all(*facts: int | bytes) -> None:
    """Seeds python's, numpy's and torch's generators (of every device) by a hash of some facts."""
    # A hash: seeds that are near each other, such as 0 and 1, give generators that have nothing in common.
    digest = hashlib.sha256(repr(facts).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))
    np.random.seed(int.from_bytes(digest[8:12], "little"))
    random.seed(digest[12:])
