"""A network sharded over processes by FSDP2 (`torch.distributed.fsdp.fully_shard`), and its full tensors.

One process reads the base weights and injects with them; the others build the same network on the meta device. Unit
after unit is then sent to all and sharded, so that no process but the first ever holds more than its shards and one
unit. Frozen and trained tensors, whatever their types, share a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.injection.inject import injection_of, update_injection
from pera_lightning.injection.state import find_injected


def units(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network, which FSDP gathers and frees one at a time.

    They are the members of each outermost `ModuleList` or `Sequential` whose members are of one class and have
    children: decoder layers of a language model, blocks of a ViT, stages of a Swin. What lies within a block (experts
    that a router may skip) is not a unit of its own, since every process has to gather the same ones.
    """
    if isinstance(network, AdaptedLayer):
        return []
    members = list(network.children())
    repeated = isinstance(network, (nn.ModuleList, nn.Sequential)) and len(members) > 1
    # A sequence of linear layers, adapted or not, is not a block's worth.
    composed = all(not isinstance(m, AdaptedLayer) and [*m.children()] for m in members)
    if repeated and composed and len({type(m) for m in members}) == 1:
        return members
    return [unit for member in members for unit in units(member)]


def reads_weights(mesh: Any | None) -> bool:
    """Whether this process is the one that builds the network with its weights; without a mesh every one is."""
    return mesh is None or mesh.get_local_rank() == 0


def shard(network: nn.Module, mesh: Any, device: torch.device) -> None:
    """Shards a network in place over a one-dimensional mesh, the values taken from its first process.

    Args:
        network: the network, with weights on the mesh's first process, on the meta device elsewhere; injected alike.
        mesh: a `DeviceMesh` of one dimension.
        device: the device of this process.
    """
    group = mesh.get_group()
    source = dist.get_global_rank(group, 0)
    _check_alike(network, group)
    for unit, modules in _modules_of_units(network):
        # All get the full tensors of one unit, and keep their shards of it before the next one comes.
        replace_tensors(modules, partial(_received, device=device, group=group, source=source))
        fully_shard(unit, mesh=mesh)
    mark = injection_of(network)
    if mark is not None:  # the meta device had no values to take a fingerprint of
        fingerprint = [{"fingerprint": mark.fingerprint, "rest_of_base": mark.rest_of_base}]
        dist.broadcast_object_list(fingerprint, source, group)
        update_injection(network, **fingerprint[0])


def _modules_of_units(network: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Each unit, the network itself last, with the modules that are in it and in no unit before it."""
    seen: set[nn.Module] = set()
    owners: dict[nn.Parameter, nn.Module] = {}
    found = []
    for unit in (*units(network), network):
        modules = [module for module in unit.modules() if module not in seen]
        for parameter in (p for module in modules for p in module.parameters(recurse=False)):
            if owners.setdefault(parameter, unit) is not unit:  # each unit gathers and frees its own
                name = next(name for name, p in network.named_parameters() if p is parameter)
                raise ConfigurationError(f"FSDP cannot shard {name}, which two blocks of the network share")
        seen.update(modules)
        found.append((unit, modules))
    return found


def replace_tensors(modules: Iterable[nn.Module], make: Callable[[Tensor], Tensor]) -> None:
    """Replaces the parameters and buffers of modules themselves, not of those within; what they share stays shared.

    `make` gives the new tensor for an old one, of the same shape; it is called once for each.
    """
    made: dict[Tensor, Tensor] = {}
    for module in modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if tensor not in made:
                value = make(tensor)
                parameter = isinstance(tensor, nn.Parameter)
                made[tensor] = nn.Parameter(value, tensor.requires_grad) if parameter else value
            setattr(module, name, made[tensor])


def _received(tensor: Tensor, *, device: torch.device, group: Any, source: int) -> Tensor:
    """The source's values of a tensor, on the device."""
    # Only the first process has values, the others have tensors on the meta device.
    value = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
    value = value.contiguous()
    if value.numel():
        # As bytes, since not every backend sends every type.
        dist.broadcast(value.reshape(-1).view(torch.uint8), source, group)
    return value


def _check_alike(network: nn.Module, group: Any) -> None:
    """Raises where a broadcast would mix up tensors: every process must have the same ones in the same order."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    if scalars := [name for name, value in network.named_parameters() if not value.dim()]:
        raise ConfigurationError(f"FSDP cannot shard parameters without a dimension: {listed(scalars)}")
    # Without values: those of the others are on the meta device.
    own = {name: (tuple(value.shape), str(value.dtype), value.requires_grad) for name, value in tensors}
    ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(ranks, own, group)
    for rank, other in enumerate(ranks):
        if other != ranks[0]:
            names = [n for n in {**ranks[0], **other} if ranks[0].get(n) != other.get(n)]
            raise ConfigurationError(
                f"process {rank} built another network than process 0, without its weights: they differ in "
                f"{listed(names, 3)}; build_network(weights=False) must give the same tensors as with weights"
            )


def full_tensors(value: Any, *, keep: bool = True) -> Any:
    """Gathers the sharded tensors of a dict or list, or one, onto the CPU; every process must call it.

    Args:
        value: what may hold sharded tensors; all else stays as it is.
        keep: False gives None for sharded tensors, on processes that only take part.
    """
    if isinstance(value, dict):
        return {key: full_tensors(item, keep=keep) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(full_tensors(item, keep=keep) for item in value)
    if not isinstance(value, DTensor):
        return value
    # Also where it is not kept: every process sends its shards.
    gathered = value.full_tensor()
    return gathered.detach().cpu() if keep else None


def sharded_like(value: Tensor, like: Tensor | None) -> Tensor:
    """A full tensor as shards where `like`, of the same shape, is sharded; every process must call it with the same."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


class AdapterWrapPolicy:
    """Which modules FSDP1 shards as units of their own: ``FSDPStrategy(auto_wrap_policy=AdapterWrapPolicy())``.

    The blocks, see `units`. FSDP1 joins a unit's tensors into one, which has one type: over a base in low precision
    adapters and heads, in float32, are units too.
    """

    def __init__(self) -> None:
        self._chosen: set[nn.Module] = set()

    def __call__(self, module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        """Whether to look into a module (`recurse`), or else whether to wrap it."""
        # torch asks for the network first: then all are chosen.
        if recurse and module not in self._chosen and (found := find_injected(module)) is not None:
            root = found[1]
            self._chosen = set(units(root))
            if any(p.is_floating_point() and p.dtype != torch.float32 for p in root.parameters()):
                self._chosen |= {a for m in root.modules() if isinstance(m, AdaptedLayer) for a in m.adapters.values()}
                self._chosen |= {root.get_submodule(path) for path in injection_of(root).trained_modules}  # type: ignore[union-attr]
        return recurse or module in self._chosen
