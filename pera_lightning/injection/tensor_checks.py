"""Whether tensors out of a file fit a model: their names, kinds, shapes, types and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pera_lightning.adapters.adapted_layer import base_weight
from pera_lightning.adapters.base import LayerContext
from pera_lightning.adapters.method import LinearMethod, Method
from pera_lightning.errors import CheckpointError, PeraError, listed
from pera_lightning.injection.targets import Fused, resolve

_EXACT = (torch.float32, torch.float64)  # what the tensors of adapters are kept in
_FLOATS = (*_EXACT, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensors(given: Mapping[str, Any], present: Mapping[str, Any], required: Iterable[str], source: str) -> None:
    """Raises `CheckpointError` for tensors that are missing, unexpected or unlike the model's.

    Args:
        given: what is loaded, by name.
        present: what the model has.
        required: names that must be given.
        source: where they come from, for the message.
    """
    # All names first: a shape says little where half of the tensors are another model's.
    missing = [name for name in required if name not in given]
    unexpected = [str(name) for name in given if name not in present]
    if missing or unexpected:
        parts = [f"{len(missing)} missing: {listed(missing, 3)}"] if missing else []
        parts += [f"{len(unexpected)} unexpected: {listed(unexpected, 3)}"] if unexpected else []
        raise CheckpointError(f"{source} does not fit this model: {'; '.join(parts)}")
    pairs = [(name, given[name], present[name]) for name in present if name in given]
    pairs = [pair for pair in pairs if isinstance(pair[2], Tensor)]  # else a module's own extra state
    for check in (_other_shape, _other_type, _not_finite):  # each for all tensors: shapes say most
        for name, value, own in pairs:
            if wrong := check(name, value, own):
                raise CheckpointError(f"{source}: {name} {wrong}")


def _other_shape(name: str, value: Any, own: Tensor) -> str:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        return f"is a {type(value).__name__}, not a tensor of plain values"
    if value.shape == own.shape:
        return ""
    # A head has as many rows as the data have classes.
    hint = "" if ".adapters." in name else "; does the data have another number of classes?"
    return f"is {tuple(value.shape)}, the model's is {tuple(own.shape)}{hint}"


def _other_type(name: str, value: Tensor, own: Tensor) -> str:
    # Heads and buffers follow the base's precision, and the base may be a copy in another one.
    floats = _EXACT if ".adapters." in name else _FLOATS
    kinds = [kind for kind in (floats, _INTEGERS) if value.dtype in kind]
    if value.dtype == own.dtype or (kinds and own.dtype in (_FLOATS if kinds[0] is floats else _INTEGERS)):
        return ""
    return f"is {value.dtype}, the model's is {own.dtype}"


def _not_finite(name: str, value: Tensor, own: Tensor) -> str:
    if not value.is_floating_point() or bool(torch.isfinite(value).all()):
        return ""
    # A mask may be infinite where the model's own is.
    if ".adapters." not in name and type(own) is Tensor and not own.is_meta and torch.equal(value.cpu(), own.cpu()):
        return ""
    return "has values that are not finite"


def planned_tensors(model: nn.Module, method: Method, targets: Sequence[str], fused: Fused) -> dict[str, Tensor]:
    """What the adapters of an injection would hold, by name, on the meta device: without memory for their values.

    Only of methods that build each layer's adapter by itself, and can do so without memory: of others nothing is known
    before they are applied.
    """
    if not isinstance(method, LinearMethod):
        return {}
    planned = {}
    for target in resolve(model, targets, fused):
        module = target.module
        weight, bias = base_weight(module).detach().to("meta"), module.bias
        bias = None if bias is None else bias.detach().to("meta")
        for name, rows in target.slices.items():
            own = {"weight": weight[rows], "bias": None if bias is None else bias[rows]}
            try:
                with torch.device("meta"):
                    adapter = method.build(LayerContext(path=target.path, slice=name, **own))
            except PeraError:
                raise
            except Exception:  # another package's method that needs values
                return {}
            planned |= {f"{target.path}.adapters.{name}.{n}": v for n, v in adapter.state_dict().items()}
    return planned
