"""What vLLM takes of a PEFT folder: one LoRA of one rank and alpha for all layers, of at most 512, and nothing else.

No trained head, no constants (`lora_bias`), no patterns of ranks. The server is told the rank, one of a few values.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pera_lightning.adapters.base import LowRankUpdate
from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.export.low_rank import padded
from pera_lightning.injection.inject import Injection

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank can be
_INSTEAD = "export merged weights and serve those"


def check_model(model: nn.Module, mark: Injection) -> None:
    """Raises `ConfigurationError` for a model of which vLLM takes no adapter, however it is written."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise ConfigurationError(f"vLLM serves models of transformers, not a {type(model).__name__}")
    if mark.trained_modules:
        heads = listed(mark.trained_modules)
        raise ConfigurationError(f"vLLM takes no trained head in an adapter, and {heads} was trained: {_INSTEAD}")


def served_updates(
    updates: Mapping[str, LowRankUpdate], mark: Injection
) -> tuple[dict[str, LowRankUpdate], int, list[str]]:
    """Updates as vLLM takes them, the `--max-lora-rank` to start it with, and notes.

    Raises:
        ConfigurationError: where the rank is too large, or there are constants.
    """
    if any(update.bias is not None for update in updates.values()):
        raise ConfigurationError(f"vLLM takes no constants in an adapter, and the calibration has some: {_INSTEAD}")
    # The server takes the rank of all its adapters when it starts.
    rank = max(update.rank for update in updates.values())
    if rank > RANKS[-1]:
        given = f"the updates of {mark.method} are LoRAs of rank {rank}, and vLLM takes at most {RANKS[-1]}"
        raise ConfigurationError(f"{given}: cut them with rank={RANKS[-1]}, or {_INSTEAD}")
    # One rank for all layers, and one of those that the server can be started with.
    uneven = any(update.rank != rank for update in updates.values())
    notes = ["ranks differ by layer, and vLLM takes one: the smaller ones are filled up with zeros"] if uneven else []
    return padded(updates), next(allowed for allowed in RANKS if allowed >= rank), notes
