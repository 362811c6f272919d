"""Inputs of layers over several batches, in order, while the layers are changed."""

from __future__ import annotations

import threading
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
    for group, inputs in inputs_in_order(layers, given, run or model):
        found.append((group, [(x[0, 0].item(), number) for x, number in inputs]))
        for layer in group:
            doubled(layer)
    return found


def test_each_layer_gets_what_the_changed_ones_before_it_give() -> None:
    model = line()
    expected = [([model[k]], [(2.0**k * (n + 1), n) for n in range(3)]) for k in range(3)]
    assert seen(model, list(model), batches()) == expected


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    model = line()
    seen(model, list(model), batches())
    assert threading.active_count() == before
    for _ in inputs_in_order(list(model), batches(), model):
        break  # given up in the middle
    assert threading.active_count() == before


def test_an_error_of_the_model_is_raised_and_ends_all() -> None:
    before, model, calls = threading.active_count(), line(), []

    def run(batch: Tensor) -> None:
        calls.append(batch)
        y = model[1](model[0](batch))
        if len(calls) > 4:  # the second batch, after the order was found
            raise ValueError("the model says no")
        model[2](y)

    with pytest.raises(ValueError, match="the model says no"):
        seen(model, list(model), batches(), run)
    assert threading.active_count() == before


def test_passes_run_one_at_a_time_without_gradients_and_under_the_callers_autocast() -> None:
    model, modes, inside = line(), set(), []

    def watched(layer: nn.Module, args: Any) -> None:
        modes.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))

    def run(batch: Tensor) -> None:
        inside.append(threading.get_ident())
        model(batch)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model[1].register_forward_pre_hook(watched)
        seen(model, list(model), batches(), run)
    assert modes == {(False, True, torch.bfloat16)}
    assert len(set(inside)) > 1


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
