"""Linear updates in the place of AuroRA's nonlinear ones, for as long as they are merged or exported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from pera_lightning.adapters.aurora import AuroRALayer, acting_layers
from pera_lightning.errors import ConfigurationError
from pera_lightning.merging.calibration import RIDGE, calibrate
from pera_lightning.merging.merge_error import Forward
from pera_lightning.validation import check_choice

MODES = ("static", "calibrated")


@contextmanager
def linearised(
    model: nn.Module,
    mode: str | None,
    batches: Sequence[Any] = (),
    forward: Forward | None = None,
    ridge: float | None = None,
) -> Iterator[list[str]]:
    """Within this context AuroRA's layers with dynamic inference have a linear update, and can be merged or exported.

    Args:
        model: injected.
        mode: "static" or "calibrated"; None without such layers.
        batches: inputs to calibrate with.
        forward: how the model is called in a calibration.
        ridge: see `pera_lightning.merging.calibration.Moments.fit`.

    Yields the notes of a calibration.
    """
    adapters = nonlinear_adapters(model, mode, batches, ridge)
    try:
        if mode == "calibrated":
            yield calibrate(model, batches, forward=forward, ridge=RIDGE if ridge is None else ridge)
        else:
            for adapter in adapters:
                adapter.inference_mode = "static"
            yield []
    finally:
        for adapter in adapters:
            adapter.calibrate(None)  # dynamic again


def nonlinear_adapters(
    model: nn.Module, mode: str | None, batches: Sequence[Any], ridge: float | None = None
) -> list[AuroRALayer]:
    """The adapters whose updates no matrix equals; raises where the options, as of `linearised`, do not fit them."""
    if mode is not None:
        check_choice(mode, "mode", MODES)
    found = [layer for layer in acting_layers(model) if layer.inference_mode == "dynamic"]  # static is linear already
    if found and mode is None:
        found[0].low_rank_update()  # raises NotMergeableError, which says what modes there are
    if mode is not None and not found:
        raise ConfigurationError(f"mode={mode!r} acts on AuroRA with dynamic inference only: leave it out")
    if mode != "calibrated" and ridge is not None:
        raise ConfigurationError(f"ridge={ridge} acts with mode='calibrated' only")
    if mode == "calibrated" and not batches:
        raise ConfigurationError("mode='calibrated' needs batches: inputs like those that the model is for")
    return found
