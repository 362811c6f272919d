"""What all modules share: building, injection, optimizer and schedule, and the stop at a loss that is no number.

A subclass defines `build_network` and the steps. The network is built in `configure_model`, once, so that it can be
sharded and `load_from_checkpoint` can rebuild it; adapters come from the `AdapterInjection` callback, or from the
checkpoint.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from pera_lightning.errors import ConfigurationError, NonFiniteLossError, listed
from pera_lightning.export.merged import MergedReport, export_merged
from pera_lightning.injection.inject import injection_of
from pera_lightning.injection.state import METADATA
from pera_lightning.training.checkpoint_io import check_checkpoint
from pera_lightning.training.fsdp2 import data_parallel_mesh
from pera_lightning.training.optimizers import parameter_groups
from pera_lightning.training.reloading import inject_from
from pera_lightning.training.schedules import SCHEDULES, lr_factor, warmup_length
from pera_lightning.training.sharding import reads_weights, shard
from pera_lightning.validation import check_choice, check_in_range, check_positive

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class AdapterModule(LightningModule):
    """Base of this package's modules; `self.model` is the network, None until `configure_model`.

    A subclass declares its own arguments, takes those below as ``**shared``, hands them on and reads all of them from
    `hparams`, which this `__init__` saves. A name has one value: a subclass that hands on another one than it was given
    is refused.

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
        self.save_hyperparameters()
        # Under a LightningCLI these are the config's, without what a subclass gives to its base by itself.
        self._set_by_subclass = [name for name in acting if name not in self.hparams]
        self.hparams.update(acting)
        self.model: nn.Module | None = None

    @abstractmethod
    def build_network(self, weights: bool = True) -> nn.Module:
        """The network in `base_dtype`, with its base weights, or (for counting, on the meta device) without."""

    def configure_model(self) -> None:
        """Builds, injects and, under FSDP2, shards, once."""
        if self.model is not None:
            return
        mesh = data_parallel_mesh(self)
        if reads_weights(mesh):
            self.model = self._injected(self.build_network())
        else:
            with torch.device("meta"):
                self.model = self._injected(self.build_network(weights=False))
        self.finish_network()
        if mesh is not None:
            shard(self.model, mesh, self.trainer.strategy.root_device)

    def _injected(self, network: nn.Module) -> nn.Module:
        # In its dtype already: adapters and heads stay float32 over a low one.
        if self.adapter_injection is not None:
            training = network.training
            network.train()  # as on_fit_start does: the report would say that it is not
            self.adapter_injection(network)
            network.train(training)
            keep_heads_float32(network)
            check_trained_float32(network)
        return network

    def finish_network(self) -> None:
        """What is done to the injected network before it is sharded."""

    def dry_run(self, injection: Callable[[nn.Module], Any]) -> Any:
        """Injects into a network on the meta device, without weights and memory.

        Args:
            injection: called with the network, e.g. `AdapterInjection.injector()`.

        Returns:
            What `injection` returns, the report.
        """
        with torch.device("meta"):
            return injection(self.build_network(weights=False).train())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out the hyperparameters that a subclass sets by itself: its `__init__` need not take them."""
        for name in self._set_by_subclass:
            checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Injects what the checkpoint describes where the network is plain (`load_from_checkpoint`)."""
        if METADATA in checkpoint and self.model is not None:
            inject_from(self, checkpoint)
            keep_heads_float32(self.model)
            check_checkpoint(checkpoint, self, "the checkpoint")

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
                "nothing is trained: give AdapterInjection a method with adapters or trainable=[…]"
            )
        optimizer = self.make_optimizer(groups)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = warmup_length(total, steps=h["warmup_steps"], ratio=h["warmup_ratio"])

        def factor(step: int) -> float:
            return lr_factor(step, total=total, warmup=warmup, schedule=h["lr_schedule"])

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW; what another module may choose otherwise.

        Args:
            groups: of `parameter_groups`.
        """
        return torch.optim.AdamW(groups)

    # --- what is agreed on with the data: see `pera_lightning.data.base` ---

    def data_requirements(self) -> dict[str, Any]:
        """What the network asks of its data: a tokenizer's name, image size and mean, and the like."""
        return {}

    def data_description(self) -> Mapping[str, Any]:
        """What the trainer's data module says of its data; empty for somebody else's data, or loaders alone."""
        describe = getattr(getattr(self.trainer, "datamodule", None), "description", None)
        return describe() if callable(describe) else {}

    # --- merging and export: cli/commands/merge.py and cli/commands/export.py ---

    def settle(self, state: Mapping[str, Tensor]) -> None:
        """Takes settings that the network depends on, where they were left to the data, from trained tensors.

        Args:
            state: adapters and heads by their names in the network.
        """

    def outputs_and_loss(self, network: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Outputs (N, C) for a training or validation batch and their mean loss; a `merge_error.Forward`.

        Args:
            network: `self.model`.
            batch: as the module's steps take it.
        """
        raise ConfigurationError(f"{type(self).__name__} defines no outputs_and_loss, by which a merge is measured")

    def write_network(self, folder: Path, data: Any = None, class_names: Sequence[str] | None = None) -> list[str]:
        """Writes the merged network as the folder of its own library; see `export_merged`."""
        raise ConfigurationError(f"{type(self).__name__} defines no write_network: merged export does not know it")

    def how_to_load(self, folder: Path) -> str:
        """The line of Python that loads what `write_network` wrote."""
        raise NotImplementedError

    def export_merged(
        self, folder: str | Path, *, data: Any = None, class_names: Sequence[str] | None = None, **options: Any
    ) -> MergedReport:
        """Merges the network, in place, and writes it as a folder of its own library.

        Args:
            folder: made, whole or not at all.
            data: the data module, for what belongs to a network in use: its tokenizer, or how it sees images.
            class_names: by label, where there are classes and their names are known.
            options: of `pera_lightning.export.merged.export_merged`, but for `forward`.
        """

        def write(made: Path) -> list[str]:
            return self.write_network(made, data, class_names)

        return export_merged(self.model, folder, write, forward=self.outputs_and_loss, **options)  # type: ignore[arg-type]

    def check_loss(self, loss: Tensor, batch_idx: int) -> None:
        """Raises `NonFiniteLossError` where the loss is NaN or infinite."""
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the training loss is {loss.item()} at optimizer step {self.global_step}, epoch {self.current_epoch}, "
                f"batch {batch_idx}: lower the learning rate, or look at this batch"
            )


def one_value_each(module: nn.Module) -> dict[str, Any]:
    """Collects the arguments of every `__init__` that is running on a module, from its base to its own class.

    Raises:
        ConfigurationError: where a class hands on another value than it was given under the same name.
    """
    values: dict[str, Any] = {}
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
                    f"one value a name, so call its own argument otherwise"
                )
        frame = frame.f_back
    return values


def keep_heads_float32(network: nn.Module) -> None:
    """Casts the modules trained whole to float32 over a base in low precision, and their inputs with them.

    Args:
        network: injected; nothing happens to one that is float32 throughout.
    """
    mark = injection_of(network)
    for path in mark.trained_modules if mark else ():
        head = network.get_submodule(path)
        low = any(p.is_floating_point() and p.dtype != torch.float32 for p in head.parameters())
        if low:
            head.float()
            head.register_forward_pre_hook(_cast_inputs)


def release_heads(network: nn.Module, dtype: torch.dtype) -> list[str]:
    """Undoes `keep_heads_float32`.

    Args:
        network: whole again in `dtype` afterwards.
        dtype: the base's.

    Returns:
        Paths of the heads that were cast.
    """
    cast = []
    for path, module in network.named_modules():
        hooks = [key for key, hook in module._forward_pre_hooks.items() if hook is _cast_inputs]
        for key in hooks:
            del module._forward_pre_hooks[key]
        if hooks:
            module.to(dtype)
            cast.append(path)
    return cast


def check_trained_float32(network: nn.Module) -> None:
    """Raises `ConfigurationError` where base parameters are trained in low precision, where small updates vanish."""
    low = [n for n, p in network.named_parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if low:
        raise ConfigurationError(
            f"{len(low)} trained parameters are in low precision, where small updates vanish: {listed(low, 2)}; set "
            "base_dtype=float32"
        )


def _cast_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
