"""The layer that carries adapters: a linear layer, the same module object with another class.

So parameters, hooks, ties and state-dict keys stay. The layer makes the one base product and adds what its adapters
give. A plain layer has one adapter, called ``"all"``; a fused projection has one for each of its named slices, which
are ranges of its output features (`qkv.adapters.q.A`).

Shapes: ``...`` any batch dimensions; in, out the features of the layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_lightning.adapters.base import ALL, LinearAdapter
from pera_lightning.errors import ConfigurationError, UnsupportedTarget

UNUSED = "output_unused"  # attribute that marks a submodule which runs, but whose output nothing uses
_EXACT = (torch.float32, torch.float64)  # types in which W + ΔW keeps a small ΔW


class AdaptedLayer(nn.Module):
    """What `AdaptedLinear` and `AdaptedConv1D` share: slices, each with an adapter of its own."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    adapters: nn.ModuleDict
    slices: dict[str, slice]
    plain_class: type[nn.Module]  # what `release_layer` goes back to
    merged: str | None = None  # how the updates got into the weight; set by `pera_lightning.merging.merge`
    kept: Any = None  # the rows that a merge has changed, as they were

    def base_weight(self) -> Tensor:
        """The frozen weight as (out, in), a view."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out): the frozen map plus the adapters' updates of their slices."""
        frozen = weight = self.base_weight()
        if self.merged:  # the updates are in the weight, and gradients would change nothing
            if self.training and torch.is_grad_enabled():
                raise ConfigurationError("the adapters are merged, and training would not change them: call unmerge")
            return F.linear(x, weight, self.bias)
        # Adding an update to a bfloat16 weight would round it away, and dropout acts on the update's input only:
        # in both cases the update needs a product of its own.
        exact = weight.dtype in _EXACT and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
        added, apart = {}, {}  # updates of the weight, and adapters that make a product of their own
        for name, adapter in self.adapters.items():
            if adapter.uses_weight and exact and not adapter.dropout_acts:
                added[name] = adapter.effective_update(weight[self.slices[name]])
            else:
                apart[name] = adapter
        if added:
            weight = _add_to_slices(weight, added, self.slices, dim=0)  # (out, in)
        y = F.linear(x, weight, self.bias)  # the one base product, (..., out)
        updates = {name: adapter(x, frozen[self.slices[name]]) for name, adapter in apart.items()}
        return _add_to_slices(y, updates, self.slices, dim=-1) if updates else y


def _add_to_slices(base: Tensor, updates: dict[str, Tensor], slices: dict[str, slice], dim: int) -> Tensor:
    """Adds each update to its slice of `base` along `dim`; what lies between the slices is copied bit for bit."""
    if ALL in updates:  # then it is the only one
        return base + updates[ALL].to(base.dtype)
    # The stretches of `base` in their order, each with the name of its update, or None.
    stretches: list[tuple[int, str | None]] = []
    end = 0
    for name in sorted(updates, key=lambda name: slices[name].start):
        first, last = slices[name].start, slices[name].stop
        stretches += [(first - end, None), (last - first, name)]
        end = last
    stretches = [(size, name) for size, name in [*stretches, (base.shape[dim] - end, None)] if size]
    # One split and one cat: the backward pass of slices would make a full-size tensor of zeros for each of them.
    pieces = zip(base.split([size for size, _ in stretches], dim), stretches, strict=True)
    return torch.cat([p if name is None else p + updates[name].to(p.dtype) for p, (_, name) in pieces], dim)


class AdaptedLinear(AdaptedLayer, nn.Linear):
    """An `nn.Linear` with adapters; made by `adapt_layer`, never by its constructor."""


class AdaptedConv1D(AdaptedLayer):
    """transformers' `Conv1D` (GPT-2) with adapters: a linear layer whose weight is stored as (in, out)."""

    def base_weight(self) -> Tensor:
        return self.weight.T

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[0]}, out_features={self.weight.shape[1]}"


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is exactly transformers' `Conv1D`, told by name so that transformers need not be there."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def is_linear(module: nn.Module) -> bool:
    """Whether `module` can be adapted: exactly `nn.Linear`, or transformers' `Conv1D`."""
    return type(module) is nn.Linear or is_conv1d(module)


def base_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer, adapted or not, as (out, in), a view."""
    if isinstance(module, AdaptedLayer):
        return module.base_weight()
    return module.weight.T if is_conv1d(module) else module.weight


def used_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path to module of all within `model`, without those whose output the network does not use, see `UNUSED`."""
    modules = {path: module for path, module in model.named_modules() if path}
    unused = tuple(f"{path}." for path, module in modules.items() if getattr(module, UNUSED, False))  # with all inside
    return {path: module for path, module in modules.items() if not f"{path}.".startswith(unused)}


def adapt_layer(module: nn.Module, adapters: dict[str, LinearAdapter], slices: dict[str, slice]) -> None:
    """Turns a linear layer into an adapted one, in place: the same object, weight and bias, another class.

    Args:
        module: `nn.Linear` or transformers' `Conv1D`; any other class is an `UnsupportedTarget`.
        adapters: name of a slice to its adapter.
        slices: name of a slice to its output features, see `check_slices`.
    """
    if not is_linear(module):
        raise UnsupportedTarget(f"{type(module).__name__} is neither nn.Linear nor transformers' Conv1D")
    check_slices(slices, base_weight(module).shape[0])
    # Another class of the same object: what holds this module, its hooks and its parameters notices nothing.
    adapted = nn.ModuleDict(adapters)  # first, since it may refuse a name
    module.plain_class = type(module)
    module.__class__ = AdaptedConv1D if is_conv1d(module) else AdaptedLinear
    module.slices = dict(slices)
    module.adapters = adapted


def release_layer(layer: AdaptedLayer) -> None:
    """Undoes `adapt_layer`: the plain class again, without adapters; weight and bias stay what they are."""
    layer.__class__ = layer.plain_class
    for name in ("adapters", "slices", "plain_class", "merged", "kept"):
        if name in vars(layer) or name in layer._modules:
            delattr(layer, name)


def check_slices(slices: dict[str, slice], features: int, where: str = "the layer") -> None:
    """Raises `ConfigurationError` for slices of the layer `where` with impossible names or ranges of its features."""
    end, reserved = 0, nn.ModuleDict()  # an instance, since `training` and others are set by its constructor
    for name, rows in sorted(slices.items(), key=lambda item: (item[1].start, item[1].stop)):
        everything = (rows.start, rows.stop) == (0, features)  # all that "all" may name
        if not name.isidentifier() or hasattr(reserved, name) or (name == ALL and not everything):
            raise ConfigurationError(f"slice {name!r} of {where}: this name cannot be used; take another one")
        if not end <= rows.start < rows.stop <= features:
            given = f"slice {name!r} of {where} is {rows.start} to {rows.stop}"
            raise ConfigurationError(f"{given}: slices must not overlap and end by {features}")
        end = rows.stop
