"""HiLoRA: HiRA and LoRA side by side. Huang et al., ICLR 2025 (the HiRA paper's combination).

    ΔW = W ⊙ (B₁ A₁) + s · B₂ A₂,  s = alpha / lora_rank

Both updates share one product, since HiRA needs its matrix anyway. Shapes: in, out features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pera_lightning.adapters.base import LayerContext, LinearAdapter
from pera_lightning.adapters.hira import HiRA, HiRALayer
from pera_lightning.adapters.lora import LoRA, LoRALayer
from pera_lightning.adapters.method import LinearMethod, Merging
from pera_lightning.adapters.registry import register_method
from pera_lightning.validation import check_in_range, check_positive, check_positive_int


class HiLoRALayer(LinearAdapter):
    """The update W ⊙ (B₁ A₁) + s · B₂ A₂ of one linear map, with an adapter of each method for its factors."""

    uses_weight: ClassVar[bool] = True

    def __init__(self, context: LayerContext, method: HiLoRA) -> None:
        # By the names that the user knows; the two adapters would say "rank".
        context.check_rank(method.hira_rank, "hira_rank")
        context.check_rank(method.lora_rank, "lora_rank")
        lora = LoRA(rank=method.lora_rank, alpha=method.alpha)
        size = {"in_features": context.in_features, "out_features": context.out_features}
        super().__init__(**size, scale=lora.scale, dropout=method.dropout)
        self.hira = HiRALayer(context, HiRA(rank=method.hira_rank))  # A₁, B₁
        self.lora = LoRALayer(context, lora)  # A₂, B₂

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Both A kaiming-uniform (a = √5), both B zero."""
        self.hira.reset_parameters(generator)
        self.lora.reset_parameters(generator)

    def effective_update(self, weight: Tensor) -> Tensor:
        """W (out, in) -> ΔW (out, in), in the parameters' dtype."""
        # The scale on B, which is smaller than the product.
        return self.hira.effective_update(weight) + (self.lora.B * self.scale) @ self.lora.A


@register_method
@dataclass(frozen=True, kw_only=True)
class HiLoRA(LinearMethod):
    """HiRA plus LoRA (Huang et al. 2025).

    Args:
        hira_rank: rank of the Hadamard factor, A₁ and B₁.
        lora_rank: rank of the LoRA factor, A₂ and B₂.
        alpha: the LoRA's scale is alpha / lora_rank.
        dropout: probability on the update's input, in training.
    """

    layer: ClassVar = HiLoRALayer
    merging: ClassVar[Merging] = "exact"

    hira_rank: int = 4
    lora_rank: int = 4
    alpha: float = 8.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int(self.hira_rank, "hira_rank")
        check_positive_int(self.lora_rank, "lora_rank")
        check_positive(self.alpha, "alpha")
        check_in_range(self.dropout, "dropout", ge=0, lt=1)
