"""Reading a PEFT folder: its config, the factors of its layers, and its other tensors. Does without peft.

Shapes: in, out features of a layer; r its rank.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from pera_lightning.errors import CheckpointError, listed, shorten
from pera_lightning.export.peft_names import CONFIG_FILE, PICKLE_FILE, PREFIX, WEIGHTS_FILE
from pera_lightning.files import check_crcs, closest_beside, parse_json, what_failed

# Settings of peft's configs that are used below, or that change nothing of a loaded adapter.
_READ = {"peft_type", "r", "target_modules", "exclude_modules", "modules_to_save", "rank_pattern"}
_READ |= {"lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern", "hira_dropout", "layers_to_transform"}
_READ |= {"init_lora_weights"}
_IDLE = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"}
_IDLE |= {"fan_in_fan_out", "megatron_core", "qalora_group_size", "layers_pattern", "runtime_config"}
_RELEASED = {"r_ab", "scale_ab", "init_a", "init_b", "train_a", "train_b", "merge_weights"}  # HiRA's and PERA's
_MIXED = {"lora_use_mixer", "merge_weights"}  # MoSLoRA's
_IDLE |= {"init_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config"}  # of initial values
NOTHING = (None, False, "none", {}, [])
# Types of the values that are read, where the config has them.
_TYPES: dict[str, tuple[type, ...]] = {"r": (int,), "lora_alpha": (int, float), "modules_to_save": (list, type(None))}
_TYPES |= dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict, type(None)))
_TYPES |= dict.fromkeys(("target_modules", "exclude_modules"), (str, list, type(None)))
# Initial values that leave the base as it is; the others (pissa, olora, corda, loftq …) subtract from its weights.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class Kind(NamedTuple):
    """A type of adapters in such folders: the names of its tensors and settings."""

    method: str  # of this package
    A: str  # (r, in)
    B: str  # (out, r)
    dropout: str | None  # None where the code that wrote it has the setting and never uses it
    scaled: bool  # by lora_alpha / r
    rank: str = "r"
    third: str | None = None  # a tensor besides A and B
    third_here: str = ""  # its name in this package


class Factors(NamedTuple):
    """The tensors of one layer."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    third: Tensor | None = None


KINDS = {
    "LORA": Kind("LoRA", "lora_A.weight", "lora_B.weight", "lora_dropout", scaled=True),
    "HIRA": Kind("HiRA", "hira_A", "hira_B", "hira_dropout", scaled=False),
}
# What the papers' own forks of peft write, as a LORA. HiRA and PERA know no scale: their lora_alpha is never used.
_MOSLORA = Kind("MoSLoRA", "lora_A.weight", "lora_B.weight", "lora_dropout", True, "r", "lora_AB.weight", "mixer")
_HIRA = Kind("HiRA", "lora_A", "lora_B", None, False, "r_ab")
_PERA = Kind("PERA", "lora_A", "lora_B", "lora_dropout", False, "r_ab", "lora_A_parameter", "h")  # with coefficients
_PERA_FIXED = Kind("PERA", "lora_A", "lora_B", None, False, "r_ab", third_here="h")  # without


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config of a PEFT folder.

    Raises:
        CheckpointError: where it is missing, damaged, or not peft's.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        missing = f"has no {CONFIG_FILE}" if folder.is_dir() else f"does not exist{closest_beside(folder)}"
        raise CheckpointError(f"{folder} {missing}")
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {shorten(str(error))}") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise CheckpointError(
            f"{file} was not written by peft: it has no peft_type; for a folder of this package use load_adapter"
        )
    return config


def checked_kind(config: Mapping[str, Any], tensors: Collection[str], folder: Path, method: str | None = None) -> Kind:
    """The kind of an adapter; raises `CheckpointError` for one that cannot be loaded completely.

    Args:
        config: the folder's.
        tensors: names of its tensors.
        folder: for the message.
        method: which of two that write the same files wrote it, "HiRA" or "PERA".
    """
    if config["peft_type"] not in KINDS:
        raise CheckpointError(f"{folder} is a {config['peft_type']} of peft: LORA and HIRA can be loaded")
    kind = _told_kind(config, tensors, folder, method)
    # Some initial values are taken out of the base's weights, which are not in the folder.
    init = config.get("init_lora_weights", True)
    if not isinstance(init, (str, bool, type(None))) or init not in _INITS:
        raise CheckpointError(
            f"{folder} was trained with init_lora_weights={init!r}, which changes the base weights: save it from peft "
            "with path_initial_model_for_weight_conversion, as a plain LoRA"
        )
    # A setting that is not known here could change what the adapter computes.
    known = _READ | _IDLE | (_RELEASED if kind.rank == "r_ab" else set()) | (_MIXED if kind is _MOSLORA else set())
    strange = [f"{k}={v!r}" for k, v in config.items() if k not in known and v not in NOTHING]
    if strange:
        raise CheckpointError(
            f"{folder} has {listed(strange, 3)}, which this package does not take: only plain LoRA and HiRA can be "
            "loaded; or merge it in peft (merge_and_unload) and take that for the base"
        )
    _check_values(config, kind, folder / CONFIG_FILE)
    return kind


def _told_kind(config: Mapping[str, Any], tensors: Collection[str], folder: Path, method: str | None) -> Kind:
    """The kind by the config and the names of the tensors: the papers' forks all call themselves LORA."""
    kind = KINDS[config["peft_type"]]
    has = {fork: any(name.endswith(f".{fork.third}") for name in tensors) for fork in (_PERA, _MOSLORA)}
    if kind.method == "LoRA" and "r_ab" in config:
        kind = _PERA if has[_PERA] else _PERA_FIXED if method == "PERA" else _HIRA
    elif kind.method == "LoRA" and (has[_MOSLORA] or config.get("lora_use_mixer")):
        kind = _MOSLORA
    if method not in (None, kind.method):
        given = f"method={method!r} is given: leave it out"
        raise CheckpointError(f"{folder} is a {kind.method} by its config and tensors, and {given}")
    if kind is _HIRA and method is None:
        warnings.warn(
            f"{folder} is taken for HiRA; the released code of PERA, without coefficients, writes the same: if that "
            "made it, give method='PERA'",
            stacklevel=4,
        )
    return kind


def _check_values(config: Mapping[str, Any], kind: Kind, file: Path) -> None:
    """Raises `CheckpointError` for values that peft does not write; what is checked here is relied on later."""
    kinds = {**_TYPES, kind.rank: (int,), **({kind.dropout: (int, float)} if kind.dropout else {})}
    wrong = [name for name, allowed in kinds.items() if name in config and not isinstance(config[name], allowed)]
    if not wrong and config.get(kind.rank, 0) < 1:
        wrong = [kind.rank]
    # What lists and patterns hold.
    lists, patterns = ("target_modules", "exclude_modules", "modules_to_save"), ("rank_pattern", "alpha_pattern")
    if not wrong:
        names = {k: v for k in lists if isinstance(v := config.get(k), list)}
        wrong = [k for k, v in names.items() if not all(isinstance(each, str) for each in v)]
        wrong += [k for k in patterns if not all(isinstance(v, (int, float)) for v in (config.get(k) or {}).values())]
    if wrong:
        raise CheckpointError(f"{file} is damaged: {wrong[0]}={config.get(wrong[0])!r}")
    # Expressions: the keys of patterns, and targets that are not lists.
    expressions = [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    expressions += [v for v in (config.get("target_modules"), config.get("exclude_modules")) if isinstance(v, str)]
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise CheckpointError(f"{file} is damaged: {expression!r} is not a regular expression ({error})") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors of a PEFT folder, by their names in the base.

    Raises:
        CheckpointError: where they are missing, damaged or named otherwise.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        file = folder / PICKLE_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE} (nor {PICKLE_FILE})")
    try:
        if file.name == WEIGHTS_FILE:
            tensors = load_file(file)
        else:  # a pickle: tensors and primitives only, so that it runs nothing
            check_crcs(file)
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and zipfile each have several kinds
        raise CheckpointError(f"{file} is damaged, or holds more than tensors ({what_failed(error)})") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise CheckpointError(f"{file} is damaged: it holds no tensors by name")
    other = [name for name in tensors if not name.startswith(PREFIX)]
    if other:
        raise CheckpointError(f"{file} has tensors that do not begin with {PREFIX}: {listed(other, 3)}")
    return {name.removeprefix(PREFIX): value for name, value in tensors.items()}


def split_factors(
    tensors: Mapping[str, Tensor], kind: Kind, folder: Path
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Splits tensors into the factors of every layer, by its path, and those that are none."""
    found: dict[str, dict[str, Tensor]] = {}
    rest = {}
    ends = [end for end in (kind.A, kind.B, kind.third) if end]
    for name, value in tensors.items():
        end = next((end for end in ends if name.endswith(f".{end}")), None)
        if end is None:
            rest[name] = value
        else:
            found.setdefault(name.removesuffix(f".{end}"), {})[end] = value
    # A layer without one of its factors is damage, not an adapter.
    parts = [path for path, own in found.items() if len(own) != len(ends)]
    if parts or not found:
        lacks = "have one factor of two" if len(ends) == 2 else f"lack one of {', '.join(ends)}"
        what = f"{listed(parts, 3)} {lacks}" if parts else f"{kind.A} of any layer is missing"
        raise CheckpointError(f"{folder} is not complete: {what}")
    return {path: Factors(*(own[end] for end in ends)) for path, own in found.items()}, rest
