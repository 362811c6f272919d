"""The fingerprint of a frozen base: shapes and hashes of sampled weights, to tell one base from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

SAMPLES = 64  # elements of each tensor


def weight_hash(weight: Tensor, bias: Tensor | None = None) -> str:
    """``"OUTxIN:hash"`` of a weight and its bias: the shape, and a hash of 64 evenly spaced elements of each.

    A second hash may follow, ``"OUTxIN:hash,hash"``, for float16 copies. On the meta device only the shape is told.
    """
    shape = "x".join(map(str, weight.shape))
    if weight.is_meta:
        return f"{shape}:"
    sample = torch.cat([_sample(t) for t in (weight, bias) if t is not None])
    # Rounded to bfloat16, so that a float32 and a bfloat16 copy of one base agree. By way of float16 the rounding may
    # give other bits: then there are two hashes, and a float16 copy agrees with the second.
    return f"{shape}:{','.join(dict.fromkeys(_digest(x) for x in (sample, sample.half())))}"


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)  # a view, but for transposed weights
    # Positions in float64 on the CPU: they must be the same on every device, also beyond 2**24 elements.
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64, device="cpu").long()
    return flat[index.to(flat.device)].cpu()


def _digest(sample: Tensor) -> str:
    bits = sample.to(torch.bfloat16).view(torch.int16).numpy()  # numpy has no bfloat16
    return hashlib.sha256(bits.tobytes()).hexdigest()[:16]


def fingerprint(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Hashes of the frozen weights and biases of the adapted layers; without layers, of all frozen matrices.

    Args:
        model: an injected model.
        layers: paths of the adapted layers.

    Returns:
        Path to ``"shape:hash"``; empty where nothing is frozen.
    """
    # A probe adapts no layer, and still belongs to one base.
    paths = list(layers) or [n for n, p in model.named_parameters() if not p.requires_grad and p.dim() > 1]
    return {path: fingerprint_of(model, path) for path in paths}


def fingerprint_of(model: nn.Module, path: str) -> str:
    """The hash of one layer or parameter by its path; the empty string where it does not exist."""
    owner, _, name = path.rpartition(".")  # of a layer, or of a parameter
    try:
        found = getattr(model.get_submodule(owner), name)
    except AttributeError:
        return ""
    return weight_hash(found) if isinstance(found, Tensor) else weight_hash(found.weight, found.bias)


def differing(saved: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """Paths whose hashes are known on both sides and differ; a path that one side lacks differs too."""
    paths = [*saved, *(path for path in present if path not in saved)]
    return [path for path in paths if not _agree(saved.get(path, ""), present.get(path, ""))]


def _agree(one: str, other: str) -> bool:
    (shape, _, hashes), (other_shape, _, other_hashes) = one.partition(":"), other.partition(":")
    # On the meta device the hash is not known; otherwise one in common is enough.
    known = hashes and other_hashes
    return shape == other_shape and (not known or bool({*hashes.split(",")} & {*other_hashes.split(",")}))
