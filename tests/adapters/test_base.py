"""The adapted layer: what it accepts, and what a subclass must bring."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pera_lightning.adapters import AdaptedLinear, HiRA, LayerContext, LinearAdapter, LoRA, LoRALayer
from pera_lightning.adapters.adapted_layer import adapt_layer, base_weight, check_slices, is_linear
from pera_lightning.errors import ConfigurationError, NotMergeableError, UnsupportedTarget
from tests.adapters.cases import adapted, inputs


def lora(out: int = 4) -> LoRALayer:
    return LoRA(rank=2).build(LayerContext(path="", weight=torch.empty(out, 6)))


class Quantised(nn.Linear):
    pass


@pytest.mark.parametrize("module", [Quantised(6, 4), nn.Conv1d(6, 4, 1), nn.Bilinear(6, 6, 4), nn.Embedding(6, 4)])
def test_other_classes_are_refused(module: nn.Module) -> None:
    kind = type(module)
    assert not is_linear(module)
    with pytest.raises(UnsupportedTarget, match=kind.__name__):
        adapt_layer(module, {"all": lora()}, {"all": slice(0, 4)})
    assert type(module) is kind


def test_a_class_that_is_called_conv1d_elsewhere_is_refused() -> None:
    assert not is_linear(type("Conv1D", (nn.Module,), {})())


def test_an_adapted_layer_is_not_adapted_again() -> None:
    layer = nn.Linear(6, 4)
    adapt_layer(layer, {"all": lora()}, {"all": slice(0, 4)})
    assert not is_linear(layer)
    with pytest.raises(UnsupportedTarget, match="AdaptedLinear"):
        adapt_layer(layer, {"all": lora()}, {"all": slice(0, 4)})


@pytest.mark.parametrize("name", ["keys", "items", "training", "forward", "_modules", "a.b", "", "2q", "all"])
def test_impossible_names_of_slices(name: str) -> None:
    layer = nn.Linear(6, 8)
    with pytest.raises(ConfigurationError, match="this name cannot be used"):
        adapt_layer(layer, {name: lora()}, {name: slice(0, 4)})
    assert type(layer) is nn.Linear


@pytest.mark.parametrize(
    "ranges", [{"a": (0, 5), "b": (4, 8)}, {"a": (0, 9)}, {"a": (3, 3)}, {"a": (-1, 4)}, {"a": (5, 2)}]
)
def test_impossible_slices(ranges: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(ConfigurationError, match="must not overlap"):
        check_slices({name: slice(*ends) for name, ends in ranges.items()}, 8)


def test_slices_in_any_order_with_gaps_between() -> None:
    layer = nn.Linear(6, 20)
    plain = copy.deepcopy(layer)
    slices = {"late": slice(15, 19), "early": slice(1, 5), "next": slice(5, 9)}
    adapt_layer(layer, {name: lora() for name in slices}, slices)
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        for k, adapter in enumerate(layer.adapters.values()):
            adapter.B.fill_(k + 1.0)
    changed = (layer(x) != plain(x)).flatten(0, 1).any(0)
    assert changed.nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 18]
    update = layer(x) - plain(x)
    adapter = layer.adapters["early"]
    torch.testing.assert_close(update[..., 1:5], adapter.delta_output(x))


def test_inputs_of_any_number_of_dimensions() -> None:
    for method in (LoRA(), HiRA()):
        layer = adapted(method)
        flat = layer(inputs(24))
        torch.testing.assert_close(layer(inputs(24).view(2, 3, 4, -1)), flat.view(2, 3, 4, -1))
        torch.testing.assert_close(layer(inputs(24)[0]), flat[0])
        assert layer(inputs(24)[:0]).shape == (0, 12)


def test_only_the_update_needs_a_graph() -> None:
    """Without gradients, and for frozen adapters, nothing is kept for a backward pass."""
    layer = adapted(LoRA()).requires_grad_(False)
    assert not layer(inputs()).requires_grad
    with torch.inference_mode():
        assert layer(inputs()).is_inference()


def test_base_weight_is_out_by_in() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    assert base_weight(conv1d(4, 6)).shape == (4, 6)
    assert base_weight(nn.Linear(6, 4)).shape == (4, 6)


def test_a_subclass_says_what_it_lacks() -> None:
    class Empty(LinearAdapter):
        pass

    adapter = Empty(in_features=6, out_features=4)
    with pytest.raises(NotImplementedError, match="Empty defines no delta_output"):
        adapter(torch.ones(6), torch.ones(4, 6))
    with pytest.raises(NotMergeableError, match="Empty"):
        adapter.delta_weight(torch.ones(4, 6))


def test_prints_its_adapters() -> None:
    text = str(adapted(LoRA(rank=2, alpha=3)))
    assert AdaptedLinear.__name__ in text
    assert "10 -> 12, scale=1.5" in text
