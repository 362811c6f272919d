"""The contract of every per-linear method: dtypes, autocast and devices."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from pera_lightning.adapters import LinearMethod
from pera_lightning.injection.inject import inject
from tests.adapters.cases import (
    IN,
    OUT,
    adapted,
    adapters_of,
    every_path,
    inputs,
    network,
    the_adapter,
)


@every_path
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


@every_path
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


@every_path
@pytest.mark.parametrize(
    ("dtype", "autocast", "least"),
    # Adding to a bfloat16 output rounds: about a third of so small an update can arrive. float16 has room for it.
    [(torch.bfloat16, False, 0.2), (torch.float16, False, 0.9), (torch.float32, True, 0.2)],
    ids=["bfloat16", "float16", "autocast"],
)
def test_a_small_update_is_not_lost(method: LinearMethod, dtype: torch.dtype, autocast: bool, least: float) -> None:
    assert least < how_much_arrives(method, dtype, autocast) < 1.1


@every_path
def test_autocast(method: LinearMethod) -> None:
    layer, x = adapted(method, spread=0.2, double=False), inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in the_adapter(layer).parameters())


@every_path
def test_runs_on_the_meta_device(method: LinearMethod) -> None:
    with torch.device("meta"):
        model = network()
        inject(model, method, targets=["proj"])
        assert model(torch.empty(3, IN)).shape == (3, OUT)
    assert all(p.is_meta for p in model.parameters())


@every_path
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
