"""Frozen weights with the updates of their adapters added, and put back again bit for bit.

Sums are made in float32 (float64 for a float64 base) and cast once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.errors import NotMergeableError, listed


@dataclass(frozen=True)
class _Before:
    """What `restore` puts back: the rows of weight and bias that changed, by slice, on the CPU."""

    weight: dict[str, Tensor]
    bias: dict[str, Tensor]


def check_weights(model: nn.Module, layers: dict[str, AdaptedLayer], constants: Collection[nn.Module]) -> None:
    """Raises `NotMergeableError` for weights that cannot be changed by themselves, and for adapters with NaN.

    Args:
        model: the entire model, whose other modules may use the same tensors.
        layers: layers to be merged, by path.
        constants: adapters that will have a constant, besides those that have one already.
    """
    owners: dict[int, list[str]] = {}  # the same memory to the names of its parameters
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_memory(parameter), []).append(f"{path}.{name}" if path else name)
    for path, layer in layers.items():
        moved = any(adapter in constants or adapter.delta_bias() is not None for adapter in layer.adapters.values())
        for name in ("weight", "bias") if moved and layer.bias is not None else ("weight",):
            if name not in layer._parameters:
                computed = f"the {name} of {path} is computed at every call (weight_norm, pruning …)"
                raise NotMergeableError(f"{computed}: make it a plain parameter before injection")
            shared = owners[_memory(layer._parameters[name])]
            if len(shared) > 1:
                tied = f"{path} shares its {name} ({' and '.join(shared)} are one tensor)"
                raise NotMergeableError(f"{tied}: leave it out of the targets, or untie them before injection")
        if isinstance(layer.weight, DTensor) or layer.weight.is_meta:
            where = f"{path} is sharded or on the meta device"
            raise NotMergeableError(f"{where}: merge on one process, from the checkpoint")
        broken = [name for name, p in layer.adapters.named_parameters() if not torch.isfinite(p).all()]
        if broken:
            raise NotMergeableError(f"the adapter of {path} has NaN or infinite values in {listed(broken, 2)}")


def _memory(tensor: Tensor) -> int:
    """The same number for tensors that share memory, tied as one parameter or as two over the same values."""
    has_memory = not isinstance(tensor, DTensor) and not tensor.is_meta and tensor.numel()
    return tensor.data_ptr() if has_memory else id(tensor)


def merge_layers(layers: dict[str, AdaptedLayer], keep_base: bool) -> None:
    """Merges all layers, given by path, or, where one cannot be merged, none of them."""
    if not keep_base:  # nothing to go back to, so what could fail is tried first
        for path, layer in layers.items():
            for name in layer.adapters:
                _merged_slice(path, layer, name)
    done = []  # to be put back should a later one fail
    try:
        for path, layer in layers.items():
            done.append(layer)
            _merge_layer(path, layer, keep_base)
    except BaseException:
        for layer in done:
            if layer.kept is not None:
                restore(layer)
        raise


@torch.no_grad()
def _merge_layer(path: str, layer: AdaptedLayer, keep_base: bool) -> None:
    weight, slices = layer.base_weight(), {name: layer.slices[name] for name in layer.adapters}
    # All slices are computed before one is written, for each may be refused.
    new = {name: _merged_slice(path, layer, name) for name in slices}
    if keep_base:
        layer.kept = _Before(
            weight={name: weight[rows].to("cpu", copy=True) for name, rows in slices.items()},
            bias={n: layer.bias[slices[n]].to("cpu", copy=True) for n, (_, bias) in new.items() if bias is not None},
        )
    for name, (merged, bias) in new.items():
        weight[slices[name]] = merged
        if bias is not None:
            layer.bias[slices[name]] = bias
    layer.merged = "exact"


@torch.no_grad()
def _merged_slice(path: str, layer: AdaptedLayer, name: str) -> tuple[Tensor, Tensor | None]:
    """The rows of a slice with the update in them, (rows, in), and their bias (rows,) where it changes."""
    rows, adapter = layer.slices[name], layer.adapters[name]
    weight = layer.base_weight()[rows]
    with torch.autocast(weight.device.type, enabled=False):  # which would run the products in low precision
        merged = _sum(path, weight, adapter.delta_weight(weight))  # (rows, in)
    constant = adapter.delta_bias()
    if constant is None:
        return merged, None
    if layer.bias is None:
        raise NotMergeableError(f"the update of {path} has a constant, and the layer no bias to take it")
    return merged, _sum(path, layer.bias[rows], constant)


def _sum(path: str, base: Tensor, update: Tensor) -> Tensor:
    wide = torch.promote_types(base.dtype, torch.float32)  # one rounding at the end, not two
    merged = (base.to(wide) + update.to(wide)).to(base.dtype)
    if not torch.isfinite(merged).all():
        raise NotMergeableError(f"merging {path} gives values that {base.dtype} cannot hold: merge a float32 copy")
    return merged


@torch.no_grad()
def restore(layer: AdaptedLayer) -> None:
    """Puts back what a merge changed in a layer, and drops the copy."""
    weight = layer.base_weight()
    for name, rows in layer.kept.weight.items():
        weight[layer.slices[name]] = rows.to(weight.device)  # its dtype too, where the model was cast meanwhile
    for name, rows in layer.kept.bias.items():
        layer.bias[layer.slices[name]] = rows.to(weight.device)
    layer.merged = None
    del layer.kept  # of this object; the class has None
