"""Inputs of layers over several batches, in order, while the layers are changed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pera_lightning.merging.activation_capture import inputs_in_order


def doubled(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def line(depth: int = 3) -> nn.Sequential:
    """Layers that give their input on, so that what a layer gets says which of those before it were doubled."""
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(depth)))
    for layer in model:
        nn.init.eye_(layer.weight)
    return model


def batches(count: int = 3) -> list[Tensor]:
    return [torch.full((2, 2), float(k + 1)) for k in range(count)]


def seen(model: nn.Module, layers: list[nn.Module], given: list[Any], run: Any = None) -> list[tuple[list, list]]:
    found = []
    for group, inputs in inputs_in_order(model, layers, given, run or model):
        found.append((group, [(x[0, 0].item(), number) for x, number in inputs]))
        for layer in group:
            doubled(layer)
    return found


def is_untouched(model: nn.Module) -> bool:
    return not any("forward" in vars(module) for module in model.modules())


def test_each_layer_gets_what_the_changed_ones_before_it_give() -> None:
    model = line()
    expected = [([model[k]], [(2.0**k * (n + 1), n) for n in range(3)]) for k in range(3)]
    assert seen(model, list(model), batches()) == expected
    assert is_untouched(model)
    for _ in inputs_in_order(model, list(model), batches(), model):
        break  # given up in the middle
    assert is_untouched(model)


def test_an_error_of_the_model_is_raised_and_leaves_nothing_behind() -> None:
    model, calls = line(), []

    def run(batch: Tensor) -> None:
        calls.append(batch)
        y = model[1](model[0](batch))
        if len(calls) > 7:  # after the order was found and the first layer was changed
            raise ValueError("the model says no")
        model[2](y)

    with pytest.raises(ValueError, match="the model says no"):
        seen(model, list(model), batches(), run)
    assert len(calls) > 7
    assert is_untouched(model)


def test_a_forward_that_another_library_has_set_is_called_and_stays() -> None:
    model = line()
    plain = model[0].forward
    model[0].forward = lambda x: 10 * plain(x)
    ours = model[0].forward
    assert seen(model, list(model), batches(1))[1] == ([model[1]], [(20.0, 0)])
    assert model[0].forward is ours


def test_a_model_that_catches_exceptions_is_stopped_too() -> None:
    model = line(2)

    def run(batch: Tensor) -> None:
        try:
            model(batch)
        except (TypeError, ValueError, IndexError, RuntimeError):  # as `merge_error.call` does
            pytest.fail("the model was told")

    assert len(seen(model, list(model), batches(), run)) == 2


def test_passes_run_without_gradients_and_under_the_callers_autocast() -> None:
    model, modes = line(), set()

    def watched(*_: Any) -> None:
        modes.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))

    model[1].register_forward_pre_hook(watched)
    with torch.autocast("cpu", torch.bfloat16):
        seen(model, list(model), batches())
    assert modes == {(False, True, torch.bfloat16)}


class Block(nn.Module):
    """Two layers and a part that nobody changes; adds to what it got in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.fixed, self.two = line(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y += self.fixed(x)
        return self.two(y)


def test_what_lies_behind_runs_once_more_only() -> None:
    """For the order, as far as the second layer, and whole; then its output is kept, whatever is done to that."""
    model = nn.Sequential(Block(), nn.ReLU(inplace=True), Block(), nn.Linear(2, 2), Block())
    layers = [layer for block in (model[0], model[2], model[4]) for layer in (block.one, block.two)]
    calls: Counter[nn.Module] = Counter()
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: calls.update([module]))
    assert len(seen(model, layers, batches())) == 6
    assert [calls[block.fixed] for block in (model[0], model[2], model[4])] == [9, 9, 6]
    assert calls[model[3]] == 9  # not within what is kept


def test_what_is_kept_is_what_would_be_computed() -> None:
    torch.manual_seed(0)
    given = [torch.randn(3, 2) for _ in range(2)]

    def built() -> nn.Sequential:
        torch.manual_seed(1)
        model = nn.Sequential(Block(), nn.ReLU(inplace=True), Block(), nn.Tanh(), Block())
        for p in model.parameters():
            nn.init.normal_(p)
        return model

    model = built()
    layers = [layer for block in (model[0], model[2], model[4]) for layer in (block.one, block.two)]
    with torch.no_grad():
        for group, inputs in inputs_in_order(model, layers, given, model):
            plain: list[Tensor] = []
            hook = group[0].register_forward_pre_hook(lambda _, args, plain=plain: plain.append(args[0].clone()))
            for batch in given:
                model(batch)
            hook.remove()
            assert all(torch.equal(x, y) for (x, _), y in zip(inputs, plain, strict=True))
            doubled(group[0])


def test_a_layer_that_is_called_again_is_seen_whole_before_it_is_changed() -> None:
    model = line(2)
    run = lambda batch: model[1](model[0](model[0](batch)))  # noqa: E731
    found = seen(model, list(model), batches(2), run)
    assert found == [([model[0]], [(1.0, 0), (1.0, 0), (2.0, 1), (2.0, 1)]), ([model[1]], [(4.0, 0), (8.0, 1)])]


def test_batches_that_take_other_ways() -> None:
    """A layer waits for all batches that come to it, and is left to those where it never runs."""
    model = line(3)

    def run(batch: Tensor) -> None:
        first = model[0] if batch[0, 0] < 2 else model[1]
        model[2](first(batch))

    found = seen(model, list(model), batches(3), run)
    assert found == [
        ([model[0]], [(1.0, 0)]),
        ([model[1]], [(2.0, 1), (3.0, 2)]),
        ([model[2]], [(2.0, 0), (4.0, 1), (6.0, 2)]),
    ]


@pytest.mark.parametrize("swapped", [False, True])
def test_batches_that_take_opposite_ways(swapped: bool) -> None:
    """The first batch's order counts, and nothing is kept of what is still to change."""
    model = line(2)

    def run(batch: Tensor) -> None:
        first, second = (0, 1) if bool(batch[0, 0] < 2) is not swapped else (1, 0)
        model[second](model[first](batch))

    first, second = (1, 0) if swapped else (0, 1)
    found = seen(model, list(model), batches(2), run)
    assert found == [([model[first]], [(1.0, 0), (2.0, 1)]), ([model[second]], [(2.0, 0), (2.0, 1)])]
