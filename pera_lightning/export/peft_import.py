"""Import from PEFT: a folder with a LoRA becomes this package's `LoRA`, one with a HiRA its `HiRA`. Does without peft.

So do the folders that the released code of HiRA, PERA and MoSLoRA writes, forks of peft: what is read is what that code
computes, which is ΔW = W ⊙ BA without a scale, B̂ Â without a scale (with coefficients, or with 1 for squares and 2 for
other products), and lora_alpha / r · B M A.

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
from pera_lightning.adapters.moslora import MoSLoRA
from pera_lightning.adapters.pera import PERA, number_of_pairs, pairs
from pera_lightning.errors import CheckpointError, closest, listed
from pera_lightning.export.low_rank import padded
from pera_lightning.export.peft_folder import (
    NOTHING,
    Factors,
    Kind,
    checked_kind,
    read_config,
    read_tensors,
    split_factors,
)
from pera_lightning.export.peft_names import WEIGHTS_FILE, alpha_of, heads, names, plain_modules, shortest_targets
from pera_lightning.injection.inject import inject
from pera_lightning.injection.state import find_injected
from pera_lightning.injection.tensor_checks import check_tensors


def load_peft(model: nn.Module, folder: str | Path, *, method: str | None = None) -> nn.Module:
    """Adapts a plain model in place by what a PEFT folder holds; it can be trained on, saved, merged and exported.

    As after `inject`, adapters are in training mode, so dropout acts until ``model.eval()``; heads are trainable.

    Args:
        model: the base, plain.
        folder: what peft's `save_pretrained`, `export_peft`, or the released code of a paper wrote: LoRA, HiRA, PERA or
            MoSLoRA, in safetensors, or in a ``.bin`` of tensors only.
        method: "HiRA" or "PERA", whose released codes write the same files where PERA's has no coefficients.

    Returns:
        `model`; it is untouched where the folder does not fit.

    Raises:
        CheckpointError: where the folder is missing, damaged, of another kind, or does not fit the model.
        ConfigurationError: where a rank is larger than a layer.
    """
    # The folder is read, and compared with the model, before that is touched.
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_tensors(folder)
    kind = checked_kind(config, tensors, folder, method)
    if find_injected(model) is not None:
        raise CheckpointError(f"{folder} cannot be loaded: this model is adapted already; build it anew")
    layers, rest = split_factors(tensors, kind, folder)
    modules = plain_modules(model)
    _check_layers(layers, kind, config, model, folder)
    # Besides the layers it holds all tensors of the heads and nothing else.
    given = config.get("modules_to_save") or []
    saved, state = heads(given, modules), model.state_dict()
    if given and not saved:
        lacks = f"{type(model).__name__} has none of that name: load the base with the class that it was trained in"
        raise CheckpointError(f"{folder} has the heads {listed(given)}, and {lacks}")
    wanted = {name: state[name] for name in state if name.startswith(tuple(f"{path}." for path in saved))}
    rest = _without_base(rest, wanted, state, layers, folder)
    check_tensors(rest, wanted, wanted, str(folder / WEIGHTS_FILE))
    _check_ties(rest, model, folder)
    # Then the model is adapted in the same places, and gets the values.
    updates, adapting = _as_method(layers, config, kind)
    targets = shortest_targets(layers, modules)
    targets = targets if isinstance(targets, list) else [f"re:{targets}"]
    inject(model, adapting, targets, [f"re:{re.escape(path)}" for path in saved])
    with torch.no_grad():
        for path, update in updates.items():
            adapter = model.get_submodule(f"{path}.adapters.all")
            adapter.A.copy_(update.A)  # type: ignore[union-attr, operator]
            adapter.B.copy_(update.B)  # type: ignore[union-attr, operator]
            if kind.third_here:
                getattr(adapter, kind.third_here).copy_(_third(layers[path], kind))
        for name, value in rest.items():
            state[name].copy_(value)  # the model's own tensors, whose names injection does not change
    return model


def _check_layers(
    layers: Mapping[str, Factors], kind: Kind, config: dict[str, Any], model: nn.Module, folder: Path
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
    for path, factors in layers.items():
        A, B = factors.A, factors.B
        out_features, in_features = base_weight(linear[path]).shape
        # The scale depends on the config's rank. Of HiRA, which has no scale, peft (0.21) ignores the pattern.
        own = kind.scaled or kind.rank == "r_ab"
        rank = _by_pattern(path, config.get("rank_pattern"), config[kind.rank]) if own else len(A)
        given, expected = (tuple(A.shape), tuple(B.shape)), ((rank, in_features), (out_features, rank))
        if given != expected:
            sizes = f"{given[0]} and {given[1]}, expected {expected[0]} and {expected[1]} (rank {rank})"
            raise CheckpointError(f"{folder} does not fit this model: A and B of {path} are {sizes}")
        if factors.third is not None:  # a matrix, or the coefficients of all products, in a row or alone
            size = number_of_pairs(rank, "full")
            shapes = [(rank, rank)] if kind.method == "MoSLoRA" else [(size,), (1, size)]
            if (shape := tuple(factors.third.shape)) not in shapes:
                raise CheckpointError(
                    f"{folder}: {kind.third} of {path} is {shape}, expected {shapes[0]} (rank {rank})"
                )
        if not all(each.is_floating_point() and torch.isfinite(each).all() for each in factors if each is not None):
            raise CheckpointError(f"{folder} is damaged: the factors of {path} have values that are not finite numbers")
        if kind.method == "PERA" and linear[path].bias is not None:
            raise CheckpointError(
                f"{folder} adapts {path}, which has a bias here: PERA's released code feeds a bias into its own "
                "products, and runs without one only; so it was trained on another base"
            )


def _without_base(
    rest: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    layers: Mapping[str, Factors],
    folder: Path,
) -> dict[str, Tensor]:
    """Leaves out what peft saves of the frozen base (`lm_head` and embeddings), where it is what the model has.

    Raises:
        CheckpointError: where the model's own is another: an adapter of a base with other words, or of another one.
    """
    kept = {}
    for name, value in rest.items():
        owner, _, end = name.rpartition(".base_layer.")
        plain = f"{owner}.{end}" if owner in layers else name
        if plain in wanted or plain not in state:
            kept[name] = value
            continue
        own = state[plain]
        # Either may be a copy in a lower precision.
        lower = min((own.dtype, value.dtype), key=lambda dtype: dtype.itemsize)
        apart = f"{tuple(value.shape)} there, {tuple(own.shape)} here" if value.shape != own.shape else ""
        if not apart and not torch.equal(value.to(lower).to(own.device), own.to(lower)):
            apart = "other values"
        if apart:
            raise CheckpointError(
                f"{folder} also holds the frozen {plain} of its base, which is not this model's ({apart}): load the "
                "base that it was trained on, with the same (perhaps resized) vocabulary"
            )
    return kept


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


def _third(factors: Factors, kind: Kind) -> Tensor:
    """What goes into the third tensor of a layer: MoSLoRA's mixer (r, r), or PERA's coefficients (P,)."""
    if kind.method == "MoSLoRA":
        return factors.third  # type: ignore[return-value]
    if factors.third is not None:
        return factors.third.reshape(-1)  # in the order of torch.triu_indices, there and here
    i, j = pairs(len(factors.A), "full")
    return torch.where(i == j, 1.0, 2.0)  # what the code without coefficients multiplies by


def _as_method(
    layers: Mapping[str, Factors], config: Mapping[str, Any], kind: Kind
) -> tuple[dict[str, LowRankUpdate], Method]:
    """The factors with one rank and one scale, and the method of this package that has them."""
    updates = {}
    for path, (A, B, _) in layers.items():
        scale = 1.0
        if kind.scaled:
            alpha = _by_pattern(path, config.get("alpha_pattern"), config.get("lora_alpha", 8))
            scale = alpha / (len(A) ** 0.5 if config.get("use_rslora") else len(A))
        updates[path] = LowRankUpdate(A.float(), B.float(), scale)
    # Layers of this package have one rank and one scale.
    uneven = len({(update.rank, update.scale) for update in updates.values()}) > 1
    if uneven and kind.third_here:
        raise CheckpointError(f"ranks or scales of a {kind.method} differ by layer, which this package does not take")
    even = padded(updates)
    if uneven:
        warnings.warn(
            "ranks or scales differ by layer in this PEFT folder: smaller ranks are filled up with zeros and scales go "
            "into B; the model is the same, but training it on would scale some gradients differently than peft",
            stacklevel=3,
        )
    one = next(iter(even.values()))
    rank, dropout = one.rank, (config.get(kind.dropout) or 0.0) if kind.dropout else 0.0
    if kind.method == "HiRA":
        return even, HiRA(rank=rank, dropout=dropout)
    method = {"LoRA": LoRA, "MoSLoRA": MoSLoRA, "PERA": PERA}[kind.method]
    return even, method(rank=rank, alpha=alpha_of(one), dropout=dropout)
