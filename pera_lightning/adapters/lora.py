"""LoRA: a linear update of low rank. Hu et al., ICLR 2022 (arXiv 2106.09685).

    Δy = s · B (A x),  s = alpha / rank

Initial values: A kaiming-uniform (a = √5), B zero (`init="default"`). `"gaussian"` draws A from N(0, 1/rank²) as peft
does. `"pissa"` (arXiv 2404.02948) and `"milora"` (arXiv 2406.09044) start from the largest / smallest singular values
of W. Those papers subtract the initial product from the stored weight; here W stays untouched and the update is
s · (B A − B₀ A₀) with B₀, A₀ kept as buffers, the same function with the same gradients.

Shapes: in, out features; r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_lightning.adapters.base import LayerContext, LowRankAdapter, LowRankUpdate, draw
from pera_lightning.adapters.method import LowRankMethod, Merging
from pera_lightning.adapters.registry import register_method
from pera_lightning.validation import check_choice

INITS = ("default", "gaussian", "pissa", "milora")
SVD_INITS = ("pissa", "milora")


def lora_output(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """s · B (A x): x (..., in), A (r, in), B (out, r) -> (..., out), in x's dtype (or autocast's)."""
    z = F.linear(x, A.to(x.dtype))  # (..., r)
    return F.linear(z * scale, B.to(z.dtype))  # (..., out); the scale on z, which is small


def svd_factors(weight: Tensor, rank: int, scale: float, largest: bool) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) in float32 with s · B A = W (out, in), cut to r singular values.

    The `largest` ones are PiSSA's, the smallest MiLoRA's.
    """
    u, sigma, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    keep = slice(None, rank) if largest else slice(-rank, None)  # sigma falls
    # Each factor takes the root of the singular values, so that both learn at one pace.
    root = (sigma[keep] / scale).sqrt()
    return root[:, None] * vh[keep], u[:, keep] * root


class LoRALayer(LowRankAdapter):
    """The update s · B A of one linear map; the SVD inits are completed by `initialise_from`."""

    def __init__(self, context: LayerContext, method: LoRA) -> None:
        super().__init__(context, method)
        # A₀ and B₀ are saved: an SVD on another machine may have other signs.
        start = method.init in SVD_INITS
        self.register_buffer("A0", torch.zeros_like(self.A) if start else None)
        self.register_buffer("B0", torch.zeros_like(self.B) if start else None)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws A, zeroes B; see the file's head."""
        if self.method.init == "gaussian":
            draw(self.A, nn.init.normal_, generator, std=1.0 / self.A.shape[0])  # 1 / r
            self.B.zero_()
        else:
            super().reset_parameters(generator)

    @torch.no_grad()
    def initialise_from(self, weight: Tensor) -> None:
        """Starts A, B and their saved copies from the singular values of the frozen weight (out, in)."""
        if weight.is_meta:  # no values yet: a checkpoint brings all four
            return
        A, B = svd_factors(weight, self.A.shape[0], self.scale, largest=self.method.init == "pissa")
        for tensor, value in ((self.A, A), (self.B, B), (self.A0, A), (self.B0, B)):
            tensor.copy_(value)

    def delta_output(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return lora_output(x, *self._factors(), self.scale)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A and B; for the SVD inits the two of rank 2r whose product is B A - B₀ A₀.

        Written as (B - B₀) A + B₀ (A - A₀), it is exactly zero at the start, and casting the factors to bfloat16 keeps
        small updates, which the difference of two products would round away.
        """
        if self.A0 is None:
            return self.A, self.B
        # (2r, in) and (out, 2r)
        return torch.cat([self.A, self.A - self.A0]), torch.cat([self.B - self.B0, self.B0], dim=1)

    @torch.no_grad()
    def low_rank_update(self) -> LowRankUpdate:
        """A LoRA of rank r, 2r for the SVD inits."""
        return LowRankUpdate(*self._factors(), scale=self.scale)


@register_method
@dataclass(frozen=True, kw_only=True)
class LoRA(LowRankMethod):
    """Low-rank adaptation (Hu et al. 2022).

    Args:
        rank: r.
        alpha: the scale is alpha / rank.
        dropout: probability on the update's input, in training.
        init: initial values, see the file's head.
    """

    layer: ClassVar = LoRALayer
    merging: ClassVar[Merging] = "exact"

    init: Literal["default", "gaussian", "pissa", "milora"] = "default"

    @property
    def export_rank(self) -> int:
        return 2 * self.rank if self.init in SVD_INITS else self.rank

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.init, "init", INITS)

    def build(self, context: LayerContext) -> LoRALayer:
        adapter = super().build(context)
        if self.init in SVD_INITS:  # these need the weight, which `reset_parameters` does not get
            adapter.initialise_from(context.weight)
        return adapter
