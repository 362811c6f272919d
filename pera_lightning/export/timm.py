"""Merged weights for timm: a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.export.merged import MergedReport, export_merged

TAG = "merged"


def export_timm(
    network: nn.Module,
    folder: str | Path,
    *,
    data_config: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> MergedReport:
    """Merges a timm network and writes a folder that `timm.create_model` loads.

    Args:
        network: injected; merged in place, so hand over a copy to keep it.
        folder: made, in full or not at all.
        data_config: see `write_timm`.
        class_names: see `write_timm`.
        options: options of `pera_lightning.export.merged.export_merged`.
    """
    return export_merged(network, folder, lambda made: write_timm(network, made, data_config, class_names), **options)


def write_timm(
    network: nn.Module,
    folder: Path,
    data_config: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
) -> list[str]:
    """Writes a plain network with its architecture, what images it expects, and its classes' names; gives notes.

    Args:
        network: made by `timm.create_model`, without adapters.
        folder: exists.
        data_config: `input_size` (3, H, W), `mean`, `std`, `interpolation`, `crop_pct` and `crop_mode`, as timm says
            it; what is left out is the base's.
        class_names: by label; None where they are not known, since the base's names are of other classes.

    Raises:
        ConfigurationError: where timm would build another network from what was written, or is too old.
    """
    if not hasattr(timm.models, "get_model_args"):
        raise ConfigurationError(f"merged weights need timm 1.0.31 or newer, and this is {timm.__version__}")
    if class_names is not None and len(class_names) != network.num_classes:
        raise ConfigurationError(f"{len(class_names)} class names for a head of {network.num_classes} classes")
    # timm would keep the tag and the class names of the base's weights; these are others.
    config: dict[str, Any] = {"pretrained_cfg": {"tag": TAG, "label_names": None, "label_descriptions": None}}
    if class_names is not None:
        config["label_names"] = list(class_names)
    timm.models.save_for_hf(
        network, folder, model_config=config, safe_serialization=True, data_config=dict(data_config or {})
    )
    _check_loads(network, folder)
    return [] if class_names is not None else ["the names of the classes are not known: config.json has none"]


def as_data_config(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """What our evaluation does to an image, in timm's words.

    Args:
        preprocessing: `size` (H, W), `mean`, `std`, `interpolation` and `crop_pct`; where that is None the entire
            image is resized to the exact size, which timm calls "squash".
    """
    kept = {name: preprocessing[name] for name in ("mean", "std", "interpolation")}
    crop = preprocessing["crop_pct"]  # share of the shorter side
    how = {"crop_pct": 1.0, "crop_mode": "squash"} if crop is None else {"crop_pct": crop, "crop_mode": "center"}
    return {"input_size": (3, *preprocessing["size"]), **kept, **how}


def _check_loads(network: nn.Module, folder: Path) -> None:
    """Builds what the folder describes, without memory, and compares: timm warns of little and ignores more."""
    with torch.device("meta"):  # shapes without values
        described = timm.create_model(f"local-dir:{folder}").state_dict()
    present = {name: value.shape for name, value in network.state_dict().items()}
    other = [name for name in {**present, **described} if present.get(name) != getattr(described.get(name), "shape", 0)]
    if other:
        another = f"timm would build another {type(network).__name__}, one that differs in {listed(other, 3)}"
        raise ConfigurationError(f"{another}: it was changed after timm made it")
