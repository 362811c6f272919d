"""A calibrated merge for AuroRA: a linear map fitted to σ on the inputs of calibration batches.

The paper merges σ(A), σ on the columns of A, which is another function than σ(A x) and can lose what was learnt. Here,
layer after layer in forward order, each seeing the linear maps of the layers before it,

    σ(A x) ≈ N x + c,    N, c = argmin Σ_t |σ(A x_t) - N x_t - c|² + λ |N - M A|²,    λ = ridge · tr(G) / in

in float64, over all tokens x_t of the batches; G is their (centred) second moment. M is the least squares fit of σ(z)
on z = A x, for which few tokens suffice; the more there are, the more the fit on x itself says. The update s · B σ(A x)
becomes s · B N x, a LoRA of the same rank with N in the place of A, and the constant s · B c. That goes into the base's
bias; where the base has none, the fit is through the origin (c = 0, nothing centred), since a bias that is created
would be dropped by `from_pretrained` and refused by peft.

Not in the paper. Shapes: in, out features; r rank; n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.adapters.aurora import AuroRALayer, acting_layers
from pera_lightning.adapters.base import LowRankUpdate
from pera_lightning.errors import NotMergeableError, listed
from pera_lightning.merging.activation_capture import inputs_in_order
from pera_lightning.merging.merge_error import Forward, call, device_of, evaluating, on_device, unpadded
from pera_lightning.validation import check_in_range

RIDGE = 1e-3
_TINY = 1e-6


class Moments:
    """Second moments of the tokens x with themselves and with σ(A x), summed in float64: all that a linear fit needs.

    Args:
        adapters: adapters of layers that get the same input.
    """

    def __init__(self, adapters: Sequence[AuroRALayer]) -> None:
        features, device = adapters[0].in_features, adapters[0].A.device
        self.device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        self.adapters = list(adapters)
        self.n = 0
        self.x, self.xx = self._zeros(features), self._zeros(features, features)  # (in,), (in, in)
        self.s = [self._zeros(len(a.A)) for a in adapters]  # (r,)
        self.sx = [self._zeros(len(a.A), features) for a in adapters]  # (r, in)
        self.ss = [self._zeros(()) for _ in adapters]

    def _zeros(self, *shape: Any) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def add(self, x: Tensor) -> None:
        """Adds tokens, (n, in)."""
        exact = x.to(self.device).double()  # (n, in)
        self.n += len(x)
        self.x += exact.sum(0)
        self.xx += exact.T @ exact
        for k, adapter in enumerate(self.adapters):
            sigma = adapter.anl(F.linear(x, adapter.A.to(x.dtype))).to(self.device).double()  # as in the layer, (n, r)
            self.s[k] += sigma.sum(0)
            self.sx[k] += sigma.T @ exact  # (r, in)
            self.ss[k] += sigma.square().sum()

    def fit(self, index: int, ridge: float, constant: bool) -> tuple[Tensor, Tensor, float]:
        """Fits the linear map of one adapter, by the formula at the top of the file.

        Args:
            index: number of the adapter.
            ridge: pull towards M A, as a share of an input feature's mean square.
            constant: whether c is fitted; otherwise it is 0.

        Returns:
            N (r, in) and c (r,), float64; and the share of σ's variance (its mean square, without a constant) that
            they leave unexplained.
        """
        # Second moments of x with itself and with σ, centred if a constant is fitted.
        mean_x, mean_s = self.x / self.n * constant, self.s[index] / self.n * constant
        raw = self.xx / self.n
        G = raw - torch.outer(mean_x, mean_x)  # (in, in)
        C = self.sx[index] / self.n - torch.outer(mean_s, mean_x)  # (r, in)
        # M is σ's least squares fit on z = A x, and M A what the ridge pulls the fit on x towards.
        A = self.adapters[index].A.to(G)
        M = torch.cholesky_solve(A @ C.T, _factor(A @ G @ A.T, _TINY, A @ raw @ A.T)).T  # (r, r)
        N = M @ A  # (r, in)
        # What M A leaves of σ is fitted on x itself, the less the larger the ridge.
        N = N + torch.cholesky_solve((C - N @ G).T, _factor(G, max(ridge, _TINY), raw)).T
        # Mean of |σ - N x - c|², expanded in the moments.
        variance = self.ss[index] / self.n - mean_s.square().sum()
        left = variance - 2 * (C * N).sum() + ((N @ G) * N).sum()
        return N, mean_s - N @ mean_x, (left / variance).clamp(min=0).item() if variance > 0 else 0.0


def _factor(G: Tensor, ridge: float, raw: Tensor) -> Tensor:
    """Cholesky factor of G + ridge · tr(G) / k; a G of zeros counts as the unit matrix."""
    level = torch.maximum(G.trace(), 1e-4 * raw.trace()) / len(G)  # centring leaves rounding
    level = torch.where(level > 0, level, torch.ones_like(level))
    return torch.linalg.cholesky(G + ridge * level * torch.eye(len(G), dtype=G.dtype, device=G.device))


def calibrate(
    model: nn.Module, batches: Sequence[Any], *, forward: Forward | None = None, ridge: float = RIDGE
) -> list[str]:
    """Fits a linear map to every AuroRA layer with dynamic inference, which takes its place in eval mode; gives notes.

    The outputs of what is fitted are kept for all batches, see `activation_capture`, and have to fit into memory; so do
    the second moments of a layer's inputs, in x in x 8 bytes. Padding is left out where a batch is a mapping with an
    ``attention_mask``.

    Args:
        model: injected.
        batches: inputs of the model, without labels; better more tokens than a layer has input features.
        forward: see `pera_lightning.merging.merge_error.Forward`.
        ridge: see `Moments.fit`.
    """
    check_in_range(ridge, "ridge", ge=0)

    def run(batch: Any) -> None:  # for its side effect, the inputs of layers
        (forward or call)(model, on_device(batch, device_of(model)))

    fitted = {adapter for adapter in acting_layers(model) if adapter.inference_mode == "dynamic"}
    layers = ((path, layer) for path, layer in model.named_modules() if isinstance(layer, AdaptedLayer))
    paths = {layer: path for path, layer in layers if not fitted.isdisjoint(layer.adapters.values())}
    unexplained: dict[str, float] = {}
    counts: list[tuple[int, int]] = []  # tokens and input features of each group
    with evaluating(model), torch.no_grad():
        for group, inputs in inputs_in_order(model, list(paths), batches, run):
            # Layers with the same input share its moments.
            owner = {adapter: layer for layer in group for adapter in layer.adapters.values() if adapter in fitted}
            moments = Moments(list(owner))
            for x, number in inputs:
                moments.add(unpadded(x, batches[number]))
            if not moments.n or not torch.isfinite(moments.xx).all():
                what = "NaN or infinite inputs" if moments.n else "padding only, no token"
                raise NotMergeableError(f"the calibration batches give {paths[group[0]]} {what}")
            # From here on the layers are linear, in what later layers see too.
            fits = [moments.fit(k, ridge, layer.bias is not None) for k, layer in enumerate(owner.values())]
            for (adapter, layer), (N, c, left) in zip(owner.items(), fits, strict=True):
                constant = None if layer.bias is None else (adapter.scale * adapter.B.to(c) @ c).to(adapter.B)
                adapter.calibrate(LowRankUpdate(N.to(adapter.A), adapter.B.detach().clone(), adapter.scale, constant))
                unexplained[paths[layer]] = max(left, unexplained.get(paths[layer], 0.0))
            counts.append((moments.n, len(moments.x)))
    if unseen := [path for path in paths.values() if path not in unexplained]:
        raise NotMergeableError(f"{len(unseen)} layers do not run for any batch: {listed(unseen, 3)}")
    # How far the notes may be trusted depends on the group with the fewest tokens.
    tokens, features = min(counts)
    if tokens < 2 * features:  # too few to say how good the fit is
        return [f"fitted to {tokens} tokens, few for {features} input features: give more batches"]
    mean = sum(unexplained.values()) / len(unexplained)
    worst = max(unexplained, key=unexplained.__getitem__)
    return [
        f"fitted to {tokens} tokens; of the variance of σ {mean:.1%} is not linear on average over the layers, at most "
        f"{unexplained[worst]:.1%} ({worst})"
    ]
