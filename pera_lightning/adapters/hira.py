"""HiRA: a Hadamard product with the frozen weight, of high rank. Huang et al., ICLR 2025.

    ΔW = scale · R ⊙ (B A),  R = W by default, no alpha

`reference` chooses R: "weight" is W itself; "random" uniform in [0, 1) from `reference_seed`; "svd" is W cut to
`reference_rank` singular values; "smooth" the mean of the weights of the previous, this and the next layer of the same
role (at the ends, of those that exist). R is recomputed from W or the seed and never saved.

In float32 the layer makes one product with W + ΔW. In low precision, adding an update to W loses it, so the layer makes
two products, W x + ΔW x.

Shapes: in, out features; r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pera_lightning.adapters.adapted_layer import base_weight, is_linear, used_modules
from pera_lightning.adapters.base import LayerContext, LowRankAdapter
from pera_lightning.adapters.method import LinearMethod, Merging, Target
from pera_lightning.adapters.registry import register_method
from pera_lightning.errors import ConfigurationError
from pera_lightning.validation import check_choice, check_in_range, check_positive, check_positive_int

REFERENCES = ("weight", "random", "svd", "smooth")


def hira_update(reference: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """scale · R ⊙ (B A): R (out, in), A (r, in), B (out, r) -> (out, in), in the dtype of A."""
    return reference.to(A.dtype) * ((B * scale) @ A)  # the scale on B, which is smaller than the product


@torch.no_grad()
def own_reference(context: LayerContext, method: HiRA) -> Tensor | None:
    """R (out, in) in the base's dtype, where one layer is enough for it; None stands for its frozen weight."""
    weight, rank = context.weight, method.reference_rank
    if method.reference not in ("random", "svd"):
        return None
    if weight.is_meta:  # only the shape is known
        return torch.empty_like(weight)
    if method.reference == "random":
        # From its own seed and not the run's, since R is not saved.
        source = context.generator("reference", method.reference_seed or 0)
        values = torch.rand(weight.shape, generator=source, dtype=torch.float32, device="cpu")
        return values.to(device=weight.device, dtype=weight.dtype)
    context.check_rank(rank, "reference_rank")
    # The best approximation of W of that rank.
    u, sigma, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return ((u[:, :rank] * sigma[:rank]) @ vh[:rank]).to(weight.dtype)


def layers_around(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Path of each linear layer to the previous, this and the next layer of its role and shape, those that exist.

    Two layers have one role where their paths differ only in the numbers of repeated blocks: of containers whose
    children are all of one class.
    """
    modules = used_modules(model)  # an unused layer is nobody's neighbour
    roles: dict[tuple, list[str]] = {}  # role and shape to the paths that have them, in the model's order
    for path, module in modules.items():
        if is_linear(module):
            # The path with a star for the number of each repeated block.
            parts = path.split(".")
            containers = [model.get_submodule(".".join(parts[:k])) for k in range(len(parts))]
            repeated = [len({type(child) for child in container.children()}) == 1 for container in containers]
            role = tuple("*" if p.isdigit() and r else p for p, r in zip(parts, repeated, strict=True))
            roles.setdefault((role, *base_weight(module).shape), []).append(path)
    return {
        path: [modules[name] for name in paths[max(0, k - 1) : k + 2]]
        for paths in roles.values()
        for k, path in enumerate(paths)
    }


class HiRALayer(LowRankAdapter):
    """The update scale · R ⊙ (B A) of one linear map; `reference` None stands for the frozen weight."""

    uses_weight: ClassVar[bool] = True

    def __init__(self, context: LayerContext, method: HiRA) -> None:
        super().__init__(context, method)
        self.register_buffer("reference", own_reference(context, method), persistent=False)  # (out, in) or None

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
        reference_rank: number of singular values kept for ``reference="svd"``; must be given there.
        reference_seed: seed of ``reference="random"``.
    """

    layer: ClassVar = HiRALayer
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
        # Nothing is accepted that would be ignored.
        for name, owner in (("reference_rank", "svd"), ("reference_seed", "random")):
            if getattr(self, name) is not None and self.reference != owner:
                raise ConfigurationError(f"{name}={getattr(self, name)} acts with reference='{owner}' only")

    def apply(self, model: nn.Module, targets: Sequence[Target], trainable: Sequence[str], seed: int) -> list[str]:
        around = layers_around(model) if self.reference == "smooth" else {}  # before the layers change their class
        notes = super().apply(model, targets, trainable, seed)
        for target in targets if around else ():
            # The reference of each slice is the mean over the same slice of the layers around.
            weights = [base_weight(layer).detach() for layer in around[target.path]]
            for name, rows in target.slices.items():
                mean = sum(weight[rows].float() for weight in weights) / len(weights)
                target.module.adapters[name].reference = mean.to(target.module.weight.dtype)  # (rows, in)
        return notes
