"""Which adapted layers do not run: an adapter on a layer that nobody calls changes nothing."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.errors import ConfigurationError, UnusedLayerError, listed
from pera_lightning.injection.inject import adapter_parameter_names


class UnusedLayers:
    """Finds adapted layers that are not used, once each in the first training batch, evaluation batch and step.

    The forwards of a model with compiled parts are not watched: its graph may be an old one, traced without the hooks.
    What it trains still shows in the gradients.

    Args:
        on_unused: "raise", or "warn" for models that route (mixtures of experts).
    """

    def __init__(self, on_unused: Literal["raise", "warn"]) -> None:
        if on_unused not in ("raise", "warn"):
            raise ConfigurationError(f"on_unused={on_unused!r}: 'raise' or 'warn' is needed")
        self.on_unused = on_unused
        self._handles: list[RemovableHandle] = []
        self._waiting: dict[int, str] = {}
        self.restart()

    def restart(self) -> None:
        """Checks everything once more, as for a new fit."""
        self.stop()
        self._checked: set[Any] = set()

    def before_batch(self, kind: str, model: nn.Module) -> None:
        """Watches the adapted layers of `model`, in the first batch of a kind."""
        if kind in self._checked:
            return
        self.stop()
        if any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in model.modules()):
            return
        for path, module in model.named_modules():
            if isinstance(module, AdaptedLayer):
                self._waiting[id(module)] = path
                self._handles.append(module.register_forward_hook(self._ran))

    def after_batch(self, kind: str) -> None:
        """Complains of the adapted layers that did not run in the first batch of a kind."""
        if kind not in self._checked:
            self._checked.add(kind)
            silent = list(self._waiting.values())
            self.stop()
            self._complain(silent, f"adapted layers did not run in the first {kind} batch")

    def before_step(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Complains of the adapter parameters that have no gradient in the first step of an optimizer."""
        if id(optimizer) in self._checked:
            return
        self._checked.add(id(optimizer))
        without = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is None}
        names = {n for n, p in model.named_parameters() if p.requires_grad and id(p) in without}
        silent = sorted(names.intersection(adapter_parameter_names(model)))
        self._complain(silent, "adapter parameters had no gradient in the first optimizer step")

    def stop(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._waiting = [], {}

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
