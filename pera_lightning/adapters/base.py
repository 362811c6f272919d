"""The adapter contract and the adapted layer.

`LinearAdapter` owns the trained tensors of one frozen linear map y = W x + b. `AdaptedLinear` is that map: the same
module object with another class, so that parameters, hooks, ties and state-dict keys stay. It makes the one base
product and adds what its adapters give; an adapter never repeats the product.

Shapes: ``...`` any batch dimensions, in / out the features of the linear map (or of one row block of it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_lightning.errors import ConfigurationError, NotMergeableError, UnsupportedTarget

WHOLE = "all"
_EXACT = (torch.float32, torch.float64)


@dataclass(frozen=True)
class LowRankUpdate:
    """An update of a linear map that is a LoRA, to be merged or exported: ΔW = scale · B A, Δb = bias.

    Attributes:
        A: (R, in).
        B: (out, R).
        scale: factor of the product.
        bias: what is added to the bias, (out,); None where it stays.
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
    """Base of every per-linear adapter. A subclass serves one of two forms.

    Either `delta_output` (LoRA, PERA, AuroRA), with `low_rank_update` where it is one, or, with ``uses_weight = True``,
    `effective_update` (HiRA). Its parameters are float32 whatever the base's dtype, since a small update vanishes in
    bfloat16; products run in the activation's dtype. At initialisation the update is zero.

    Args:
        in_features: in.
        out_features: out, the rows of the block that the adapter serves.
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
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial values, on the CPU so that they are the same on every device."""
        raise NotImplementedError(f"{type(self).__name__} defines no reset_parameters")

    def delta_output(self, x: Tensor) -> Tensor:
        """The update of the output.

        Args:
            x: input after dropout, (..., in).

        Returns:
            (..., out), in the dtype of the products.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no delta_output")

    def effective_update(self, weight: Tensor) -> Tensor:
        """The update of the weight, differentiable in the adapter's parameters.

        Args:
            weight: the frozen weight, (out, in).

        Returns:
            (out, in), in the parameters' dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no effective_update")

    def low_rank_update(self) -> LowRankUpdate:
        """The update as a LoRA, exact in eval mode.

        Raises:
            NotMergeableError: where it is none.
        """
        raise NotMergeableError(f"the update of {type(self).__name__} is no product of low rank")

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        """The matrix ΔW with W x + ΔW x (+ `delta_bias`) = the adapted layer, in eval mode.

        Args:
            weight: the frozen weight, (out, in).

        Returns:
            (out, in), at least float32.

        Raises:
            NotMergeableError: where no such matrix exists.
        """
        if self.uses_weight:
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
        if self.uses_weight:
            return F.linear(x, self.effective_update(weight).to(x.dtype))
        return self.delta_output(x)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, scale={self.scale:g}"


def new_parameter(*shape: int, device: torch.device | None = None) -> nn.Parameter:
    """An uninitialised float32 parameter."""
    return nn.Parameter(torch.empty(*shape, device=device, dtype=torch.float32))


@torch.no_grad()
def draw(parameter: Tensor, init: object, generator: torch.Generator | None, **options: float) -> None:
    """Fills `parameter` by an initialiser of `torch.nn.init`, drawn on the CPU; does nothing on the meta device.

    Args:
        parameter: what is filled, any shape.
        init: a function of `torch.nn.init` that takes a generator.
        generator: source of randomness, None for torch's own.
        options: further arguments of `init`.
    """
    if parameter.is_meta:
        return
    values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")  # whatever torch.device context is on
    init(values, generator=generator, **options)  # type: ignore[operator]
    parameter.copy_(values)


class AdaptedLayer(nn.Module):
    """What `AdaptedLinear` and `AdaptedConv1D` share: row blocks, each with an adapter of its own."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    adapters: nn.ModuleDict
    blocks: dict[str, tuple[int, int]]
    plain_class: type[nn.Module]
    merged: str | None = None  # how the updates got into the weight; set by `pera_lightning.merging.merge`

    def base_weight(self) -> Tensor:
        """The frozen weight as (out, in), a view."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out): the frozen map plus the adapters' updates of their rows.

        Raises:
            ConfigurationError: where merged adapters are trained, which would change nothing.
        """
        weight = self.base_weight()
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise ConfigurationError("the adapters are merged, and training would not change them: call unmerge")
            return F.linear(x, weight, self.bias)
        # Adding an update to a bfloat16 weight would round it away, and dropout acts on the update's input only:
        # in both cases the update needs a product of its own.
        exact = weight.dtype in _EXACT and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
        merged: dict[str, Tensor] = {}
        apart: list[str] = []
        for name, adapter in self.adapters.items():
            if adapter.uses_weight and exact and not adapter.dropout_acts:
                merged[name] = adapter.effective_update(weight[slice(*self.blocks[name])])
            else:
                apart.append(name)
        if merged:
            weight = _add_rows(weight, merged, self.blocks, dim=0)
        y = F.linear(x, weight, self.bias)
        if not apart:
            return y
        frozen = self.base_weight()
        updates = {name: self.adapters[name](x, frozen[slice(*self.blocks[name])]) for name in apart}
        return _add_rows(y, updates, self.blocks, dim=-1)


def _add_rows(base: Tensor, updates: dict[str, Tensor], blocks: dict[str, tuple[int, int]], dim: int) -> Tensor:
    """Adds each update to its rows of `base` along `dim`; the other rows are copied bit for bit."""
    if len(blocks) == 1 and WHOLE in updates:
        return base + updates[WHOLE].to(base.dtype)
    ordered = sorted(updates, key=lambda name: blocks[name])
    sizes, names, end = [], [], 0
    for name in ordered:
        first, last = blocks[name]
        for size, owner in ((first - end, None), (last - first, name)):
            if size:
                sizes.append(size)
                names.append(owner)
        end = last
    if end < base.shape[dim]:
        sizes.append(base.shape[dim] - end)
        names.append(None)
    # One split and one cat: the backward pass of slices would make a full-size tensor of zeros for each of them.
    parts = base.split(sizes, dim)
    return torch.cat([p if n is None else p + updates[n].to(p.dtype) for p, n in zip(parts, names, strict=True)], dim)


class AdaptedLinear(AdaptedLayer, nn.Linear):
    """An `nn.Linear` with adapters; made by `adapt_layer`, never by its constructor.

    A plain layer has the block ``"all"``; a fused projection has named row blocks with one independent adapter each
    (`qkv.adapters.q.A`).
    """


class AdaptedConv1D(AdaptedLayer):
    """transformers' `Conv1D` (GPT-2) with adapters: a linear layer whose weight is stored as (in, out)."""

    def base_weight(self) -> Tensor:
        return self.weight.T

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[0]}, out_features={self.weight.shape[1]}"


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is exactly transformers' `Conv1D`, told by name so that transformers need not be there."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def is_linear(module: nn.Module) -> bool:
    """Whether `module` can be adapted: exactly `nn.Linear`, or transformers' `Conv1D`."""
    return type(module) is nn.Linear or is_conv1d(module)


def base_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer, adapted or not, as (out, in), a view."""
    if isinstance(module, AdaptedLayer):
        return module.base_weight()
    return module.weight.T if is_conv1d(module) else module.weight


def adapt_layer(module: nn.Module, adapters: dict[str, LinearAdapter], blocks: dict[str, tuple[int, int]]) -> None:
    """Turns a linear layer into an adapted one, in place: the same object, weight and bias, another class.

    Args:
        module: `nn.Linear` or transformers' `Conv1D`.
        adapters: row block name to adapter.
        blocks: row block name to (first row, one past the last row).

    Raises:
        UnsupportedTarget: for any other class.
        ConfigurationError: for block names that a `ModuleDict` cannot hold, or blocks that overlap.
    """
    if not is_linear(module):
        raise UnsupportedTarget(f"{type(module).__name__} is neither nn.Linear nor transformers' Conv1D")
    check_blocks(blocks, base_weight(module).shape[0])
    adapted = nn.ModuleDict(adapters)
    module.plain_class = type(module)
    module.__class__ = AdaptedConv1D if is_conv1d(module) else AdaptedLinear
    module.blocks = dict(blocks)
    module.adapters = adapted


def release_layer(layer: AdaptedLayer) -> None:
    """Undoes `adapt_layer`: the plain class again, without adapters; weight and bias stay what they are."""
    layer.__class__ = layer.plain_class
    for name in ("adapters", "blocks", "plain_class", "merged"):
        if name in vars(layer) or name in layer._modules:
            delattr(layer, name)


def check_blocks(blocks: dict[str, tuple[int, int]], rows: int, where: str = "the layer") -> None:
    """Raises `ConfigurationError` for row blocks with impossible names or ranges."""
    end, reserved = 0, nn.ModuleDict()  # an instance, since attributes such as `training` are no class attributes
    for name, (first, last) in sorted(blocks.items(), key=lambda item: item[1]):
        if not name.isidentifier() or hasattr(reserved, name) or (name == WHOLE and (first, last) != (0, rows)):
            raise ConfigurationError(f"row block {name!r} of {where}: this name cannot be used; take another one")
        if not end <= first < last <= rows:
            raise ConfigurationError(
                f"row block {name!r} of {where} is rows {first} to {last}: blocks must not overlap and end by {rows}"
            )
        end = last
