"""Merging: the updates of the adapters added to the frozen weights, and taken out again to the bit.

Sums are made in float32 (float64 for a float64 base) and cast once. Nothing here happens by itself: `train()` and
`eval()` merge nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pera_lightning.adapters.adapted_layer import AdaptedLayer, release_layer
from pera_lightning.adapters.aurora import AuroRALayer, acting_layers
from pera_lightning.errors import ConfigurationError, NotMergeableError, listed
from pera_lightning.injection.inject import forget_injection, injection_of
from pera_lightning.merging.calibration import RIDGE, calibrate
from pera_lightning.merging.merge_error import Drift, Forward, Measured, drift, measure, taken
from pera_lightning.validation import check_choice

METHODS = ("static", "calibrated")
_KEPT = "_pera_before_merging"


@dataclass
class MergeReport:
    """What a merge did.

    Attributes:
        layers: number of adapted layers merged.
        method: "exact", "static" or "calibrated".
        drift: how far the merged model is from the adapted one; None where there were no batches to measure on.
        notes: one line for each thing that a reader should know.
    """

    layers: int
    method: str = "exact"
    drift: Drift | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        how = "" if self.method == "exact" else f" by the {self.method} method"
        lines = [f"Merged {self.layers} layers{how}"]
        if self.drift is not None:
            lines.append(f"  {self.drift}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@dataclass(frozen=True)
class _Before:
    """What `unmerge` puts back: rows of weight and bias by row block, on the CPU."""

    weight: dict[str, Tensor]
    bias: dict[str, Tensor]


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Path and layer of every adapted layer of `model`, each once."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, AdaptedLayer))


def merged_layers(model: nn.Module) -> list[str]:
    """Paths of the adapted layers whose updates are merged."""
    return [path for path, layer in adapted_layers(model) if layer.merged]


def merge(
    model: nn.Module,
    *,
    method: str | None = None,
    batches: Iterable[Any] | None = None,
    measure_on: Iterable[Any] | None = None,
    forward: Forward | None = None,
    keep_base: bool = True,
    ridge: float | None = None,
) -> MergeReport:
    """Adds every adapter's update to its frozen weight, in place; adapters stay and rest. Twice is once.

    Args:
        model: injected, or a model that contains an injected one.
        method: for AuroRA with dynamic inference, which no matrix equals: "static" (what the paper merges; it can lose
            what was learnt) or "calibrated" (a fit on `batches`, see `pera_lightning.merging.calibration`).
        batches: inputs of the model, to calibrate with and, without `measure_on`, to measure the drift on.
        measure_on: other inputs to measure the drift on, better those that were not calibrated with.
        forward: how the model is called, see `pera_lightning.merging.merge_error.call` for the default.
        keep_base: keeps a copy of the changed rows on the CPU, which `unmerge` needs.
        ridge: of the calibration, see `pera_lightning.merging.calibration.Moments.fit`.

    Returns:
        What was done. Where nothing is left to merge, a report of 0 layers.

    Raises:
        NotMergeableError: where an update is no matrix, or a weight cannot be changed by itself; the model is then as
            it was.
        ConfigurationError: where nothing was injected, or the options do not fit.
    """
    layers = dict(adapted_layers(model))
    if not layers:
        what = "its method adapts no layers" if _marks(model) else "it has no adapters, call inject first"
        raise ConfigurationError(f"{type(model).__name__} cannot be merged: {what}")
    merged = {layer.merged for layer in layers.values() if layer.merged}
    if method is not None and merged - {method, "exact"}:
        raise ConfigurationError(f"the adapters are merged by the {listed(merged)} method: call unmerge first")
    waiting = {path: layer for path, layer in layers.items() if not layer.merged}
    if not waiting:
        return MergeReport(0, notes=["the adapters are merged already"])
    fit, held_out = taken(batches), taken(measure_on)
    nonlinear = _nonlinear(model, method, fit, ridge)
    _check_weights(model, waiting, constants=nonlinear if method == "calibrated" else [])
    measured = held_out or fit
    before = measure(model, measured, forward) if measured else None
    with linearised(model, method, fit, forward, ridge) as notes:
        _merge_layers(waiting, keep_base)
    for layer in waiting.values():
        approximated = any(adapter in nonlinear for adapter in layer.adapters.values())
        layer.merged = method if approximated and method else "exact"
    report = MergeReport(len(waiting), method or "exact", _drift(model, before, measured, forward), notes)
    if method is not None and report.drift is None:
        report.notes.append(f"the drift of the {method} merge was not measured: give batches")
    elif method == "calibrated" and not held_out:
        report.notes.append("the drift was measured on the batches of the calibration: measure_on takes others")
    return report


@contextmanager
def linearised(
    model: nn.Module,
    method: str | None,
    batches: Sequence[Any] = (),
    forward: Forward | None = None,
    ridge: float | None = None,
) -> Iterator[list[str]]:
    """Within this context AuroRA's layers with dynamic inference have a linear update, and can be merged or exported.

    Args:
        model: injected.
        method: None where there are no such layers, else "static" or "calibrated".
        batches: for "calibrated".
        forward: likewise.
        ridge: likewise, see `pera_lightning.merging.calibration.Moments.fit`.

    Yields:
        Notes of the calibration, one line each.

    Raises:
        NotMergeableError: where there are such layers and no method is given.
        ConfigurationError: for options that do not act.
    """
    adapters = _nonlinear(model, method, batches, ridge)
    try:
        if method == "static":
            for adapter in adapters:
                adapter.inference_mode = "static"
        notes = []
        if method == "calibrated":
            notes = calibrate(model, batches, forward=forward, ridge=RIDGE if ridge is None else ridge)
        yield notes
    finally:
        for adapter in adapters:
            adapter.calibrate(None)


def _nonlinear(model: nn.Module, method: str | None, batches: Sequence[Any], ridge: float | None) -> list[AuroRALayer]:
    """The adapters that no matrix equals; raises where `method` does not fit them."""
    if method is not None:
        check_choice(method, "method", METHODS)
    found = [layer for layer in acting_layers(model) if layer.inference_mode == "dynamic"]
    if found and method is None:
        found[0].low_rank_update()  # raises
    if method is not None and not found:
        raise ConfigurationError(f"method={method!r} acts on AuroRA with dynamic inference only: leave it out")
    if method != "calibrated" and ridge is not None:
        raise ConfigurationError(f"ridge={ridge} acts with method='calibrated' only")
    if method == "calibrated" and not batches:
        raise ConfigurationError("method='calibrated' needs batches: inputs like those that the model is for")
    return found


def unmerge(model: nn.Module) -> int:
    """Takes the updates out again: base weights and biases as they were, to the bit; adapters act again.

    Returns:
        How many layers were merged.

    Raises:
        ConfigurationError: where the base was not kept (``keep_base=False``); nothing is changed then.
    """
    layers = {path: layer for path, layer in adapted_layers(model) if layer.merged}
    lost = [path for path, layer in layers.items() if getattr(layer, _KEPT, None) is None]
    if lost:
        raise ConfigurationError(
            f"{len(lost)} layers were merged with keep_base=False and cannot be unmerged: {listed(lost, 3)}; build the "
            "model anew and load the adapter"
        )
    for layer in layers.values():
        _restore(layer)
    return len(layers)


def merge_and_unload(model: nn.Module, **options: Any) -> nn.Module:
    """Merges and removes the adapters: plain layers, no trace of this package but what other modules import.

    Parameters stay frozen as they are.

    Args:
        model: injected, or a model that contains an injected one; merged already or not.
        options: of `merge`, but for `keep_base`.

    Returns:
        `model`, changed in place.
    """
    if "keep_base" in options:
        raise ConfigurationError("merge_and_unload keeps no base: leave keep_base out")
    layers = [layer for _, layer in adapted_layers(model)]
    if layers or not _marks(model):  # a probe adapts no layers and has nothing to merge
        merge(model, keep_base=False, **options)
    for layer in layers:
        vars(layer).pop(_KEPT, None)
        release_layer(layer)
    for module in _marks(model):
        forget_injection(module)
    return model


def _marks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if injection_of(module) is not None]


def _check_weights(model: nn.Module, layers: dict[str, AdaptedLayer], constants: Sequence[nn.Module]) -> None:
    """Raises `NotMergeableError` for weights that cannot be changed by themselves, and for adapters with NaN.

    Args:
        model: the whole model, whose other modules may use the same tensors.
        layers: to be merged, by path.
        constants: adapters that will have a constant, besides those that have one already.
    """
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_memory(parameter), []).append(f"{path}.{name}" if path else name)
    for path, layer in layers.items():
        changed = ["weight"]
        if any(adapter in constants or adapter.delta_bias() is not None for adapter in layer.adapters.values()):
            changed += [] if layer.bias is None else ["bias"]
        for name in changed:
            if name not in layer._parameters:
                raise NotMergeableError(
                    f"the {name} of {path} is computed at every call (weight_norm, pruning …), and a merge would be "
                    "lost: make it a plain parameter before injection"
                )
            shared = owners[_memory(layer._parameters[name])]
            if len(shared) > 1:
                raise NotMergeableError(
                    f"{path} shares its {name} ({' and '.join(shared)} are one tensor), and merging would change them "
                    "all: leave it out of the targets, or untie them before injection"
                )
        if isinstance(layer.weight, DTensor):
            raise NotMergeableError(f"{path} is sharded over processes: merge on one, from the checkpoint")
        if layer.weight.is_meta:
            raise NotMergeableError(f"{path} is on the meta device and has no values")
        broken = [name for name, p in layer.adapters.named_parameters() if not torch.isfinite(p).all()]
        if broken:
            raise NotMergeableError(f"the adapter of {path} has NaN or infinite values in {listed(broken, 2)}")


def _memory(tensor: Tensor) -> int:
    """The same number for tensors that share memory, tied as one parameter or as two over the same values."""
    there = not isinstance(tensor, DTensor) and not tensor.is_meta and tensor.numel()
    return tensor.data_ptr() if there else id(tensor)


def _merge_layers(layers: dict[str, AdaptedLayer], keep_base: bool) -> None:
    """Merges all layers or, where one cannot be, none of them."""
    if not keep_base:  # nothing to go back to, so what could fail is tried first
        for path, layer in layers.items():
            for block in layer.adapters:
                _merged_rows(path, layer, block)
    done = []
    try:
        for path, layer in layers.items():
            done.append(layer)
            _merge_layer(path, layer, keep_base)
    except BaseException:
        for layer in done:
            if getattr(layer, _KEPT, None) is not None:
                _restore(layer)
        raise


@torch.no_grad()
def _merge_layer(path: str, layer: AdaptedLayer, keep_base: bool) -> None:
    weight = layer.base_weight()
    rows = {block: layer.slices[block] for block in layer.adapters}
    new = {block: _merged_rows(path, layer, block) for block in rows}
    if keep_base:
        before = _Before(
            weight={block: weight[r].to("cpu", copy=True) for block, r in rows.items()},
            bias={b: layer.bias[rows[b]].to("cpu", copy=True) for b, (_, bias) in new.items() if bias is not None},
        )
        setattr(layer, _KEPT, before)
    for block, (merged, bias) in new.items():
        weight[rows[block]] = merged
        if bias is not None:
            layer.bias[rows[block]] = bias
    layer.merged = "exact"


@torch.no_grad()
def _merged_rows(path: str, layer: AdaptedLayer, block: str) -> tuple[Tensor, Tensor | None]:
    """The rows of a block with the update in them, (rows, in), and their bias (rows,) where it changes."""
    rows, adapter = layer.slices[block], layer.adapters[block]
    weight = layer.base_weight()[rows]
    with torch.autocast(weight.device.type, enabled=False):  # which would run the products in low precision
        merged = _sum(path, weight, adapter.delta_weight(weight))
    bias = adapter.delta_bias()
    if bias is None:
        return merged, None
    if layer.bias is None:
        raise NotMergeableError(f"the update of {path} has a constant, and the layer no bias to take it")
    return merged, _sum(path, layer.bias[rows], bias)


def _sum(path: str, base: Tensor, update: Tensor) -> Tensor:
    wide = torch.promote_types(base.dtype, torch.float32)
    merged = (base.to(wide) + update.to(wide)).to(base.dtype)
    if not torch.isfinite(merged).all():
        raise NotMergeableError(f"merging {path} gives values that {base.dtype} cannot hold: merge a float32 copy")
    return merged


@torch.no_grad()
def _restore(layer: AdaptedLayer) -> None:
    before: _Before = getattr(layer, _KEPT)
    weight = layer.base_weight()
    for block, rows in before.weight.items():
        weight[layer.slices[block]] = rows.to(weight.device)
    for block, rows in before.bias.items():
        layer.bias[layer.slices[block]] = rows.to(weight.device)
    layer.merged = None
    delattr(layer, _KEPT)


def _drift(model: nn.Module, before: Measured | None, batches: list[Any], forward: Forward | None) -> Drift | None:
    return None if before is None else drift(before, measure(model, batches, forward))
