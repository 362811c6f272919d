"""The adapter contract: what the adapter of one linear map is made from, what it owns, and what it computes.

A `LinearAdapter` owns the trained tensors of one frozen linear map y = W x + b. The layer that carries it
(`pera_lightning.adapters.adapted_layer`) makes the one base product and adds what its adapters give; an adapter never
repeats the product.

Shapes: ``...`` any batch dimensions; in, out the features of the linear map, or of one slice of a fused projection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_lightning.errors import ConfigurationError, NotMergeableError

ALL = "all"  # the slice of a layer that is adapted as one
MAX_SEED = 2**63 - 1  # of torch.Generator.manual_seed
COMPILED = "_orig_mod"  # name, in the wrapper of `torch.compile`, of the module inside of it


def plain_name(name: str) -> str:
    """The name of a module or tensor without those that `torch.compile` puts into it."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """What a method may need to build the adapter of one linear map, or of one slice of a fused projection.

    Attributes:
        path: the module's path in the model, for messages and seeds.
        slice: name of the slice, ``"all"`` for a plain layer.
        weight: the frozen weight of the slice, (out, in); never written to.
        bias: the frozen bias of the slice, (out,), or None.
        seed: the run's seed; `generator` mixes path and slice into it.
    """

    path: str
    weight: Tensor
    slice: str = ALL
    bias: Tensor | None = None
    seed: int = 0

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def generator(self, purpose: str = "init", seed: int | None = None) -> torch.Generator:
        """A CPU generator that depends on seed, path, slice and purpose alone, not on the order of injection.

        Args:
            purpose: a word that separates several uses within one layer.
            seed: takes the place of the run's.
        """
        # Hashed into one number, so that every layer has a stream of its own.
        text = f"{self.seed if seed is None else seed}|{plain_name(self.path)}|{self.slice}|{purpose}"
        value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") & MAX_SEED
        return torch.Generator(device="cpu").manual_seed(value)

    def check_rank(self, rank: int, name: str = "rank") -> None:
        """Raises `ConfigurationError` where the hyperparameter `name` exceeds the smaller side of the layer."""
        most = min(self.out_features, self.in_features)  # a product of two factors has no higher rank
        if rank > most:
            raise ConfigurationError(f"{name}={rank} is larger than {self} allows: at most {most}")

    def __str__(self) -> str:
        rows = "" if self.slice == ALL else f"[{self.slice}]"
        return f"{self.path}{rows} ({self.out_features} x {self.in_features})"


@dataclass(frozen=True)
class LowRankUpdate:
    """An update of a linear map that is a LoRA, to be merged or exported: ΔW = scale · B A, Δb = bias.

    Attributes:
        A: (R, in).
        B: (out, R).
        scale: factor of the product.
        bias: what is added to the bias, (out,), or None.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def delta_weight(self) -> Tensor:
        """ΔW, (out, in)."""
        return self.scale * (self.B @ self.A)


class LinearAdapter(nn.Module):
    """Base of every per-linear adapter. A subclass is made from (context, method) and serves one of two forms.

    Either `delta_output` (LoRA, PERA, AuroRA), with `low_rank_update` where the update is one, or, with
    ``uses_weight = True``, `effective_update` (HiRA). Its parameters are float32 whatever the base's dtype, since a
    small update vanishes in bfloat16; products run in the activation's dtype. At initialisation the update is zero.

    Args:
        in_features: in.
        out_features: out.
        scale: s, the factor of the update.
        dropout: probability with which an input of the update is zeroed, in training only. The flag that counts is
            the adapter's own, so a base left in eval mode does not switch it off.
    """

    uses_weight: ClassVar[bool] = False

    def __init__(self, *, in_features: int, out_features: int, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scale = scale
        self.dropout = nn.Dropout(dropout)  # a module of its own, so that the model's train() and eval() reach it

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial values, on the CPU so that they are the same on every device."""
        raise NotImplementedError(f"{type(self).__name__} defines no reset_parameters")

    def delta_output(self, x: Tensor) -> Tensor:
        """The update of the output, in the dtype of the products: x (..., in), after dropout -> (..., out)."""
        raise NotImplementedError(f"{type(self).__name__} defines no delta_output")

    def effective_update(self, weight: Tensor) -> Tensor:
        """The update of the weight, differentiable, in the parameters' dtype: W (out, in) -> ΔW (out, in)."""
        raise NotImplementedError(f"{type(self).__name__} defines no effective_update")

    def low_rank_update(self) -> LowRankUpdate:
        """The update as a LoRA, exact in eval mode; `NotMergeableError` where it is not of this form."""
        raise NotMergeableError(f"the update of {type(self).__name__} is not a product of low rank")

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        """The matrix ΔW with W x + ΔW x (+ `delta_bias`) = the adapted layer, in eval mode.

        W (out, in) -> ΔW (out, in), at least float32; `NotMergeableError` where no such matrix exists.
        """
        if self.uses_weight:  # in float32, whatever the base is stored in
            return self.effective_update(weight.to(torch.promote_types(weight.dtype, torch.float32)))
        return self.low_rank_update().delta_weight()

    def delta_bias(self) -> Tensor | None:
        """What the update adds whatever x is, (out,); None for nothing, as in all methods whose update is linear."""
        return None

    @property
    def dropout_acts(self) -> bool:
        return self.dropout.training and self.dropout.p > 0.0

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The update as a product of its own: x (..., in), weight (out, in) -> (..., out)."""
        x = self.dropout(x)
        if self.uses_weight:  # a second full-size product, which low precision needs
            return F.linear(x, self.effective_update(weight).to(x.dtype))  # (..., out)
        return self.delta_output(x)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, scale={self.scale:g}"


class LowRankAdapter(LinearAdapter):
    """An adapter with low-rank factors, A (r, in) and B (out, r).

    Args:
        context: the layer.
        method: its hyperparameters, among them `rank`, `scale` and `dropout`.
    """

    def __init__(self, context: LayerContext, method: Any) -> None:
        context.check_rank(method.rank)
        size = {"in_features": context.in_features, "out_features": context.out_features}
        super().__init__(**size, scale=method.scale, dropout=method.dropout)
        self.method = method  # its other hyperparameters are read where they act
        self.A = new_parameter(method.rank, context.in_features, device=context.weight.device)  # (r, in)
        self.B = new_parameter(context.out_features, method.rank, device=context.weight.device)  # (out, r)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A kaiming-uniform (a = √5), B zero."""
        draw(self.A, nn.init.kaiming_uniform_, generator, a=5**0.5)
        self.B.zero_()


def new_parameter(*shape: int, device: torch.device | None = None) -> nn.Parameter:
    """An uninitialised float32 parameter."""
    return nn.Parameter(torch.empty(*shape, device=device, dtype=torch.float32))


@torch.no_grad()
def draw(parameter: Tensor, init: Callable, generator: torch.Generator | None, **options: float) -> None:
    """Fills `parameter` by an initialiser of `torch.nn.init`, drawn on the CPU; does nothing on the meta device."""
    if parameter.is_meta:
        return
    # On the CPU and in float32 whatever torch.device context or default dtype is on: the same values everywhere.
    values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    init(values, generator=generator, **options)
    parameter.copy_(values)
