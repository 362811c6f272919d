"""AuroRA: an adaptive nonlinear layer between the low-rank factors. Dong et al., NeurIPS 2025 (arXiv 2505.18738).

    Δy = s · B σ(A x),  s = alpha / rank
    σ(z) = act(H act(z)) + w Σ_i b(z_i)

b(z_i) is the vector of B-spline basis functions at z_i on a uniform grid, summed over the r components of z before w
maps it back to r. `fixed=False` leaves out the first term and `learnable=False` the second, the paper's ablations.

Two modes, for training and for inference: "dynamic" is B σ(A x); "static" is B σ(A) x, σ on each column of A, a matrix
that can be merged. The paper trains dynamic and merges static, which can lose what was learnt; inference here is
dynamic unless asked otherwise. `pera_lightning.merging.calibration` fits a linear map to the dynamic update instead,
and has it in the mode "calibrated".

Initial values: A and H xavier-normal, B zero, w uniform ±0.1 (A, H, w and the grid, 5 intervals on [-1, 1] of order 3,
are not in the paper; they are those of its public re-implementations). σ runs in the parameters' precision, since
splines in bfloat16 are coarse and σ costs r numbers a token.

Shapes: in, out features; r rank; G grid intervals; S spline order; K = G + S basis functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.adapters.base import LayerContext, LowRankAdapter, LowRankUpdate, draw, new_parameter
from pera_lightning.adapters.lora import lora_output
from pera_lightning.adapters.method import LowRankMethod, Merging
from pera_lightning.adapters.registry import register_method
from pera_lightning.errors import ConfigurationError, NotMergeableError
from pera_lightning.validation import check_choice, check_positive_int

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
}
MODES = ("dynamic", "static")


def uniform_knots(grid_size: int, spline_order: int, grid_range: tuple[float, float]) -> Tensor:
    """Knots of a uniform B-spline, the grid extended by `spline_order` intervals on both sides: (G + 2S + 1,)."""
    low, high = grid_range
    step = (high - low) / grid_size
    # In float64, and rounded once at the end.
    index = torch.arange(-spline_order, grid_size + spline_order + 1, dtype=torch.float64, device="cpu")
    return low + step * index


def bspline_basis(z: Tensor, knots: Tensor, order: int) -> Tensor:
    """B-spline basis functions of degree S, `order`, by the Cox-de Boor recursion.

    z (...), increasing knots (K + S + 1,) -> (..., K); zero where z lies outside the knots.
    """
    z = z.unsqueeze(-1)
    # Order 0: which interval a point is in.
    basis = ((z >= knots[:-1]) & (z < knots[1:])).to(z.dtype)  # (..., K + S)
    # Each higher order blends two neighbouring functions of the order below, by the distance to their outer knots.
    for k in range(1, order + 1):
        left = (z - knots[: -k - 1]) / (knots[k:-1] - knots[: -k - 1])
        right = (knots[k + 1 :] - z) / (knots[k + 1 :] - knots[1:-k])
        basis = left * basis[..., :-1] + right * basis[..., 1:]
    return basis


class AdaptiveNonlinearLayer(nn.Module):
    """σ: (..., r) -> (..., r)."""

    def __init__(self, method: AuroRA, device: torch.device | None = None) -> None:
        super().__init__()
        self.activation, self.spline_order = method.activation, method.spline_order
        r, K = method.rank, method.grid_size + method.spline_order
        projection = new_parameter(r, r, device=device) if method.fixed else None
        spline = new_parameter(r, K, device=device) if method.learnable else None
        if spline is not None and spline.is_meta:  # only the shape is asked for, of whatever size
            knots = torch.empty(K + method.spline_order + 1, device="meta")
        else:
            knots = uniform_knots(method.grid_size, method.spline_order, method.grid_range)
            knots = knots.to(device=device, dtype=torch.float32)
        self.register_parameter("self_projection", projection)  # H (r, r)
        self.register_parameter("spline_weight", spline)  # w (r, K)
        self.register_buffer("grid", knots if method.learnable else None)  # (G + 2S + 1,)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """H xavier-normal, w uniform(-0.1, 0.1)."""
        if self.self_projection is not None:
            draw(self.self_projection, nn.init.xavier_normal_, generator)
        if self.spline_weight is not None:
            draw(self.spline_weight, nn.init.uniform_, generator, a=-0.1, b=0.1)

    def forward(self, z: Tensor) -> Tensor:
        """z (..., r) -> σ(z) (..., r), in z's dtype, computed in the wider of z's and the parameters'."""
        act = ACTIVATIONS[self.activation]
        out: Tensor | float = 0.0
        # Splines are coarse in bfloat16, and r numbers a token cost little.
        kept = self.self_projection if self.spline_weight is None else self.spline_weight
        exact = z.to(torch.promote_types(z.dtype, kept.dtype))
        # Autocast, which does not know the meta device, would run the products in low precision.
        with nullcontext() if z.is_meta else torch.autocast(z.device.type, enabled=False):
            if self.self_projection is not None:  # the fixed activation
                out = act(F.linear(act(exact), self.self_projection.to(exact.dtype)))
            if self.spline_weight is not None:  # the learnable spline, summed over the r components of z
                summed = bspline_basis(exact, self.grid.to(exact.dtype), self.spline_order).sum(-2)  # (..., K)
                out = out + F.linear(summed, self.spline_weight.to(exact.dtype))
        return out.to(z.dtype)


class AuroRALayer(LowRankAdapter):
    """The update s · B σ(A x) (dynamic) or s · B σ(A) x (static) of one linear map.

    `train_mode` acts while the adapter is in training mode and `inference_mode` otherwise; `calibrate` sets that to
    "calibrated".
    """

    def __init__(self, context: LayerContext, method: AuroRA) -> None:
        super().__init__(context, method)
        self.train_mode, self.inference_mode = method.train_mode, method.inference_mode
        self.anl = AdaptiveNonlinearLayer(method, context.weight.device)
        # Set by `calibrate` and never saved.
        for name in ("calibrated_A", "calibrated_B", "calibrated_bias"):
            self.register_buffer(name, None, persistent=False)

    def calibrate(self, update: LowRankUpdate | None) -> None:
        """Takes a linear update in the place of the dynamic one, in eval mode; None goes back to the dynamic one."""
        self.calibrated_A = None if update is None else update.A
        self.calibrated_B = None if update is None else update.scale / self.scale * update.B  # by this layer's scale
        self.calibrated_bias = None if update is None else update.bias
        self.inference_mode = "dynamic" if update is None else "calibrated"

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A xavier-normal, B zero, σ as its own layer says."""
        draw(self.A, nn.init.xavier_normal_, generator)  # not in the paper
        self.B.zero_()
        self.anl.reset_parameters(generator)

    def static_factor(self) -> Tensor:
        """σ on each column of A: (r, in), which takes A's place in the static mode."""
        return self.anl(self.A.T).T

    def delta_output(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        mode = self.train_mode if self.training else self.inference_mode
        if mode == "calibrated":
            y = lora_output(x, self.calibrated_A, self.calibrated_B, self.scale)
            return y if self.calibrated_bias is None else y + self.calibrated_bias.to(y.dtype)
        if mode == "static":
            return lora_output(x, self.static_factor(), self.B, self.scale)
        z = self.anl(F.linear(x, self.A.to(x.dtype)))  # dynamic: (..., r)
        return F.linear(z * self.scale, self.B.to(z.dtype))  # (..., out)

    @torch.no_grad()
    def low_rank_update(self) -> LowRankUpdate:
        """A LoRA of rank r, where inference is static or calibrated.

        Raises:
            NotMergeableError: where inference is dynamic, a nonlinear function of x.
        """
        if self.inference_mode == "calibrated":
            return LowRankUpdate(self.calibrated_A, self.calibrated_B, self.scale, self.calibrated_bias)
        if self.inference_mode == "static":
            return LowRankUpdate(self.static_factor(), self.B, self.scale)
        raise NotMergeableError(
            "AuroRA in dynamic mode is not a linear map: take the mode 'calibrated' (a fit on batches), or 'static' "
            "(what the paper merges; it can lose what was learnt)"
        )

    def delta_bias(self) -> Tensor | None:
        """The constant of a calibration, (out,)."""
        return self.calibrated_bias if self.inference_mode == "calibrated" else None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, train_mode={self.train_mode}, inference_mode={self.inference_mode}"


def acting_layers(model: nn.Module) -> list[AuroRALayer]:
    """The AuroRA layers of `model` that are not merged: what is in the weight stays."""
    layers = [layer for layer in model.modules() if isinstance(layer, AdaptedLayer) and not layer.merged]
    return [a for layer in layers for a in layer.adapters.values() if isinstance(a, AuroRALayer)]


@contextmanager
def static_inference(model: nn.Module) -> Iterator[int]:
    """Makes inference of every AuroRA layer that is not merged static within this context; yields how many were not."""
    changed = {layer: layer.inference_mode for layer in acting_layers(model) if layer.inference_mode != "static"}
    for layer in changed:  # dynamic ones, and calibrated ones that are not merged
        layer.inference_mode = "static"
    try:
        yield len(changed)
    finally:
        for layer, mode in changed.items():
            layer.inference_mode = mode


@register_method
@dataclass(frozen=True, kw_only=True)
class AuroRA(LowRankMethod):
    """An adaptive nonlinear layer between the low-rank factors (Dong et al. 2025).

    Args:
        rank: r.
        alpha: the scale is alpha / rank.
        dropout: probability on the update's input, in training.
        activation: act, the fixed activation.
        train_mode: "dynamic" as in the paper, or "static", which merges exactly.
        inference_mode: "dynamic", the paper's AuroRA-D, or "static", the paper's AuroRA.
        grid_size: G, intervals of the spline's grid; not in the paper, from its public re-implementations.
        spline_order: S, degree of the spline; of the same origin.
        grid_range: ends of the grid; of the same origin.
        fixed: keeps act(H act(z)).
        learnable: keeps the spline.
    """

    layer: ClassVar = AuroRALayer
    runtime_fields: ClassVar[frozenset[str]] = frozenset({"dropout", "train_mode", "inference_mode"})
    merging: ClassVar[Merging] = "approximate"

    rank: int = 2
    alpha: float = 4.0
    dropout: float = 0.0
    activation: Literal["tanh", "leaky_relu", "sigmoid", "relu"] = "tanh"
    train_mode: Literal["dynamic", "static"] = "dynamic"
    inference_mode: Literal["dynamic", "static"] = "dynamic"
    grid_size: int = 5
    spline_order: int = 3
    grid_range: tuple[float, float] = (-1.0, 1.0)
    fixed: bool = True
    learnable: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.activation, "activation", tuple(ACTIVATIONS))
        check_choice(self.train_mode, "train_mode", MODES)
        check_choice(self.inference_mode, "inference_mode", MODES)
        check_positive_int(self.grid_size, "grid_size")
        check_positive_int(self.spline_order, "spline_order")
        # YAML and JSON give a list.
        ends = tuple(self.grid_range) if isinstance(self.grid_range, (list, tuple)) else ()
        if len(ends) != 2 or not all(isinstance(v, (int, float)) for v in ends) or not 0 < ends[1] - ends[0] < math.inf:
            raise ConfigurationError(f"grid_range={self.grid_range!r}: two increasing numbers are needed")
        object.__setattr__(self, "grid_range", (float(ends[0]), float(ends[1])))  # hashable
        if not (self.fixed or self.learnable):
            raise ConfigurationError("fixed=False and learnable=False leave no nonlinear layer; keep one of them")
