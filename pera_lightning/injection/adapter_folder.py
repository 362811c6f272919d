"""The adapter folder: `adapter.safetensors`, and `adapter_config.json` with the injection and the tensors' hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from pera_lightning.errors import CheckpointError, shorten
from pera_lightning.files import atomic_write, closest_beside
from pera_lightning.injection.compiled import own_description, own_state, plain_description, plain_state
from pera_lightning.injection.inject import injection_of
from pera_lightning.injection.state import (
    FORMAT,
    adapter_state_dict,
    adopt_training_data,
    check_injection,
    check_plain,
    check_state,
    find_injected,
    inject_spec,
)

WEIGHTS_FILE, CONFIG_FILE = "adapter.safetensors", "adapter_config.json"


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Saves the adapters, heads and buffers of an injected model as an adapter folder.

    Args:
        model: an injected model, or one that contains it (names are then relative to the injected part).
        folder: made where it does not exist; its two files are replaced.
    """
    found = find_injected(model)
    root = found[1] if found else model
    return write_adapter(folder, adapter_state_dict(root), injection_of(root).spec())  # type: ignore[union-attr]


def write_adapter(folder: str | Path, state: Mapping[str, Tensor], spec: Mapping[str, Any]) -> Path:
    """Writes an adapter folder, the tensors first, so that the config's hash tells whether both are of one saving.

    Args:
        folder: made where it does not exist.
        state: what `adapter_state_dict` gave.
        spec: what `Injection.spec` gave.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses shared memory, and tied heads share it.
    plain = plain_state(state)
    data = dump_tensors({name: value.detach().cpu().clone().contiguous() for name, value in plain.items()})
    config = {"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest(), **plain_description(spec)}
    atomic_write(folder / WEIGHTS_FILE, data)
    atomic_write(folder / CONFIG_FILE, (json.dumps(config, indent=1) + "\n").encode())
    return folder


def load_adapter(model: nn.Module, folder: str | Path, *, check_base: bool = True) -> nn.Module:
    """Loads an adapter folder into a model, injecting first where the model is plain.

    Args:
        model: the base, plain or injected in the same way.
        folder: what `save_adapter` wrote.
        check_base: whether another base than the one trained on is refused.

    Returns:
        `model`, adapted in place; a plain one is left untouched where the folder does not fit.

    Raises:
        CheckpointError: where the folder is damaged, or does not fit the model.
        ConfigurationError: where the model's adapters are merged.
    """
    state, config = read_adapter(folder)  # on the CPU
    found = find_injected(model)
    root = found[1] if found else model
    state, config = own_state(root, state), own_description(root, config)
    if found is None:  # check what can be checked before the model is changed
        check_plain(root, state, config, str(folder), check_base=check_base)
        inject_spec(root, config)
    present = injection_of(root)
    if not check_base:  # take the model's own base for the right one
        config = {**config, "fingerprint": present.fingerprint, "rest_of_base": present.rest_of_base}  # type: ignore[union-attr]
    check_injection(config, present, str(folder), held=state)  # type: ignore[arg-type]
    check_state(root, state, str(folder))
    root.load_state_dict(state, strict=False)  # the frozen base is not in it
    adopt_training_data(root, config)
    return model


def read_adapter(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads an adapter folder: its tensors and its config.

    Raises:
        CheckpointError: where it is missing, cut short or of a newer format.
    """
    folder = Path(folder)
    try:
        data = (folder / WEIGHTS_FILE).read_bytes()
        config = json.loads((folder / CONFIG_FILE).read_text())
    except FileNotFoundError as error:
        missing = f"{Path(error.filename).name} is missing{closest_beside(folder)}"
        raise CheckpointError(f"{folder} is not an adapter folder: {missing}") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged: {shorten(str(error))}") from None
    if config.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {config.get('format')!r}, this version reads {FORMAT}")
    if hashlib.sha256(data).hexdigest() != config.get("sha256"):
        raise CheckpointError(f"{folder / WEIGHTS_FILE} is damaged, or not the file its config was written for")
    return plain_state(load_tensors(data)), plain_description(config)
