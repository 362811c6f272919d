"""The contract of every per-linear method. A method is covered the moment it is registered."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections import OrderedDict

import pytest
import reference
import torch
import torch.nn.functional as F
import yaml
from cases import (
    IN,
    OTHER_VALUES,
    OUT,
    adapted,
    adapters_of,
    case_id,
    cases,
    inputs,
    linear_methods,
    network,
    randomise,
    the_adapter,
)
from torch import Tensor, nn

from pera_lightning.adapters import AdaptedLinear, AuroRA, LinearMethod, LoRA, method_from_spec
from pera_lightning.adapters.base import adapt_layer
from pera_lightning.errors import NotMergeableError
from pera_lightning.injection import inject

every_method = pytest.mark.parametrize("method", cases(), ids=case_id)


def starts_from_the_weight(method: LinearMethod) -> bool:
    return getattr(method, "init", None) in ("pissa", "milora")


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
    if name == "AuroRA":
        knots = method.grid_size + method.spline_order
        state |= {"anl.self_projection": (r, r)} if method.fixed else {}
        state |= {"anl.spline_weight": (r, knots)} if method.learnable else {}
        state |= {"anl.grid": (knots + method.spline_order + 1,)} if method.learnable else {}
    return state


def update(layer: AdaptedLinear, x: Tensor) -> Tensor:
    return layer(x) - F.linear(x, layer.weight, layer.bias)


def test_every_method_has_a_reference() -> None:
    missing = linear_methods().keys() - reference.REFERENCES.keys()
    assert not missing, f"write a plain-loop reference in tests/adapters/reference.py for {sorted(missing)}"


# --- mathematics ---


@every_method
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_equals_the_reference(method: LinearMethod, bias: bool) -> None:
    layer, x = adapted(method, bias=bias), inputs()
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


@every_method
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


@every_method
def test_gradcheck(method: LinearMethod) -> None:
    layer = adapted(method)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    values = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (inputs(2).requires_grad_(), *values))


@every_method
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


@every_method
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


@every_method
def test_dropout_acts_in_training_only(method: LinearMethod) -> None:
    layer, x = adapted(dataclasses.replace(method, dropout=0.5)), inputs()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), adapted(method)(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@every_method
def test_dropout_acts_while_the_base_rests_in_eval_mode(method: LinearMethod) -> None:
    model = network().eval()
    inject(model, dataclasses.replace(method, dropout=0.5), targets=["proj"])
    randomise(model)
    assert not model.proj.training
    x = inputs(dtype=torch.float32)
    assert not torch.equal(model(x), model(x))


@every_method
def test_dropout_is_on_the_updates_input_only(method: LinearMethod) -> None:
    layer, x = adapted(dataclasses.replace(method, dropout=0.5)).train(), inputs()
    the_adapter(layer).dropout.p = 1.0  # drops the whole input of the update
    at_zero = adapted(method).train()(torch.zeros_like(x)) - layer.bias
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) + at_zero)


# --- precision ---


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_base(method: LinearMethod, dtype: torch.dtype) -> None:
    layer = adapted(method, spread=0.2, double=False, dtype=dtype)
    assert {p.dtype for p in the_adapter(layer).parameters()} == {torch.float32}
    assert layer.weight.dtype == dtype
    x = inputs(dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    for parameter in the_adapter(layer).parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@every_method
def test_float64_base_with_float32_adapters(method: LinearMethod) -> None:
    layer = adapted(method, spread=0.2, double=False, dtype=torch.float64)
    assert layer(inputs()).dtype == torch.float64
    torch.testing.assert_close(layer(inputs()), copy.deepcopy(layer).double()(inputs()), rtol=1e-5, atol=1e-5)


def how_much_arrives(method: LinearMethod, dtype: torch.dtype, autocast: bool) -> float:
    """Slope of the low-precision update against the exact one, for an update of about 5e-4 of the output."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(proj=nn.Linear(64, 64)))
    inject(model.to(dtype), method, targets=["proj"], seed=0)
    x = torch.randn(256, 64).to(dtype)
    exact, start = copy.deepcopy(model).double(), copy.deepcopy(model)
    steps = [torch.randn(p.shape) for a in adapters_of(model) for p in a.parameters()]
    before, size = exact(x.double()), 1e-3
    for _ in range(3):  # the update is nearly linear in a small step
        for target in (exact, model):
            target.load_state_dict(start.state_dict())
            with torch.no_grad():
                parameters = [p for a in adapters_of(target) for p in a.parameters()]
                for parameter, step in zip(parameters, steps, strict=True):
                    parameter.add_(size * step)
        wanted = (exact(x.double()) - before).detach()
        size *= 5e-4 * before.norm().item() / wanted.norm().item()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        arrived = (model(x) - start(x)).double()
    return ((arrived * wanted).sum() / wanted.square().sum()).item()


@every_method
@pytest.mark.parametrize(
    ("dtype", "autocast", "least"),
    # Adding to a bfloat16 output rounds: about a third of so small an update can arrive. float16 has room for it.
    [(torch.bfloat16, False, 0.2), (torch.float16, False, 0.9), (torch.float32, True, 0.2)],
    ids=["bfloat16", "float16", "autocast"],
)
def test_a_small_update_is_not_lost(method: LinearMethod, dtype: torch.dtype, autocast: bool, least: float) -> None:
    assert least < how_much_arrives(method, dtype, autocast) < 1.1


@every_method
def test_autocast(method: LinearMethod) -> None:
    layer, x = adapted(method, spread=0.2, double=False), inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in the_adapter(layer).parameters())


@every_method
def test_runs_on_the_meta_device(method: LinearMethod) -> None:
    with torch.device("meta"):
        model = network()
        inject(model, method, targets=["proj"])
        assert model(torch.empty(3, IN)).shape == (3, OUT)
    assert all(p.is_meta for p in model.parameters())


@every_method
def test_initial_values_do_not_depend_on_the_default_device_or_dtype(method: LinearMethod) -> None:
    """Frameworks build networks under `torch.device(…)` and in low precision."""
    plain, other = network(), network()
    inject(plain, method, targets=["proj"], seed=0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            inject(other, method, targets=["proj"], seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    tensors = dict(plain.named_parameters()) | dict(plain.named_buffers())
    assert tensors.keys() == (dict(other.named_parameters()) | dict(other.named_buffers())).keys()
    for name, value in (*other.named_parameters(), *other.named_buffers()):
        assert value.dtype == tensors[name].dtype, name
        assert torch.equal(value, tensors[name]), name


# --- kinds of layers ---


@every_method
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


@every_method
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_row_blocks(method: LinearMethod, mode: bool) -> None:
    model, plain = network(out=3 * OUT), network(out=3 * OUT)
    fused = {"proj": {"q": OUT, "k": OUT, "v": OUT}}
    inject(model, dataclasses.replace(method, dropout=0.5), ["proj[v,q]"], fused=fused, seed=0)
    x = inputs(8, torch.float32).view(2, 4, IN)
    assert torch.equal(model.train(mode)(x), plain(x))
    if not starts_from_the_weight(method):
        starts = [list(model.proj.adapters[block].parameters()) for block in ("q", "v")]
        assert not all(torch.equal(one, other) for one, other in zip(*starts, strict=True))
    randomise(model)
    q, k, v = (model(x) - plain(x)).split(OUT, dim=-1)
    assert torch.equal(k, torch.zeros_like(k))
    assert q.abs().max() > 1e-3
    assert v.abs().max() > 1e-3
    assert not torch.allclose(q, v)  # each block has an adapter of its own
    assert set(model.proj.adapters) == {"q", "v"}


@every_method
@pytest.mark.parametrize("block", ["q", "v"])
def test_a_row_block_equals_a_separate_layer(method: LinearMethod, block: str) -> None:
    model = network(out=3 * OUT)
    inject(model, method, [f"proj[{block}]"], fused={"proj": {"q": OUT, "k": OUT, "v": OUT}}, seed=0)
    model.double().eval()
    randomise(model)
    rows = slice(0, OUT) if block == "q" else slice(2 * OUT, 3 * OUT)
    separate = nn.Linear(IN, OUT).double()
    with torch.no_grad():
        separate.weight.copy_(model.proj.weight[rows])
        separate.bias.copy_(model.proj.bias[rows])
    adapt_layer(separate, {"all": copy.deepcopy(model.proj.adapters[block])}, {"all": (0, OUT)})
    torch.testing.assert_close(model(inputs())[:, rows], separate.eval()(inputs()))


@every_method
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


@every_method
def test_state_dict_round_trip(method: LinearMethod) -> None:
    layer = adapted(method)
    other = network()
    inject(other, method, targets=["proj"], seed=99)
    other = other.double().eval().proj
    assert not torch.equal(layer(inputs()), other(inputs()))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(inputs()), other(inputs()))


@every_method
def test_deep_copies_are_independent(method: LinearMethod) -> None:
    layer, x = adapted(method), inputs()
    before, other = layer(x), copy.deepcopy(layer)
    assert torch.equal(other(x), before)
    randomise(other, seed=5)
    assert not torch.equal(other(x), before)
    assert torch.equal(layer(x), before)


@every_method
def test_pickle_round_trip(method: LinearMethod) -> None:
    layer = adapted(method)
    other = pickle.loads(pickle.dumps(layer))
    assert type(other) is type(layer)
    assert torch.equal(other(inputs()), layer(inputs()))


# Compiling takes seconds: each method's defaults, and what takes another path through the code.
COMPILED = [
    *(cls() for cls in linear_methods().values()),
    LoRA(init="pissa"),
    AuroRA(train_mode="static", inference_mode="static"),
]


@pytest.mark.parametrize("rows", [False, True], ids=["whole", "rows"])
@pytest.mark.parametrize("method", COMPILED, ids=case_id)
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


# --- the method itself ---


@every_method
def test_spec_round_trip(method: LinearMethod) -> None:
    assert method_from_spec(json.loads(json.dumps(method.spec()))) == method
    assert method_from_spec(yaml.safe_load(yaml.safe_dump(method.spec()))) == method


@every_method
def test_is_frozen_and_keyword_only(method: LinearMethod) -> None:
    name = dataclasses.fields(method)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(method, name, 4)
    with pytest.raises(TypeError):
        type(method)(4)


@every_method
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
