"""Memory of a device in a training step, computed without weights, data or a device.

    held  = weights + adapters + heads + buffers + gradients + optimizer states   (/ N where FSDP2 shards them)
    step  = what is alive after the forward + the most that comes on top until the backward has ended
    total = held + step (+ DDP's buckets, or the units that FSDP2 has gathered)

What is held is counted from shapes. The step is run on fake tensors, without values: autograd saves what it would, and
each storage counts from the operation that makes it until nothing holds it. Workspaces of libraries are not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode, fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pera_lightning.errors import ConfigurationError, shorten
from pera_lightning.injection.inject import adapter_parameter_names, injection_of
from pera_lightning.training.sharding import replace_tensors, units

_MISSING_VALUES = ("DataDependentOutputException", "DynamicOutputShapeException", "UnsupportedOperatorException")


def as_fake(network: nn.Module) -> FakeTensorMode:
    """Replaces a network's parameters and buffers by fake ones on the CPU, in place; gives the mode to make more."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    replace_tensors(network.modules(), lambda tensor: fake_like(tensor, mode))  # ties stay ties
    return mode


def fake_like(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor of the CPU with the shape and type of `tensor`."""
    return FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))


class LiveBytes(TorchDispatchMode):
    """Counts, while it is on, the bytes that operations make and something holds: `live` now, `peak` at most.

    Tensors that are `apart` are not counted; `bool_masks` counts a mask of dropout as CUDA keeps it, a byte an element.
    """

    def __init__(self, apart: Iterable[Tensor], bool_masks: bool) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.bool_masks = bool_masks
        self._apart = [tensor.untyped_storage() for tensor in apart]  # held, so that no other storage gets their id
        self._sizes = {id(storage): 0 for storage in self._apart}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))  # views share a storage, which counts once
        for storage in (value.untyped_storage() for value in tree_iter(out) if isinstance(value, Tensor)):
            if id(storage) not in self._sizes:
                self._resize(id(storage), storage.nbytes())
                weakref.finalize(storage, self._resize, id(storage), None).atexit = False
        if self.bool_masks and func is torch.ops.aten.bernoulli_.float:
            self._resize(id(out.untyped_storage()), out.numel())
        return out

    def _resize(self, key: int, size: int | None) -> None:
        self.live += (size or 0) - self._sizes.pop(key, 0)
        self.peak = max(self.peak, self.live)
        if size is not None:
            self._sizes[key] = size


def fused_attention() -> AbstractContextManager:
    """Has attention keep no scores for its dropout: CUDA's kernels draw the mask again, the CPU's would keep them."""
    # Swapped by name: modes over functions are off where checkpointing computes again in the backward.
    own = F.scaled_dot_product_attention
    return patch.object(F, "scaled_dot_product_attention", lambda *args, dropout_p=0.0, **how: own(*args, **how))


class StepMemory(NamedTuple):
    """Bytes that a training step needs besides what is held between steps."""

    kept: int  # after the forward, for the backward
    peak: int  # most at a time, with `kept`


def measure_step(
    network: nn.Module, loss: Callable[[], Tensor], *, autocast: torch.dtype | None = None, as_on_cuda: bool = True
) -> StepMemory:
    """Runs a forward and a backward and counts; gradients count as held already, as in gradient accumulation.

    The network is on the CPU, with values or `as_fake`. `as_on_cuda` counts what CUDA keeps for dropout, not the CPU.
    Raises `ConfigurationError` where values decide what a fake network computes, or nothing is trained.
    """
    parameters = [*network.parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gradients = [p.grad for p in parameters if p.grad is not None]  # held between batches, so not counted
    if not gradients:
        raise ConfigurationError("nothing is trained: give adapters or trainable=[…]")
    count = LiveBytes([*parameters, *gradients, *network.buffers()], bool_masks=as_on_cuda)
    try:
        with fused_attention() if as_on_cuda else nullcontext(), count:
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                value = loss()
            kept = count.live  # without autocast's copies of weights, unless the backward needs them
            value.backward()
    except tuple(getattr(fake_tensor, name) for name in _MISSING_VALUES) as error:
        what = f"{type(network).__name__} computes by its values ({shorten(str(error))})"
        raise ConfigurationError(f"{what}, and there are none: measure its memory") from error
    return StepMemory(kept=kept, peak=count.peak)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device while it trains with AdamW; `total` is their sum."""

    base: int  # weights that are neither adapters nor in heads
    adapters: int
    heads: int  # modules trained in full
    buffers: int  # in full on every device
    gradients: int
    optimizer: int  # two moments, each as large as the trained tensor
    buckets: int  # DDP's second copy of the gradients
    gathered: int  # full tensors of FSDP2, see `gathered_bytes`
    kept: int  # after the forward, for the backward
    besides: int  # most that comes on top in forward, backward or the optimizer's step

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def device_memory(network: nn.Module, step: StepMemory, *, strategy: str = "single", devices: int = 1) -> DeviceMemory:
    """Computes what each device holds at the peak of a step under "single", "ddp", or "fsdp2" on so many `devices`."""
    mark = injection_of(network)
    heads = tuple(f"{path}." for path in (mark.trained_modules if mark else ()))
    adapters = adapter_parameter_names(network)
    held, trained = dict.fromkeys(("base", "adapters", "heads"), 0), 0
    for name, parameter in network.named_parameters():
        kind = "adapters" if name in adapters else "heads" if heads and name.startswith(heads) else "base"
        size = shard_bytes(parameter, devices if strategy == "fsdp2" else 1)
        held[kind] += size
        trained += size if parameter.requires_grad else 0
    return DeviceMemory(
        **held,
        buffers=_bytes({id(b): b for b in network.buffers()}.values()),
        gradients=trained,
        optimizer=2 * trained,
        buckets=trained if strategy == "ddp" else 0,
        gathered=gathered_bytes(network) if strategy == "fsdp2" else 0,
        kept=step.kept,
        # AdamW takes the roots of its second moments of all tensors at once, when nothing is kept any more.
        besides=max(step.peak, trained) - step.kept,
    )


def shard_bytes(tensor: Tensor, shards: int) -> int:
    """Bytes of a tensor on the device with most of it: FSDP2 cuts the first dimension, and fills up the last cut."""
    rows, *rest = tensor.shape or (1,)
    return -(-rows // shards) * torch.Size(rest).numel() * tensor.element_size()


def gathered_bytes(network: nn.Module) -> int:
    """An upper bound of the bytes that FSDP2 has gathered at a time.

    What is in no block stays gathered from the forward to the end of the backward. One block computes while the next is
    there twice, as it arrived and in tensors of its own. A block's gradients are full until summed over the devices.
    """
    blocks = [[*block.parameters()] for block in units(network)]
    inside = {id(p) for block in blocks for p in block}
    root = [p for p in network.parameters() if id(p) not in inside]
    largest = max((_bytes(block) for block in blocks), default=0)
    gradients = max(_bytes(p for p in unit if p.requires_grad) for unit in (*blocks, root))
    return _bytes(root) + 3 * largest + gradients


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
