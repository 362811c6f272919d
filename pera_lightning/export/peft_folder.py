"""Reading a PEFT folder: its config, the factors of its layers, and its other tensors. Does without peft.

Shapes: in, out features of a layer; r its rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pera_lightning.errors import CheckpointError, closest, listed, shorten
from pera_lightning.export.peft_names import CONFIG_FILE, PICKLE_FILE, PREFIX, WEIGHTS_FILE

# Settings of peft's configs that are used below, or that change nothing of a loaded adapter.
_READ = {"peft_type", "r", "target_modules", "exclude_modules", "modules_to_save", "rank_pattern"}
_READ |= {"lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern", "hira_dropout", "layers_to_transform"}
_IDLE = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"}
_IDLE |= {"fan_in_fan_out", "megatron_core", "qalora_group_size", "layers_pattern", "runtime_config"}
_IDLE |= {"init_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config"}  # of initial values
NOTHING = (None, False, "none", {}, [])
# Initial values that leave the base as it is; the others (pissa, olora, corda, loftq …) subtract from its weights.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Kind:
    """A type of peft's adapters.

    Attributes:
        A: name of A (r, in).
        B: name of B (out, r).
        dropout: name of its dropout.
        scaled: whether it has a scale, lora_alpha / r.
    """

    A: str
    B: str
    dropout: str
    scaled: bool


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
        if folder.is_dir():
            raise CheckpointError(f"{folder} is no PEFT folder: {CONFIG_FILE} is missing")
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise CheckpointError(f"{folder} does not exist{closest(folder.name, siblings)}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {shorten(str(error))}") from None
    if isinstance(config, dict) and "sha256" in config and "peft_type" not in config:
        raise CheckpointError(f"{folder} is an adapter folder of this package, not of peft: use load_adapter")
    if not isinstance(config, dict) or "peft_type" not in config:
        raise CheckpointError(f"{file} has no peft_type: it is no config of peft")
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
            "with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    # A setting that is not known here could change what the adapter computes.
    known = _READ | _IDLE | {"init_lora_weights"}
    strange = {k: v for k, v in config.items() if k not in known and v not in NOTHING}
    if strange:
        raise CheckpointError(
            f"{folder} has {listed([f'{k}={v!r}' for k, v in strange.items()], 3)}, which this package does not take: "
            "plain LoRA and HiRA can be loaded; or merge it in peft (merge_and_unload) and take that for the base"
        )
    _check_values(config, kind, folder / CONFIG_FILE)
    return kind


def _check_values(config: Mapping[str, Any], kind: Kind, file: Path) -> None:
    """Raises `CheckpointError` for values that peft does not write; what is checked here is relied on later."""
    number, patterns, listing = (int, float), (dict, type(None)), (list, type(None))
    kinds = {"r": int, "lora_alpha": number, kind.dropout: number, "modules_to_save": listing}
    kinds |= {"rank_pattern": patterns, "alpha_pattern": patterns}
    kinds |= dict.fromkeys(("target_modules", "exclude_modules"), (str, *listing))
    for name, allowed in kinds.items():
        if name in config and not isinstance(config[name], allowed):
            raise CheckpointError(f"{file} is damaged: {name}={config[name]!r}")
    if config.get("r", 0) < 1:
        raise CheckpointError(f"{file} is damaged: it gives no rank r above 0")
    expressions = [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    expressions += [v for v in (config.get("target_modules"), config.get("exclude_modules")) if isinstance(v, str)]
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise CheckpointError(f"{file} is damaged: {expression!r} is no regular expression ({error})") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors of a PEFT folder, by their names in the base.

    Raises:
        CheckpointError: where they are missing, damaged, pickled or named otherwise.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        if (folder / PICKLE_FILE).is_file():
            raise CheckpointError(
                f"{folder / PICKLE_FILE} is a pickle, which can run code when it is read: load it in peft and save "
                "it as safetensors (save_pretrained)"
            )
        raise CheckpointError(f"{folder} is no whole PEFT folder: {WEIGHTS_FILE} is missing")
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
        what = f"{listed(halves, 3)} have one factor of two" if halves else f"there is no {kind.A}"
        raise CheckpointError(f"{folder / WEIGHTS_FILE} is not whole: {what}")
    return {path: (both[kind.A], both[kind.B]) for path, both in found.items()}, rest
