"""Optimizer groups: adapters, heads and whatever else is trained, each with and without weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from pera_lightning.injection.inject import adapter_parameter_names, injection_of
from pera_lightning.injection.state import find_injected


def parameter_groups(model: nn.Module, *, lr: float, head_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of the trained parameters, named for the learning-rate monitor.

    Tensors of one dimension (biases, norms, PERA's h) get no weight decay.

    Args:
        model: module with an injected network, or without one (then everything trained is "base").
        lr: learning rate of adapters, and of base parameters that the method trains.
        head_lr: learning rate of the modules trained in full.
        weight_decay: weight decay of the other tensors.

    Returns:
        Non-empty groups: adapter, base, head, each perhaps with "_no_decay".
    """
    prefix, root = find_injected(model) or ("", model)
    mark = injection_of(root)
    heads = tuple(f"{prefix}{name}." for name in (mark.trained_modules if mark else ()))
    adapters = adapter_parameter_names(model)
    groups: dict[str, dict[str, Any]] = {}
    # Every trained parameter is in one group: by what it belongs to, and by whether it decays.
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "adapter" if name in adapters else "head" if name.startswith(heads) and heads else "base"
        decays = parameter.dim() > 1
        key = kind if decays else f"{kind}_no_decay"  # the name that the monitor of learning rates logs
        rate, decay = (head_lr if kind == "head" else lr), (weight_decay if decays else 0.0)
        group = groups.setdefault(key, {"name": key, "params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def with_own_rate(
    groups: Iterable[dict[str, Any]], parameters: Iterable[nn.Parameter], *, name: str, lr: float
) -> list[dict[str, Any]]:
    """Gives some of the parameters groups of their own, called "{name}_{group}", with their own `lr`.

    Each non-empty group comes before what was taken out of it; parameters that are in no group are not trained.
    """
    own = {id(parameter) for parameter in parameters}  # by identity: tensors have no truth value
    found = []
    for group in groups:
        inside = [parameter for parameter in group["params"] if id(parameter) in own]
        outside = [parameter for parameter in group["params"] if id(parameter) not in own]
        found += [{**group, "params": outside}] if outside else []
        found += [{**group, "params": inside, "name": f"{name}_{group['name']}", "lr": lr}] if inside else []
    return found
