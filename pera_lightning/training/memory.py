"""Memory of a device in a training step, computed without weights, data or a device.

What is held between steps (weights, adapters, buffers, gradients, optimizer states) is counted from shapes. What the
step itself needs comes from running it, forward and backward, on fake tensors: tensors of the CPU with shapes and
types, and without values. Every operation runs as it would, so that autograd saves what it saves; each storage is
counted from the operation that makes it until nothing holds it any more.

    held    = weights + adapters + heads + buffers + gradients + optimizer states   (/ N where FSDP2 shards them)
    step    = what is alive after the forward + the most that comes on top of it until the backward has ended
    total   = held + step (+ DDP's buckets, or the units that FSDP2 has gathered)

Memory inside of an operation (workspaces of the CUDA libraries) is in none of these.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pera_lightning.errors import ConfigurationError, shorten
from pera_lightning.injection.inject import adapter_parameter_names, injection_of
from pera_lightning.training.sharding import replace_tensors, units

_MOMENTS = 2  # of AdamW, each like the trained tensor


def as_fake(network: nn.Module) -> FakeTensorMode:
    """Replaces the parameters and buffers of a network by fake ones on the CPU, in place; ties stay ties.

    Args:
        network: on the meta device, or with values, which are given up.

    Returns:
        The mode that further fake tensors are made with, see `fake_like`.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    replace_tensors(network.modules(), lambda tensor: fake_like(tensor, mode))
    return mode


def fake_like(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor of the CPU with the shape and type of `tensor`."""
    return FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))


class LiveBytes(TorchDispatchMode):
    """While it is on: the bytes of all storages that operations have made and something still holds.

    Args:
        apart: tensors whose storages are not counted, such as parameters and their gradients.

    Attributes:
        live: bytes alive now.
        peak: the most there were.
    """

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._apart = [tensor.untyped_storage() for tensor in apart]  # held, so that no other storage gets their id
        self._known = {id(storage) for storage in self._apart}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._watch(value.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@contextmanager
def as_cuda_keeps() -> Iterator[None]:
    """Within it the CPU keeps what CUDA keeps where they differ: of dropout a mask of bools, of attention's nothing."""
    # Swapped by name: torch's modes over functions are off where checkpointing computes again in the backward.
    own = F.dropout, F.scaled_dot_product_attention

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input

    def attention(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        return own[1](*args, **kwargs)  # CUDA's draws the mask again; the CPU's would keep the scores

    F.dropout, F.scaled_dot_product_attention = dropout, attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = own


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step needs besides what is held between steps.

    Attributes:
        kept: alive after the forward, for the backward.
        peak: the most that is alive at a time, `kept` included.
    """

    kept: int
    peak: int


def measure_step(
    network: nn.Module, loss: Callable[[], Tensor], *, autocast: torch.dtype | None = None, as_on_cuda: bool = True
) -> StepMemory:
    """Runs a forward and a backward and counts; gradients count as held already, as in gradient accumulation.

    Args:
        network: on the CPU, with values or fake (`as_fake`); its gradients are set.
        loss: computes the loss of a batch.
        autocast: type of mixed precision.
        as_on_cuda: see `as_cuda_keeps`; else what the CPU keeps.

    Raises:
        ConfigurationError: where values decide what a fake network computes, or nothing is trained.
    """
    parameters = [*network.parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise ConfigurationError("nothing is trained, so there is no training step: give adapters or trainable=[…]")
    count = LiveBytes([*parameters, *gradients, *network.buffers()])
    try:
        with as_cuda_keeps() if as_on_cuda else nullcontext(), count:
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                value = loss()
            kept = count.live  # without autocast's copies of weights, unless the backward needs them
            value.backward()
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise ConfigurationError(
            f"{type(network).__name__} computes by its values ({shorten(str(error))}), and there are none: its memory "
            "cannot be computed; measure it"
        ) from error
    return StepMemory(kept=kept, peak=count.peak)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device while it trains with AdamW; `total` is their sum.

    Attributes:
        base: weights that are neither adapters nor in heads.
        adapters: parameters of adapters.
        heads: modules trained whole.
        buffers: whole on every device.
        gradients: of all that is trained.
        optimizer: the moments of all that is trained.
        buckets: DDP's second copy of the gradients.
        gathered: what FSDP2 has whole at a time, see `gathered_bytes`.
        kept: alive after the forward, for the backward.
        besides: the most that comes on top for a while, in forward, backward or the optimizer's step.
    """

    base: int
    adapters: int
    heads: int
    buffers: int
    gradients: int
    optimizer: int
    buckets: int
    gathered: int
    kept: int
    besides: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def device_memory(network: nn.Module, step: StepMemory, *, strategy: str = "single", devices: int = 1) -> DeviceMemory:
    """What each device holds at the peak of a training step.

    Args:
        network: injected, whole; on the meta device, fake or real.
        step: of one device's batch.
        strategy: "single", "ddp" or "fsdp2".
        devices: that FSDP2 shards over.
    """
    shards = devices if strategy == "fsdp2" else 1
    held = dict.fromkeys(("base", "adapters", "heads"), 0)
    trained = 0
    for kind, parameter in _by_kind(network):
        size = shard_bytes(parameter, shards)
        held[kind] += size
        trained += size if parameter.requires_grad else 0
    return DeviceMemory(
        **held,
        buffers=_bytes({id(b): b for b in network.buffers()}.values()),
        gradients=trained,
        optimizer=_MOMENTS * trained,
        buckets=trained if strategy == "ddp" else 0,
        gathered=gathered_bytes(network) if strategy == "fsdp2" else 0,
        kept=step.kept,
        # AdamW takes the roots of its second moments of all tensors at once, when nothing is kept any more.
        besides=max(step.peak, trained) - step.kept,
    )


def shard_bytes(tensor: Tensor, shards: int) -> int:
    """Bytes of a tensor on the device with most of it: FSDP2 cuts the first dimension, and fills up the last cut."""
    rows = -(-tensor.shape[0] // shards) if tensor.dim() else 1
    return rows * (tensor.numel() // max(tensor.shape[0], 1) if tensor.dim() else 1) * tensor.element_size()


def gathered_bytes(network: nn.Module) -> int:
    """Bytes of what FSDP2 has gathered at a time, as an upper bound.

    What is in no block stays gathered from the forward to the end of the backward. Of the blocks, one computes while
    the next is there twice, in the buffer it arrived in and in tensors of its own. The gradients of a block are whole
    until they are summed over the devices.
    """
    blocks = [[*block.parameters()] for block in units(network)]
    inside = {id(p) for block in blocks for p in block}
    root = [p for p in network.parameters() if id(p) not in inside]
    largest = max((_bytes(block) for block in blocks), default=0)
    gradients = max(_bytes(p for p in unit if p.requires_grad) for unit in (*blocks, root))
    return _bytes(root) + 3 * largest + gradients


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _by_kind(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter once, as "base", "adapters" or "heads"."""
    mark = injection_of(network)
    heads = tuple(f"{path}." for path in (mark.trained_modules if mark else ()))
    adapters = adapter_parameter_names(network)
    for name, parameter in network.named_parameters():
        yield ("adapters" if name in adapters else "heads" if heads and name.startswith(heads) else "base"), parameter
