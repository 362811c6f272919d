"""The contract of every per-linear method: kinds of layers, copies, files and compilers."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

from pera_lightning.adapters import HiRA, LinearMethod, LoRA
from pera_lightning.adapters.adapted_layer import adapt_layer
from pera_lightning.injection.inject import inject
from tests.adapters.cases import (
    IN,
    OUT,
    PATHS,
    adapted,
    case_id,
    every_method,
    every_path,
    inputs,
    network,
    randomise,
    starts_from_the_weight,
)


def expected_tensors(method: LinearMethod) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an adapter's state, as they are documented."""
    name = type(method).__name__
    if name == "HiLoRA":
        h, r = method.hira_rank, method.lora_rank
        return {"hira.A": (h, IN), "hira.B": (OUT, h), "lora.A": (r, IN), "lora.B": (OUT, r)}
    r = method.rank
    state = {"A": (r, IN), "B": (OUT, r)}
    if name == "LoRA" and starts_from_the_weight(method):
        state |= {"A0": (r, IN), "B0": (OUT, r)}
    if name == "PERA":
        count = {"full": r * (r + 1) // 2, "square": r, "cross": r * (r - 1) // 2, "linear": 0}[method.terms]
        state |= {"h": (count,)} if count else {}
    if name == "MoSLoRA":
        state |= {"mixer": (r, r)}
    if name == "AuroRA":
        knots = method.grid_size + method.spline_order
        state |= {"anl.self_projection": (r, r)} if method.fixed else {}
        state |= {"anl.spline_weight": (r, knots)} if method.learnable else {}
        state |= {"anl.grid": (knots + method.spline_order + 1,)} if method.learnable else {}
    return state


# --- kinds of layers ---


@every_path
def test_conv1d_equals_linear(method: LinearMethod) -> None:
    from transformers.pytorch_utils import Conv1D

    linear, x = adapted(method), inputs(6).view(2, 3, IN)
    model = nn.Sequential(OrderedDict(proj=Conv1D(OUT, IN)))
    with torch.no_grad():
        model.proj.weight.copy_(linear.weight.T)
        model.proj.bias.copy_(linear.bias)
    before = model.double()(x)
    inject(model, method, targets=["proj"], seed=0)
    torch.testing.assert_close(model(x), before)
    model.double().eval().proj.adapters = copy.deepcopy(linear.adapters)
    torch.testing.assert_close(model(x), linear(x))
    assert model.proj.weight.shape == (IN, OUT)


@every_path
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_slices(method: LinearMethod, mode: bool) -> None:
    model, plain = network(out=3 * OUT), network(out=3 * OUT)
    fused = {"proj": {"q": OUT, "k": OUT, "v": OUT}}
    inject(model, dataclasses.replace(method, dropout=0.5), ["proj[v,q]"], fused=fused, seed=0)
    x = inputs(8, torch.float32).view(2, 4, IN)
    assert torch.equal(model.train(mode)(x), plain(x))
    if not starts_from_the_weight(method):
        starts = [list(model.proj.adapters[name].parameters()) for name in ("q", "v")]
        assert not all(torch.equal(one, other) for one, other in zip(*starts, strict=True))
    randomise(model)
    q, k, v = (model(x) - plain(x)).split(OUT, dim=-1)
    assert torch.equal(k, torch.zeros_like(k))
    assert q.abs().max() > 1e-3
    assert v.abs().max() > 1e-3
    assert not torch.allclose(q, v)  # each slice has an adapter of its own
    assert set(model.proj.adapters) == {"q", "v"}


@every_path
@pytest.mark.parametrize("name", ["q", "v"])
def test_a_slice_equals_a_separate_layer(method: LinearMethod, name: str) -> None:
    model = network(out=3 * OUT)
    inject(model, method, [f"proj[{name}]"], fused={"proj": {"q": OUT, "k": OUT, "v": OUT}}, seed=0)
    model.double().eval()
    randomise(model)
    rows = slice(0, OUT) if name == "q" else slice(2 * OUT, 3 * OUT)
    separate = nn.Linear(IN, OUT).double()
    with torch.no_grad():
        separate.weight.copy_(model.proj.weight[rows])
        separate.bias.copy_(model.proj.bias[rows])
    adapt_layer(separate, {"all": copy.deepcopy(model.proj.adapters[name])}, {"all": slice(0, OUT)})
    torch.testing.assert_close(model(inputs())[:, rows], separate.eval()(inputs()))


@every_path
def test_the_layer_stays_the_same_object(method: LinearMethod) -> None:
    model, seen = network(), []
    layer, weight, bias = model.proj, model.proj.weight, model.proj.bias
    layer.register_forward_hook(lambda *_: seen.append("hook"))
    base_keys = list(model.state_dict())
    inject(model, method, targets=["proj"])
    assert model.proj is layer
    assert layer.weight is weight
    assert layer.bias is bias
    assert isinstance(layer, nn.Linear)
    assert [key for key in model.state_dict() if ".adapters." not in key] == base_keys
    model(inputs(dtype=torch.float32))
    assert seen == ["hook"]


# --- copies, files, compilers ---


@every_method
def test_state_dict_names_and_shapes(method: LinearMethod) -> None:
    state = adapted(method).state_dict()
    found = {key: tuple(value.shape) for key, value in state.items() if key.startswith("adapters.all.")}
    assert found == {f"adapters.all.{name}": shape for name, shape in expected_tensors(method).items()}


@every_path
def test_state_dict_round_trip(method: LinearMethod) -> None:
    layer = adapted(method)
    other = network()
    inject(other, method, targets=["proj"], seed=99)
    other = other.double().eval().proj
    assert not torch.equal(layer(inputs()), other(inputs()))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(inputs()), other(inputs()))


@every_path
def test_deep_copies_are_independent(method: LinearMethod) -> None:
    layer, x = adapted(method), inputs()
    before, other = layer(x), copy.deepcopy(layer)
    assert torch.equal(other(x), before)
    randomise(other, seed=5)
    assert not torch.equal(other(x), before)
    assert torch.equal(layer(x), before)


@every_path
def test_pickle_round_trip(method: LinearMethod) -> None:
    layer = adapted(method)
    other = pickle.loads(pickle.dumps(layer))
    assert type(other) is type(layer)
    assert torch.equal(other(inputs()), layer(inputs()))


# Compiling takes seconds; slices of a fused projection are added in one of two ways: to the weight, or to the output.
COMPILED = [*((method, False) for method in PATHS), (LoRA(), True), (HiRA(), True)]


@pytest.mark.parametrize(("method", "rows"), COMPILED, ids=[f"{case_id(m)}-{rows}" for m, rows in COMPILED])
def test_compiles_to_one_graph(method: LinearMethod, rows: bool) -> None:
    torch._dynamo.reset()
    model = network(out=3 * OUT if rows else OUT)
    fused = {"proj": {"q": OUT, "k": OUT, "v": OUT}} if rows else None
    inject(model, method, ["proj[q,v]" if rows else "proj"], fused=fused)
    randomise(model)
    copied, x = copy.deepcopy(model), inputs(dtype=torch.float32)
    y, z = model(x), torch.compile(copied, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(z, y)
    y.square().sum().backward()
    z.square().sum().backward()
    other = dict(copied.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (other[name].grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(other[name].grad, parameter.grad)
