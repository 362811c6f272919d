"""Merged weights for diffusers: a pipeline for `StableDiffusionXLPipeline.from_pretrained`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from pera_lightning.export.diffusers import check_sdxl
from pera_lightning.export.merged import MergedReport, export_merged
from pera_lightning.export.pipeline_files import copy_files, pipeline_files, without_path


def export_pipeline(
    network: nn.Module,
    folder: str | Path,
    base: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    **options: Any,
) -> MergedReport:
    """Merges an SDXL network and writes a pipeline that `StableDiffusionXLPipeline.from_pretrained` loads.

    Args:
        network: injected; merged in place, so hand over a copy to keep it.
        folder: made, in full or not at all.
        base: see `write_pipeline`, as for the next three.
        revision: branch, tag or commit of the base on the hub.
        variant: variant of the base's weights.
        prediction_type: what the UNet was trained to predict.
        options: options of `pera_lightning.export.merged.export_merged`.
    """
    how = {"revision": revision, "variant": variant, "prediction_type": prediction_type}
    return export_merged(network, folder, lambda made: write_pipeline(network, made, base, **how), **options)


def write_pipeline(
    network: nn.Module,
    folder: Path,
    base: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
) -> list[str]:
    """Writes a plain SDXL network with everything else of its base, a complete pipeline; gives notes.

    The network's components are written as they are, in the type of their weights; the others are the base's files,
    copied without being loaded. A variant's files get the plain names, so that no variant is to be given.

    Args:
        network: without adapters, with a child `unet` and, where they were trained, the text encoders.
        folder: exists.
        base: folder of the pipeline that the network is from, or its id on the hub.
        revision: branch, tag or commit on the hub.
        variant: variant of the base's weights, such as "fp16".
        prediction_type: what the UNet was trained to predict, where it is not what the base's scheduler says.

    Raises:
        ConfigurationError: for another network, or a base that is missing or lacks a component.
    """
    check_sdxl(network)
    own = dict(network.named_children())
    shared = pipeline_files(base, own, revision=revision, variant=variant)  # before anything is written
    notes = []
    for name, component in own.items():
        # diffusers loads a component in one dtype: that of most of its weights.
        weights: Counter[Any] = Counter()
        for parameter in component.parameters():
            weights[parameter.dtype] += parameter.numel()
        dtype = weights.most_common(1)[0][0]
        if len(weights) > 1:  # modules trained in full are float32 over a base of any type
            component.to(dtype)
            notes.append(f"all weights of the {name} are {str(dtype).removeprefix('torch.')}, as most of them were")
        component.save_pretrained(folder / name)
        without_path(folder / name / "config.json")
    copy_files(shared, folder)
    # A scheduler that predicts otherwise than the UNet was trained would give noise.
    if prediction_type is not None:
        file = folder / "scheduler" / "scheduler_config.json"
        scheduler = {**json.loads(file.read_text(encoding="utf-8")), "prediction_type": prediction_type}
        file.write_text(json.dumps(scheduler, indent=2) + "\n", encoding="utf-8")
        notes.append(f"the scheduler has prediction_type={prediction_type}, as the training")
    return notes
