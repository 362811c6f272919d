"""Methods: frozen dataclasses of hyperparameters, and how they adapt a model.

A method holds no tensors, validates itself and round-trips through YAML and JSON. `LinearMethod.build` makes one
layer's adapter; `Method.apply` adapts a model, which by default means: build the adapters of every target.
How to add one stands at the head of `registry.py`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from pera_lightning.adapters.adapted_layer import adapt_layer, base_weight
from pera_lightning.adapters.base import LayerContext, LinearAdapter
from pera_lightning.validation import check_in_range, check_positive, check_positive_int

Merging = Literal["exact", "approximate", "none"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One linear layer to adapt.

    Attributes:
        path: its path in the model.
        module: the layer itself, `nn.Linear` or transformers' `Conv1D`.
        slices: name of each slice to its output features; ``{"all": slice(0, out)}`` for a plain layer.
    """

    path: str
    module: nn.Module
    slices: dict[str, slice]


class Method(ABC):
    """Base of all methods. Subclasses are frozen keyword-only dataclasses, registered by `register_method`.

    `runtime_fields` names the hyperparameters that may differ between a checkpoint and the model that loads it,
    since they change no stored tensor and no trained function (dropout, say). `merging` says whether the update can be
    added to the frozen weight: "exact" (to rounding), "approximate" (a linear map in place of a nonlinear one, which
    has to be asked for), or "none" (no matrix exists, or nothing needs merging).
    """

    needs_targets: ClassVar[bool] = True
    merging: ClassVar[Merging] = "none"
    runtime_fields: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def apply(self, model: nn.Module, targets: Sequence[Target], trainable: Sequence[str], seed: int) -> list[str]:
        """Adapts `model` in place.

        Freezing, counting and the report are `inject`'s; the method only changes modules.

        Args:
            model: the entire model.
            targets: the layers that the user's target expressions name; empty where `needs_targets` is False.
            trainable: paths of the modules that will be trained in full.
            seed: the run's seed, for initial values.

        Returns:
            Notes for the report, one line each.
        """

    def trains(self, name: str) -> bool:
        """Whether the method trains the base parameter called `name` (adapters and heads are trained anyway)."""
        return False

    @property
    def export_rank(self) -> int | None:
        """Rank of the LoRA that a layer's update (or, if approximate, its merge) exactly is; None where it is not."""
        return None

    def spec(self) -> dict[str, Any]:
        """The method as primitives: ``{"class_path": …, "init_args": {…}}``, what `method_from_spec` takes."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        # YAML and JSON know no tuples.
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": plain}

    def __str__(self) -> str:
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in values.items())})"


class LinearMethod(Method):
    """A method that adapts each linear layer by itself. A subclass names its `layer`, or overrides `build`."""

    layer: ClassVar[type[LinearAdapter]]
    runtime_fields: ClassVar[frozenset[str]] = frozenset({"dropout"})

    def build(self, context: LayerContext) -> LinearAdapter:
        """Makes the adapter of one linear map, initialised, float32, on the weight's device."""
        adapter = self.layer(context, self)  # type: ignore[call-arg]
        adapter.reset_parameters(context.generator())  # the same values whatever was drawn before
        return adapter

    def apply(self, model: nn.Module, targets: Sequence[Target], trainable: Sequence[str], seed: int) -> list[str]:
        """Builds one adapter per slice of each target and attaches it; see `Method.apply`."""
        # Build everything first: an error in the last layer leaves the model as it was.
        built = []
        for target in targets:
            weight, bias = base_weight(target.module).detach(), target.module.bias
            adapters = {}
            for name, rows in target.slices.items():
                own = {"weight": weight[rows], "bias": None if bias is None else bias.detach()[rows]}  # views
                adapters[name] = self.build(LayerContext(path=target.path, slice=name, seed=seed, **own))
            built.append((target, adapters))
        # Only now change the model.
        for target, adapters in built:
            adapt_layer(target.module, adapters, target.slices)
        return []


@dataclass(frozen=True, kw_only=True)
class LowRankMethod(LinearMethod):
    """A linear method with a rank and a scale s = alpha / rank.

    Args:
        rank: r.
        alpha: the scale is alpha / rank.
        dropout: probability on the update's input, in training.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int(self.rank, "rank")
        check_positive(self.alpha, "alpha")
        check_in_range(self.dropout, "dropout", ge=0, lt=1)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def export_rank(self) -> int:  # one product of two factors, unless a method says otherwise
        return self.rank
