"""What the adapter tests share: the cases of the contract test and small helpers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pera_lightning.adapters import (
    AdaptedLayer,
    AuroRA,
    HiRA,
    LinearAdapter,
    LinearMethod,
    LoRA,
    registered_methods,
)
from pera_lightning.injection.inject import inject

IN, OUT = 10, 12
STATIC = AuroRA(train_mode="static", inference_mode="static")

# Hyperparameters of each method to test besides its defaults. A new method is tested with its defaults at once.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "LoRA": [{"rank": 3, "init": "gaussian"}, {"rank": 3, "init": "pissa"}, {"rank": 2, "init": "milora"}],
    "PERA": [
        {"rank": 3, "terms": "square"},
        {"rank": 3, "terms": "cross"},
        {"rank": 3, "terms": "linear"},
        {"rank": 1, "terms": "cross"},
        {"rank": 3, "init": "gaussian_b"},
    ],
    "HiRA": [
        {"rank": 3, "reference": "random", "scale": 0.7},
        {"rank": 3, "reference": "svd", "reference_rank": 2},
        {"rank": 3, "reference": "smooth"},
    ],
    "HiLoRA": [{"hira_rank": 2, "lora_rank": 3, "alpha": 5.0}],
    "AuroRA": [
        {"rank": 3, "activation": "leaky_relu"},
        {"rank": 3, "activation": "sigmoid", "grid_size": 3, "spline_order": 2},
        {"rank": 3, "activation": "relu", "grid_range": (-2.0, 1.5)},
        {"rank": 3, "train_mode": "static", "inference_mode": "static"},
        {"rank": 3, "fixed": False},
        {"rank": 3, "learnable": False},
    ],
    "MoSLoRA": [{"rank": 3, "mixer_init": "orthogonal"}],
}

# Another value for every hyperparameter: each must change what the layer does. Values that need company bring it.
OTHER_VALUES: dict[str, dict[str, dict[str, Any]]] = {
    "LoRA": {"rank": {"rank": 3}, "alpha": {"alpha": 5.0}, "dropout": {"dropout": 0.5}, "init": {"init": "pissa"}},
    "PERA": {
        "rank": {"rank": 3},
        "alpha": {"alpha": 5.0},
        "dropout": {"dropout": 0.5},
        "terms": {"terms": "cross"},
        "init": {"init": "gaussian_b"},
        "init_std": {"init": "gaussian_b", "init_std": 0.3},
    },
    "HiRA": {
        "rank": {"rank": 3},
        "scale": {"scale": 0.7},
        "dropout": {"dropout": 0.5},
        "reference": {"reference": "random"},
        "reference_rank": {"reference": "svd", "reference_rank": 2},
        "reference_seed": {"reference": "random", "reference_seed": 3},
    },
    "HiLoRA": {
        "hira_rank": {"hira_rank": 2},
        "lora_rank": {"lora_rank": 2},
        "alpha": {"alpha": 5.0},
        "dropout": {"dropout": 0.5},
    },
    "AuroRA": {
        "rank": {"rank": 3},
        "alpha": {"alpha": 5.0},
        "dropout": {"dropout": 0.5},
        "activation": {"activation": "relu"},
        "train_mode": {"train_mode": "static"},
        "inference_mode": {"inference_mode": "static"},
        "grid_size": {"grid_size": 4},
        "spline_order": {"spline_order": 2},
        "grid_range": {"grid_range": (-2.0, 2.0)},
        "fixed": {"fixed": False},
        "learnable": {"learnable": False},
    },
    "MoSLoRA": {
        "rank": {"rank": 3},
        "alpha": {"alpha": 5.0},
        "dropout": {"dropout": 0.5},
        "mixer_init": {"mixer_init": "orthogonal"},
    },
}


def linear_methods() -> dict[str, type[LinearMethod]]:
    return {name: cls for name, cls in registered_methods().items() if issubclass(cls, LinearMethod)}


def cases() -> list[LinearMethod]:
    """Every registered per-linear method: as it is by default, then its variants."""
    return [cls(**values) for name, cls in linear_methods().items() for values in [{}, *VARIANTS.get(name, [])]]


def case_id(method: LinearMethod) -> str:
    """The method's name and what differs from its defaults."""
    plain = {field.name: field.default for field in dataclasses.fields(method)}
    changed = {name: value for name, value in dataclasses.asdict(method).items() if plain[name] != value}
    return "-".join([type(method).__name__, *(f"{name}={value}" for name, value in changed.items())])


# By default, and the variants whose layers hold other tensors or run other code.
PATHS = [*(cls() for cls in linear_methods().values()), LoRA(init="pissa"), HiRA(reference="random"), STATIC]

every_method = pytest.mark.parametrize("method", cases(), ids=case_id)
# For what a layer does with its update, whatever the formula: a method's variants would only repeat it.
every_path = pytest.mark.parametrize("method", PATHS, ids=case_id)


def starts_from_the_weight(method: LinearMethod) -> bool:
    return getattr(method, "init", None) in ("pissa", "milora")


def network(*, bias: bool = True, out: int = OUT, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A model of one linear layer, called "proj"."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("proj", nn.Linear(IN, out, bias=bias))
    return model.to(dtype)


def adapted(method: LinearMethod, *, spread: float | None = 0.5, double: bool = True, **options: Any) -> AdaptedLayer:
    """The adapted layer of `network(**options)`, its adapter randomised unless `spread` is None, in eval mode."""
    model = network(**options)
    inject(model, method, targets=["proj"], seed=0)
    if double:
        model.double()
    if spread is not None:
        randomise(model, spread)
    return model.eval().proj


@torch.no_grad()
def randomise(module: nn.Module, spread: float = 0.5, seed: int = 1) -> None:
    """Draws every adapter parameter from a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters_of(module):
        for parameter in adapter.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def adapters_of(module: nn.Module) -> list[LinearAdapter]:
    return [m for m in module.modules() if isinstance(m, LinearAdapter)]


def the_adapter(layer: AdaptedLayer) -> LinearAdapter:
    return layer.adapters["all"]


def inputs(n: int = 3, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
    return torch.randn(n, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
