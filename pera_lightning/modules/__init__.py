"""LightningModules, one a task; imported when first used."""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "CausalLMModule": "pera_lightning.tasks.causal_lm.module",
    "DreamBoothModule": "pera_lightning.tasks.dreambooth.module",
    "ImageClassificationModule": "pera_lightning.tasks.image_classification.module",
    "SequenceClassificationModule": "pera_lightning.tasks.sequence_classification.module",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)
