"""MoSLoRA: its initial values, and LoRA as its special case. The formula is in the contract tests."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pera_lightning.adapters import LoRA, MoSLoRA
from pera_lightning.errors import UnknownNameError
from pera_lightning.injection.inject import inject
from tests.adapters.cases import adapted, inputs, the_adapter


def large_adapter(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"proj": nn.Linear(400, 300)})
    inject(model, MoSLoRA(rank=64, **options), targets=["proj"], seed=0)
    return the_adapter(model.proj)


def test_default_initial_values() -> None:
    """A and the mixer kaiming-uniform: bounds 1/√in and 1/√r."""
    adapter = large_adapter()
    for tensor, fan_in in ((adapter.A, 400), (adapter.mixer, 64)):
        bound = 1 / math.sqrt(fan_in)
        assert tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not adapter.B.any()


def test_orthogonal_mixer() -> None:
    mixer = large_adapter(mixer_init="orthogonal").mixer
    torch.testing.assert_close(mixer @ mixer.T, torch.eye(64), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixer, torch.eye(64))


def test_lora_with_the_mixer_fixed_to_one() -> None:
    layer, other, x = adapted(MoSLoRA(rank=3, alpha=5)), adapted(LoRA(rank=3, alpha=5)), inputs()
    with torch.no_grad():
        the_adapter(layer).mixer.copy_(torch.eye(3))
        for name in ("A", "B"):
            getattr(the_adapter(other), name).copy_(getattr(the_adapter(layer), name))
    torch.testing.assert_close(layer(x), other(x))


def test_an_unknown_mixer() -> None:
    with pytest.raises(UnknownNameError, match=r"mixer_init='orthogonl' does not exist; .*closest: orthogonal"):
        MoSLoRA(mixer_init="orthogonl")
