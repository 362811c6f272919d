"""The callback that adapts a LightningModule: injection at setup, adapter-only checkpoints, exact resume, checks.

It works with anybody's module that builds its network in `__init__`, unchanged. A module that builds in
`configure_model` offers the hook: a class attribute ``adapter_injection = None`` which the callback sets, called at the
end of building, before compiling and sharding::

    class MyModule(LightningModule):
        adapter_injection = None

        def configure_model(self):
            if self.model is None:
                self.model = build()
                if self.adapter_injection is not None:
                    self.adapter_injection(self.model)
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

from pera_lightning.adapters.method import Method
from pera_lightning.errors import ConfigurationError, NoTargetMatched
from pera_lightning.injection.inject import inject, injection_of
from pera_lightning.injection.state import find_injected, remember_unfrozen
from pera_lightning.training import _lightning_internals as internals
from pera_lightning.training.accumulated_gradients import put_gradients, save_gradients, saved_gradients
from pera_lightning.training.averaged_weights import AveragedWeights
from pera_lightning.training.checkpoint_io import AdapterCheckpointIO, allow_missing_base, in_one_line
from pera_lightning.training.checks import (
    check_adapters,
    check_before_fit,
    check_epoch,
    check_in_optimizer,
    check_not_empty,
    check_position,
    check_precision,
)
from pera_lightning.training.data_order import load_loader_states, resume_data_order
from pera_lightning.training.final_adapter import write_final_adapter
from pera_lightning.training.finite import check_metrics, check_parameters, check_training_loss
from pera_lightning.training.fsdp2 import write_adapters_only
from pera_lightning.training.loop_state import go_on_where_it_stopped, warn_of_plateau
from pera_lightning.training.preemption import Preemption, drop_requeue_file, validate_before_going_on
from pera_lightning.training.random_state import capture, restore
from pera_lightning.training.run_folder import RunFolder, rebase_checkpoints
from pera_lightning.training.seed_per_rank import seed_ranks_apart, share_first_ranks_generators
from pera_lightning.training.training_data import injection_in, note_training_data, number_classes_alike
from pera_lightning.training.training_state import check_callback_states, check_training_state
from pera_lightning.training.unused_layers import UnusedLayers

HOOK = "adapter_injection"


class AdapterInjection(Callback):
    """Adapts a LightningModule and keeps its checkpoints to what is trained. Put it before all other callbacks.

    Args:
        method: the adapter method, e.g. ``PERA(rank=16)``.
        targets: expressions that name linear layers, see `pera_lightning.injection.targets`.
        trainable: modules trained in full (heads), by name or glob.
        fused: sizes of the slices of fused projections whose layout is not known.
        seed: seed of the initial values; by default the run's.
        on_unused: what to do about adapted layers that do not run in the first training or evaluation batch: "raise",
            or "warn" for models that route (mixtures of experts).
    """

    def __init__(
        self,
        method: Method,
        targets: list[str] | None = None,
        trainable: list[str] | None = None,
        fused: dict[str, dict[str, int]] | None = None,
        seed: int | None = None,
        on_unused: Literal["raise", "warn"] = "raise",
    ) -> None:
        self.method = method
        self.targets, self.trainable = targets or [], trainable or []  # lists, as in a config
        self.fused, self.seed, self.on_unused = fused, seed, on_unused
        self.preemption = Preemption()
        self.run_folder = RunFolder()
        self.untrained = False  # whether an evaluation is of the base, asked for by name
        self.best_checkpoint = ""  # of the last fit; `ModelCheckpoint` forgets it when another one is tested
        self._unused = UnusedLayers(on_unused)
        self._averaged = AveragedWeights()
        self._rng: dict[str, Any] | None = None  # random state after the last training batch
        self._gradients: dict[str, torch.Tensor] = {}  # of a resumed accumulation

    def injector(self) -> partial:
        """Called with a network, it injects: what a module's hook is set to."""
        names = {"targets": self.targets, "trainable": self.trainable, "fused": self.fused}
        return partial(inject, method=self.method, seed=self.seed, **names)

    # --- before anything runs ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_position(self, trainer)
        check_precision(trainer)  # both before anything is changed
        if stage == TrainerFn.FITTING:
            self.run_folder.enter(trainer)
        if hasattr(type(pl_module), HOOK):
            setattr(pl_module, HOOK, self.injector())
        else:
            self._inject_foreign(pl_module)
        if stage != TrainerFn.FITTING and (mark := injection_in(pl_module)) is not None:  # loaded before
            number_classes_alike(pl_module, mark.spec(), type(pl_module).__name__)
        # Checkpoints are of what is trained: written so, and loaded without the base.
        allow_missing_base(pl_module)
        write_adapters_only(trainer.strategy)
        trainer.strategy.checkpoint_io = AdapterCheckpointIO(trainer.strategy.checkpoint_io, pl_module, self.run_folder)
        internals.wrap_restoring(trainer, in_one_line, partial(check_training_state, trainer))
        if stage == TrainerFn.FITTING:
            self._unused.restart()
            self._rng, self._gradients = None, {}
            resume_data_order(trainer)
            self.preemption.watch(trainer)  # before Lightning registers its handlers
            seed_ranks_apart(trainer)

    def _inject_foreign(self, module: LightningModule) -> None:
        late = is_overridden("configure_model", module)
        try:
            if not late or next(module.parameters(), None) is not None:
                self.injector()(module)  # it is built: a module's `__init__` did that
                return
        except NoTargetMatched:
            if not late:
                raise
        raise ConfigurationError(
            f"{type(module).__name__} builds its network in configure_model, after the injection: add the class "
            f"attribute `{HOOK} = None`, and at the end of building `if self.{HOOK} is not None: self.{HOOK}(self)`"
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = find_injected(pl_module)
        if found is None:
            raise ConfigurationError(
                f"{type(pl_module).__name__} has the hook `{HOOK}` and did not call it in configure_model"
            )
        rank_zero_only(print)(injection_of(found[1]).report, flush=True)  # type: ignore[union-attr]
        check_before_fit(trainer, pl_module)
        note_training_data(trainer, pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.preemption.begin(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        warn_of_plateau(trainer)
        self.preemption.begin(trainer)
        self.run_folder.begin(trainer)
        in_one_line(partial(load_loader_states, trainer))
        in_one_line(partial(put_gradients, pl_module, self._gradients))
        self._gradients = {}  # they are the parameters' now

    # --- training batches ---

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._unused.before_batch("training", pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self._unused.is_first_step(optimizer):
            check_adapters(pl_module)
            check_in_optimizer(trainer, pl_module)
        self._unused.before_step(optimizer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._unused.after_batch("training")
        check_training_loss(trainer, pl_module, outputs, batch_idx)
        self._rng = capture()  # what follows, validation and other callbacks, may draw
        self.preemption.after_train_batch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_epoch(trainer, pl_module)
        remember_unfrozen(pl_module)  # by a callback that thaws the base later, as BaseFinetuning does

    # --- evaluation batches; validation leaves the randomness of training as if it had not been ---

    def _evaluation_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._unused.before_batch("evaluation", pl_module)

    def _evaluation_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._unused.after_batch("evaluation")

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _evaluation_start
    on_test_batch_end = on_predict_batch_end = _evaluation_end

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.preemption.before_validation(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._unused.after_batch("evaluation")
        self.preemption.after_validation_batch(trainer)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        check_metrics(trainer)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._rng is not None:
            restore(self._rng)

    def on_test_end(self, trainer: Trainer, *_: Any) -> None:
        check_metrics(trainer)

    # --- checkpoints ---

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        check_adapters(pl_module)
        check_parameters(pl_module, of_all=True)
        if trainer.state.fn == TrainerFn.FITTING and internals.should_accumulate(trainer):
            save_gradients(pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        rebase_checkpoints(trainer, checkpoint)
        if trainer.state.fn == TrainerFn.FITTING:
            check_callback_states(trainer, checkpoint)
            self.run_folder.resume(trainer, checkpoint)
        validate_before_going_on(trainer, checkpoint)
        go_on_where_it_stopped(trainer, checkpoint)
        self._gradients = saved_gradients(trainer, pl_module, checkpoint)

    # --- at the end ---

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unused.stop()
        # A checkpoint of this stop is to hold the random state of training.
        if trainer.validating:
            self.on_validation_end(trainer)
        if (files := self.preemption.save(trainer, exception)) is not None:
            try:
                write_final_adapter(trainer, pl_module, self.run_folder.run, older_than=next(iter(files), None))
            finally:
                self.preemption.say_how_to_go_on(trainer, files)
        self.preemption.release(trainer)
        self.run_folder.leave()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._averaged.training_ends(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        share_first_ranks_generators()
        drop_requeue_file(trainer)
        check_not_empty(trainer)
        self.best_checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
        averaged = self._averaged.put_into(trainer, pl_module)
        write_final_adapter(trainer, pl_module, self.run_folder.run, averaged=averaged)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        internals.stop_intercepting_loaders(trainer)
        self.preemption.release(trainer)
        self.run_folder.leave()
