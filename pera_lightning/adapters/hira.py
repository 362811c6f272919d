"""HiRA: a Hadamard product with the frozen weight, of high rank. Huang et al., ICLR 2025.

    ΔW = scale · R ⊙ (B A),  R = W by default, no alpha

`reference` chooses R: "weight" is W itself; "random" uniform in [0, 1) from `reference_seed`; "svd" is W cut to
`reference_rank` singular values; "smooth" the mean of the weights of the previous, this and the next layer of the same
role (of those there are). R is recomputed from W or the seed and never saved.

In float32 the layer makes one product with W + ΔW. In low precision, adding an update to W loses it, so the layer makes
two products, W x + ΔW x.

Shapes: in, out features; r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pera_lightning.adapters.base import LinearAdapter, draw, new_parameter
from pera_lightning.adapters.method import LayerContext, LinearMethod, Merging, check_fits
from pera_lightning.adapters.registry import register_method
from pera_lightning.errors import ConfigurationError
from pera_lightning.validation import check_choice, check_in_range, check_positive, check_positive_int

REFERENCES = ("weight", "random", "svd", "smooth")


def hira_update(reference: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """scale · R ⊙ (B A): R (out, in), A (r, in), B (out, r) -> (out, in), in the dtype of A."""
    return reference.to(A.dtype) * ((B * scale) @ A)


@torch.no_grad()
def reference_matrix(context: LayerContext, reference: str, rank: int, seed: int) -> Tensor | None:
    """R as HiRA keeps it, in the base's dtype; None where it is the frozen weight itself.

    Args:
        context: the layer, with its neighbours for "smooth".
        reference: one of `REFERENCES`.
        rank: number of singular values for "svd".
        seed: of "random".

    Returns:
        (out, in) or None.
    """
    weight = context.weight
    if reference == "weight":
        return None
    if weight.is_meta:
        return torch.empty_like(weight)
    if reference == "random":
        source = context.generator("reference", seed)
        values = torch.rand(weight.shape, generator=source, dtype=torch.float32, device="cpu")
        return values.to(device=weight.device, dtype=weight.dtype)
    if reference == "svd":
        check_fits(context, rank, "reference_rank")
        u, sigma, vh = torch.linalg.svd(weight.float(), full_matrices=False)
        return ((u[:, :rank] * sigma[:rank]) @ vh[:rank]).to(weight.dtype)
    around = [w.float() for w in (context.previous, weight, context.next) if w is not None]
    return (sum(around) / len(around)).to(weight.dtype)


class HiRALayer(LinearAdapter):
    """The update scale · R ⊙ (B A) of one linear map.

    Args:
        in_features: in.
        out_features: out.
        rank: r.
        scale: factor of the update.
        dropout: on the update's input.
        reference: R, (out, in), or None for the frozen weight itself.
        device: where the parameters live.
    """

    uses_weight: ClassVar[bool] = True

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float = 1.0,
        dropout: float = 0.0,
        reference: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(in_features=in_features, out_features=out_features, scale=scale, dropout=dropout)
        self.A = new_parameter(rank, in_features, device=device)  # (r, in)
        self.B = new_parameter(out_features, rank, device=device)  # (out, r)
        self.register_buffer("reference", reference, persistent=False)  # (out, in) or None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A kaiming-uniform (a = √5), B zero."""
        draw(self.A, nn.init.kaiming_uniform_, generator, a=5**0.5)
        self.B.zero_()

    def effective_update(self, weight: Tensor) -> Tensor:
        """W (out, in) -> ΔW (out, in), in the parameters' dtype."""
        return hira_update(weight if self.reference is None else self.reference, self.A, self.B, self.scale)


@register_method
@dataclass(frozen=True, kw_only=True)
class HiRA(LinearMethod):
    """Hadamard high-rank adaptation (Huang et al. 2025).

    Args:
        rank: r.
        scale: factor of the update; the paper has none.
        dropout: probability on the update's input, in training.
        reference: what the low-rank product is multiplied with, see the file's head.
        reference_rank: singular values kept for ``reference="svd"``; must be given there.
        reference_seed: of ``reference="random"``.
    """

    merging: ClassVar[Merging] = "exact"

    rank: int = 8
    scale: float = 1.0
    dropout: float = 0.0
    reference: Literal["weight", "random", "svd", "smooth"] = "weight"
    reference_rank: int | None = None
    reference_seed: int | None = None

    def __post_init__(self) -> None:
        check_positive_int(self.rank, "rank")
        check_positive(self.scale, "scale")
        check_in_range(self.dropout, "dropout", ge=0, lt=1)
        check_choice(self.reference, "reference", REFERENCES)
        if self.reference == "svd":
            check_positive_int(self.reference_rank, "reference_rank")
        for name, owner in (("reference_rank", "svd"), ("reference_seed", "random")):
            if getattr(self, name) is not None and self.reference != owner:
                raise ConfigurationError(f"{name}={getattr(self, name)} acts with reference='{owner}' only")

    def build(self, context: LayerContext) -> HiRALayer:
        check_fits(context, self.rank)
        layer = HiRALayer(
            **context.layer_arguments(),
            rank=self.rank,
            scale=self.scale,
            dropout=self.dropout,
            reference=reference_matrix(context, self.reference, self.reference_rank or 0, self.reference_seed or 0),
        )
        layer.reset_parameters(context.generator())
        return layer
