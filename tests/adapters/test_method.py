"""Methods refuse bad values by name, and say what is allowed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch import nn

from pera_lightning.adapters import PERA, AuroRA, HiLoRA, HiRA, InjectionReport, LinearMethod, LoRA, Method
from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.errors import ConfigurationError, UnknownNameError
from pera_lightning.injection.inject import inject
from tests.adapters.cases import case_id, cases, network

METHODS = [LoRA, PERA, HiRA, HiLoRA, AuroRA]
RANKS = [(cls, name.name) for cls in METHODS for name in dataclasses.fields(cls) if name.name.endswith("rank")]


# What else is refused as a number: tests/test_validation.py.
@pytest.mark.parametrize(("cls", "name"), RANKS)
@pytest.mark.parametrize("value", [0])
def test_ranks_are_positive_integers(cls: type[Method], name: str, value: Any) -> None:
    company = {"reference": "svd"} if name == "reference_rank" else {}
    with pytest.raises(ConfigurationError, match=f"{name}={value!r}: a positive integer"):
        cls(**{name: value}, **company)


@pytest.mark.parametrize(("cls", "name"), RANKS)
def test_ranks_fit_the_layer(cls: type[Method], name: str) -> None:
    company = {"reference": "svd"} if name == "reference_rank" else {}
    model = network()
    with pytest.raises(ConfigurationError, match=rf"{name}=11 is larger than proj \(12 x 10\) allows: at most 10"):
        inject(model, cls(**{name: 11}, **company), targets=["proj"])
    assert type(model.proj) is nn.Linear
    inject(model, cls(**{name: 10}, **company), targets=["proj"])


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("value", [0])
def test_scales_are_positive(cls: type[Method], value: Any) -> None:
    name = "scale" if cls is HiRA else "alpha"
    with pytest.raises(ConfigurationError, match=f"{name}={value!r}: a number above 0"):
        cls(**{name: value})


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("value", [1.0, -0.1])
def test_dropout_is_a_probability_below_one(cls: type[Method], value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"dropout=.*: a number in \[0, 1\)"):
        cls(dropout=value)
    assert cls(dropout=0).dropout == 0


@pytest.mark.parametrize(
    ("cls", "name", "value", "suggestion"),
    [
        (LoRA, "init", "pisa", "pissa"),
        (PERA, "terms", "squares", "square"),
        (PERA, "init", "gaussian", "gaussian_b"),
        (HiRA, "reference", "weights", "weight"),
        (AuroRA, "activation", "tan", "tanh"),
        (AuroRA, "activation", "leakyrelu", "leaky_relu"),
        (AuroRA, "train_mode", "statik", "static"),
        (AuroRA, "inference_mode", "dynamik", "dynamic"),
    ],
)
def test_unknown_names_get_a_suggestion(cls: type[Method], name: str, value: str, suggestion: str) -> None:
    with pytest.raises(UnknownNameError, match=f"{name}='{value}' does not exist; one of .*closest: {suggestion}"):
        cls(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fixed": False, "learnable": False}, "leave no nonlinear layer"),
        ({"grid_range": (1.0, -1.0)}, "two increasing numbers"),
        ({"grid_range": (0.0, 0.0)}, "two increasing numbers"),
        ({"grid_range": (0.0, float("nan"))}, "two increasing numbers"),
        ({"grid_range": (0.0, float("inf"))}, "two increasing numbers"),
        ({"grid_range": (0.0,)}, "two increasing numbers"),
        ({"grid_range": 2.0}, "two increasing numbers"),
        ({"grid_range": "ab"}, "two increasing numbers"),
        ({"grid_size": 0}, "grid_size=0: a positive integer"),
        ({"spline_order": 0}, "spline_order=0: a positive integer"),
    ],
)
def test_aurora_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AuroRA(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reference": "svd"}, "reference_rank=None: a positive integer"),
        ({"reference_rank": 4}, "reference_rank=4 acts with reference='svd' only"),
        ({"reference_seed": 4}, "reference_seed=4 acts with reference='random' only"),
        ({"reference": "smooth", "reference_seed": 0}, "acts with reference='random' only"),
    ],
)
def test_hira_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        HiRA(**values)


def test_gaussian_b_needs_a_spread() -> None:
    with pytest.raises(ConfigurationError, match="init_std=0"):
        PERA(init="gaussian_b", init_std=0)


@pytest.mark.parametrize("method", cases(), ids=case_id)
def test_equal_methods_are_equal_and_hashable(method: LinearMethod) -> None:
    assert method == dataclasses.replace(method)
    assert len({method, dataclasses.replace(method)}) == 1
    assert type(method).__name__ in str(method)


def test_an_error_in_the_last_layer_leaves_the_first_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    with pytest.raises(ConfigurationError, match=r"rank=8 is larger than 1 \(4 x 32\)"):
        inject(model, LoRA(rank=8), targets=["0", "1"])
    assert not any(isinstance(m, AdaptedLayer) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_report_of_nothing_prints() -> None:
    assert "0 of 0" not in str(InjectionReport(method="none", total_parameters=1))
    assert InjectionReport(method="none").percent == 0.0
