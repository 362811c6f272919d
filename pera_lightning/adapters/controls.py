"""The two controls that need no adapter layer: the linear probe and full fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from pera_lightning.adapters.method import Method, Target
from pera_lightning.adapters.registry import register_method
from pera_lightning.errors import ConfigurationError


@register_method
@dataclass(frozen=True, kw_only=True)
class LinearProbe(Method):
    """Trains the modules named in `trainable` (the head) and nothing else; targets are not used."""

    needs_targets: ClassVar[bool] = False

    def apply(self, model: nn.Module, targets: Sequence[Target], trainable: Sequence[str], seed: int) -> list[str]:
        if not trainable:
            raise ConfigurationError("LinearProbe trains the modules named in trainable=[…], and none is named")
        return []  # `inject` freezes all but these modules


@register_method
@dataclass(frozen=True, kw_only=True)
class FullFineTuning(Method):
    """Trains every parameter, so checkpoints and adapter folder hold the entire model; targets are not used."""

    needs_targets: ClassVar[bool] = False

    def apply(self, model: nn.Module, targets: Sequence[Target], trainable: Sequence[str], seed: int) -> list[str]:
        return []  # nothing is added to the model

    def trains(self, name: str) -> bool:
        return True
