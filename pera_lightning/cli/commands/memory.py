"""`params --memory`: a table of the memory per device that training by a config needs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from pera_lightning.errors import ConfigurationError, closest
from pera_lightning.training.memory import DeviceMemory, as_fake, device_memory, fake_like, measure_step
from pera_lightning.training.module import AdapterModule
from pera_lightning.training.tables import format_table

_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_LABELS = {  # of the components that are not called as they are
    "optimizer": "AdamW's moments",
    "buckets": "gradient buckets",
    "gathered": "gathered units",
    "kept": "kept for the backward",
    "besides": "for a while, at the peak",
}


def memory_report(
    module: AdapterModule, batch: Any, assumed: str, *, precision: Any, devices: Sequence[int], cuda: bool
) -> str:
    """Computes the memory of a training step per device and lays it out, strategy by strategy.

    The module's network, injected on the meta device, becomes a fake one; `assumed` says what the `batch` holds.
    """
    short = {name.partition("-")[0]: name for name in _AUTOCAST}  # Lightning takes "bf16" for "bf16-mixed" too
    name = short.get(str(precision or "32"), str(precision))
    if name not in _AUTOCAST:
        known = ", ".join(_AUTOCAST) + closest(name, _AUTOCAST)
        raise ConfigurationError(f"trainer.precision={precision}: --memory knows {known}")
    network, h = module.model.train(), module.hparams  # type: ignore[union-attr]
    mode = as_fake(network)  # tensors of the batch that are not on the meta device keep their values
    batch = tree_map_only(torch.Tensor, lambda tensor: fake_like(tensor, mode) if tensor.is_meta else tensor, batch)
    with torch.compiler.set_stance("force_eager"):  # one run is not worth compiling
        step = measure_step(network, partial(module.training_loss, batch), autocast=_AUTOCAST[name], as_on_cuda=cuda)
    strategies = {"1 device": {}, "DDP": {"strategy": "ddp"}}
    strategies |= {f"FSDP2 on {count}": {"strategy": "fsdp2", "devices": count} for count in devices}
    columns = {title: device_memory(network, step, **how) for title, how in strategies.items()}
    kept = "computed again" if h.get("activation_checkpointing") else "kept"
    small = " in float32, of whose moments adamw8bit has a quarter" if h.get("optimizer") == "adamw8bit" else ""
    return (
        f"{_table(columns, h['base_dtype'])}\n"
        f"Assumed: on each device {assumed}; precision {name}; activations {kept}; AdamW{small}, not compiled.\n"
        "Computed, not measured. Not in it: the device's context, workspaces of its libraries, fragmentation, buffers "
        "of the communication, evaluation."
    )


def _table(columns: dict[str, DeviceMemory], base_dtype: str) -> str:
    """A row for each component that there is any of, and their sum."""
    largest = max(column.total for column in columns.values())
    unit, size = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    labels = {key: _LABELS.get(key, key) for key in vars(columns["DDP"])}
    labels |= {"base": f"base weights ({base_dtype})", "total": "sum"}
    rows = []
    for key, label in labels.items():
        values = [getattr(column, key) for column in columns.values()]
        if any(values):
            rows.append([label, *(f"{value / size:,.1f}" if value else "-" for value in values)])
    return format_table([f"Memory per device, {unit}", *columns], rows)
