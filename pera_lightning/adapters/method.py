"""Methods: frozen dataclasses of hyperparameters, and the two doors by which they reach a model.

A method holds no tensors, validates itself and round-trips through YAML and JSON. `LinearMethod.build` makes one
layer's adapter; `Method.apply` adapts a whole model, which by default means: build one adapter per target.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pera_lightning.adapters.base import LinearAdapter, adapt_layer, base_weight
from pera_lightning.errors import ConfigurationError
from pera_lightning.validation import check_in_range, check_positive, check_positive_int

MAX_SEED = 2**63 - 1
Merging = Literal["exact", "approximate", "none"]


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """What a method may need to build the adapter of one linear map (or of one row block of a fused one).

    Attributes:
        path: the module's path in the model, for messages and seeds.
        block: the row block's name, ``"all"`` for a plain layer.
        weight: the frozen weight of these rows, shape (out, in); never written to.
        bias: the frozen bias of these rows, shape (out,), or None.
        seed: the run's seed; `generator` mixes path and block into it.
        previous: the same rows of the layer of the same role before this one, shape (out, in), or None at the start.
        next: likewise of the layer after this one, or None at the end.
    """

    path: str
    weight: Tensor
    block: str = "all"
    bias: Tensor | None = None
    seed: int = 0
    previous: Tensor | None = None
    next: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def layer_arguments(self) -> dict[str, Any]:
        """What every adapter layer takes from its place: in_features, out_features, device."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "device": self.weight.device,
        }

    def generator(self, purpose: str = "init", seed: int | None = None) -> torch.Generator:
        """A CPU generator that depends on seed, path, block and purpose alone, not on the order of injection.

        Args:
            purpose: separates several uses within one layer.
            seed: replaces the run's seed.
        """
        text = f"{self.seed if seed is None else seed}|{self.path}|{self.block}|{purpose}"
        value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") & MAX_SEED
        return torch.Generator(device="cpu").manual_seed(value)

    def __str__(self) -> str:
        rows = "" if self.block == "all" else f"[{self.block}]"
        return f"{self.path}{rows} ({self.out_features} x {self.in_features})"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One linear layer to adapt.

    Attributes:
        path: its path in the model.
        module: the layer itself, `nn.Linear` or transformers' `Conv1D`.
        blocks: row block name to (first row, one past the last row); ``{"all": (0, out)}`` for a plain layer.
        previous: the layer of the same role and shape before it, or None.
        next: likewise after it.
    """

    path: str
    module: nn.Module
    blocks: dict[str, tuple[int, int]]
    previous: nn.Module | None = None
    next: nn.Module | None = None


@dataclass
class InjectionReport:
    """What an injection did.

    Attributes:
        method: the method, as its constructor call.
        matched: path of each adapted layer to its row blocks.
        trained_modules: paths of the modules trained whole (heads).
        adapter_parameters: number of parameters in adapters.
        trainable_parameters: number of all trained parameters, heads included.
        total_parameters: number of parameters of base, adapters and heads, shared ones counted once.
        shapes: path of each adapted layer to (out, in).
        notes: one line for each thing that a reader should know.
    """

    method: str
    matched: dict[str, tuple[str, ...]] = field(default_factory=dict)
    trained_modules: tuple[str, ...] = ()
    adapter_parameters: int = 0
    trainable_parameters: int = 0
    total_parameters: int = 0
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def percent(self) -> float:
        """Trained parameters as a percentage of all (base and trained)."""
        return 100.0 * self.trainable_parameters / max(1, self.total_parameters)

    def __str__(self) -> str:
        lines = [f"Injected {self.method}"]
        rows = [
            (name, f"{n} x" if n > 1 else "", f"{o} x {i}", rows) for (name, o, i, rows), n in self._kinds().items()
        ]
        if rows:
            widths = [max(len(row[k]) for row in rows) for k in range(4)]
            lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        heads = self.trainable_parameters - self.adapter_parameters
        if self.trained_modules:
            lines.append(f"  trained whole: {', '.join(self.trained_modules)}")
        lines.append(
            f"  trainable {self.trainable_parameters:,} (adapters {self.adapter_parameters:,}, other {heads:,}) "
            f"of {self.total_parameters:,}: {self.percent:.4f} %"
        )
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def _kinds(self) -> dict[tuple[str, int, int, str], int]:
        """Counts layers that differ in their layer number only."""
        kinds: dict[tuple[str, int, int, str], int] = {}
        for path, blocks in self.matched.items():
            name = ".".join("*" if part.isdigit() else part for part in path.split("."))
            rows = "" if blocks == ("all",) else f"rows {', '.join(blocks)}"
            key = (name, *self.shapes[path], rows)
            kinds[key] = kinds.get(key, 0) + 1
        return kinds


class Method(ABC):
    """Base of all methods. Subclasses are frozen keyword-only dataclasses, registered by `register_method`.

    `runtime_fields` names the hyperparameters that may differ between a checkpoint and the model that loads it,
    since they change no stored tensor and no trained function (dropout, say). `merging` says whether the update can be
    added to the frozen weight: "exact" (to rounding), "approximate" (a linear map in place of a nonlinear one, which
    has to be asked for), or "none" (there is no matrix, or nothing to merge).
    """

    needs_targets: ClassVar[bool] = True
    merging: ClassVar[Merging] = "none"
    runtime_fields: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def apply(self, model: nn.Module, targets: Sequence[Target], trainable: Sequence[str], seed: int) -> list[str]:
        """Adapts `model` in place.

        Freezing, counting and the report are `inject`'s; the method only changes modules.

        Args:
            model: the whole model.
            targets: the layers that the user's target expressions name; empty where `needs_targets` is False.
            trainable: paths of the modules that will be trained whole.
            seed: the run's seed, for initial values.

        Returns:
            Notes for the report, one line each.
        """

    def trains(self, name: str) -> bool:
        """Whether the method trains the base parameter called `name` (adapters and heads are trained anyway)."""
        return False

    @property
    def export_rank(self) -> int | None:
        """Rank of the LoRA that the update of a layer (or, if approximate, its merge) exactly is; None for none."""
        return None

    def spec(self) -> dict[str, Any]:
        """The method as primitives: ``{"class_path": …, "init_args": {…}}``, what `method_from_spec` takes."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": plain}

    def __str__(self) -> str:
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in values.items())})"


class LinearMethod(Method):
    """A method that adapts each linear layer by itself."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"dropout"})

    @abstractmethod
    def build(self, context: LayerContext) -> LinearAdapter:
        """Makes the adapter of one linear map, initialised, float32, on the weight's device.

        Args:
            context: the layer; see `LayerContext`.

        Raises:
            ConfigurationError: where the hyperparameters do not fit the layer (a rank larger than it).
        """

    def apply(self, model: nn.Module, targets: Sequence[Target], trainable: Sequence[str], seed: int) -> list[str]:
        """Builds one adapter per row block of each target and attaches it; see `Method.apply`."""
        # Build everything first: an error in the last layer leaves the model as it was.
        built = []
        for target in targets:
            weight, bias = base_weight(target.module).detach(), target.module.bias
            around = [None if m is None else base_weight(m).detach() for m in (target.previous, target.next)]
            adapters = {}
            for block, (first, last) in target.blocks.items():
                rows = slice(first, last)
                previous, following = (None if w is None else w[rows] for w in around)
                adapters[block] = self.build(
                    LayerContext(
                        path=target.path,
                        block=block,
                        weight=weight[rows],
                        bias=None if bias is None else bias.detach()[rows],
                        seed=seed,
                        previous=previous,
                        next=following,
                    )
                )
            built.append((target, adapters))
        for target, adapters in built:
            adapt_layer(target.module, adapters, target.blocks)
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


def check_fits(context: LayerContext, rank: int, name: str = "rank") -> None:
    """Raises `ConfigurationError` where `rank` exceeds the smaller side of the layer."""
    most = min(context.out_features, context.in_features)
    if rank > most:
        raise ConfigurationError(f"{name}={rank} is larger than {context} allows: at most {most}")
