"""The contract of every per-linear method: what it computes. A method is covered the moment it is registered."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from pera_lightning.adapters import AdaptedLinear, LinearMethod, method_from_spec
from pera_lightning.errors import NotMergeableError
from pera_lightning.injection.inject import inject
from tests.adapters import reference
from tests.adapters.cases import (
    IN,
    OTHER_VALUES,
    OUT,
    adapted,
    adapters_of,
    every_method,
    every_path,
    inputs,
    linear_methods,
    network,
    randomise,
    starts_from_the_weight,
    the_adapter,
)


def update(layer: AdaptedLinear, x: Tensor) -> Tensor:
    return layer(x) - F.linear(x, layer.weight, layer.bias)


def test_every_method_has_a_reference() -> None:
    missing = linear_methods().keys() - reference.REFERENCES.keys()
    assert not missing, f"write a plain-loop reference in tests/adapters/reference.py for {sorted(missing)}"


# --- mathematics ---


@every_method
def test_equals_the_reference(method: LinearMethod) -> None:
    layer, x = adapted(method), inputs()
    tensors = dict(the_adapter(layer).named_parameters()) | dict(the_adapter(layer).named_buffers())
    wanted = reference.output(method, tensors, x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-6)
    assert update(layer, x).abs().max() > 1e-3  # else the comparison says nothing


@every_method
def test_identity_at_the_start(method: LinearMethod) -> None:
    plain, x = network(), inputs(5, torch.float32)
    layer = adapted(method, spread=None, double=False)
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x), plain(x))


@every_path
def test_gradients_reach_the_adapter_and_nothing_else(method: LinearMethod) -> None:
    model = network()
    inject(model, method, targets=["proj"])
    x = inputs(dtype=torch.float32)
    for randomised in (False, True):
        if randomised:
            randomise(model)
        model.zero_grad()
        model(x).square().sum().backward()
        trained = {id(p) for adapter in adapters_of(model) for p in adapter.parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) not in trained:
                assert parameter.grad is None, name
                assert not parameter.requires_grad, name
            else:
                assert parameter.grad is not None, name
                assert not randomised or parameter.grad.abs().max() > 0, name


@every_path
def test_gradcheck(method: LinearMethod) -> None:
    layer = adapted(method)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    values = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (inputs(2).requires_grad_(), *values))


@every_path
def test_scale_acts_linearly(method: LinearMethod) -> None:
    field = next(name for name in ("alpha", "scale") if hasattr(method, name))
    start, x = adapted(method), inputs()
    outputs = []
    for value in (1.0, 2.0, 3.0):
        layer = adapted(dataclasses.replace(method, **{field: value}))
        layer.load_state_dict(start.state_dict())
        outputs.append(layer(x))
    torch.testing.assert_close(outputs[2] - outputs[1], outputs[1] - outputs[0])
    assert (outputs[1] - outputs[0]).abs().max() > 1e-3


@every_path
def test_the_bias_is_added_once_and_enters_no_product(method: LinearMethod) -> None:
    biased, bare, x = adapted(method, bias=True), adapted(method, bias=False), inputs()
    with torch.no_grad():
        bare.weight.copy_(biased.weight)
    bare.adapters = copy.deepcopy(biased.adapters)
    torch.testing.assert_close(biased(x), bare(x) + biased.bias)


@every_method
def test_delta_weight_is_the_update(method: LinearMethod) -> None:
    layer, x = adapted(method), inputs()
    adapter = the_adapter(layer)
    try:
        delta = adapter.delta_weight(layer.weight)
    except NotMergeableError:
        # Then the update must really be no matrix.
        assert not torch.allclose(update(layer, 2 * x), 2 * update(layer, x))
        return
    assert not delta.requires_grad
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + delta, layer.bias))
    half = adapted(method, dtype=torch.bfloat16, double=False)
    assert the_adapter(half).delta_weight(half.weight).dtype == torch.float32


# --- dropout ---


@every_path
def test_dropout_acts_in_training_only(method: LinearMethod) -> None:
    layer, x = adapted(dataclasses.replace(method, dropout=0.5)), inputs()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), adapted(method)(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@every_path
def test_dropout_acts_while_the_base_rests_in_eval_mode(method: LinearMethod) -> None:
    model = network().eval()
    inject(model, dataclasses.replace(method, dropout=0.5), targets=["proj"])
    randomise(model)
    assert not model.proj.training
    x = inputs(dtype=torch.float32)
    assert not torch.equal(model(x), model(x))


@every_path
def test_dropout_is_on_the_updates_input_only(method: LinearMethod) -> None:
    layer, x = adapted(dataclasses.replace(method, dropout=0.5)).train(), inputs()
    the_adapter(layer).dropout.p = 1.0  # drops the whole input of the update
    at_zero = adapted(method).train()(torch.zeros_like(x)) - layer.bias
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) + at_zero)


# --- the method itself ---


@every_method
def test_spec_round_trip(method: LinearMethod) -> None:
    assert method_from_spec(json.loads(json.dumps(method.spec()))) == method
    assert method_from_spec(yaml.safe_load(yaml.safe_dump(method.spec()))) == method


@every_path
def test_is_frozen_and_keyword_only(method: LinearMethod) -> None:
    name = dataclasses.fields(method)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(method, name, 4)
    with pytest.raises(TypeError):
        type(method)(4)


@every_path
def test_initial_values_depend_on_seed_and_path_only(method: LinearMethod) -> None:
    def start(targets: list[str], seed: int | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(IN, OUT) for name in ("one", "two")})
        torch.manual_seed(7)
        torch.rand(len(targets))  # what was drawn before must not matter
        state = torch.get_rng_state()
        inject(model, method, targets=targets, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return {name: p.clone() for name, p in model.named_parameters() if ".adapters." in name}

    def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return all(torch.equal(value, other[name]) for name, value in one.items())

    first = start(["one", "two"], 0)
    assert same(first, start(["two", "one"], 0))
    assert same({n: p for n, p in first.items() if n.startswith("two.")}, start(["two"], 0) | first)
    assert same(start(["two"], 0), first)
    assert same(start(["one"], None), start(["one"], 7))  # torch's own seed by default
    ones = {name.removeprefix("one."): p for name, p in first.items() if name.startswith("one.")}
    assert not all(torch.equal(p, first[f"two.{name}"]) for name, p in ones.items())
    if not starts_from_the_weight(method):
        assert not same(first, start(["one", "two"], 1))


def behaviour(method: LinearMethod) -> list[Tensor]:
    """What a method does, seen from outside: initial values, and outputs in training and inference."""
    model = network()
    inject(model, method, targets=["proj"], seed=0)
    start = [p.clone() for a in adapters_of(model) for p in a.parameters()]
    randomise(model)
    x = inputs(dtype=torch.float32)
    torch.manual_seed(0)
    return [*start, model.train()(x), model.eval()(x)]


@pytest.mark.parametrize("name", linear_methods())
def test_every_hyperparameter_changes_something(name: str) -> None:
    cls = linear_methods()[name]
    values = OTHER_VALUES.get(name, {})
    fields = [field.name for field in dataclasses.fields(cls)]
    assert list(values) == fields, f"give another value for each hyperparameter of {name} in tests/adapters/cases.py"
    for field in fields:
        company = {key: value for key, value in values[field].items() if key != field}
        without, given = behaviour(cls(**({} if field == "reference_rank" else company))), cls(**values[field])
        other = behaviour(given)
        changed = len(without) != len(other) or any(
            a.shape != b.shape or not torch.equal(a, b) for a, b in zip(without, other, strict=True)
        )
        assert changed, f"{given} does the same as without {field}"
