"""What all modules share: hyperparameters, building, injection, optimizer and schedule, the stop at a NaN loss.

A subclass defines `build_network` and the steps. The network is built in `configure_model`, once, so that it can be
sharded and `load_from_checkpoint` can rebuild it; adapters come from the `AdapterInjection` callback, or from the
checkpoint.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from pera_lightning.adapters.report import InjectionReport
from pera_lightning.errors import ConfigurationError, NonFiniteLossError
from pera_lightning.export.merged import MergedReport, export_merged
from pera_lightning.injection.all_or_nothing import as_it_was
from pera_lightning.injection.description import UNFROZEN
from pera_lightning.injection.inject import injection_of
from pera_lightning.injection.state import (
    METADATA,
    adopt_training_data,
    check_injection,
    check_plain,
    check_state,
    inject_spec,
    take_as_unfrozen,
)
from pera_lightning.training import _lightning_internals as internals
from pera_lightning.training.checkpoint_io import read_checkpoint
from pera_lightning.training.fsdp2 import data_parallel_mesh, reshard
from pera_lightning.training.optimizers import parameter_groups
from pera_lightning.training.precision import DTYPES, check_trained_float32, keep_heads_float32
from pera_lightning.training.reloading import built, inject_from
from pera_lightning.training.schedules import SCHEDULES, lr_factor, warmup_length
from pera_lightning.training.sharding import reads_weights, shard
from pera_lightning.training.training_data import description_of, injection_in, number_classes_alike
from pera_lightning.validation import check_choice, check_in_range, check_positive


class AdapterModule(LightningModule):
    """Base of this package's modules; `self.model` is the network, None until `configure_model`.

    A subclass declares its own arguments, takes those below as ``**shared``, hands them on and reads all of them from
    `hparams`, which this `__init__` saves. An argument has one value: a subclass that was given ``lr=1`` and hands on
    ``lr=2`` is refused, since a checkpoint could keep only one of them.

    Args:
        lr: learning rate of the adapters.
        head_lr: learning rate of the modules trained in full, by default `lr`.
        weight_decay: AdamW's weight decay, on tensors of two dimensions or more.
        lr_schedule: course of the learning rates after the warm-up.
        warmup_steps: number of optimizer steps of linear warm-up.
        warmup_ratio: length of the warm-up as a share of all optimizer steps, in place of `warmup_steps`.
        base_dtype: precision of the frozen base; adapters and heads are float32. On CPUs without bfloat16 arithmetic
            float32 is faster.
    """

    adapter_injection: Callable[[nn.Module], Any] | None = None
    asks: tuple[str, ...] = ()  # names in `data_description` that the module uses
    selection_metric: tuple[str, str] | None = None  # metric that chooses the best checkpoint, and "max" or "min"
    # Which checkpoint a test or prediction will load: a trainer says so only when the network is built.
    evaluated_checkpoint: str | None = None
    classes_argument: str | None = None  # name of the argument that says how many classes the new head has

    def __init__(
        self,
        *,
        lr: float = 1e-3,
        head_lr: float | None = None,
        weight_decay: float = 0.0,
        lr_schedule: Literal["linear", "cosine", "constant"] = "linear",
        warmup_steps: int = 0,
        warmup_ratio: float = 0.0,
        base_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        super().__init__()
        check_positive(lr, "lr")
        if head_lr is not None:
            check_positive(head_lr, "head_lr")
        check_in_range(weight_decay, "weight_decay", ge=0)
        check_choice(lr_schedule, "lr_schedule", SCHEDULES)
        check_in_range(warmup_steps, "warmup_steps", ge=0, integer=True)
        check_in_range(warmup_ratio, "warmup_ratio", ge=0, lt=1)
        check_choice(base_dtype, "base_dtype", tuple(DTYPES))
        if warmup_steps and warmup_ratio:
            raise ConfigurationError(f"warmup_steps={warmup_steps} and warmup_ratio={warmup_ratio}: give one of them")
        acting = one_value_each(self)
        self.save_hyperparameters()  # in hparams and in every checkpoint
        # A LightningCLI saves the config's values only: what a subclass sets for its base by itself is added here.
        self._set_by_subclass = [name for name in acting if name not in self.hparams]
        self.hparams.update(acting)
        self.model: nn.Module | None = None
        self._read_names: tuple[Any, list[str] | None] = (None, None)  # of a checkpoint by its path

    @abstractmethod
    def build_network(self, weights: bool = True) -> nn.Module:
        """The network in `base_dtype`, with its base weights, or (for counting, on the meta device) without."""

    def configure_model(self) -> None:
        """Builds, injects and, under FSDP2, shards, once."""
        if self.model is not None:
            return
        # A callback that copies the model builds it before `setup` is called.
        self.agree()
        # With FSDP2 one process reads the weights; the others build on the meta device and get their shards from it.
        mesh = data_parallel_mesh(self)
        self.build_injected(weights=reads_weights(mesh))
        if mesh is not None:
            shard(self.model, mesh, self.trainer.strategy.root_device)  # from the first process to all

    def build_injected(self, weights: bool = True) -> None:
        """Builds and injects `self.model`, with its base weights or on the meta device without."""
        with nullcontext() if weights else torch.device("meta"):
            network = self.build_network(weights=weights)
            if self.adapter_injection is not None:
                training = network.training
                network.train()  # as on_fit_start does: the report would say that it is not
                self.adapter_injection(network)
                network.train(training)
                # After the injection, since only now it is known which modules are trained in full.
                keep_heads_float32(network)
                check_trained_float32(network)
        self.model = network
        self.finish_network()

    def dry_run(self, injection: Callable[[nn.Module], Any]) -> InjectionReport:
        """Builds and injects on the meta device, without weights and memory; gives the report."""
        self.adapter_injection = injection
        self.build_injected(weights=False)
        return injection_of(self.model).report  # type: ignore[union-attr, arg-type]

    def finish_network(self) -> None:
        """What is done to the injected network before it is sharded."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out the hyperparameters that a subclass sets by itself: its `__init__` need not take them."""
        for name in self._set_by_subclass:
            checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Injects what the checkpoint describes into a network that is plain (`load_from_checkpoint`)."""
        if METADATA in checkpoint and self.model is not None:
            inject_from(self, checkpoint, "the checkpoint")
            keep_heads_float32(self.model)

    @internals.called_on_classes
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Lightning's own; it takes tensors and primitives only, of a URL too, unless `weights_only` is False.

        Raises:
            CheckpointError: where the file is missing, damaged, or does not fit this class.
        """
        options = {"map_location": map_location, "hparams_file": hparams_file, "strict": strict}
        return built(super().load_from_checkpoint, checkpoint_path, weights_only is not False, **options, **kwargs)

    def load_trained(self, state: dict[str, Tensor], spec: dict[str, Any], source: str) -> None:
        """Builds the network with its base weights and loads what was trained, in eval mode.

        Args:
            state: adapters, heads and buffers by their names in the network.
            spec: description of the injection.
            source: file or folder that both come from, for messages.
        """
        # Number of classes and the like, where the fit took them from the data.
        self.settle(state)
        self.model = self.build_network()
        with as_it_was(self.model, source):
            check_plain(self.model, state, spec, source, check_base=True)  # before the injection changes names
            inject_spec(self.model, spec)
            # Compared by fingerprint and names before anything is loaded.
            check_injection(spec, injection_of(self.model), source)  # type: ignore[arg-type]
            check_state(self.model, state, source, unfrozen=spec.get(UNFROZEN))
        keep_heads_float32(self.model)
        take_as_unfrozen(self.model, spec)
        self.model.load_state_dict(state, strict=False)  # without the base, which is there
        adopt_training_data(self.model, spec)
        self.eval()

    def on_fit_start(self) -> None:
        # fit never does this, and networks from from_pretrained come in eval mode, without their dropout.
        self.model.train()  # type: ignore[union-attr]

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with a group each for adapters and heads, and the schedule, stepped at every optimizer step."""
        h = self.hparams
        head_lr = h["lr"] if h["head_lr"] is None else h["head_lr"]
        groups = parameter_groups(self, lr=h["lr"], head_lr=head_lr, weight_decay=h["weight_decay"])
        if not groups:
            raise ConfigurationError(
                "nothing is trained: give AdapterInjection a method with adapters, or trainable=[…]"
            )
        # Steps of the entire run, so that the schedule ends with it; Lightning knows accumulation and epochs.
        optimizer = self.make_optimizer(groups)
        total = self.trainer.estimated_stepping_batches  # builds the train loader, if nothing has yet
        reshard(self)  # a loader may have run the network, as for DreamBooth's class images
        if total == math.inf and (h["lr_schedule"] != "constant" or h["warmup_ratio"]):
            raise ConfigurationError(
                f"lr_schedule={h['lr_schedule']} needs the number of optimizer steps, which is not known: give the "
                "trainer max_steps, or lr_schedule=constant with warmup_steps"
            )
        warmup = warmup_length(total, steps=h["warmup_steps"], ratio=h["warmup_ratio"])
        if warmup >= total:
            rank_zero_warn(
                f"the warm-up takes {warmup} optimizer steps and the run has {int(total)}: the learning rate never "
                "gets to what is set; lower warmup_steps, or give warmup_ratio"
            )

        def factor(step: int) -> float:
            return lr_factor(step, total=total, warmup=warmup, schedule=h["lr_schedule"])

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW on the groups that `parameter_groups` made; another module may choose otherwise."""
        return torch.optim.AdamW(groups)

    # --- what is agreed on with the data: see `pera_lightning.data.base` ---

    def setup(self, stage: str) -> None:
        self.agree()
        if stage != "fit" and (mark := injection_in(self)) is not None:  # loaded before, with no checkpoint of this run
            number_classes_alike(self, mark.spec(), type(self).__name__)

    def trained_class_names(self) -> list[str] | None:
        """Names of the classes that the adapters were trained on; until they are loaded, of `evaluated_checkpoint`.

        None where they are not known, and in a fit, whose data say them.
        """
        trainer = internals.attached_trainer(self)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            return None
        if (mark := injection_in(self)) is not None and mark.class_names is not None:
            return list(mark.class_names)
        if self.evaluated_checkpoint is None:
            return None
        if self.evaluated_checkpoint != self._read_names[0]:
            saved = read_checkpoint(self.evaluated_checkpoint).get(METADATA)
            self._read_names = self.evaluated_checkpoint, saved.get("class_names") if isinstance(saved, dict) else None
        return self._read_names[1]

    @property
    def trained_with(self) -> dict[str, Any] | None:
        """What the adapters were trained with, as their data describe it; None where that is not known."""
        mark = injection_in(self)
        return None if mark is None else mark.trained_on

    def agree(self) -> None:
        """Takes from `data_description` what the module must know of its data; called before the network is built."""

    def data_requirements(self) -> dict[str, Any]:
        """What the network asks of its data: a tokenizer's name, image size and mean, and the like."""
        return {}

    def data_description(self) -> Mapping[str, Any]:
        """What the data module says of its data; somebody else's by its attributes `asks` and `protocol()`."""
        return description_of(getattr(internals.attached_trainer(self), "datamodule", None), self.asks)

    def agree_on(self, name: str, said: int | None) -> None:
        """Takes a hyperparameter from the data where it is not given, and compares where both say it.

        It is saved with its value: `load_from_checkpoint` needs no data.
        """
        given = self.hparams[name]
        if None not in (given, said) and given != said:
            raise ConfigurationError(f"{name}={given}, but the data has {name}={said}: leave it out, or match it")
        self.hparams[name] = said if given is None else given

    # --- merging and export: cli/commands/merge.py and cli/commands/export.py ---

    def settle(self, state: Mapping[str, Tensor]) -> None:
        """Takes hyperparameters that the network needs and that were left to the data from trained tensors, by name."""

    def outputs_and_loss(self, network: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Outputs (N, C) for a training or validation batch and their mean loss; a `merge_error.Forward`.

        `network` is `self.model`, which merging hands over as it does to functions.
        """
        raise ConfigurationError(f"{type(self).__name__} defines no outputs_and_loss, by which a merge is measured")

    def write_network(self, folder: Path, data: Any = None, class_names: Sequence[str] | None = None) -> list[str]:
        """Writes the merged network as the folder of its own library; see `export_merged`."""
        raise ConfigurationError(f"{type(self).__name__} defines no write_network: merged export does not know it")

    def how_to_load(self, folder: Path) -> str:
        """The line of Python that loads what `write_network` wrote."""
        return f"the folder {folder}"

    def export_merged(
        self, folder: str | Path, *, data: Any = None, class_names: Sequence[str] | None = None, **options: Any
    ) -> MergedReport:
        """Merges the network, in place, and writes it as a folder of its own library, completely or not at all.

        Args:
            folder: folder to make.
            data: data module, for what belongs to a network in use: its tokenizer, or how it sees images.
            class_names: names of the classes by label, if they are known.
            options: further arguments of `pera_lightning.export.merged.export_merged`.
        """
        write = partial(self.write_network, data=data, class_names=class_names)
        return export_merged(self.model, folder, write, forward=self.outputs_and_loss, **options)  # type: ignore[arg-type]

    def export_notes(self) -> list[str]:
        """What somebody who loads an export must know besides, a line each."""
        return []

    # --- counting parameters and memory: cli/commands/params.py ---

    @property
    def classes(self) -> int | None:
        """Number of classes of the head; None without one, or where it is left to the data."""
        return self.hparams.get(self.classes_argument)

    @classes.setter
    def classes(self, count: int) -> None:
        self.hparams[self.classes_argument] = count

    def example_batch(self, data: Any) -> tuple[Any, str]:
        """Makes a training batch of the largest shapes that a data module, not set up, gives, to compute its memory.

        Returns:
            The batch, on the meta device but for tensors whose values decide what is computed; and what it holds, in
            words.
        """
        raise ConfigurationError(
            f"--memory knows no batch of {type(data).__name__} for {type(self).__name__}: give its task's data module"
        )

    def training_loss(self, batch: Any) -> Tensor:
        """Loss of a training batch, up to a factor, without logging it."""
        return self._shared_step(batch)[0].sum()

    def check_loss(self, loss: Tensor, batch_idx: int) -> None:
        """Raises `NonFiniteLossError` for a loss that is NaN or infinite."""
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the training loss is {loss.item()} at optimizer step {self.global_step}, epoch {self.current_epoch}, "
                f"batch {batch_idx}: lower the learning rate, or look at this batch"
            )


def one_value_each(module: nn.Module) -> dict[str, Any]:
    """Collects the arguments of every `__init__` that is running on a module, from its base to its own class."""
    values: dict[str, Any] = {}
    # From the innermost `__init__`, the base's, outwards: the value that reaches the base is the one that acts.
    frame = inspect.currentframe().f_back  # type: ignore[union-attr]
    while frame is not None and frame.f_code.co_name == "__init__":
        names, _, others, given = inspect.getargvalues(frame)
        if not names or given[names[0]] is not module:  # that of another object, which holds this one
            break
        arguments = {name: given[name] for name in names[1:]} | (given[others] if others else {})
        for name, value in arguments.items():
            acting = values.setdefault(name, value)
            if acting is not value and acting != value:
                raise ConfigurationError(
                    f"{type(module).__name__} was given {name}={value!r} and hands on {name}={acting!r}: hparams hold "
                    "one value a name, so rename its own argument"
                )
        frame = frame.f_back  # to the subclass that called
    return values
