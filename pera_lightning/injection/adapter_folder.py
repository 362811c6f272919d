"""The adapter folder: `adapter.safetensors`, and `adapter_config.json` with the injection and checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from pera_lightning.errors import CheckpointError, listed
from pera_lightning.files import atomic_write, closest_beside
from pera_lightning.injection.all_or_nothing import as_it_was
from pera_lightning.injection.compiled import own_description, own_state, plain_description, plain_state
from pera_lightning.injection.description import FORMAT, UNFROZEN, checked_description
from pera_lightning.injection.inject import injection_of
from pera_lightning.injection.state import (
    adapter_state_dict,
    adopt_training_data,
    check_injection,
    check_plain,
    check_state,
    describe,
    find_injected,
    inject_spec,
    take_as_unfrozen,
)

WEIGHTS_FILE, CONFIG_FILE = "adapter.safetensors", "adapter_config.json"
_CHECKSUMS = "checksums"  # of the config's fields but for those that are compared with something anyway
_COMPARED = ("format", "sha256", "fingerprint")


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Saves the adapters, heads and buffers of an injected model as an adapter folder.

    Args:
        model: an injected model, or one that contains it (names are then relative to the injected part).
        folder: made where it does not exist; its two files are replaced.
    """
    found = find_injected(model)
    root = found[1] if found else model
    return write_adapter(folder, adapter_state_dict(root), describe(root))


def write_adapter(folder: str | Path, state: Mapping[str, Tensor], spec: Mapping[str, Any]) -> Path:
    """Writes an adapter folder, the tensors first, so that the config's hash tells whether both are of one saving.

    Args:
        folder: made where it does not exist.
        state: what `adapter_state_dict` gave.
        spec: what `describe` gave.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses shared memory, and tied heads share it.
    plain = plain_state(state)
    data = dump_tensors({name: value.detach().cpu().clone().contiguous() for name, value in plain.items()})
    config: dict[str, Any] = {"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest(), **plain_description(spec)}
    config[_CHECKSUMS] = {name: _checksum(value) for name, value in config.items() if name not in _COMPARED}
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
    with as_it_was(root, str(folder)):
        if found is None:  # check what can be checked before the model is changed
            check_plain(root, state, config, str(folder), check_base=check_base)
            inject_spec(root, config)
        present = injection_of(root)
        if not check_base:  # take the model's own base for the right one
            config |= {"fingerprint": present.fingerprint, "rest_of_base": present.rest_of_base}  # type: ignore[union-attr]
        check_injection(config, present, str(folder), held=state)  # type: ignore[arg-type]
        check_state(root, state, str(folder), unfrozen=config.get(UNFROZEN))
    take_as_unfrozen(root, config)
    root.load_state_dict(state, strict=False)  # the frozen base is not in it
    adopt_training_data(root, config)
    return model


def read_adapter(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads an adapter folder: its tensors, and its config, which is checked to be one.

    Raises:
        CheckpointError: where it is missing, damaged, or of another format.
    """
    folder = Path(folder)
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    data = _read(weights_file)
    config = checked_description(_read_json(config_file), str(config_file))
    _check_checksums(config, config_file)
    if hashlib.sha256(data).hexdigest() != config.get("sha256"):
        raise CheckpointError(f"{weights_file} is damaged, or not the file its config was written for")
    try:
        return plain_state(load_tensors(data)), plain_description(config)
    except Exception as error:  # safetensors has errors of its own, and lets others through
        raise CheckpointError(f"{weights_file} is damaged: {type(error).__name__}: {error}") from None


def _read(file: Path) -> bytes:
    """The content of one of the two files; `CheckpointError` for whatever is in its place."""
    folder = file.parent
    try:
        if file.exists() and not file.is_file():  # a folder, or a pipe, which would be waited for
            raise CheckpointError(f"{folder} is not an adapter folder: {file.name} is not a file")
        return file.read_bytes()
    except FileNotFoundError:
        missing = f"{file.name} is missing{closest_beside(folder)}"
        raise CheckpointError(f"{folder} is not an adapter folder: {missing}") from None
    except (OSError, ValueError) as error:  # ValueError for a path that can be none
        raise CheckpointError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _read_json(file: Path) -> Any:
    try:
        return json.loads(_read(file))
    except (ValueError, RecursionError) as error:  # brackets within brackets end in the second
        raise CheckpointError(f"{file} is damaged: {error}") from None


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _check_checksums(config: Mapping[str, Any], file: Path) -> None:
    """Raises `CheckpointError` where a field is not what was written: a flipped bit may leave the JSON valid.

    Each field has a checksum of its own, so that one may be added or taken out by hand. A folder of an earlier version
    has none.
    """
    written = config.get(_CHECKSUMS, {})
    if not isinstance(written, dict):
        raise CheckpointError(f"{file} is damaged: {_CHECKSUMS} are not those of its fields")
    changed = [name for name in written if name in config and written[name] != _checksum(config[name])]
    lost = [name for name in written if name not in config]
    if lost and any(name not in (*written, *_COMPARED, _CHECKSUMS) for name in config):
        changed += lost  # one name in the place of another
    if changed:
        raise CheckpointError(
            f"{file} is damaged: these fields are not as they were written: {listed(changed)}; if you changed them on "
            f"purpose, take them out of {_CHECKSUMS!r}"
        )
