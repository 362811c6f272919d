"""A calibrated merge for AuroRA: a linear map fitted to σ on the activations of calibration batches.

The paper merges σ(A), σ on the columns of A, which is another function than σ(A x) and can lose what was learnt. Here,
layer after layer in forward order, each seeing the linear maps of the layers before it,

    σ(z) ≈ M z + c,  z = A x over all tokens of the batches,

by least squares in float64, with a ridge on M that keeps it well-posed. The update s · B (M z + c) is s · (B M) A with
the constant s · B c. That goes into the base's bias; where the base has none, the fit is through the origin (c = 0),
since a bias that is created would be dropped by `from_pretrained` and refused by peft.

Not in the paper. Shapes: in, out features; r rank; n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_lightning.adapters.aurora import AuroRALayer
from pera_lightning.adapters.base import AdaptedLayer, LowRankUpdate
from pera_lightning.adapters.method import check_number
from pera_lightning.drift import Forward, call, device_of, evaluating, on_device
from pera_lightning.errors import NotMergeableError, listed

RIDGE = 1e-6


class _Enough(Exception):
    pass


class Moments:
    """Sums over tokens that a linear fit of σ(z) needs, in float64: n, Σz, Σσ, Σ z zᵀ, Σ z σᵀ.

    Args:
        rank: r.
        device: of z.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.n = 0
        self.z, self.s = (torch.zeros(rank, dtype=torch.float64, device=device) for _ in range(2))  # (r,)
        self.zz, self.zs = (torch.zeros(rank, rank, dtype=torch.float64, device=device) for _ in range(2))  # (r, r)

    def add(self, z: Tensor, s: Tensor) -> None:
        """Adds tokens: z and σ(z), both (n, r)."""
        z, s = z.double(), s.double()
        self.n += len(z)
        self.z += z.sum(0)
        self.s += s.sum(0)
        self.zz += z.T @ z
        self.zs += z.T @ s

    def fit(self, ridge: float, constant: bool) -> tuple[Tensor, Tensor]:
        """The least squares solution of σ(z) ≈ M z + c.

        Args:
            ridge: λ of the penalty λ · mean(z²) · n · ‖M‖², z centred where there is a constant.
            constant: whether c is fitted; otherwise it is 0.

        Returns:
            M (r, r) and c (r,), float64.
        """
        zz, zs = self.zz, self.zs
        if constant:
            zz, zs = zz - torch.outer(self.z, self.z) / self.n, zs - torch.outer(self.z, self.s) / self.n
        rank = len(zz)
        size = zz.trace() / rank
        if size <= 0:  # A is zero, and so is z
            M = torch.zeros_like(zz)
        else:
            M = torch.linalg.solve(zz + ridge * size * torch.eye(rank, dtype=zz.dtype, device=zz.device), zs).T
        c = (self.s - M @ self.z) / self.n if constant else torch.zeros_like(self.z)
        return M, c


def calibrate(
    model: nn.Module, batches: Sequence[Any], *, forward: Forward | None = None, ridge: float = RIDGE
) -> list[str]:
    """Fits a linear map to every AuroRA layer with dynamic inference and puts it in its place in eval mode.

    Layers that get the same input (q, k and v) are fitted in one pass; a pass ends after the layers it is for.

    Args:
        model: injected.
        batches: inputs of the model, without labels; a few hundred tokens a layer, better thousands.
        forward: see `pera_lightning.drift.Forward`.
        ridge: see `Moments.fit`.

    Returns:
        Notes, one line each.

    Raises:
        NotMergeableError: for a layer that no batch reaches.
        ConfigurationError: for a negative ridge.
    """
    check_number(ridge, "ridge", low=-1e-300, allowed="a number of at least 0")
    waiting = {layer: path for path, layer in model.named_modules() if _dynamic(layer)}
    with evaluating(model), torch.no_grad():
        groups, calls = _groups(model, list(waiting), batches, forward)
        unseen = [path for layer, path in waiting.items() if layer not in calls]
        if unseen:
            raise NotMergeableError(f"{len(unseen)} layers do not run for any batch: {listed(unseen, 3)}")
        for group in groups:
            moments = _collect(model, group, batches, forward, once=all(calls[layer] == 1 for layer in group))
            for (layer, block), sums in moments.items():
                adapter: AuroRALayer = layer.adapters[block]  # type: ignore[assignment]
                M, c = sums.fit(ridge, constant=layer.bias is not None)
                B = adapter.B.double()
                bias = None if layer.bias is None else (adapter.scale * (B @ c)).to(adapter.B.dtype)
                update = LowRankUpdate(adapter.A.detach().clone(), (B @ M).to(adapter.B.dtype), adapter.scale, bias)
                adapter.calibrate(update)
    return []


def _dynamic(layer: nn.Module) -> bool:
    return isinstance(layer, AdaptedLayer) and any(_fitted(adapter) for adapter in layer.adapters.values())


def _fitted(adapter: nn.Module) -> bool:
    return isinstance(adapter, AuroRALayer) and adapter.inference_mode == "dynamic"


def _groups(
    model: nn.Module, layers: list[AdaptedLayer], batches: Sequence[Any], forward: Forward | None
) -> tuple[list[list[AdaptedLayer]], dict[AdaptedLayer, int]]:
    """Layers in forward order, those that get one input tensor together; and how often each is called at most."""
    groups: list[list[AdaptedLayer]] = []
    most: dict[AdaptedLayer, int] = {}
    last: list[Tensor] = []

    def called(layer: nn.Module, args: tuple[Any, ...]) -> None:
        counts[layer] = counts.get(layer, 0) + 1
        if layer not in most and counts[layer] == 1:
            if last and last[0] is args[0]:
                groups[-1].append(layer)
            else:
                groups.append([layer])
        last[:] = [args[0]]

    for batch in batches:
        counts: dict[nn.Module, int] = {}
        hooks = [layer.register_forward_pre_hook(called) for layer in layers]
        try:
            _run(model, batch, forward)
        finally:
            _remove(hooks)
        most |= {layer: max(n, most.get(layer, 0)) for layer, n in counts.items()}  # type: ignore[misc]
        if len(most) == len(layers):
            break
    last.clear()
    return groups, most


def _collect(
    model: nn.Module, group: list[AdaptedLayer], batches: Sequence[Any], forward: Forward | None, once: bool
) -> dict[tuple[AdaptedLayer, str], Moments]:
    """The sums of a group's row blocks over all batches; ``once`` ends each pass after its last layer."""
    sums: dict[tuple[AdaptedLayer, str], Moments] = {}

    def called(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])  # (n, in)
        for block, adapter in layer.adapters.items():
            if _fitted(adapter):
                z = F.linear(x, adapter.A.to(x.dtype))  # (n, r)
                if (layer, block) not in sums:
                    sums[layer, block] = Moments(z.shape[-1], z.device)
                sums[layer, block].add(z, adapter.anl(z))
        left.discard(layer)
        if once and not left:
            raise _Enough

    for batch in batches:
        left = set(group)
        hooks = [layer.register_forward_pre_hook(called) for layer in group]
        try:
            _run(model, batch, forward)
        except _Enough:
            pass
        finally:
            _remove(hooks)
    return sums


def _run(model: nn.Module, batch: Any, forward: Forward | None) -> None:
    (forward or call)(model, on_device(batch, device_of(model)))


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
