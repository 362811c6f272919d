"""Adapter state: what of a model is saved, and the checks on what is loaded.

A checkpoint holds everything but the frozen base: adapters, trained heads, and every buffer (they are small, and those
of norms in training mode change). Next to it goes the injection as primitives, so that another method, target set or
base is told apart before a tensor is touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.adapters.method import Method
from pera_lightning.adapters.registry import method_from_spec
from pera_lightning.errors import CheckpointError, ConfigurationError, listed
from pera_lightning.injection.description import FORMAT, UNFROZEN
from pera_lightning.injection.fingerprint import differing, fingerprint_of, may_be_halves, not_comparable
from pera_lightning.injection.inject import (
    Injection,
    inject,
    injection_of,
    trained_parameter_names,
    update_injection,
)
from pera_lightning.injection.tensor_checks import check_tensors, planned_tensors

METADATA = "pera_lightning"
_UNFROZEN = "_pera_unfrozen"  # attribute of an injected model, see `remember_unfrozen`


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
    kept = trained_parameter_names(root) | getattr(root, _UNFROZEN, set())  # names within root
    parameters = root.named_parameters(remove_duplicate=False)
    return {prefix + name for name, p in parameters if name not in kept and not p.requires_grad}


def remember_unfrozen(model: nn.Module) -> list[str]:
    """Names of base parameters that other code has unfrozen; from now on they are saved, frozen again or not."""
    found = find_injected(model)
    if found is None:
        return []
    root = found[1]
    loose = {name for name, p in _base_parameters(root).items() if p.requires_grad}
    setattr(root, _UNFROZEN, getattr(root, _UNFROZEN, set()) | loose)
    return sorted(loose)


def take_as_unfrozen(root: nn.Module, spec: Mapping[str, Any]) -> None:
    """Saves from now on what a description says that other code had unfrozen: the model gets those values."""
    setattr(root, _UNFROZEN, getattr(root, _UNFROZEN, set()) | set(spec.get(UNFROZEN) or ()))


def _base_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of an injected model that are neither adapters' nor heads', by name."""
    parameters = dict(root.named_parameters(remove_duplicate=False))
    # By identity, since a head may be tied to the base.
    ours = {id(parameters[name]) for name in trained_parameter_names(root)}
    return {name: p for name, p in parameters.items() if id(p) not in ours}


def describe(root: nn.Module) -> dict[str, Any]:
    """What a file says of an injected model: the injection, and the base parameters that other code has unfrozen."""
    frozen = frozen_names(root)
    unfrozen = sorted(name for name in _base_parameters(root) if name not in frozen)
    return {**injection_of(root).spec(), UNFROZEN: unfrozen}  # type: ignore[union-attr]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Adapters, trained heads and buffers of an injected model: its state dict without the frozen base."""
    if find_injected(model) is None:
        raise ConfigurationError(f"{type(model).__name__} has no adapters: call inject first")
    return without(model.state_dict(), frozen_names(model))


def without(state: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A copy of a state dict without some names."""
    names = set(names)
    return {name: value for name, value in state.items() if name not in names}


def metadata(model: nn.Module, version: str) -> dict[str, Any]:
    """What a checkpoint says about the injection in `model` as primitives; `root` is the injected part's path."""
    found = find_injected(model)
    if found is None:
        return {}
    about = {"format": FORMAT, "version": version, "root": found[0].removesuffix("."), **describe(found[1])}
    examples = injection_of(found[1]).trained_examples  # type: ignore[union-attr]  # a tensor, so in no folder's JSON
    return about if examples is None else {**about, "trained_examples": examples}


def adopt_training_data(root: nn.Module, saved: Mapping[str, Any]) -> None:
    """Takes over what a file says of the data its adapters were trained with, once they are loaded into `root`."""
    names = saved.get("class_names")
    update_injection(
        root,
        class_names=None if names is None else tuple(names),
        trained_on=saved.get("trained_on"),
        trained_examples=saved.get("trained_examples"),
    )


def inject_spec(model: nn.Module, spec: Mapping[str, Any]) -> None:
    """Repeats the injection that `Injection.spec` describes."""
    method = method_from_spec(spec["method"])
    inject(model, method, spec["targets"], spec["trainable"], fused=spec["fused"], seed=spec["seed"])


def forgive_missing_base(module: nn.Module, incompatible: Any) -> None:
    """A load-state-dict hook: frozen base parameters may be missing, anything else still raises."""
    frozen = frozen_names(module)
    # AveragedModel and DistributedDataParallel put "module." before every name.
    kept = [n for n in incompatible.missing_keys if n not in frozen and n.removeprefix("module.") not in frozen]
    incompatible.missing_keys[:] = kept


# ---- checks of what is loaded ----------------------------------------------------------------------------------------


def check_state(
    model: nn.Module,
    state: Mapping[str, Any],
    source: str,
    *,
    unfrozen: Iterable[str] | None = (),
    strict: bool = True,
    kept: tuple[str, ...] = (),
) -> None:
    """Raises `CheckpointError` where tensors are missing, not to be there, or unlike the model's.

    Args:
        model: an injected model, or one that contains it.
        state: tensors by name; those of the frozen base may be missing.
        source: where they come from, for the message.
        unfrozen: parameters of the base that `state` holds since other code had unfrozen them, by their names in the
            injected part; None where a file of an earlier version does not tell.
        strict: whether tensors besides adapters and heads are checked too.
        kept: beginnings of the names of what the model keeps, whatever `state` has.
    """
    if any(isinstance(module, AdaptedLayer) and module.merged for module in model.modules()):
        raise ConfigurationError(f"{source} cannot be loaded into merged adapters: call unmerge first")
    prefix, root = find_injected(model) or ("", model)
    loaded = {f"{prefix}{name}" for name in unfrozen or ()}
    frozen, present = frozen_names(model) - loaded, model.state_dict()
    required = [name for name in present if name not in frozen and not name.startswith(kept or ())]
    _check_frozen(state, [f"{prefix}{n}" for n in _base_parameters(root)], frozen, loaded, source, known=unfrozen)
    if not strict:  # other code's tensors, such as those of metrics, may come and go
        ours = {prefix + name for name in trained_parameter_names(root)}
        required = [name for name in required if name in ours]
        state = {name: value for name, value in state.items() if name in present or ".adapters." in name}
    check_tensors(state, present, required, source)


def _check_frozen(
    state: Mapping[str, Any],
    base: Iterable[str],
    frozen: set[str],
    loaded: set[str],
    source: str,
    known: Iterable[str] | None,
) -> None:
    """Raises `CheckpointError` where frozen weights would be replaced; says in a line which of the base are."""
    base = [name for name in base if name in state]
    if replaced := [name for name in base if name in frozen]:
        what = f"{len(replaced)} frozen weights of the base ({listed(replaced, 3)})"
        if known is not None:
            raise CheckpointError(
                f"{source} also holds {what}, which nothing has trained: it was not written so by this package; they "
                "would replace the model's own, so take them out, or give another file"
            )
        warnings.warn(f"{source}, of an earlier version, also holds {what}: they replace the model's", stacklevel=4)
    elif taken := [name for name in base if name in loaded]:
        what = f"{len(taken)} weights of the base that were unfrozen in its training ({listed(taken, 3)})"
        warnings.warn(f"{source} also holds {what}: they replace the model's", stacklevel=4)


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
    # The layers, whether they are those of the base, and the shapes of the heads.
    modules = dict(model.named_modules())
    if absent := [path for path in config["layers"] if path not in modules]:
        raise CheckpointError(f"{source} adapts {listed(absent, 3)}, which {type(model).__name__} does not have")
    if check_base:
        own = {k: {p: fingerprint_of(model, p) for p in config.get(k, ())} for k in ("fingerprint", "rest_of_base")}
        check_same_base(config, own["fingerprint"], own["rest_of_base"], source, held=state)
    present = model.state_dict()  # which has no adapters yet
    check_tensors({name: value for name, value in state.items() if name in present}, present, (), source)
    # And those of the adapters, before any memory is taken for them.
    planned = planned_tensors(model, method_from_spec(config["method"]), config["targets"], config["fused"])
    check_tensors({name: value for name, value in state.items() if name in planned}, planned, planned, source)


def check_same_base(
    saved: Mapping[str, Any],
    layers: Mapping[str, str],
    rest: Mapping[str, str],
    source: str,
    *,
    held: Container[str] = (),
) -> None:
    """Raises `CheckpointError` where a base is not the one trained on; warns of what could not be compared.

    Args:
        saved: what `Injection.spec` gave.
        layers: the model's own `Injection.fingerprint`.
        rest: the model's own `Injection.rest_of_base`.
        source: where `saved` comes from, for the message.
        held: names of the tensors that are loaded, and so need not be those of the base: buffers, what was unfrozen.
    """
    # The file of an earlier version says nothing of the rest.
    then, now = ({**saved["fingerprint"], **saved.get("rest_of_base", rest)}, {**layers, **rest})
    if wrong := [name for name in differing(then, now) if name not in held]:
        hint = ""
        if not {*wrong} & {*layers}:
            hint = "; none of them is adapted: if they are new and random, fit again with their modules in trainable"
        elif all(may_be_halves(then.get(name, ""), now.get(name, "")) for name in wrong):
            hint = (
                "; is one a bfloat16 copy and the other a float16 copy of one base? Rounding alone makes them differ: "
                "load it in the type that was trained on"
            )
        count = f"{len(wrong)} of {len(now)} frozen tensors differ: {listed(wrong, 3)}"
        raise CheckpointError(f"{source} was trained on another base: {count}{hint}")
    if "rest_of_base" not in saved and rest:
        _warn(
            f"{source} is of an earlier version and describes the adapted layers only: whether the {len(rest)} other "
            "frozen tensors are those trained on could not be compared"
        )
    if unknown := not_comparable(then, now):
        _warn(f"{source}: {len(unknown)} of {len(now)} frozen tensors could not be compared: {listed(unknown, 3)}")


def _warn(message: str) -> None:
    """Warns on the first process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        warnings.warn(message, stacklevel=2)


def check_injection(saved: Mapping[str, Any], present: Injection, source: str, *, held: Container[str] = ()) -> None:
    """Raises `CheckpointError` where a saved injection is of another method, target set, head or base.

    Args:
        saved: what `Injection.spec` gave.
        present: the model's.
        source: where `saved` comes from, for the message.
        held: names of the tensors that are loaded, see `check_same_base`.
    """
    # The method, but for what may differ at run time.
    method = method_from_spec(saved["method"])
    own, other = _lasting(method), _lasting(present.method)
    if own != other:
        raise CheckpointError(f"{source} is of {_differences(own, other)}, the model has {_differences(other, own)}")
    # The layers and slices, not the expressions, since several expressions can name the same.
    layers = {path: tuple(slices) for path, slices in saved["layers"].items()}
    if layers != present.layers:
        apart = [path for path in {**layers, **present.layers} if layers.get(path) != present.layers.get(path)]
        ours = f"the model {len(present.layers)} by {list(present.targets)}"
        differ = f"{ours}; they differ at {listed(apart, 3)}"
        raise CheckpointError(f"{source} adapts {len(layers)} layers by {saved['targets']}, {differ}")
    # The heads, and then the base itself.
    if tuple(saved["trained_modules"]) != present.trained_modules:
        heads = f"{saved['trained_modules']} in full, the model {list(present.trained_modules)}"
        raise CheckpointError(f"{source} trains {heads}: give the same trainable")
    check_same_base(saved, present.fingerprint, present.rest_of_base, source, held=held)


def _lasting(method: Method) -> dict[str, Any]:
    """The class and the hyperparameters that must agree between a checkpoint and the model that loads it."""
    spec = method.spec()  # primitives, as a checkpoint has them
    kept = {name: value for name, value in spec["init_args"].items() if name not in method.runtime_fields}
    return {"class_path": spec["class_path"], **kept}


def _differences(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """A method's name, with the hyperparameters in which it differs from another of its class."""
    name = own["class_path"].rpartition(".")[2]
    if own["class_path"] != other["class_path"]:
        return name
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in own.items() if other.get(key) != value)})"
