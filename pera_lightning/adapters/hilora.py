"""HiLoRA: HiRA and LoRA side by side. Huang et al., ICLR 2025 (the HiRA paper's combination).

    ΔW = W ⊙ (B₁ A₁) + s · B₂ A₂,  s = alpha / lora_rank

Both updates share one product, since HiRA needs its matrix anyway. Shapes: in, out features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pera_lightning.adapters.base import LinearAdapter, draw, new_parameter
from pera_lightning.adapters.hira import hira_update
from pera_lightning.adapters.method import LayerContext, LinearMethod, Merging, check_fits
from pera_lightning.adapters.registry import register_method
from pera_lightning.validation import check_in_range, check_positive, check_positive_int


class Factors(nn.Module):
    """The pair A (rank, in), B (out, rank)."""

    def __init__(self, in_features: int, out_features: int, rank: int, device: torch.device | None) -> None:
        super().__init__()
        self.A = new_parameter(rank, in_features, device=device)
        self.B = new_parameter(out_features, rank, device=device)


class HiLoRALayer(LinearAdapter):
    """The update W ⊙ (B₁ A₁) + s · B₂ A₂ of one linear map.

    Args:
        in_features: in.
        out_features: out.
        hira_rank: rank of B₁ A₁.
        lora_rank: rank of B₂ A₂.
        scale: s, of the LoRA part.
        dropout: on the update's input.
        device: where the parameters live.
    """

    uses_weight: ClassVar[bool] = True

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        hira_rank: int,
        lora_rank: int,
        scale: float = 1.0,
        dropout: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(in_features=in_features, out_features=out_features, scale=scale, dropout=dropout)
        self.hira = Factors(in_features, out_features, hira_rank, device)
        self.lora = Factors(in_features, out_features, lora_rank, device)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Both A kaiming-uniform (a = √5), both B zero."""
        for factors in (self.hira, self.lora):
            draw(factors.A, nn.init.kaiming_uniform_, generator, a=5**0.5)
            factors.B.zero_()

    def effective_update(self, weight: Tensor) -> Tensor:
        """W (out, in) -> ΔW (out, in), in the parameters' dtype."""
        return hira_update(weight, self.hira.A, self.hira.B) + (self.lora.B * self.scale) @ self.lora.A


@register_method
@dataclass(frozen=True, kw_only=True)
class HiLoRA(LinearMethod):
    """HiRA plus LoRA (Huang et al. 2025).

    Args:
        hira_rank: rank of the Hadamard part.
        lora_rank: rank of the LoRA part.
        alpha: the LoRA part's scale is alpha / lora_rank.
        dropout: probability on the update's input, in training.
    """

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

    def build(self, context: LayerContext) -> HiLoRALayer:
        check_fits(context, self.hira_rank, "hira_rank")
        check_fits(context, self.lora_rank, "lora_rank")
        layer = HiLoRALayer(
            **context.layer_arguments(),
            hira_rank=self.hira_rank,
            lora_rank=self.lora_rank,
            scale=self.alpha / self.lora_rank,
            dropout=self.dropout,
        )
        layer.reset_parameters(context.generator())
        return layer
