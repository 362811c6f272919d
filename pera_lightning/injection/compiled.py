"""Names without the wrapper of `torch.compile`, so that files of compiled and plain networks fit each other.

``net = torch.compile(net)`` wraps a module, and everything inside has ``_orig_mod.`` in its name. In memory names are
what the model has; files have them without, and what is read gets the model's names before it is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pera_lightning.adapters.base import COMPILED, plain_name

_BY_NAME, _NAMES = ("layers", "fingerprint", "rest_of_base"), ("trained_modules", "unfrozen")  # of a description


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` made of another."""
    return [*module._modules] == [COMPILED]


def plain_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict by plain names."""
    return {plain_name(name): value for name, value in state.items()}


def plain_description(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What `Injection.spec` gave, by plain names; old files of compiled networks have the others."""
    spec = _renamed(spec, plain_name)
    return {**spec, "root": plain_name(spec["root"])} if isinstance(spec.get("root"), str) else spec


def own_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict by the names that `model` has."""
    return {own_name(model, name): value for name, value in state.items()}


def own_description(root: nn.Module, spec: Mapping[str, Any]) -> dict[str, Any]:
    """A description by the names that the injected part `root`, or what is to be it, has."""
    return _renamed(plain_description(spec), lambda name: own_name(root, name), lambda name: own_name(root, name, True))


def own_name(model: nn.Module, name: str, innermost: bool = False) -> str:
    """The name in `model` of a module or tensor; what `model` does not have keeps the end of its name.

    Args:
        model: any module.
        name: plain or not.
        innermost: whether a compiled module's name is that of the module inside of it.
    """
    module: nn.Module | None = model
    parts = []
    for part in plain_name(name).split("."):
        while module is not None and is_wrapper(module):
            parts.append(COMPILED)
            module = module._modules[COMPILED]
        parts.append(part)
        module = None if module is None else module._modules.get(part)
    while innermost and module is not None and is_wrapper(module):
        parts.append(COMPILED)
        module = module._modules[COMPILED]
    return ".".join(parts)


def _renamed(
    spec: Mapping[str, Any], rename: Callable[[str], str], rename_layer: Callable[[str], str] | None = None
) -> dict[str, Any]:
    """A description with other names; what is not as `Injection.spec` gives it stays, to be refused as it is."""
    spec, layer = dict(spec), rename_layer or rename
    for field in _BY_NAME:
        if isinstance(spec.get(field), Mapping):
            spec[field] = {layer(name) if isinstance(name, str) else name: v for name, v in spec[field].items()}
    for field in _NAMES:
        if isinstance(spec.get(field), (list, tuple)):
            spec[field] = [rename(name) if isinstance(name, str) else name for name in spec[field]]
    return spec
