"""The fingerprint of a frozen base: shapes and hashes of sampled weights, to tell one base from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

SAMPLES = 64


def weight_hash(weight: Tensor) -> str:
    """``"OUTxIN:hash"`` of a tensor: its shape and a hash of 64 evenly spaced elements, rounded to bfloat16.

    The rounding makes a float32 and a bfloat16 copy of one base agree. On the meta device only the shape is told.
    """
    shape = "x".join(map(str, weight.shape))
    if weight.is_meta:
        return f"{shape}:"
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64, device="cpu").long()
    sample = flat[index.to(flat.device)].to(torch.bfloat16).cpu()
    return f"{shape}:{hashlib.sha256(sample.view(torch.int16).numpy().tobytes()).hexdigest()[:16]}"


def fingerprint(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Hashes of the adapted layers' frozen weights; without any, of all frozen matrices.

    Args:
        model: an injected model.
        layers: paths of the adapted layers.

    Returns:
        Path to ``"shape:hash"``; empty where nothing is frozen.
    """
    paths = list(layers)
    if paths:
        return {path: weight_hash(model.get_submodule(path).weight) for path in paths}
    return {n: weight_hash(p) for n, p in model.named_parameters() if not p.requires_grad and p.dim() > 1}


def differing(saved: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """Paths whose hashes are known on both sides and differ; a path that one side lacks differs too."""
    paths = [*saved, *(path for path in present if path not in saved)]
    return [path for path in paths if not _agree(saved.get(path, ""), present.get(path, ""))]


def _agree(one: str, other: str) -> bool:
    (shape, _, digest), (other_shape, _, other_digest) = one.partition(":"), other.partition(":")
    return shape == other_shape and (digest == other_digest or not digest or not other_digest)
