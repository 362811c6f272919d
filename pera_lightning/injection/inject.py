"""Injection: adapts the targeted layers of a model, freezes the rest and reports.

One definition of "trained", by structure, serves freezing, counting, saving and loading: the parameters of every
`LinearAdapter`, of the modules named in `trainable`, and those that the method itself claims (`Method.trains`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pera_lightning.adapters.adapted_layer import AdaptedLayer, base_weight
from pera_lightning.adapters.base import LinearAdapter, plain_name
from pera_lightning.adapters.method import Method, Target
from pera_lightning.adapters.report import InjectionReport
from pera_lightning.errors import AlreadyInjectedError, ConfigurationError, listed
from pera_lightning.injection.fingerprint import fingerprint, rest_of_base
from pera_lightning.injection.fused_projections import call_the_layer
from pera_lightning.injection.new_layers import new_and_frozen
from pera_lightning.injection.targets import match_modules, resolve

_MARK = "_pera_injection"  # attribute of an injected model; a plain one, so it is in no state dict


@dataclass(frozen=True)
class Injection:
    """What was injected into a model; kept on the model, and as primitives in its checkpoints."""

    method: Method
    targets: tuple[str, ...]  # expressions, as given
    trainable: tuple[str, ...]  # names of the modules trained in full, as given
    fused: dict[str, dict[str, int]]  # sizes of the slices of fused projections, as given
    seed: int  # of the initial values
    layers: dict[str, tuple[str, ...]]  # path of each adapted layer to the names of its slices
    trained_modules: tuple[str, ...]  # paths of the modules trained in full
    fingerprint: dict[str, str] = field(repr=False)  # path of each adapted layer to its shape and hash
    rest_of_base: dict[str, str] = field(repr=False)  # the same of all other frozen tensors, by name
    report: InjectionReport = field(repr=False)  # what is printed for people
    # Of the data it was trained with, as far as they say it; see `pera_lightning.training.training_data`.
    class_names: tuple[str, ...] | None = None  # by label
    trained_on: dict[str, Any] | None = field(default=None, repr=False)  # data set, split, seed, digest …
    trained_examples: torch.Tensor | None = field(default=None, repr=False, compare=False)  # (n,) int64, their hashes

    def spec(self) -> dict[str, Any]:
        """Primitives that `inject` can be repeated from."""
        return {
            "method": self.method.spec(),
            "targets": list(self.targets),
            "trainable": list(self.trainable),
            "fused": {name: dict(sizes) for name, sizes in self.fused.items()},
            "seed": self.seed,
            "layers": {path: list(slices) for path, slices in self.layers.items()},
            "trained_modules": list(self.trained_modules),
            "fingerprint": dict(self.fingerprint),
            "rest_of_base": dict(self.rest_of_base),
            "class_names": None if self.class_names is None else list(self.class_names),
            "trained_on": self.trained_on,
        }


def injection_of(model: nn.Module) -> Injection | None:
    """What was injected into `model`, or None."""
    return getattr(model, _MARK, None)


def inject(
    model: nn.Module,
    method: Method,
    targets: Sequence[str] | str = (),
    trainable: Sequence[str] | str = (),
    *,
    fused: Mapping[str, Mapping[str, int]] | None = None,
    seed: int | None = None,
) -> InjectionReport:
    """Adapts a model in place and freezes everything but adapters and heads.

    New adapters are in training mode, so their dropout acts until ``model.eval()``. Load the base weights before:
    references and initial values taken from them (HiRA's, PiSSA's) are not recomputed.

    Args:
        model: any module; layers are adapted where they are, no key of its state dict changes.
        method: a method, e.g. ``PERA(rank=16)``.
        targets: expressions that name linear layers, see `pera_lightning.injection.targets`.
        trainable: modules that are trained in full (heads), by name or glob.
        fused: sizes of the slices of fused projections whose layout is not known, e.g.
            ``{"qkv_proj": {"q": 4096, "k": 1024, "v": 1024}}``.
        seed: seed of the initial values; by default torch's.

    Returns:
        The report. Doing it twice with the same arguments changes nothing and returns the first report.

    Raises:
        NoTargetMatched: where an expression matches nothing.
        UnsupportedTarget: where a layer cannot be adapted.
        AlreadyInjectedError: where the model is adapted already in another way.
        ConfigurationError: for values that do not fit the model.
    """
    if not isinstance(method, Method):
        raise ConfigurationError(f"method={method!r}: an adapter method such as LoRA(rank=8) is needed")
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    trainable = (trainable,) if isinstance(trainable, str) else tuple(trainable)
    fused = {name: dict(sizes) for name, sizes in (fused or {}).items()}
    # The same again changes nothing; anything else on top is refused.
    done = injection_of(model)
    if done is not None:
        same = (done.method, done.targets, done.trainable, done.fused) == (method, targets, trainable, fused)
        if same and seed in (None, done.seed):
            return done.report
        given = f"this model has {done.method} on {list(done.targets)} already, with seed {done.seed}"
        wanted = f"{method} on {list(targets)} with seed {done.seed if seed is None else seed}"
        raise AlreadyInjectedError(f"{given}; build it anew to inject {wanted}")
    if any(isinstance(module, AdaptedLayer) for module in model.modules()):
        raise AlreadyInjectedError("a part of this model is adapted already; inject into the entire model once")
    if method.needs_targets and not targets:
        raise ConfigurationError(f"{type(method).__name__} adapts linear layers: name them in targets=[…]")
    seed = torch.initial_seed() if seed is None else seed  # the same in all processes that were seeded alike

    # Find and check everything before anything is changed: an error leaves the model as it was.
    trained_modules = match_modules(model, trainable, "trainable")
    resolved = resolve(model, targets, fused) if method.needs_targets else []
    _check_trainable(model, method, resolved, trained_modules)

    # Adapt, make sure that the adapted layers are called, and freeze the rest.
    notes = [f"targets are not used by {type(method).__name__}"] if targets and not method.needs_targets else []
    notes += method.apply(model, resolved, trained_modules, seed)
    for target in resolved:  # some modules read the weight of a linear and never call it
        owner, _, name = target.path.rpartition(".")
        notes.append(call_the_layer(model, model.get_submodule(owner), name))
    trained, parameters = _trained(model, method, trained_modules), model.named_parameters(remove_duplicate=False)
    # The trained ones last: a parameter that a head and the base share is the head's, and trained.
    for name, parameter in sorted(parameters, key=lambda item: item[0] in trained):
        parameter.requires_grad_(name in trained)

    # Remember what was done, and report it.
    known = fingerprint(model, [target.path for target in resolved])
    mark = Injection(
        method=method,
        targets=targets,
        trainable=trainable,
        fused=fused,
        seed=seed,
        layers={target.path: tuple(target.slices) for target in resolved},
        trained_modules=trained_modules,
        fingerprint=known,
        rest_of_base=rest_of_base(model, known, trained, trained_modules),
        report=_report(model, method, resolved, trained_modules, notes),  # counts what is trained by now
    )
    setattr(model, _MARK, mark)
    if new := new_and_frozen(model):
        warnings.warn(
            f"{listed(new)} of {type(model).__name__} is frozen, and neither a target nor in trainable: if new, it "
            f"is random and stays so; trainable=[{', '.join([*trainable, *new])}] trains it",
            stacklevel=2,
        )
    return mark.report


def _check_trainable(model: nn.Module, method: Method, targets: list[Target], trained_modules: Sequence[str]) -> None:
    """Raises `ConfigurationError` for targets within modules trained in full, and weights that have no gradient."""
    for path, module in ((target.path, module) for target in targets for module in trained_modules):
        if f"{path}.".startswith(f"{module}."):
            raise ConfigurationError(f"{path} is a target and part of {module!r}, which is trained in full")
    for name in _trained(model, method, trained_modules):
        if not model.get_parameter(name).is_floating_point():  # quantised
            raise ConfigurationError(f"{name} is {model.get_parameter(name).dtype} and cannot be trained")


def forget_injection(model: nn.Module) -> None:
    """Removes the mark of an injection; its adapters are to be removed by the caller."""
    delattr(model, _MARK)


def update_injection(model: nn.Module, **changes: Any) -> None:
    """Replaces fields of what is remembered of an injection: what was not known when it was made."""
    setattr(model, _MARK, replace(injection_of(model), **changes))  # type: ignore[type-var]


def adapter_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that belong to adapters."""
    return {  # adapters may lie within one another, as HiLoRA's
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, LinearAdapter)
        for name, _ in module.named_parameters()
    }


def trained_parameter_names(model: nn.Module) -> set[str]:
    """Names of the trained parameters of an injected model: adapters, heads, and what the method claims."""
    mark = injection_of(model)
    if mark is None:
        return set()
    return _trained(model, mark.method, mark.trained_modules)


def _trained(model: nn.Module, method: Method, trained_modules: Sequence[str]) -> set[str]:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]  # a tied parameter has two names
    heads = tuple(f"{module}." for module in trained_modules)
    return adapter_parameter_names(model) | {name for name in names if method.trains(name) or name.startswith(heads)}


def _report(
    model: nn.Module, method: Method, targets: list[Target], trained_modules: tuple[str, ...], notes: Sequence[str]
) -> InjectionReport:
    adapters = adapter_parameter_names(model)
    parameters = dict(model.named_parameters())
    notes = list(dict.fromkeys(note for note in notes if note))  # one for all layers of a kind
    if resting := sum(not module.training for module in model.modules()):
        idle = "base dropout and activation checkpointing do nothing there until .train() is called"
        notes.append(f"{resting} modules are in eval mode, as from_pretrained leaves them: {idle}")
    return InjectionReport(
        method=str(method),
        matched={plain_name(target.path): tuple(target.slices) for target in targets},
        shapes={plain_name(target.path): tuple(base_weight(target.module).shape) for target in targets},
        trained_modules=trained_modules,
        adapter_parameters=sum(parameters[name].numel() for name in adapters),
        trainable_parameters=sum(p.numel() for p in parameters.values() if p.requires_grad),
        total_parameters=sum(p.numel() for p in parameters.values()),  # shared ones once
        notes=notes,
    )
