"""Every private attribute of Lightning that this package uses: one function each, all read from Lightning 2.6.6.

Nothing outside this file names them. Each function has a canary in tests/training/test_lightning_internals.py, which
fails with a sentence where Lightning has changed what stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod

# --- modules and loops ---


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The trainer that a module is attached to, if any; `LightningModule.trainer` would raise without one (2.6.6)."""
    return module._trainer


def should_accumulate(trainer: Trainer) -> bool:
    """Whether the current batch adds to the gradients without an optimizer step (`_TrainingEpochLoop`, 2.6.6)."""
    return trainer.fit_loop._should_accumulate()


def is_training_done(trainer: Trainer) -> bool:
    """Whether this was the last batch of its epoch or of the run (`_TrainingEpochLoop`, 2.6.6)."""
    return trainer.fit_loop.epoch_loop._is_training_done


def restart_by_epochs(trainer: Trainer) -> None:
    """Has a run with `max_steps` resume as one with `max_epochs` does (`_FitLoop._iteration_based_training`, 2.6.6).

    Otherwise the loop takes every checkpoint for one of the middle of an epoch.
    """
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]


def take_loader_states(trainer: Trainer) -> list[dict[str, Any]]:
    """The states of the train loaders that a checkpoint held and Lightning has not loaded yet (`_FitLoop`, 2.6.6).

    Lightning loads them in the middle of an epoch only; afterwards it finds none left.
    """
    loop = trainer.fit_loop
    states, loop._combined_loader_states_to_load = loop._combined_loader_states_to_load, []
    return states


def load_loader_states(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    """Hands the train loaders their states and makes their iterators again (`_FitLoop`, `CombinedLoader`, 2.6.6)."""
    loop = trainer.fit_loop
    if states and loop._combined_loader is not None:
        loop._combined_loader._load_state_dicts(states)
        iter(loop._data_fetcher)  # type: ignore[call-overload]


def intercept_loaders(trainer: Trainer, change: Callable[[Any], Any]) -> None:
    """Passes every loader that the strategy has processed to `change` (`Strategy.process_dataloader`, 2.6.6).

    The loops call it on the strategy's instance, where an attribute hides the method.
    """
    strategy = trainer.strategy
    inner = strategy.process_dataloader
    strategy.process_dataloader = lambda loader: change(inner(loader))  # type: ignore[method-assign]


def stop_intercepting_loaders(trainer: Trainer) -> None:
    """Undoes every `intercept_loaders`."""
    vars(trainer.strategy).pop("process_dataloader", None)


def extend_object(value: Any, template: type) -> None:
    """Gives a loader or strategy that exists a subclass of its class with the members of `template`.

    Lightning asks both for their class and keeps its own references to them, so that it would not meet a wrapper. Two
    bases would be refused: an object cannot get a class with another first base.

    The template is a class without bases, whose methods find the class of before as ``self.plain_class``. What has its
    members already stays as it is; a `TypeError` comes for lists, generators and classes with slots.
    """
    if getattr(value, "template", None) is not template:
        value.__class__ = _extended(type(value), template)


@lru_cache
def _extended(kind: type, template: type) -> type:
    # Once a pair of classes: loaders of one class stay of one class. It goes by the name of the class before.
    members = {n: v for n, v in vars(template).items() if n not in ("__dict__", "__weakref__", "__doc__")}
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**members, **names, "plain_class": kind, "template": template})


# --- signals and SLURM ---

_SIGNAL_HANDLERS = ("_sigterm_notifier_fn", "_slurm_sigusr_handler_fn")


def replace_signal_handlers(trainer: Trainer, sigterm: Callable[..., None], requeue: Callable[..., None]) -> None:
    """Has Lightning register these for SIGTERM and SLURM's signal when a fit begins (`_SignalConnector`, 2.6.6)."""
    for name, handler in zip(_SIGNAL_HANDLERS, (sigterm, requeue), strict=True):
        setattr(trainer._signal_connector, name, handler)


def restore_signal_handlers(trainer: Trainer) -> None:
    """Undoes `replace_signal_handlers`."""
    for name in _SIGNAL_HANDLERS:
        vars(trainer._signal_connector).pop(name, None)


def put_back_handler(trainer: Trainer, number: int, handler: Any) -> None:
    """Has Lightning put back this handler when the fit ends, not that of when it began (`_SignalConnector`, 2.6.6)."""
    trainer._signal_connector._original_handlers[number] = handler


def stop_after_batch(trainer: Trainer) -> None:
    """Has the training loop raise `SIGTERMException` once all callbacks had this batch (`_SignalConnector`, 2.6.6)."""
    trainer._signal_connector.received_sigterm = True


def requeue_job(trainer: Trainer) -> None:
    """Writes ``hpc_ckpt_N.ckpt`` and asks SLURM to start the job again (`_SignalConnector`, 2.6.6)."""
    _SignalConnector._slurm_sigusr_handler_fn(trainer._signal_connector, 0, None)  # type: ignore[arg-type]


def is_requeued(trainer: Trainer) -> bool:
    """Whether SLURM starts the job again after it was stopped (`_AcceleratorConnector.cluster_environment`, 2.6.6)."""
    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, SLURMEnvironment) and environment.auto_requeue


def hpc_save_path(trainer: Trainer) -> str:
    """The next ``hpc_ckpt_N.ckpt`` in `default_root_dir` (`_CheckpointConnector`, 2.6.6)."""
    return trainer._checkpoint_connector.hpc_save_path(str(trainer.default_root_dir))


def hpc_resume_path(trainer: Trainer) -> str | None:
    """The latest ``hpc_ckpt_N.ckpt``, with which Lightning resumes a requeued job (`_CheckpointConnector`, 2.6.6)."""
    return trainer._checkpoint_connector._hpc_resume_path


# --- checkpoints and strategies ---

# Decorates a class method that raises where it is called on an instance, as `load_from_checkpoint` does (2.6.6).
called_on_classes = _restricted_classmethod


def wrap_restoring(
    trainer: Trainer, wrap: Callable[[Callable[[], None]], None], check: Callable[[dict[str, Any]], None]
) -> None:
    """Has `wrap` called with whatever restores from a checkpoint (`_CheckpointConnector`, 2.6.6).

    `check` gets the checkpoint of a fit before loops, optimizers and schedulers take their states. `Trainer._run` calls
    the two methods on the connector's instance, where an attribute hides them.
    """
    connector = trainer._checkpoint_connector
    modules, training = type(connector)._restore_modules_and_callbacks, type(connector).restore_training_state

    def restore_training_state() -> None:
        if connector._loaded_checkpoint and trainer.state.fn == TrainerFn.FITTING:
            check(connector._loaded_checkpoint)
        training(connector)

    def restore_modules(*args: Any, **options: Any) -> None:
        wrap(lambda: modules(connector, *args, **options))

    connector._restore_modules_and_callbacks = restore_modules  # type: ignore[method-assign]
    connector.restore_training_state = lambda: wrap(restore_training_state)  # type: ignore[method-assign]


def replace_wrapped_io(outer: CheckpointIO, kind: type[CheckpointIO], new: CheckpointIO) -> None:
    """Puts `new` in the place of a `CheckpointIO` of just this class within a wrapper (`_WrappingCheckpointIO`, 2.6.6).

    The wrapper's own setter acts once only.
    """
    if isinstance(outer, _WrappingCheckpointIO) and type(outer.checkpoint_io) is kind:
        outer._checkpoint_io = new


def write_one_file(strategy: ModelParallelStrategy) -> bool:
    """Turns off the checkpoints that are folders of shards (`ModelParallelStrategy`, 2.6.6); whether they were on."""
    was, strategy._save_distributed_checkpoint = strategy._save_distributed_checkpoint, False
    return was


def shard_over_all_processes(strategy: ModelParallelStrategy) -> None:
    """Sets the size of the data-parallel mesh (`ModelParallelStrategy`, 2.6.6).

    Lightning's "auto" is the number of nodes, and would shard within none of them.
    """
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


# --- samplers ---


def wrap_draws(sampler: DistributedSamplerWrapper, wrap: Callable[[Callable[[], None]], None]) -> None:
    """Has `wrap` called with what draws an epoch's order for all processes (`_DatasetSamplerWrapper.reset`, 2.6.6)."""
    draw = sampler.dataset.reset  # type: ignore[attr-defined]
    sampler.dataset.reset = lambda: wrap(draw)  # type: ignore[attr-defined]
