"""The fingerprint of a frozen base: shapes and hashes of sampled values of every tensor, to tell one base from another.

A value is ``"OUTxIN:hash"``, the shape and a hash of 64 evenly spaced elements. A second hash may follow,
``"OUTxIN:hash,hash"``, for float16 copies; of a quantised tensor its type comes between, ``"OUTxIN:int8:hash"``.
Without a hash (on the meta device) only the shape is known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

SAMPLES = 64  # elements of each tensor


def weight_hash(weight: Tensor, bias: Tensor | None = None) -> str:
    """The shape of a weight, and a hash of samples of it and of its bias."""
    shape = "x".join(map(str, weight.shape))
    if weight.is_meta or hasattr(weight, "full_tensor"):  # a shard's samples are not those of the tensor
        return f"{shape}:"
    samples = [_sample(t) for t in (weight, bias) if t is not None]
    if not (weight.is_floating_point() or weight.is_complex()):
        return f"{shape}:{str(weight.dtype).removeprefix('torch.')}:{_digest(samples[0])}"
    # Rounded to bfloat16, so that a float32 and a bfloat16 copy of one base agree. By way of float16 the rounding may
    # give other bits: then there are two hashes, and a float16 copy agrees with the second.
    sample = torch.cat(samples)
    rounded = (x.to(torch.bfloat16).view(torch.int16) for x in (sample, sample.half()))
    return f"{shape}:{','.join(dict.fromkeys(map(_digest, rounded)))}"


def _sample(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:  # float8 can be neither indexed nor joined
        tensor = tensor.to(torch.bfloat16)
    if not (tensor.dim() and tensor.numel()):
        return tensor.reshape(-1).cpu()
    return tensor[tuple(index.to(tensor.device) for index in _positions(tensor.shape))].cpu()


@lru_cache(maxsize=64)  # the layers of a network have few shapes
def _positions(shape: torch.Size) -> tuple[Tensor, ...]:
    """Indices of evenly spaced elements, by dimension: flattening would copy a transposed weight."""
    count = shape.numel()
    # In float64 on the CPU: they must be the same on every device, also beyond 2**24 elements.
    with torch.device("cpu"):
        index = torch.linspace(0, count - 1, min(SAMPLES, count), dtype=torch.float64).long()
        return torch.unravel_index(index, shape)


def _digest(sample: Tensor) -> str:
    return hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16]


def fingerprint(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Hashes of the frozen weights and biases of the adapted layers; without layers, of all frozen matrices.

    Args:
        model: an injected model.
        layers: paths of the adapted layers.

    Returns:
        Path to hash; empty where nothing is frozen.
    """
    # A probe adapts no layer, and still belongs to one base.
    paths = list(layers) or [n for n, p in model.named_parameters() if not p.requires_grad and p.dim() > 1]
    return {path: fingerprint_of(model, path) for path in paths}


def rest_of_base(
    model: nn.Module, known: Collection[str], trained: Collection[str], trained_modules: Iterable[str]
) -> dict[str, str]:
    """Hashes of all other frozen parameters and persistent buffers of the base.

    Args:
        model: an injected model.
        known: paths that `fingerprint` has.
        trained: names of all trained parameters, adapters included.
        trained_modules: paths of the modules trained in full, whose buffers change.

    Returns:
        Name to hash; empty where nothing is frozen.
    """
    hashed = {*known, *(f"{path}.{name}" for path in known for name in ("weight", "bias"))}
    own = model.named_parameters()
    found = {n: p for n, p in own if n not in hashed and n not in trained and not p.requires_grad}
    if not (found or known):
        return {}
    heads, persistent = tuple(f"{module}." for module in trained_modules), model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent and ".adapters." not in name and not name.startswith(heads):
            found[name] = buffer
    return {name: weight_hash(tensor) for name, tensor in found.items()}


def fingerprint_of(model: nn.Module, path: str) -> str:
    """The hash of one layer, parameter or buffer by its path; the empty string where it does not exist."""
    owner, _, name = path.rpartition(".")
    try:
        found = getattr(model.get_submodule(owner), name)
    except AttributeError:
        return ""
    return weight_hash(found) if isinstance(found, Tensor) else weight_hash(found.weight, found.bias)


def differing(saved: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """Paths whose hashes are known on both sides and differ; a path that one side lacks differs too."""
    paths = [*saved, *(path for path in present if path not in saved)]
    return [path for path in paths if _agree(saved.get(path, ""), present.get(path, "")) is False]


def not_comparable(saved: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """Paths of which one side knows no values, or has them quantised and the other has not."""
    return [path for path in saved if path in present and _agree(saved[path], present[path]) is None]


def may_be_halves(one: str, other: str) -> bool:
    """Whether two hashes that differ may be of a bfloat16 and a float16 copy of one tensor.

    Each has lost other bits of it. Both have a single hash, since rounding them once more changes nothing; a float32
    tensor mostly has two.
    """
    (shape, *hashes), (other_shape, *other_hashes) = one.split(":"), other.split(":")
    return shape == other_shape and len(hashes) == len(other_hashes) == 1 and "," not in one + other


def _agree(one: str, other: str) -> bool | None:
    """Whether two hashes are of one tensor; None where that cannot be told."""
    if not (one and other):  # one side lacks it
        return False
    (shape, *kind, hashes), (other_shape, *other_kind, other_hashes) = one.split(":"), other.split(":")
    if kind != other_kind:  # a quantised tensor, packed into another shape, and its source
        return None
    if shape != other_shape:
        return False
    if not (hashes and other_hashes):  # the meta device has no values
        return None
    return bool({*hashes.split(",")} & {*other_hashes.split(",")})  # one in common is enough
