"""FSDP2 for adapters: Lightning's `ModelParallelStrategy`, with the checkpoints of a single device and of DDP.

Lightning's own writes a folder of shards with the frozen base in it, or gathers the base into one file. Here a
checkpoint is what it is elsewhere: one file of adapters, heads and their optimizer state, through the `CheckpointIO`.

    trainer = Trainer(strategy="fsdp2", devices=8, callbacks=[AdapterInjection(…)])
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from pera_lightning.errors import ConfigurationError
from pera_lightning.injection.state import frozen_names
from pera_lightning.training import _lightning_internals as internals
from pera_lightning.training.sharding import full_tensors, sharded_like


class AdapterCheckpoints:
    """What a `ModelParallelStrategy` needs to write one file, of what is not frozen, as a single device does."""

    writes_adapters = True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state without the frozen base, full tensors on rank 0."""
        module = self.lightning_module  # type: ignore[attr-defined]
        frozen = frozen_names(module)
        state = {name: value for name, value in module.state_dict().items() if name not in frozen}
        return full_tensors(state, keep=self.is_global_zero)  # type: ignore[attr-defined]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, full tensors on rank 0."""
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return full_tensors(optimizer.state_dict(), keep=self.is_global_zero)  # type: ignore[attr-defined]

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)  # type: ignore[arg-type]

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module  # type: ignore[attr-defined]
        like, given = module.state_dict(), checkpoint["state_dict"]  # sharded, and in full
        state = {name: sharded_like(value, like.get(name)) for name, value in given.items()}
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, given in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):  # type: ignore
            # A saved state counts its parameters, group after group.
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in given["param_groups"] for number in group["params"]]
            like = dict(zip(numbers, parameters, strict=True))
            state = {n: {key: _as(value, like[n]) for key, value in s.items()} for n, s in given["state"].items()}
            optimizer.load_state_dict({**given, "state": state})


def _as(value: Any, parameter: Tensor) -> Any:
    """A value of an optimizer's state as its parameter is sharded: moments are, step counts are not."""
    same = isinstance(value, Tensor) and value.shape == parameter.shape
    return sharded_like(value, parameter) if same else value


class FSDP2Strategy(AdapterCheckpoints, ModelParallelStrategy):
    """FSDP2 over all devices, in the registry as "fsdp2".

    This package's modules shard themselves; a module of your own does it in `configure_model`, after it called the
    hook `adapter_injection`, e.g. with `pera_lightning.training.sharding.shard`.

    Args:
        timeout: the time after which a process that waits for others gives up.
        process_group_backend: what the processes talk by; "nccl" on CUDA and "gloo" on the CPU by default.
    """

    def __init__(
        self, timeout: timedelta | None = default_pg_timeout, process_group_backend: str | None = None
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,  # shards over data only
            save_distributed_checkpoint=False,  # one file, as everywhere
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        internals.shard_over_all_processes(self)  # before the mesh is made
        super().setup_environment()


def write_adapters_only(strategy: Strategy) -> None:
    """Gives a plain `ModelParallelStrategy` the checkpoints of `FSDP2Strategy`; leaves every other strategy alone."""
    if not isinstance(strategy, ModelParallelStrategy) or hasattr(strategy, "writes_adapters"):
        return
    if internals.write_one_file(strategy):
        rank_zero_info(
            "checkpoints are written as one file of adapters, not as a folder of shards with the base "
            "(save_distributed_checkpoint=False)"
        )
    internals.extend_object(strategy, AdapterCheckpoints)


def data_parallel_mesh(module: Any) -> Any | None:
    """The mesh that a LightningModule is sharded over; None where its strategy shards nothing."""
    mesh = module.device_mesh
    if mesh is None:
        return None
    if mesh["tensor_parallel"].size() > 1:
        raise ConfigurationError(
            f"tensor_parallel_size={mesh['tensor_parallel'].size()}: {type(module).__name__} shards over data only; "
            "set it to 1 and data_parallel_size to the number of devices, or strategy=fsdp2"
        )
    return mesh["data_parallel"]


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all devices, adapter-only checkpoints")


def reshard(module: nn.Module) -> None:
    """Gives up what FSDP2 has gathered: after a forward without a backward some units keep their full parameters."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
