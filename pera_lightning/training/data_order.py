"""Train loaders that resume in the middle of an epoch, at the batch and with the randomness of the run that stopped.

Lightning saves the state of any loader with `state_dict`. A plain `DataLoader` has none, so `make_resumable` gives it
one: the state of the random generators when the epoch's iterator was made and now, and the number of batches trained.
Resuming makes the iterator again from the first state, passes over those batches and sets the second. That needs
nothing of the sampler, the data set or the workers but that they draw from the usual generators, or from one that the
loader or its sampler holds; passing over costs the loading of those batches. A loader with a state of its own
(torchdata's) keeps it, and nothing is passed over.

With several train loaders, order is restored but not exactly; nor is what persistent workers draw (random crops),
since their generators are seeded once a run: a warning says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from pera_lightning.errors import CheckpointError
from pera_lightning.training import _lightning_internals as internals
from pera_lightning.training.checkpoint_io import in_one_line
from pera_lightning.training.distributed import all_gather_object
from pera_lightning.training.random_state import capture, devices, restore
from pera_lightning.training.training_state import unlike


@dataclass(frozen=True)
class Progress:
    """Where training stands: the epoch, the batches of it trained, and whether they are all of it."""

    epoch: int
    batches: int
    complete: bool


class _Plain:
    """A list or another iterable in a class that can be extended."""

    def __init__(self, iterable: Iterable[Any]) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]


class _Resumable:
    """The members that `make_resumable` adds to a loader."""

    plain_class: type
    _progress: Callable[[], Progress]
    _epoch_start: dict[str, Any] | None = None  # random state when the epoch's iterator was made
    _pending: dict[str, Any] | None = None  # loaded, for the next iterator
    _drawn: bool = True  # whether the iterator has given a batch
    _undrawn: dict[str, Any] | None = None  # random state to go on from while it has not

    def __iter__(self) -> Iterator[Any]:
        pending, self._pending = self._pending, None
        own = _generators(self)
        # 1. The random state from which this epoch's order was, or is, drawn.
        if pending is not None:
            restore(pending["epoch_start"] if pending["batches"] else pending["now"], own)
        elif not self._drawn and self._epoch_start is not None:
            restore(self._epoch_start, own)  # Lightning made an iterator already and drew nothing from it
        _set_epoch(self, self._progress().epoch)  # before the iterator draws the order
        self._epoch_start = self._undrawn = capture(own)
        self._drawn = False
        # 2. The iterator, with the same order as before the stop.
        own_state = pending and pending.get("loader")
        if own_state is not None:
            self.plain_class.load_state_dict(self, own_state)  # type: ignore[attr-defined]
        iterator = self.plain_class.__iter__(self)  # type: ignore[attr-defined]
        # 3. Past the batches that are trained already, on to the random state of the stop.
        if pending is not None and pending["batches"]:
            for _ in range(0 if own_state is not None else pending["batches"]):
                try:
                    next(iterator)
                except StopIteration:  # the shorter of several loaders starts again, as in Lightning's cycle
                    iterator = self.plain_class.__iter__(self)  # type: ignore[attr-defined]
                    next(iterator)
            self._epoch_start, self._undrawn = pending["epoch_start"], pending["now"]
            restore(pending["now"], own)
        return self._watched(iterator, None if pending is None else capture(own))

    def _watched(self, iterator: Iterator[Any], start: dict[str, Any] | None) -> Iterator[Any]:
        if start is not None:
            # Between the iterator's making and here, Lightning draws for a validation that it then leaves out.
            restore(start, _generators(self))
        for batch in iterator:
            self._drawn = True  # from now on the random state of now is the one to save
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Batches trained and random states, for every rank."""
        progress = self._progress()
        # A run that goes on with a validation has made the iterator already, and validation draws.
        now = capture(_generators(self)) if self._drawn else self._undrawn
        inner = getattr(self.plain_class, "state_dict", None)
        state = {
            "batches": 0 if progress.complete else progress.batches,
            "epoch_start": now if self._epoch_start is None else self._epoch_start,
            "now": now,
            "loader": inner(self) if inner is not None and not progress.complete else None,
        }
        return {"ranks": all_gather_object(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what this rank saved; used by the next iterator."""
        # Read and tried before the epoch begins: a damaged checkpoint gets its line here.
        in_one_line(partial(self._take, state))

    def _take(self, state: dict[str, Any]) -> None:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if len(state["ranks"]) != world:
            rank_zero_warn(
                f"the checkpoint was written by {len(state['ranks'])} processes and is loaded by {world}: "
                "the order of the data and the random state are not restored"
            )
            return
        pending, now = state["ranks"][rank], capture()
        usual = {key: value for key, value in now.items() if key not in devices(now)}  # of another machine they differ
        usual["python"] = {**now["python"], "gauss": None}  # a number or nothing
        own = {"batches": 0, "epoch_start": usual, "now": usual}
        if wrong := unlike(pending, own, "combined_loader", exact=True):
            raise CheckpointError(f"the order of the data in the checkpoint is damaged: {wrong}")
        for saved in (pending["epoch_start"], pending["now"]):
            restore(saved)
        restore(now)
        self._pending = pending  # the next iterator takes it
        then, here = (" and ".join(names) or "cpu" for names in (devices(pending["now"]), devices(now)))
        if then != here:
            rank_zero_warn(
                f"the checkpoint was written on {then} and is loaded on {here}: what a device draws, as dropout, goes "
                "on with other numbers"
            )


def make_resumable(loader: Any, progress: Callable[[], Progress]) -> Any:
    """A copy of a loader (any iterable that Lightning takes), over the same data, with a state that restores its order.

    A copy, since the same object may serve validation, and since other people's objects keep their class.
    """
    if getattr(loader, "persistent_workers", False):
        rank_zero_warn(
            "the train loader has persistent workers, whose random state cannot be restored: a resumed run sees the "
            "same order but other augmentations; set persistent_workers=False for one that equals the run exactly"
        )
    try:
        copied = copy.copy(loader)
        internals.extend_object(copied, _Resumable)
    except TypeError:  # lists, generators, itertools, classes with slots
        copied = _Plain(loader)
        internals.extend_object(copied, _Resumable)
    copied._progress = progress
    return copied


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators of its own that a loader or its sampler draws from, each once."""
    batches = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _set_epoch(loader: Any, epoch: int) -> None:
    # Lightning sets it after the first iterator was made, too late for one that reads ahead.
    for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        if callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(epoch)


def resume_data_order(trainer: Trainer) -> None:
    """Makes every train loader of a fit resumable, where Lightning hands loaders to the strategy."""
    loop = trainer.fit_loop
    internals.stop_intercepting_loaders(trainer)  # what a fit that failed in its setup has left

    def progress() -> Progress:
        batches = loop.epoch_loop.batch_progress
        return Progress(loop.epoch_progress.current.processed, batches.current.processed, batches.is_last_batch)

    def change(loader: Any) -> Any:
        training = trainer.state.stage == RunningStage.TRAINING and trainer.state.fn == TrainerFn.FITTING
        return make_resumable(loader, progress) if training else loader

    internals.intercept_loaders(trainer, change)


def load_loader_states(trainer: Trainer) -> None:
    """Hands the train loaders their states from a checkpoint where Lightning could not.

    It loads them only in the middle of an epoch, and not where the loaders were built before the checkpoint's loop
    state was read (a module that asks for `estimated_stepping_batches` while it makes its optimizer does that).
    """
    states = internals.take_loader_states(trainer)
    if len(states) > 1:
        rank_zero_warn("several train loaders: their order is restored, but not the randomness they share")
    internals.load_loader_states(trainer, states)
