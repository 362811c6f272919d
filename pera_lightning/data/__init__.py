"""Data modules and the plain functions behind them. Nothing here knows of adapters.

Names are looked up on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "CommonsenseDataModule": "pera_lightning.tasks.causal_lm.commonsense_data",
    "DialogueDataModule": "pera_lightning.tasks.causal_lm.dialogue_data",
    "DreamBoothDataModule": "pera_lightning.tasks.dreambooth.data",
    "GLUEDataModule": "pera_lightning.tasks.sequence_classification.data",
    "ImageDataModule": "pera_lightning.tasks.image_classification.data",
    "MathsDataModule": "pera_lightning.tasks.causal_lm.maths_data",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
