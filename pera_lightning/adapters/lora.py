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

from pera_lightning.adapters.base import LinearAdapter, LowRankUpdate, draw, new_parameter
from pera_lightning.adapters.method import LayerContext, LowRankMethod, Merging, check_fits
from pera_lightning.adapters.registry import register_method
from pera_lightning.validation import check_choice

INITS = ("default", "gaussian", "pissa", "milora")
SVD_INITS = ("pissa", "milora")


def lora_output(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """s · B (A x): x (..., in), A (r, in), B (out, r) -> (..., out), in x's dtype (or autocast's)."""
    z = F.linear(x, A.to(x.dtype))  # (..., r)
    return F.linear(z * scale, B.to(z.dtype))


def svd_factors(weight: Tensor, rank: int, scale: float, largest: bool) -> tuple[Tensor, Tensor]:
    """Factors of the part of W with its largest or smallest singular values, divided by the scale.

    Args:
        weight: W, (out, in).
        rank: r, how many singular values.
        scale: s; the product of the factors times s is that part of W.
        largest: the largest (PiSSA) or the smallest ones (MiLoRA).

    Returns:
        A (r, in) and B (out, r), float32.
    """
    u, sigma, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    keep = slice(None, rank) if largest else slice(-rank, None)
    root = (sigma[keep] / scale).sqrt()
    return root[:, None] * vh[keep], u[:, keep] * root


class LoRALayer(LinearAdapter):
    """The update s · B A of one linear map.

    Args:
        in_features: in.
        out_features: out.
        rank: r.
        scale: s.
        dropout: on the update's input.
        init: one of `INITS`; the SVD inits need `initialise_from`.
        device: where the parameters live.
    """

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float = 1.0,
        dropout: float = 0.0,
        init: str = "default",
        device: torch.device | None = None,
    ) -> None:
        super().__init__(in_features=in_features, out_features=out_features, scale=scale, dropout=dropout)
        self.init = init
        self.A = new_parameter(rank, in_features, device=device)  # (r, in)
        self.B = new_parameter(out_features, rank, device=device)  # (out, r)
        start = init in SVD_INITS
        self.register_buffer("A0", torch.zeros_like(self.A) if start else None)
        self.register_buffer("B0", torch.zeros_like(self.B) if start else None)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws A, zeroes B; see the file's head. The SVD inits are set by `initialise_from`."""
        if self.init == "gaussian":
            draw(self.A, nn.init.normal_, generator, std=1.0 / self.A.shape[0])
        else:
            draw(self.A, nn.init.kaiming_uniform_, generator, a=5**0.5)
        self.B.zero_()

    @torch.no_grad()
    def initialise_from(self, weight: Tensor) -> None:
        """Starts A, B and their saved copies from the singular values of the frozen weight (out, in)."""
        if weight.is_meta:
            return
        A, B = svd_factors(weight, self.A.shape[0], self.scale, largest=self.init == "pissa")
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
        return torch.cat([self.A, self.A - self.A0]), torch.cat([self.B - self.B0, self.B0], dim=1)

    @torch.no_grad()
    def low_rank_update(self) -> LowRankUpdate:
        """Of rank r, 2r for the SVD inits."""
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

    merging: ClassVar[Merging] = "exact"

    init: Literal["default", "gaussian", "pissa", "milora"] = "default"

    @property
    def export_rank(self) -> int:
        return 2 * self.rank if self.init in SVD_INITS else self.rank

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.init, "init", INITS)

    def build(self, context: LayerContext) -> LoRALayer:
        check_fits(context, self.rank)
        layer = LoRALayer(
            **context.layer_arguments(),
            rank=self.rank,
            scale=self.scale,
            dropout=self.dropout,
            init=self.init,
        )
        layer.reset_parameters(context.generator())
        if self.init in SVD_INITS:
            layer.initialise_from(context.weight)
        return layer
