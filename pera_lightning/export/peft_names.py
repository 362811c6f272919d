"""The names in a PEFT folder: its files, its tensors, and the layers and heads that its config names.

A target of a list is the end of a module's path, component by component; a target that is text is a regular expression
for the full path. A module is a head where its path, as text, ends with a name of `modules_to_save`; "classifier" takes
DistilBERT's `pre_classifier` too. These are peft's rules (0.21).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from pera_lightning.adapters.base import LowRankUpdate
from pera_lightning.merging.merge import adapted_layers

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every tensor's name


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path to module of all that a model has without its adapters; shared modules once for each path."""
    # Adapters and all within them; by identity, since a shared layer has several paths.
    inside = {id(module) for _, layer in adapted_layers(model) for module in layer.adapters.modules()}
    named = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in named if path and id(module) not in inside}


def shortest_targets(layers: Iterable[str], modules: Collection[str]) -> list[str] | str:
    """Names for `target_modules` that match these layers and no other of the modules, all given by path.

    Ends of paths, as short as they can be; a regular expression where ends cannot tell the layers apart.
    """
    layers = set(layers)
    found: set[str] = set()
    for path in sorted(layers):
        parts = path.split(".")
        ends = (".".join(parts[k:]) for k in range(len(parts) - 1, -1, -1))
        # The shortest end that no module has but these layers.
        name = next((end for end in ends if all(m in layers for m in modules if names(end, m))), None)
        if name is None:  # the full path is the end of another one
            return "|".join(re.escape(path) for path in sorted(layers))
        found.add(name)
    return sorted(found)


def names(target: str, path: str) -> bool:
    """Whether a target of a list names the module at `path`."""
    return path == target or path.endswith(f".{target}")


def heads(modules_to_save: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Paths of the modules that peft saves in full."""
    ends = tuple(modules_to_save)
    return [path for path in modules if path.endswith(ends)] if ends else []


def exact_patterns(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """A `rank_pattern` or `alpha_pattern`: the values of those layers that differ from the usual one.

    peft takes a key for a regular expression that matches the end of a path, so it is escaped and anchored.
    """
    return {f"^{re.escape(path)}": value for path, value in values.items() if value != usual}


def alpha_of(update: LowRankUpdate) -> float:
    """`lora_alpha` of an update: scale · rank, an integer where it is one."""
    alpha = update.scale * update.rank  # rounding must not turn 16 into 15.999999999999998
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha
