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

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.distributed.tensor import DTensor

from pera_lightning.adapters.method import Method
from pera_lightning.errors import CheckpointError, ConfigurationError, NoTargetMatched, UnusedLayerError, listed
from pera_lightning.injection.inject import adapter_parameter_names, inject, injection_of
from pera_lightning.injection.state import (
    METADATA,
    adapter_state_dict,
    find_injected,
    forgive_missing_base,
    remember_unfrozen,
    write_adapter,
)
from pera_lightning.training.checkpoint_io import AdapterCheckpointIO, read_checkpoint
from pera_lightning.training.checks import (
    check_float32,
    check_optimizers,
    check_position,
    check_precision,
    check_unfrozen,
)
from pera_lightning.training.data_order import forget_data_order, load_loader_states, resume_data_order
from pera_lightning.training.distributed import all_gather_object
from pera_lightning.training.fsdp2 import adopt
from pera_lightning.training.preemption import Preemption, drop_requeue_file, validate_before_going_on
from pera_lightning.training.random_state import capture, restore
from pera_lightning.training.seed_per_rank import join_generators, part_generators
from pera_lightning.training.sharding import sharded_like, whole
from pera_lightning.training.unused_layers import LayerCoverage

HOOK = "adapter_injection"
GRADIENTS = "pera_lightning_gradients"


class AdapterInjection(Callback):
    """Adapts a LightningModule and keeps its checkpoints to what is trained. Put it before all other callbacks.

    Args:
        method: the adapter method, e.g. ``PERA(rank=16)``.
        targets: expressions that name linear layers, see `pera_lightning.injection.targets`.
        trainable: modules trained whole (heads), by name or glob.
        fused: sizes of row blocks of fused projections whose layout is not known.
        seed: of the initial values; by default the run's.
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
        if on_unused not in ("raise", "warn"):
            raise ConfigurationError(f"on_unused={on_unused!r}: 'raise' or 'warn' is needed")
        self.method = method
        self.targets, self.trainable = targets or [], trainable or []
        self.fused, self.seed, self.on_unused = fused, seed, on_unused
        self.preemption = Preemption()
        self._coverage = LayerCoverage()
        self._rng: dict[str, Any] | None = None
        self._covered: set[str] = set()
        self._stepped: set[int] = set()
        self._gradients: dict[str, torch.Tensor] = {}

    def injector(self) -> partial:
        """Called with a network, it injects: what a module's hook is set to."""
        return partial(
            inject,
            method=self.method,
            targets=self.targets,
            trainable=self.trainable,
            fused=self.fused,
            seed=self.seed,
        )

    # --- before anything runs ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_position(self, trainer)
        check_precision(trainer)
        if hasattr(type(pl_module), HOOK):
            setattr(pl_module, HOOK, self.injector())
        else:
            self._inject_foreign(pl_module)
        prepare_loading(pl_module)
        adopt(trainer.strategy)
        trainer.strategy.checkpoint_io = AdapterCheckpointIO(trainer.strategy.checkpoint_io, pl_module)
        if stage == TrainerFn.FITTING:
            self._covered, self._stepped, self._gradients, self._rng = set(), set(), {}, None
            resume_data_order(trainer)
            self.preemption.watch(trainer)
            part_generators(trainer)

    def _inject_foreign(self, module: LightningModule) -> None:
        late = ConfigurationError(
            f"{type(module).__name__} builds its network in configure_model, after the injection: add the class "
            f"attribute `{HOOK} = None` to it, and at the end of building `if self.{HOOK} is not None: "
            f"self.{HOOK}(self)`"
        )
        builds_late = is_overridden("configure_model", module)
        if builds_late and next(module.parameters(), None) is None:
            raise late
        try:
            self.injector()(module)
        except NoTargetMatched:
            if builds_late:
                raise late from None
            raise

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = find_injected(pl_module)
        if found is None:
            raise ConfigurationError(
                f"{type(pl_module).__name__} has the hook `{HOOK}` and did not call it in configure_model"
            )
        rank_zero_only(print)(injection_of(found[1]).report, flush=True)  # type: ignore[union-attr]
        check_float32(pl_module)
        check_optimizers(trainer, pl_module)
        check_unfrozen(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        load_loader_states(trainer)
        for name, gradient in self._gradients.items():
            parameter = pl_module.get_parameter(name)
            parameter.grad = sharded_like(gradient.to(parameter.device), parameter)
        self._gradients = {}

    # --- which layers run ---

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._watch("training", pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._check("training")
        self._rng = capture()
        self.preemption.after_train_batch(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if id(optimizer) not in self._stepped:
            self._stepped.add(id(optimizer))
            held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is None}
            silent = [n for n, p in pl_module.named_parameters() if p.requires_grad and id(p) in held]
            mine = adapter_parameter_names(pl_module).intersection(silent)
            self._complain(sorted(mine), "adapter parameters had no gradient in the first optimizer step")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        remember_unfrozen(pl_module)  # by a callback that thaws the base later, as BaseFinetuning does

    def _evaluation_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._watch("evaluation", pl_module)

    def _evaluation_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._check("evaluation")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.preemption.before_validation(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._check("evaluation")
        self.preemption.after_validation_batch(trainer)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _evaluation_start
    on_test_batch_end = on_predict_batch_end = _evaluation_end

    def _watch(self, kind: str, module: LightningModule) -> None:
        if kind not in self._covered:
            self._coverage.start(module)

    def _check(self, kind: str) -> None:
        if kind in self._covered:
            return
        unused = self._coverage.stop()
        if self._coverage.nothing_ran:  # a batch that the module skips says nothing of its layers: see the next one
            return
        self._covered.add(kind)
        self._complain(unused, f"adapted layers did not run in the first {kind} batch")

    def _complain(self, names: list[str], what: str) -> None:
        if not names:
            return
        text = (
            f"{len(names)} {what}, so their adapters change nothing: {listed(names)}; leave them out of targets, or "
            "set on_unused='warn' where a layer need not run in every batch"
        )
        if self.on_unused == "raise":
            raise UnusedLayerError(text)
        rank_zero_warn(text)

    # --- randomness: validation leaves the training run as if it had not been ---

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_training(trainer)

    def _restore_training(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._rng is not None:
            restore(self._rng)

    # --- a checkpoint in the middle of gradient accumulation keeps the gradients gathered so far ---

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING and trainer.fit_loop._should_accumulate():
            checkpoint[GRADIENTS] = all_gather_object(trained_gradients(pl_module))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        validate_before_going_on(trainer, checkpoint)
        ranks = checkpoint.get(GRADIENTS, [])
        same = len(ranks) == trainer.world_size and not any(isinstance(p, DTensor) for p in pl_module.parameters())
        self._gradients = ranks[trainer.global_rank] if same else mean_gradients(ranks)

    # --- at the end ---

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._coverage.stop()
        if trainer.validating:
            self._restore_training(trainer)
        self.preemption.save(trainer, exception)
        self.preemption.release(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        forget_data_order(trainer)
        self.preemption.release(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        join_generators()
        drop_requeue_file(trainer)
        folder = trainer.log_dir  # asked on every rank
        if folder is None or trainer.fast_dev_run or not trainer.global_step:
            return
        state = whole(adapter_state_dict(find_injected(pl_module)[1]), keep=trainer.is_global_zero)  # type: ignore
        if not trainer.is_global_zero:
            return
        written, source = write_best_adapter(trainer, pl_module, Path(folder) / "adapter", state)
        print(f"Adapter of {source}: {written}\nLogs and checkpoints: {folder}", flush=True)


def trained_gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the gradients that there are, whole, by parameter name, on the CPU."""
    return {n: whole(p.grad).detach().cpu().clone() for n, p in module.named_parameters() if p.grad is not None}


def mean_gradients(ranks: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean over processes of what `trained_gradients` gave on each, for a run with other processes."""
    names = {name: None for own in ranks for name in own}
    return {name: sum(own[name] for own in ranks if name in own) / len(ranks) for name in names}


def prepare_loading(module: LightningModule) -> None:
    """Lets a LightningModule load state dicts that lack its frozen base; once per module."""
    if forgive_missing_base not in module._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(forgive_missing_base)


def write_best_adapter(
    trainer: Trainer, module: LightningModule, folder: Path, state: dict[str, torch.Tensor]
) -> tuple[Path, str]:
    """Writes the adapter folder from the best checkpoint, else the last, else from the module's own `state`.

    Returns:
        The folder, and what it was written from, in words.
    """
    prefix, root = find_injected(module)  # type: ignore[misc]
    spec = injection_of(root).spec()  # type: ignore[union-attr]
    keeper = trainer.checkpoint_callback
    best = "the best checkpoint" if getattr(keeper, "monitor", None) else "the last checkpoint"
    for kind, attribute in ((best, "best_model_path"), ("the last checkpoint", "last_model_path")):
        path = getattr(keeper, attribute, "")
        if path and Path(path).is_file():
            try:
                checkpoint = read_checkpoint(path)
            except CheckpointError as error:
                rank_zero_warn(f"the adapter folder is not written from {kind}: {error}")
                continue
            if METADATA in checkpoint:
                best = {n.removeprefix(prefix): v for n, v in checkpoint["state_dict"].items() if n.startswith(prefix)}
                return write_adapter(folder, best, spec), kind
    return write_adapter(folder, state, spec), "the last step"
