"""Which adapted layers really ran: an adapter on a layer that nobody calls changes nothing."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils.hooks import RemovableHandle

from pera_lightning.adapters.adapted_layer import AdaptedLayer


class LayerCoverage:
    """Counts the adapted layers whose forward ran between `start` and `stop`.

    A model with compiled parts is not watched: its graph may be an old one, traced without the hooks. What it trains
    still shows in the gradients.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._waiting: dict[int, str] = {}

    def start(self, model: nn.Module) -> None:
        """Watches every adapted layer of `model`."""
        self.stop()
        if any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in model.modules()):
            return
        for path, module in model.named_modules():
            if isinstance(module, AdaptedLayer):
                self._waiting[id(module)] = path
                self._handles.append(module.register_forward_hook(self._ran))

    def _ran(self, module: nn.Module, *_: Any) -> None:
        self._waiting.pop(id(module), None)

    def stop(self) -> list[str]:
        """Stops watching; paths of the layers that did not run."""
        for handle in self._handles:
            handle.remove()
        silent = list(self._waiting.values())
        self._handles, self._waiting = [], {}
        return silent
