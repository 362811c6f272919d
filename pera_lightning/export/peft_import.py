"""Import from PEFT: a folder with a LoRA becomes this package's `LoRA`, one with a HiRA its `HiRA`. Does without peft.

A folder is loaded completely or refused: a setting that is not known here, a tensor with no place, and a layer that the
config names and the file lacks are errors.

peft's LoRA is lora_alpha / r (or, rank-stabilised, lora_alpha / √r) · B A, with ranks and alphas that can differ by
layer. Here all layers have one: smaller ones get zero rows, which stay zero in training, and other scales go into B.

Shapes: in, out features of a layer; r its rank.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pera_lightning.adapters.adapted_layer import base_weight, is_linear
from pera_lightning.adapters.base import LowRankUpdate
from pera_lightning.adapters.hira import HiRA
from pera_lightning.adapters.lora import LoRA
from pera_lightning.adapters.method import Method
from pera_lightning.errors import CheckpointError, closest, listed
from pera_lightning.export.low_rank import padded
from pera_lightning.export.peft_folder import NOTHING, Kind, checked_kind, read_config, read_tensors, split_factors
from pera_lightning.export.peft_names import WEIGHTS_FILE, alpha_of, heads, names, plain_modules, shortest_targets
from pera_lightning.injection.inject import inject
from pera_lightning.injection.state import check_tensors, find_injected


def load_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """Adapts a plain model in place by what a PEFT folder holds; it can be trained on, saved, merged and exported.

    As after `inject`, adapters are in training mode, so dropout acts until ``model.eval()``; heads are trainable.

    Args:
        model: the base, plain.
        folder: what peft's `save_pretrained`, or `export_peft`, wrote: LoRA or HiRA, in safetensors.

    Returns:
        `model`; it is untouched where the folder does not fit.

    Raises:
        CheckpointError: where the folder is missing, damaged, of another kind, or does not fit the model.
        ConfigurationError: where a rank is larger than a layer.
    """
    # The folder is read, and compared with the model, before that is touched.
    folder = Path(folder)
    config = read_config(folder)
    kind = checked_kind(config, folder)
    if find_injected(model) is not None:
        raise CheckpointError(f"{folder} cannot be loaded: this model is adapted already; build it anew")
    layers, rest = split_factors(read_tensors(folder), kind, folder)
    modules = plain_modules(model)
    _check_layers(layers, kind, config, model, folder)
    # Besides the layers it holds all tensors of the heads and nothing else.
    given = config.get("modules_to_save") or []
    saved, state = heads(given, modules), model.state_dict()
    if given and not saved:
        lacks = f"{type(model).__name__} has none of that name: load the base with the class that it was trained in"
        raise CheckpointError(f"{folder} has the heads {listed(given)}, and {lacks}")
    wanted = {name: state[name] for name in state if name.startswith(tuple(f"{path}." for path in saved))}
    check_tensors(rest, wanted, wanted, str(folder / WEIGHTS_FILE))
    _check_ties(rest, model, folder)
    # Then the model is adapted in the same places, and gets the values.
    updates, method = _as_method(layers, config, kind)
    targets = shortest_targets(layers, modules)
    targets = targets if isinstance(targets, list) else [f"re:{targets}"]
    inject(model, method, targets, [f"re:{re.escape(path)}" for path in saved])
    with torch.no_grad():
        for path, update in updates.items():
            adapter = model.get_submodule(f"{path}.adapters.all")
            adapter.A.copy_(update.A)  # type: ignore[union-attr, operator]
            adapter.B.copy_(update.B)  # type: ignore[union-attr, operator]
        for name, value in rest.items():
            state[name].copy_(value)  # the model's own tensors, whose names injection does not change
    return model


def _check_layers(
    layers: Mapping[str, tuple[Tensor, Tensor]], kind: Kind, config: dict[str, Any], model: nn.Module, folder: Path
) -> None:
    modules = plain_modules(model)
    # Each adapted layer has to be a linear layer of the model, in one place.
    linear = {path: module for path, module in modules.items() if is_linear(module)}
    if absent := [path for path in layers if path not in linear]:
        has = f"{type(model).__name__} does not have as linear layers of its own{closest(absent[0], linear)}"
        raise CheckpointError(f"{folder} adapts {listed(absent, 3)}, which {has}")
    places = Counter(id(module) for module in modules.values())
    if shared := [path for path in layers if places[id(linear[path])] > 1]:
        raise CheckpointError(f"{listed(shared, 3)} is used in several places, of which peft adapts one: not supported")
    # And each that the config names has to be in the file.
    if missing := [path for path in linear if path not in layers and _targeted(path, config)]:
        damage = "is not complete, or for another base: its config targets"
        raise CheckpointError(f"{folder / WEIGHTS_FILE} {damage} {listed(missing, 3)}, for which it has no tensors")
    for path, (A, B) in layers.items():
        out_features, in_features = base_weight(linear[path]).shape
        # The scale depends on the config's rank. Of HiRA, which has no scale, peft (0.21) ignores the pattern.
        rank = _by_pattern(path, config.get("rank_pattern"), config["r"]) if kind.scaled else len(A)
        given, expected = (tuple(A.shape), tuple(B.shape)), ((rank, in_features), (out_features, rank))
        if given != expected:
            sizes = f"{given[0]} and {given[1]}, expected {expected[0]} and {expected[1]} (rank {rank})"
            raise CheckpointError(f"{folder} does not fit this model: A and B of {path} are {sizes}")


def _targeted(path: str, config: Mapping[str, Any]) -> bool:
    """Whether peft's config surely targets the layer at `path`; not told for layer numbers and 'all-linear'."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if not targets or targets == "all-linear" or config.get("layers_to_transform") not in NOTHING:
        return False
    if excluded and _named(excluded, path):
        return False
    # peft never adapts what is within a head.
    saved = config.get("modules_to_save") or []
    return _named(targets, path) and not any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in saved)


def _named(expression: str | list[str], path: str) -> bool:
    if isinstance(expression, str):
        return re.fullmatch(expression, path) is not None
    return any(names(target, path) for target in expression)


def _by_pattern(path: str, pattern: Mapping[str, Any] | None, usual: Any) -> Any:
    """The value of a layer by a `rank_pattern` or `alpha_pattern`, whose keys are expressions for the end of a path."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return usual


def _check_ties(rest: Mapping[str, Tensor], model: nn.Module, folder: Path) -> None:
    """Raises `CheckpointError` where loading a head would change other weights too: peft copies heads, which unties."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for tied in groups.values():
        loaded = [name for name in tied if name in rest]
        if loaded and (len(loaded) < len(tied) or any(not torch.equal(rest[loaded[0]], rest[n]) for n in loaded)):
            ties = f"in this model {' and '.join(tied)} are one tensor: untie them first (tie_word_embeddings=False)"
            raise CheckpointError(f"{folder} has its own {loaded[0]}, and {ties}")


def _as_method(
    layers: Mapping[str, tuple[Tensor, Tensor]], config: Mapping[str, Any], kind: Kind
) -> tuple[dict[str, LowRankUpdate], Method]:
    """The factors with one rank and one scale, and the method of this package that has them."""
    updates = {}
    for path, (A, B) in layers.items():
        scale = 1.0
        if kind.scaled:
            alpha = _by_pattern(path, config.get("alpha_pattern"), config.get("lora_alpha", 8))
            scale = alpha / (len(A) ** 0.5 if config.get("use_rslora") else len(A))
        updates[path] = LowRankUpdate(A.float(), B.float(), scale)
    # Layers of this package have one rank and one scale.
    even = padded(updates)
    if len({(update.rank, update.scale) for update in updates.values()}) > 1:
        warnings.warn(
            "ranks or scales differ by layer in this PEFT folder: smaller ranks are filled up with zeros and scales go "
            "into B; the model is the same, but training it on would scale some gradients differently than peft",
            stacklevel=3,
        )
    one = next(iter(even.values()))
    dropout = config.get(kind.dropout) or 0.0
    if kind.scaled:
        return even, LoRA(rank=one.rank, alpha=alpha_of(one), dropout=dropout)
    return even, HiRA(rank=one.rank, dropout=dropout)
