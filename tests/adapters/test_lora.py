"""LoRA: its initial values, and equality with peft's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pera_lightning.adapters import LoRA
from pera_lightning.injection.inject import inject
from tests.adapters.cases import IN, OUT, adapted, inputs, network, randomise, the_adapter


def large_layer(method: LoRA) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"proj": nn.Linear(400, 300)})
    inject(model, method, targets=["proj"], seed=0)
    return model.proj


def test_default_is_kaiming_uniform() -> None:
    A = the_adapter(large_layer(LoRA(rank=8))).A
    bound = 1 / math.sqrt(400)  # sqrt(6 / ((1 + 5) fan_in))
    assert A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_gaussian_has_the_variance_of_peft() -> None:
    A = the_adapter(large_layer(LoRA(rank=8, init="gaussian"))).A
    assert A.std().item() == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize(("init", "kept"), [("pissa", slice(0, 3)), ("milora", slice(-3, None))])
def test_svd_inits_hold_that_part_of_the_weight(init: str, kept: slice) -> None:
    layer = adapted(LoRA(rank=3, alpha=6, init=init), spread=None)
    u, sigma, vh = torch.linalg.svd(layer.weight, full_matrices=False)
    part = (u[:, kept] * sigma[kept]) @ vh[kept]
    adapter = the_adapter(layer)
    torch.testing.assert_close(2.0 * adapter.B @ adapter.A, part, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(adapter.B0, adapter.B)
    torch.testing.assert_close(adapter.A0, adapter.A)
    assert torch.equal(adapter.delta_weight(layer.weight), torch.zeros(OUT, IN, dtype=torch.float64))


def test_svd_inits_have_the_gradients_of_the_subtracted_weight() -> None:
    """The papers store W - s B₀ A₀; here W stays, and the function and its gradients are the same."""
    layer, x = adapted(LoRA(rank=3, alpha=6, init="pissa"), spread=None), inputs()
    randomise(layer)
    adapter = the_adapter(layer)
    A, B = (p.detach().clone().requires_grad_() for p in (adapter.A, adapter.B))
    y = x @ (layer.weight - 2.0 * adapter.B0 @ adapter.A0).T + layer.bias + 2.0 * x @ A.T @ B.T
    torch.testing.assert_close(layer(x), y)
    layer(x).square().sum().backward()
    y.square().sum().backward()
    torch.testing.assert_close(adapter.A.grad, A.grad)
    torch.testing.assert_close(adapter.B.grad, B.grad)


@pytest.mark.parametrize("bias", [True, False])
def test_equals_peft(bias: bool) -> None:
    import peft

    ours, theirs, x = network(bias=bias).double(), network(bias=bias).double(), inputs(4)
    inject(ours, LoRA(rank=4, alpha=6), targets=["proj"])
    randomise(ours.double())
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, target_modules=["proj"])
    ).double()
    A, B = (theirs.get_parameter(f"base_model.model.proj.lora_{name}.default.weight") for name in "AB")
    adapter = the_adapter(ours.proj)
    with torch.no_grad():
        A.copy_(adapter.A)
        B.copy_(adapter.B)
    y, z = ours(x), theirs(x)
    torch.testing.assert_close(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(adapter.A.grad, A.grad)
    torch.testing.assert_close(adapter.B.grad, B.grad)
