"""Adapters beyond LoRA (PERA, HiRA, AuroRA) for PyTorch Lightning.

Public names are imported when they are first used, so that ``import pera_lightning`` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "AdapterInjection": "pera_lightning.training.callback",
    "CausalLMModule": "pera_lightning.tasks.causal_lm.module",
    "CommonsenseDataModule": "pera_lightning.tasks.causal_lm.commonsense",
    "DialogueDataModule": "pera_lightning.tasks.causal_lm.dialogue",
    "DreamBoothDataModule": "pera_lightning.tasks.dreambooth.data",
    "DreamBoothModule": "pera_lightning.tasks.dreambooth.module",
    "GLUEDataModule": "pera_lightning.tasks.sequence_classification.data",
    "ImageClassificationModule": "pera_lightning.tasks.image_classification.module",
    "ImageDataModule": "pera_lightning.tasks.image_classification.data",
    "MathsDataModule": "pera_lightning.tasks.causal_lm.maths",
    "PeraError": "pera_lightning.errors",
    "SequenceClassificationModule": "pera_lightning.tasks.sequence_classification.module",
    "adapter_state_dict": "pera_lightning.injection.state",
    "export_diffusers": "pera_lightning.export.diffusers",
    "export_peft": "pera_lightning.export.peft",
    "export_pipeline": "pera_lightning.export.diffusers_pipeline",
    "export_timm": "pera_lightning.export.timm",
    "export_transformers": "pera_lightning.export.transformers",
    "inject": "pera_lightning.injection.inject",
    "load_adapted": "pera_lightning.training.reloading",
    "load_adapter": "pera_lightning.injection.adapter_folder",
    "load_peft": "pera_lightning.export.peft_import",
    "merge": "pera_lightning.merging.merge",
    "merge_and_unload": "pera_lightning.merging.merge",
    "save_adapter": "pera_lightning.injection.adapter_folder",
    "unmerge": "pera_lightning.merging.merge",
}
__all__ = [*_NAMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
