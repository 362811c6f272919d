"""Reading a PEFT folder: its config, the factors of its layers, and its other tensors. Does without peft.

Shapes: in, out features of a layer; r its rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pera_lightning.errors import CheckpointError, listed, shorten
from pera_lightning.export.peft_names import CONFIG_FILE, PICKLE_FILE, PREFIX, WEIGHTS_FILE
from pera_lightning.files import closest_beside, parse_json

# Settings of peft's configs that are used below, or that change nothing of a loaded adapter.
_READ = {"peft_type", "r", "target_modules", "exclude_modules", "modules_to_save", "rank_pattern"}
_READ |= {"lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern", "hira_dropout", "layers_to_transform"}
_READ |= {"init_lora_weights"}
_IDLE = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"}
_IDLE |= {"fan_in_fan_out", "megatron_core", "qalora_group_size", "layers_pattern", "runtime_config"}
_IDLE |= {"init_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config"}  # of initial values
NOTHING = (None, False, "none", {}, [])
# Types of the values that are read, where the config has them.
_TYPES: dict[str, tuple[type, ...]] = {"r": (int,), "lora_alpha": (int, float), "modules_to_save": (list, type(None))}
_TYPES |= dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict, type(None)))
_TYPES |= dict.fromkeys(("target_modules", "exclude_modules"), (str, list, type(None)))
# Initial values that leave the base as it is; the others (pissa, olora, corda, loftq …) subtract from its weights.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class Kind(NamedTuple):
    """A type of peft's adapters: the names of its tensors and its dropout."""

    A: str  # (r, in)
    B: str  # (out, r)
    dropout: str
    scaled: bool  # by lora_alpha / r


KINDS = {
    "LORA": Kind("lora_A.weight", "lora_B.weight", "lora_dropout", scaled=True),
    "HIRA": Kind("hira_A", "hira_B", "hira_dropout", scaled=False),
}


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
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {shorten(str(error))}") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise CheckpointError(
            f"{file} was not written by peft: it has no peft_type; for a folder of this package use load_adapter"
        )
    return config


def checked_kind(config: Mapping[str, Any], folder: Path) -> Kind:
    """The kind of an adapter; raises `CheckpointError` for one that cannot be loaded completely."""
    kind = KINDS.get(config["peft_type"])
    if kind is None:
        raise CheckpointError(f"{folder} is a {config['peft_type']} of peft: LORA and HIRA can be loaded")
    # Some initial values are taken out of the base's weights, which are not in the folder.
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        raise CheckpointError(
            f"{folder} was trained with init_lora_weights={init!r}, which changes the base weights: save it from peft "
            "with path_initial_model_for_weight_conversion, as a plain LoRA"
        )
    # A setting that is not known here could change what the adapter computes.
    strange = [f"{k}={v!r}" for k, v in config.items() if k not in _READ | _IDLE and v not in NOTHING]
    if strange:
        raise CheckpointError(
            f"{folder} has {listed(strange, 3)}, which this package does not take: only plain LoRA and HiRA can be "
            "loaded; or merge it in peft (merge_and_unload) and take that for the base"
        )
    _check_values(config, kind, folder / CONFIG_FILE)
    return kind


def _check_values(config: Mapping[str, Any], kind: Kind, file: Path) -> None:
    """Raises `CheckpointError` for values that peft does not write; what is checked here is relied on later."""
    kinds = _TYPES | {kind.dropout: (int, float)}
    wrong = [name for name, allowed in kinds.items() if name in config and not isinstance(config[name], allowed)]
    if not wrong and config.get("r", 0) < 1:
        wrong = ["r"]
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
        CheckpointError: where they are missing, damaged, pickled or named otherwise.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        if (folder / PICKLE_FILE).is_file():
            danger = "is a pickle, which can run code when it is read"
            raise CheckpointError(f"{folder / PICKLE_FILE} {danger}: load it in peft and save it as safetensors")
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {shorten(str(error))}") from None
    other = [name for name in tensors if not name.startswith(PREFIX)]
    if other:
        raise CheckpointError(f"{file} has tensors that do not begin with {PREFIX}: {listed(other, 3)}")
    return {name.removeprefix(PREFIX): value for name, value in tensors.items()}


def split_factors(
    tensors: Mapping[str, Tensor], kind: Kind, folder: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Splits tensors into A (r, in) and B (out, r) of every layer, by its path, and those that are neither."""
    found: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for name, value in tensors.items():
        end = next((end for end in (kind.A, kind.B) if name.endswith(f".{end}")), None)
        if end is None:
            rest[name] = value
        else:
            found.setdefault(name.removesuffix(f".{end}"), {})[end] = value
    # A layer with one factor is damage, not an adapter.
    halves = [path for path, both in found.items() if len(both) != 2]
    if halves or not found:
        what = f"{listed(halves, 3)} have one factor of two" if halves else f"{kind.A} of any layer is missing"
        raise CheckpointError(f"{folder / WEIGHTS_FILE} is not complete: {what}")
    return {path: (both[kind.A], both[kind.B]) for path, both in found.items()}, rest
