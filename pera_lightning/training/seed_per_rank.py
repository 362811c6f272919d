"""Random numbers on several processes: dropout and augmentation differ between them, the order of the data does not.

Lightning seeds every process alike, so that all would drop the same units and crop alike. Here the generators of each
process but the first are moved apart where the train loader is made: after the network is built and before the state
of its first epoch is taken, from which a resumed run starts. A single process draws what it always drew.

What deals out data must still draw alike on all processes. Lightning's `DistributedSampler` and this package's samplers
have a seed; a sampler of another kind draws from the common generators, and is given the same ones on every process,
anew each epoch.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage

from pera_lightning.training.distributed import all_gather_object
from pera_lightning.training.random_state import capture, restore


def part_generators(trainer: Trainer) -> None:
    """Moves the generators of the processes apart when this fit's first train loader is handed to the strategy.

    Args:
        trainer: in a fit, after `resume_data_order`, whose undoing undoes this too.
    """
    inner, parted = trainer.strategy.process_dataloader, False

    def process(loader: Any) -> Any:
        nonlocal parted
        if trainer.state.stage == RunningStage.TRAINING and not parted:  # a sanity check takes back what it draws
            parted = True
            # Processes that hold parts of the same layers have the same data, and need the same dropout.
            share = (trainer.distributed_sampler_kwargs or {}).get("rank", 0)
            if share:
                seed_all(torch.get_rng_state().numpy().tobytes(), share)
        deal_alike(loader)
        return inner(loader)

    trainer.strategy.process_dataloader = process  # type: ignore[method-assign]


def join_generators() -> None:
    """Gives every process the generators of the first: what is built after a fit is alike on all of them."""
    ranks = all_gather_object(capture())
    if len(ranks) > 1:
        restore(ranks[0])


def seed_all(*facts: int | bytes) -> None:
    """Seeds python's, numpy's and torch's generators (of every device) by a hash of some facts."""
    digest = hashlib.sha256(repr(facts).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))
    np.random.seed(int.from_bytes(digest[8:12], "little"))
    random.seed(digest[12:])


class _AlikeEverywhere:
    """A sampler whose draws depend on the run's seed and the epoch alone.

    Args:
        sampler: draws from the common generators.
        dealer: Lightning's wrapper around it, which knows the epoch.
    """

    def __init__(self, sampler: Any, dealer: DistributedSamplerWrapper) -> None:
        self._sampler, self._dealer = sampler, dealer

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_sampler":
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __iter__(self) -> Iterator[Any]:
        own = capture()
        seed_all(int(os.environ.get("PL_GLOBAL_SEED", 0)), self._dealer.epoch)
        try:
            rows = list(self._sampler)
        finally:
            restore(own)
        return iter(rows)


def deal_alike(loader: Any) -> None:
    """Lets a sampler that Lightning deals out to several processes draw the same on all of them."""
    dealer = getattr(loader, "sampler", None)
    if isinstance(dealer, DistributedSamplerWrapper) and dealer.num_replicas > 1:
        dealer.dataset._sampler = _AlikeEverywhere(dealer.dataset._sampler, dealer)
