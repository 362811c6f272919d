"""PERA: polynomial expansion of the low-rank factors (arXiv 2604.11841).

    ΔW = s · B̂ Â,  s = alpha / rank

Â stacks the rows a_i of A and then h_ij (a_i ⊙ a_j); B̂ stacks the columns b_i of B and then b_i ⊙ b_j, pairs i ≤ j in
the order of `torch.triu_indices(r, r)`. `terms` keeps all pairs ("full"), i = j ("square"), i < j ("cross") or none
("linear", which is LoRA, gradient for gradient). Pairs left out have no coefficient, no storage and no cost.

Initial values: h zero; A kaiming-uniform and B zero (the paper's section 3.3.3 and its code), or with
`init="gaussian_b"` A zero and B ~ N(0, init_std²) (its section 3.2; the value of init_std is not in the paper, 0.02 is
ours). The released code multiplies full r x r products and uses half of them; here each pair is formed once. The rank
of ΔW is at most 2r + r(r-1)/2, and R = r + pairs rows make it exactly a LoRA of rank R.

Shapes: in, out features; r rank; P number of pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_lightning.adapters.base import LayerContext, LowRankAdapter, LowRankUpdate, draw, new_parameter
from pera_lightning.adapters.lora import lora_output
from pera_lightning.adapters.method import LowRankMethod, Merging
from pera_lightning.adapters.registry import register_method
from pera_lightning.validation import check_choice, check_positive

TERMS = ("full", "square", "cross", "linear")
INITS = ("default", "gaussian_b")


def number_of_pairs(rank: int, terms: str) -> int:
    """P, the number of products that `terms` keeps at this rank."""
    cross = rank * (rank - 1) // 2  # pairs i < j
    return {"full": cross + rank, "square": rank, "cross": cross, "linear": 0}[terms]


def pairs(rank: int, terms: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The index pairs (i, j), i ≤ j, that `terms` keeps: two tensors of shape (P,)."""
    if terms == "square":  # i = j only
        both = torch.arange(rank, device=device)
        return both, both
    # Row by row above the diagonal; saved coefficients h mean what they mean by this order.
    i, j = torch.triu_indices(rank, rank, offset=1 if terms == "cross" else 0, device=device).unbind()
    return i, j


def expand(A: Tensor, B: Tensor, h: Tensor | None, terms: str) -> tuple[Tensor, Tensor]:
    """The expanded factors of PERA: A (r, in), B (out, r) and h (P,) -> Â (r + P, in) and B̂ (out, r + P).

    `h` holds the coefficients of the products that `terms` keeps; None for ``terms="linear"``.
    """
    if h is None:
        return A, B
    i, j = pairs(A.shape[0], terms, A.device)
    # Each pair of rows of A, multiplied elementwise and weighted by its coefficient. F.embedding gathers rows as
    # index_select does; its backward pass is faster, and deterministic on CUDA.
    products_a = h[:, None] * F.embedding(i, A) * F.embedding(j, A)  # (P, in)
    # The same pairs of columns of B, as rows of its transpose, since rows are gathered faster than columns.
    columns = B.T.contiguous()  # (r, out)
    products_b = F.embedding(i, columns) * F.embedding(j, columns)  # (P, out)
    return torch.cat([A, products_a]), torch.cat([columns, products_b]).T


class PERALayer(LowRankAdapter):
    """The update s · B̂ Â of one linear map."""

    def __init__(self, context: LayerContext, method: PERA) -> None:
        super().__init__(context, method)
        count = number_of_pairs(method.rank, method.terms)
        h = new_parameter(count, device=context.weight.device) if count else None
        self.register_parameter("h", h)  # (P,)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws A or B, zeroes the other and h; see the file's head."""
        if self.method.init == "gaussian_b":
            self.A.zero_()  # the update is zero with either factor
            draw(self.B, nn.init.normal_, generator, std=self.method.init_std)
        else:
            super().reset_parameters(generator)
        if self.h is not None:
            self.h.zero_()  # so that training starts as LoRA's

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Â (r + P, in) and B̂ (out, r + P), without the scale."""
        return expand(self.A, self.B, self.h, self.method.terms)

    def delta_output(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return lora_output(x, *self.expanded(), self.scale)

    @torch.no_grad()
    def low_rank_update(self) -> LowRankUpdate:
        """A LoRA of rank r + P: r(r + 3)/2 for all terms."""
        return LowRankUpdate(*self.expanded(), scale=self.scale)  # A (r + P, in), B (out, r + P)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, terms={self.method.terms}"


@register_method
@dataclass(frozen=True, kw_only=True)
class PERA(LowRankMethod):
    """Polynomial expansion of the low-rank factors (arXiv 2604.11841).

    Args:
        rank: r.
        alpha: the scale is alpha / rank.
        dropout: probability on the update's input, in training.
        terms: which products of the factors are added, see the file's head.
        init: initial values, see the file's head.
        init_std: standard deviation of B for ``init="gaussian_b"``; not in the paper, ours.
    """

    layer: ClassVar = PERALayer
    merging: ClassVar[Merging] = "exact"

    terms: Literal["full", "square", "cross", "linear"] = "full"
    init: Literal["default", "gaussian_b"] = "default"
    init_std: float = 0.02

    @property
    def export_rank(self) -> int:
        return self.rank + number_of_pairs(self.rank, self.terms)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.terms, "terms", TERMS)
        check_choice(self.init, "init", INITS)
        check_positive(self.init_std, "init_std")
