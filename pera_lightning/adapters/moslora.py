"""MoSLoRA: a trained mixer between the low-rank factors. Wu et al., EMNLP 2024 (arXiv 2406.11909).

    ΔW = s · B M A,  s = alpha / rank

Initial values: A and M kaiming-uniform (a = √5), B zero; `mixer_init="orthogonal"` draws M orthogonal, the paper's
other choice. The update is a LoRA of rank r with the factors M A and B.

Shapes: in, out features; r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_lightning.adapters.base import LayerContext, LowRankAdapter, LowRankUpdate, draw, new_parameter
from pera_lightning.adapters.method import LowRankMethod, Merging
from pera_lightning.adapters.registry import register_method
from pera_lightning.validation import check_choice

MIXER_INITS = ("kaiming", "orthogonal")


class MoSLoRALayer(LowRankAdapter):
    """The update s · B M A of one linear map."""

    def __init__(self, context: LayerContext, method: MoSLoRA) -> None:
        super().__init__(context, method)
        self.mixer = new_parameter(method.rank, method.rank, device=context.weight.device)  # (r, r)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws A and the mixer, zeroes B; see the file's head."""
        super().reset_parameters(generator)  # A and B as LoRA's
        if self.method.mixer_init == "orthogonal":
            draw(self.mixer, nn.init.orthogonal_, generator)
        else:
            draw(self.mixer, nn.init.kaiming_uniform_, generator, a=5**0.5)

    def delta_output(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        z = F.linear(F.linear(x, self.A.to(x.dtype)), self.mixer.to(x.dtype))  # (..., r)
        return F.linear(z * self.scale, self.B.to(z.dtype))  # (..., out)

    @torch.no_grad()
    def low_rank_update(self) -> LowRankUpdate:
        """A LoRA of rank r, with M A in the place of A."""
        return LowRankUpdate(self.mixer @ self.A, self.B, self.scale)  # M A is (r, in)


@register_method
@dataclass(frozen=True, kw_only=True)
class MoSLoRA(LowRankMethod):
    """Mixture-of-subspaces LoRA (Wu et al. 2024).

    Args:
        rank: r.
        alpha: the scale is alpha / rank.
        dropout: probability on the update's input, in training.
        mixer_init: initial values of the mixer, see the file's head.
    """

    layer: ClassVar = MoSLoRALayer
    merging: ClassVar[Merging] = "exact"

    mixer_init: Literal["kaiming", "orthogonal"] = "kaiming"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.mixer_init, "mixer_init", MIXER_INITS)
