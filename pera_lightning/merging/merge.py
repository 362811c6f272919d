"""Merging: the updates of the adapters added to the frozen weights, and taken out again.

Nothing here happens by itself: `train()` and `eval()` merge nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypedDict

from torch import nn

from pera_lightning.adapters.adapted_layer import AdaptedLayer, release_layer
from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.injection.inject import forget_injection, injection_of
from pera_lightning.merging.linearised import linearised, nonlinear_adapters
from pera_lightning.merging.merge_error import Forward, MergeError, batch_list, measure, measuring_notes, merge_error
from pera_lightning.merging.weights import check_weights, merge_layers, restore
from pera_lightning.validation import renamed


class MergeOptions(TypedDict, total=False):
    """What an export takes as `merge` does, and describes there."""

    mode: str | None
    batches: Iterable[Any] | None
    measure_on: Iterable[Any] | None
    forward: Forward | None


@dataclass
class MergeReport:
    """What a merge did."""

    layers: int  # number of adapted layers merged
    mode: str = "exact"  # or "static" or "calibrated"
    merge_error: MergeError | None = None  # against the adapted model; None without batches to measure on
    notes: list[str] = field(default_factory=list)  # one line for each thing that a reader should know

    def __str__(self) -> str:
        lines = [f"Merged {self.layers} layers" + ("" if self.mode == "exact" else f", {self.mode}")]
        if self.merge_error is not None:
            lines.append(f"  {self.merge_error}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Path and layer of every adapted layer of `model`, each once."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, AdaptedLayer))


def merged_layers(model: nn.Module) -> list[str]:
    """Paths of the adapted layers whose updates are merged."""
    return [path for path, layer in adapted_layers(model) if layer.merged]


@renamed("method", "mode")
def merge(
    model: nn.Module,
    *,
    mode: str | None = None,
    batches: Iterable[Any] | None = None,
    measure_on: Iterable[Any] | None = None,
    forward: Forward | None = None,
    keep_base: bool = True,
    ridge: float | None = None,
) -> MergeReport:
    """Adds every adapter's update to its frozen weight, in place; the adapters stay, inactive. Twice is as once.

    Args:
        model: injected, or a model that contains an injected one.
        mode: for AuroRA with dynamic inference, which no matrix equals: "static" (what the paper merges; it can lose
            what was learnt) or "calibrated" (a fit on `batches`, see `pera_lightning.merging.calibration`).
        batches: inputs of the model, to calibrate with and, without `measure_on`, to measure the error on.
        measure_on: other inputs to measure the error on, better those that were not calibrated with.
        forward: how the model is called, see `pera_lightning.merging.merge_error.call` for the default.
        keep_base: keeps a copy of the changed rows on the CPU, which `unmerge` needs.
        ridge: of the calibration, see `pera_lightning.merging.calibration.Moments.fit`.

    Returns:
        What was done. Where nothing is left to merge, a report of 0 layers.

    Raises:
        NotMergeableError: where no matrix equals an update, or a weight cannot be changed by itself; the model is then
            as it was.
        ConfigurationError: where nothing was injected, or the options do not fit.
    """
    layers = dict(adapted_layers(model))
    if not layers:
        what = "its method adapts no layers" if _injected(model) else "it has no adapters, call inject first"
        raise ConfigurationError(f"{type(model).__name__} cannot be merged: {what}")
    earlier = {layer.merged for layer in layers.values() if layer.merged}
    if mode is not None and earlier - {mode, "exact"}:
        raise ConfigurationError(f"the adapters are merged in another mode ({listed(earlier)}): call unmerge first")
    waiting = {path: layer for path, layer in layers.items() if not layer.merged}  # a part may be merged already
    if not waiting:
        return MergeReport(0, notes=["the adapters are merged already"])
    # What can be refused is refused before the model is changed, or run.
    fit, held_out = batch_list(batches), batch_list(measure_on)
    nonlinear = nonlinear_adapters(model, mode, fit, ridge)
    check_weights(model, waiting, constants=nonlinear if mode == "calibrated" else [])
    measured = held_out or fit  # better batches that the calibration has not seen
    before = measure(model, measured, forward)
    # Only within the context do AuroRA's dynamic layers have a matrix.
    with linearised(model, mode, fit, forward, ridge) as notes:
        merge_layers(waiting, keep_base)
    # Layers that hold an approximation say so: another mode is refused on top of it.
    for layer in waiting.values():
        if mode is not None and any(adapter in nonlinear for adapter in layer.adapters.values()):
            layer.merged = mode
    error = merge_error(before, measure(model, measured, forward))
    return MergeReport(len(waiting), mode or "exact", error, [*notes, *measuring_notes(mode, error, held_out)])


def unmerge(model: nn.Module) -> int:
    """Takes the updates out again: base weights and biases as they were, bit for bit; adapters act again.

    Returns how many layers were merged. Where the base was not kept (``keep_base=False``) nothing is changed, and a
    `ConfigurationError` says so.
    """
    layers = {path: layer for path, layer in adapted_layers(model) if layer.merged}
    if lost := [path for path, layer in layers.items() if layer.kept is None]:
        kept_nothing = f"{len(lost)} layers were merged with keep_base=False and cannot be unmerged: {listed(lost, 3)}"
        raise ConfigurationError(f"{kept_nothing}; build the model anew and load the adapter")
    for layer in layers.values():
        restore(layer)
    return len(layers)


def merge_and_unload(model: nn.Module, **options: Any) -> nn.Module:
    """Merges and removes the adapters: plain layers, no trace of this package but what other modules import.

    Args:
        model: injected, or a model that contains an injected one; merged already or not.
        options: options of `merge`, but for `keep_base`.

    Returns:
        `model`, changed in place; parameters stay frozen as they are.
    """
    if "keep_base" in options:
        raise ConfigurationError("merge_and_unload keeps no base: leave keep_base out")
    layers = [layer for _, layer in adapted_layers(model)]
    if layers or not _injected(model):  # a probe adapts no layers and has nothing to merge
        merge(model, keep_base=False, **options)
    for layer in layers:
        release_layer(layer)  # also of what a merge has kept
    for module in _injected(model):
        forget_injection(module)
    return model


def _injected(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if injection_of(module) is not None]
