"""Which adapted layers do not run: an adapter on a layer that nobody calls changes nothing."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.errors import UnusedLayerError, listed
from pera_lightning.injection.inject import adapter_parameter_names
from pera_lightning.validation import check_choice


class UnusedLayers:
    """Finds adapted layers that are not used, once each in the first training batch, evaluation batch and step.

    The forwards of a model with compiled parts are not watched: its graph may be an old one, traced without the hooks.
    What it trains still shows in the gradients.
    """

    def __init__(self, on_unused: Literal["raise", "warn"]) -> None:
        check_choice(on_unused, "on_unused", ("raise", "warn"))
        self.on_unused = on_unused
        self._handles: list[RemovableHandle] = []
        self.restart()

    def restart(self) -> None:
        """Checks everything once more, as for a new fit."""
        self.stop()
        self._checked: set[Any] = set()  # kinds of batches, and ids of optimizers

    def before_batch(self, kind: str, model: nn.Module) -> None:
        """Watches the adapted layers of `model`, in the first batch of a kind."""
        if kind in self._checked:
            return
        self.stop()
        # Nothing waits in a compiled model, so nothing is missed.
        if any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in model.modules()):
            return
        self._nothing_ran, self._modules = True, set(model.modules())
        # One for all: a hook on each would switch off the fast path of torch's encoders, which runs no linear.
        self._handles.append(register_module_forward_pre_hook(self._some_ran))
        for path, module in model.named_modules():
            if isinstance(module, AdaptedLayer):
                self._waiting[id(module)] = path
                self._handles.append(module.register_forward_hook(self._ran))

    def after_batch(self, kind: str) -> None:
        """Complains of the adapted layers that did not run in the first batch of a kind."""
        if kind in self._checked:
            return
        silent, skipped = list(self._waiting.values()), self._nothing_ran
        self.stop()
        # A batch that the module skips, as a test that goes on does, says nothing of its layers: the next one is asked.
        if not skipped:
            self._checked.add(kind)
            self._complain(silent, f"adapted layers did not run in the first {kind} batch")

    def is_first_step(self, optimizer: Optimizer) -> bool:
        """Whether `before_step` has not seen this optimizer yet."""
        return id(optimizer) not in self._checked

    def before_step(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Complains of the adapter parameters that have no gradient in the first step of an optimizer."""
        if not self.is_first_step(optimizer):
            return
        self._checked.add(id(optimizer))
        # `grad is None`, not zero: PERA's A and h begin with gradients that are exactly zero.
        without = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is None}
        names = {n for n, p in model.named_parameters() if p.requires_grad and id(p) in without}
        silent = sorted(names.intersection(adapter_parameter_names(model)))
        self._complain(silent, "adapter parameters had no gradient in the first optimizer step")

    def stop(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()  # hooks of every forward cost time
        self._handles, self._nothing_ran = [], False
        self._waiting: dict[int, str] = {}  # layers that have not run yet
        self._modules: set[nn.Module] = set()  # of the model that is watched

    def _some_ran(self, module: nn.Module, *_: Any) -> None:
        if module in self._modules:
            self._nothing_ran = False

    def _ran(self, module: nn.Module, *_: Any) -> None:
        self._waiting.pop(id(module), None)

    def _complain(self, names: list[str], what: str) -> None:
        if not names:
            return
        text = (
            f"{len(names)} {what}, so their adapters change nothing: {listed(names)}; leave them out of targets, or "
            "set on_unused='warn' where a layer need not run in every batch"
        )
        if self.on_unused == "raise":
            raise UnusedLayerError(text)
        rank_zero_warn(text)
