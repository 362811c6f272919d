"""The inputs of layers over several batches, in forward order, while the layers are being changed.

Each layer is to see what the layers before it give once they are changed. The forward passes of all batches advance
together for that, each in a thread of its own which stops at the layers asked for: one pass over the batches in all,
at the price of keeping the activations of every batch. They take turns, so that one runs at a time. Layers that a pass
calls more than once (shared ones) need the whole pass before they are changed, and one pass for each of them.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Any], Any]  # the model's forward pass of a batch
Group = list[nn.Module]


def inputs_in_order(
    layers: Sequence[nn.Module], batches: Sequence[Any], run: Run
) -> Iterator[tuple[Group, list[tuple[Tensor, int]]]]:
    """Yields layers and their inputs over all batches; what is done to the layers acts on what is yielded later.

    Args:
        layers: called with one tensor.
        batches: at least one.
        run: see `Run`; called once for each batch to find the order, and then in other threads, one at a time.

    Yields:
        Layers that get the same input tensors in all batches (q, k and v), and these with the number of their batch.
        Layers that do not run for any batch are in no group.
    """
    members, most = _order(layers, batches, run)
    if most > 1:
        yield from _one_by_one(list(members), batches, run)
    else:
        yield from _together(members, batches, run)


def _order(
    layers: Sequence[nn.Module], batches: Sequence[Any], run: Run
) -> tuple[dict[tuple[nn.Module, ...], set[int]], int]:
    """Groups in the order of their first call with the numbers of their batches; and the most calls in a batch."""
    inputs: dict[nn.Module, list[int]] = {}  # numbers of the tensors that a layer gets
    within: dict[nn.Module, set[int]] = {}
    most = 1
    calls: Counter[nn.Module] = Counter()
    tensors = itertools.count()
    last: list[Any] = [None, 0]  # the input of the last call and its number

    def called(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if last[0] is not args[0]:
            last[:] = args[0], next(tensors)
        inputs.setdefault(layer, []).append(last[1])
        calls[layer] += 1

    with _hooked(layers, called):
        for number, batch in enumerate(batches):
            calls.clear()
            run(batch)
            most = max(most, *calls.values(), 1)
            for layer in calls:
                within.setdefault(layer, set()).add(number)
    groups: dict[tuple[int, ...], Group] = {}
    for layer, seen in inputs.items():
        groups.setdefault(tuple(seen), []).append(layer)
    return {tuple(group): within[group[0]] for group in groups.values()}, most


def _one_by_one(
    groups: Sequence[tuple[nn.Module, ...]], batches: Sequence[Any], run: Run
) -> Iterator[tuple[Group, list[tuple[Tensor, int]]]]:
    found: list[tuple[Tensor, int]] = []
    current = 0

    def called(layer: nn.Module, args: tuple[Any, ...]) -> None:
        found.append((args[0], current))

    for group in groups:
        found.clear()
        with _hooked(group[:1], called):
            for number, batch in enumerate(batches):
                current = number
                run(batch)
        yield list(group), list(found)


def _together(
    members: dict[tuple[nn.Module, ...], set[int]], batches: Sequence[Any], run: Run
) -> Iterator[tuple[Group, list[tuple[Tensor, int]]]]:
    passes = [_Pass(partial(run, batch)) for batch in batches]
    running: list[_Pass] = []
    of = {group[0]: group for group in members}  # all of a group get what its first layer gets
    waiting = list(members)

    def called(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.current_thread() is running[0] and of[layer] in waiting:
            running[0].stop(layer, args[0])

    def advance(one: _Pass) -> None:
        running[:] = [one]
        one.advance()

    with _hooked(list(of), called):
        try:
            for one in passes:
                advance(one)
            while waiting and (there := {of[one.at] for one in passes if one.at is not None}):
                # Those that no pass is still to come to, if any: passes may take other ways through the model.
                whole = [g for g in waiting if g in there and all(passes[k].at is g[0] for k in members[g])]
                group = whole[0] if whole else next(g for g in waiting if g in there)
                here = [(number, one) for number, one in enumerate(passes) if one.at is group[0]]
                yield list(group), [(one.x, number) for number, one in here]  # type: ignore[misc]
                waiting.remove(group)
                for _, one in here if waiting else ():  # else what is left of the passes is not needed
                    advance(one)
        finally:
            for one in passes:
                one.cancel()


class _Cancelled(BaseException):
    """Ends a pass that is not needed any more; no `Exception`, which a model might catch."""


class _Pass(threading.Thread):
    """A forward pass that stops where it is told to and goes on when it is told to.

    Args:
        run: the pass.

    Attributes:
        at: the layer that it stopped at; None where it has not begun, or has ended.
        x: the input of that layer.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._body = run
        self._error: BaseException | None = None
        self._cancelled = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._autocast = {kind: _autocast(kind) for kind in ("cpu", "cuda")}  # modes belong to threads
        self.at: nn.Module | None = None
        self.x: Tensor | None = None

    def run(self) -> None:
        try:
            with torch.no_grad(), self._autocast["cpu"], self._autocast["cuda"]:
                self._body()
        except BaseException as error:  # handed on by `advance`
            self._error = error
        finally:
            self.at = self.x = None
            self._stopped.release()

    def stop(self, layer: nn.Module, x: Tensor) -> None:
        """Hands the turn back; called in this thread."""
        self.at, self.x = layer, x
        self._stopped.release()
        self._go.acquire()
        self.at = self.x = None
        if self._cancelled:
            raise _Cancelled

    def advance(self) -> None:
        """Lets the pass run to its next stop, or to its end; raises its error."""
        if self.ident is None:
            self.start()
        else:
            self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Ends the pass where it is."""
        if self.at is not None:
            self._cancelled = True
            self._go.release()
            self.join()


def _autocast(kind: str) -> torch.autocast:
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))


@contextmanager
def _hooked(layers: Sequence[nn.Module], called: Callable[[nn.Module, tuple[Any, ...]], None]) -> Iterator[None]:
    hooks = [layer.register_forward_pre_hook(called) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
