"""The inputs of layers over several batches, in forward order, while the layers are being changed.

Each layer is to see what the layers before it give once they are changed. So the batches go through the model anew for
each group of layers that share an input, and a pass stops at the layer asked for. What runs before the first layer that
is still to be changed gives the same in the next pass: its output is kept and not computed again.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Any], Any]  # the model's forward pass of a batch
Group = list[nn.Module]
Around = Callable[..., Any]  # called in the place of a module's forward, with the module, that forward, its arguments


def inputs_in_order(
    model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Any], run: Run
) -> Iterator[tuple[Group, list[tuple[Tensor, int]]]]:
    """Yields layers and their inputs over all batches; what is done to the layers acts on what is yielded later.

    Args:
        model: contains the layers; gives the same output for the same batch each time.
        layers: called with one tensor.
        batches: at least one.
        run: see `Run`; called for each batch once to find the order, and once for each group.

    Yields:
        Layers that get the same input tensors in all batches (q, k and v), and these with the number of their batch.
        Layers that do not run for any batch are in no group.
    """
    waiting = set(layers)
    modules = [module for module in model.modules() if not waiting.isdisjoint(module.modules())]
    passes = [_Passes(modules, partial(run, batch)) for batch in batches]
    # One full pass for each batch: which tensors, by their numbers, does each layer get?
    inputs: dict[nn.Module, list[tuple[int, int]]] = {}  # (batch, tensor)
    for number, each in enumerate(passes):
        for layer, tensor in each.record(waiting):
            inputs.setdefault(layer, []).append((number, tensor))
    # Layers that get the same ones are a group, of which the first stands for all.
    groups: dict[tuple[tuple[int, int], ...], Group] = {}
    for layer, given in inputs.items():
        groups.setdefault(tuple(given), []).append(layer)
    first = {layer: group[0] for group in groups.values() for layer in group}
    members = {group[0]: group for group in groups.values()}
    # Then a pass for each group and batch, as far as the group.
    orders = [list(dict.fromkeys(first[m] for m in each.calls if m in first)) for each in passes]
    for layer in _one_order(orders):
        reached = [(number, each) for number, each in enumerate(passes) if each.calls[layer]]
        yield members[layer], [(x, number) for number, each in reached for x in each.inputs_of(layer, waiting)]
        waiting.difference_update(members[layer])


def _one_order(orders: Sequence[list[nn.Module]]) -> Iterator[nn.Module]:
    """Merges the orders in which batches reach the layers; where they contradict one another, the first one counts."""
    while orders := [order for order in orders if order]:
        heads = [order[0] for order in orders]
        # One that no other order has later, behind a layer that it depends on.
        layer = next((head for head in heads if not any(head in order[1:] for order in orders)), heads[0])
        yield layer
        orders = [[other for other in order if other is not layer] for order in orders]


class _Stop(BaseException):
    """Ends a pass at the layer asked for; no `Exception`, which a model might catch."""


class _Passes:
    """The forward passes of one batch.

    Args:
        modules: the layers, and the modules that contain them.
        run: the pass.

    Attributes:
        calls: how often each module runs in a pass, in the order of their first calls.
        kept: output of the modules that no pass needs to run again.
    """

    def __init__(self, modules: Sequence[nn.Module], run: Callable[[], Any]) -> None:
        self._modules, self._run = modules, run
        self.calls: Counter[nn.Module] = Counter()
        self.kept: dict[nn.Module, Any] = {}

    def record(self, layers: set[nn.Module]) -> list[tuple[nn.Module, int]]:
        """Runs a full pass; gives the calls of the layers, with the number of the tensor that each gets."""
        found: list[tuple[nn.Module, int]] = []
        last: Tensor | None = None

        def around(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal last
            self.calls[module] += 1
            if module in layers:
                number = found[-1][1] if found else 0
                found.append((module, number if args[0] is last else number + 1))
                last = args[0]
            return forward(*args, **kwargs)

        with torch.no_grad(), _forwards(self._modules, around):
            self._run()
        return found

    def inputs_of(self, layer: nn.Module, waiting: set[nn.Module]) -> list[Tensor]:
        """Runs a pass as far as the last call of a layer; gives what the layer gets.

        Args:
            layer: runs in this batch.
            waiting: layers that are still to be changed, this one among them.
        """
        found: list[Tensor] = []
        final = True  # whether all that has run by now gives the same in later passes

        def around(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal final
            if module in self.kept:
                return copy.deepcopy(self.kept[module])  # a model may go on to change it in place
            if module is layer:
                found.append(args[0])
                if len(found) == self.calls[layer]:
                    raise _Stop
            final = final and module not in waiting
            output = forward(*args, **kwargs)
            if final and self.calls[module] == 1:
                for inner in module.modules():  # these are not called any more
                    self.kept.pop(inner, None)
                self.kept[module] = copy.deepcopy(output)
            return output

        with torch.no_grad(), _forwards(self._modules, around), suppress(_Stop):
            self._run()
        return found


@contextmanager
def _forwards(modules: Sequence[nn.Module], around: Around) -> Iterator[None]:
    """Within this context `around` is called in the place of the modules' forward."""
    before = {module: vars(module).get("forward") for module in modules}  # other libraries set one, too
    for module in modules:
        module.forward = wraps(module.forward)(partial(around, module, module.forward))  # models look at signatures
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward
