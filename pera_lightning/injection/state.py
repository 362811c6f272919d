"""Adapter state: what of a model is saved, the adapter folder, and the checks on what is loaded.

A checkpoint holds everything but the frozen base: adapters, trained heads, and every buffer (they are small, and those
of norms in training mode change). Next to it goes the injection as primitives, so that another method, target set or
base is told apart before a tensor is touched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.adapters.method import Method
from pera_lightning.adapters.registry import method_from_spec
from pera_lightning.errors import CheckpointError, ConfigurationError, closest, listed, shorten
from pera_lightning.files import write_atomically
from pera_lightning.injection.fingerprint import differing, fingerprint_of
from pera_lightning.injection.inject import Injection, inject, injection_of, trained_parameter_names

METADATA = "pera_lightning"
FORMAT = 1
_UNFROZEN = "_pera_unfrozen"
WEIGHTS_FILE, CONFIG_FILE = "adapter.safetensors", "adapter_config.json"


def find_injected(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Prefix (``""`` or ``"name."``) and module of the injected part of `model`, or None."""
    for path, module in model.named_modules():
        if injection_of(module) is not None:
            return (f"{path}." if path else ""), module
    return None


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the base parameters of an injected model (or of one that contains it) that nothing has trained.

    Base parameters that other code has unfrozen are not among them, see `remember_unfrozen`.
    """
    found = find_injected(model)
    if found is None:
        return set()
    prefix, root = found
    kept = trained_parameter_names(root) | getattr(root, _UNFROZEN, set())
    parameters = root.named_parameters(remove_duplicate=False)
    return {prefix + name for name, p in parameters if name not in kept and not p.requires_grad}


def remember_unfrozen(model: nn.Module) -> list[str]:
    """Names of base parameters that other code has unfrozen; from now on they are saved, frozen again or not."""
    found = find_injected(model)
    if found is None:
        return []
    root = found[1]
    parameters = dict(root.named_parameters(remove_duplicate=False))
    ours = {
        id(parameters[name]) for name in trained_parameter_names(root)
    }  # by identity: a head may be tied to the base
    loose = {name for name, p in parameters.items() if p.requires_grad and id(p) not in ours}
    setattr(root, _UNFROZEN, getattr(root, _UNFROZEN, set()) | loose)
    return sorted(loose)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Adapters, trained heads and buffers of an injected model: its state dict without the frozen base.

    Raises:
        ConfigurationError: where nothing was injected.
    """
    if find_injected(model) is None:
        raise ConfigurationError(f"{type(model).__name__} has no adapters: call inject first")
    frozen = frozen_names(model)
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def inject_spec(model: nn.Module, spec: Mapping[str, Any]) -> None:
    """Repeats the injection that `Injection.spec` describes."""
    method = method_from_spec(spec["method"])
    inject(model, method, spec["targets"], spec["trainable"], fused=spec["fused"], seed=spec["seed"])


def check_state(model: nn.Module, state: Mapping[str, Any], source: str, *, strict: bool = True) -> None:
    """Raises `CheckpointError` where adapter tensors are missing, unexpected or of another shape.

    Args:
        model: an injected model, or one that contains it.
        state: tensors by name; those of the frozen base may be missing.
        source: where they come from, for the message.
        strict: whether tensors besides adapters and heads are checked too.
    """
    if any(isinstance(module, AdaptedLayer) and module.merged for module in model.modules()):
        raise ConfigurationError(f"{source} cannot be loaded into merged adapters: call unmerge first")
    frozen, present = frozen_names(model), model.state_dict()
    missing = [name for name in present if name not in state and name not in frozen]
    unexpected = [name for name in state if name not in present]
    if not strict:
        prefix, root = find_injected(model) or ("", model)
        ours = {prefix + name for name in trained_parameter_names(root)}
        missing = [name for name in missing if name in ours]
        unexpected = [name for name in unexpected if ".adapters." in name]
    if missing or unexpected:
        parts = [f"{len(missing)} missing: {listed(missing, 3)}"] if missing else []
        parts += [f"{len(unexpected)} unexpected: {listed(unexpected, 3)}"] if unexpected else []
        raise CheckpointError(f"{source} does not fit this model: {'; '.join(parts)}")
    for name in (n for n in present if n in state):
        given, expected = getattr(state[name], "shape", ()), getattr(present[name], "shape", ())
        if given != expected:
            raise CheckpointError(_other_shape(source, name, given, expected))


def _other_shape(source: str, name: str, given: Iterable[int], expected: Iterable[int]) -> str:
    hint = "" if ".adapters." in name else "; does the data have another number of classes?"
    return f"{source}: {name} is {tuple(given)}, the model's is {tuple(expected)}{hint}"


def check_same_base(saved: Mapping[str, str], present: Mapping[str, str], source: str) -> None:
    """Raises `CheckpointError` where two fingerprints differ."""
    wrong = differing(saved, present)
    if wrong:
        raise CheckpointError(
            f"{source} was trained on another base: {len(wrong)} of {len(present)} frozen weights differ, "
            f"first {wrong[0]}"
        )


def check_injection(saved: Mapping[str, Any], present: Injection, source: str) -> None:
    """Raises `CheckpointError` where a saved injection is of another method, target set, head or base.

    Args:
        saved: what `Injection.spec` gave.
        present: the model's.
        source: where `saved` comes from, for the message.
    """
    method = method_from_spec(saved["method"])
    if _lasting(method) != _lasting(present.method):
        raise CheckpointError(
            f"{source} is of {_told(method, present.method)}, the model has {_told(present.method, method)}"
        )
    layers = {path: tuple(blocks) for path, blocks in saved["layers"].items()}
    if layers != present.layers:
        other = [path for path in {**layers, **present.layers} if layers.get(path) != present.layers.get(path)]
        raise CheckpointError(
            f"{source} adapts {len(layers)} layers by {saved['targets']}, the model {len(present.layers)} by "
            f"{list(present.targets)}; they differ at {listed(other, 3)}"
        )
    if tuple(saved["trained_modules"]) != present.trained_modules:
        raise CheckpointError(
            f"{source} trains {saved['trained_modules']} whole, the model {list(present.trained_modules)}: "
            "give the same trainable"
        )
    check_same_base(saved["fingerprint"], present.fingerprint, source)


def _told(method: Method, other: Method) -> str:
    """A method with the hyperparameters in which it differs from another of its class; its name alone otherwise."""
    own, others = _lasting(method), _lasting(other)
    if own["class_path"] != others["class_path"]:
        return type(method).__name__
    differing_values = ", ".join(f"{k}={v!r}" for k, v in own.items() if others.get(k) != v)
    return f"{type(method).__name__}({differing_values})"


def _lasting(method: Method) -> dict[str, Any]:
    """The hyperparameters that must agree between a checkpoint and the model that loads it."""
    spec = method.spec()
    kept = {name: value for name, value in spec["init_args"].items() if name not in method.runtime_fields}
    return {"class_path": spec["class_path"], **kept}


def write_adapter(folder: str | Path, state: Mapping[str, Tensor], spec: Mapping[str, Any]) -> Path:
    """Writes an adapter folder: `adapter.safetensors` and then `adapter_config.json`, which holds its hash.

    Args:
        folder: made where it does not exist.
        state: what `adapter_state_dict` gave.
        spec: what `Injection.spec` gave.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses shared memory, and tied heads share it.
    data = dump_tensors({name: value.detach().cpu().clone().contiguous() for name, value in state.items()})
    config = {"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest(), **spec}
    write_atomically(folder / WEIGHTS_FILE, data)
    write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=1) + "\n").encode())
    return folder


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Saves the adapters, heads and buffers of an injected model as an adapter folder.

    Args:
        model: an injected model, or one that contains it (names are then relative to the injected part).
        folder: made where it does not exist; its two files are replaced.

    Raises:
        ConfigurationError: where nothing was injected.
    """
    found = find_injected(model)
    root = found[1] if found else model
    return write_adapter(folder, adapter_state_dict(root), injection_of(root).spec())  # type: ignore[union-attr]


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
    state, config = read_adapter(folder)
    found = find_injected(model)
    root = found[1] if found else model
    if found is None:
        check_plain(root, state, config, str(folder), check_base=check_base)
        inject_spec(root, config)
    present = injection_of(root)
    if not check_base:
        config = {**config, "fingerprint": present.fingerprint}  # type: ignore[union-attr]
    check_injection(config, present, str(folder))  # type: ignore[arg-type]
    check_state(root, state, str(folder))
    root.load_state_dict(state, strict=False)
    return model


def check_plain(
    model: nn.Module, state: Mapping[str, Tensor], config: Mapping[str, Any], source: str, *, check_base: bool
) -> None:
    """Raises `CheckpointError` where an adapter does not fit a model that is not injected yet.

    Args:
        model: the base.
        state: the adapter's tensors.
        config: the adapter's description.
        source: where they come from, for the message.
        check_base: whether the base must be the one trained on.
    """
    modules = dict(model.named_modules())
    absent = [path for path in config["layers"] if path not in modules]
    if absent:
        raise CheckpointError(f"{source} adapts {listed(absent, 3)}, which {type(model).__name__} does not have")
    present = {path: fingerprint_of(model, path) for path in config["fingerprint"]}
    if check_base:
        check_same_base(config["fingerprint"], present, source)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, shape in shapes.items():
        if name in state and tuple(state[name].shape) != shape:
            raise CheckpointError(_other_shape(source, name, state[name].shape, shape))


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
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise CheckpointError(
            f"{folder} is no adapter folder: {Path(error.filename).name} is missing{closest(folder.name, siblings)}"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged: {shorten(str(error))}") from None
    if config.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {config.get('format')!r}, this version reads {FORMAT}")
    if hashlib.sha256(data).hexdigest() != config.get("sha256"):
        raise CheckpointError(f"{folder / WEIGHTS_FILE} is damaged, or not the file its config was written for")
    return load_tensors(data), config


def forgive_missing_base(module: nn.Module, incompatible: Any) -> None:
    """A load-state-dict hook: frozen base parameters may be missing, anything else still raises."""
    frozen = frozen_names(module)
    # AveragedModel and DistributedDataParallel put "module." before every name.
    kept = [n for n in incompatible.missing_keys if n not in frozen and n.removeprefix("module.") not in frozen]
    incompatible.missing_keys[:] = kept


def without(state: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A copy of a state dict without some names."""
    names = set(names)
    return {name: value for name, value in state.items() if name not in names}


def metadata(model: nn.Module, version: str) -> dict[str, Any]:
    """What a checkpoint says about the injection in `model` (`root` is the injected part's path): primitives only."""
    found = find_injected(model)
    if found is None:
        return {}
    spec = injection_of(found[1]).spec()  # type: ignore[union-attr]
    return {"format": FORMAT, "version": version, "root": found[0].removesuffix("."), **spec}
