"""Small models whose adapters have moved, for the tests of merging and of the calibrated merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pera_lightning import inject
from pera_lightning.adapters import AuroRA, LoRA, Method
from pera_lightning.adapters.aurora import AuroRALayer

WIDTH = 6


def base(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def adapted(method: Method | None = None, targets: tuple[str, ...] = ("0", "2")) -> nn.Sequential:
    """A model in eval mode whose trained tensors have moved."""
    model = base()
    inject(model, method or LoRA(rank=2), targets, ["4"])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.4 * torch.randn_like(p))
    return model.eval()


def inputs(rows: int = 5) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(3))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def moved(model: nn.Module, method: AuroRA | None = None, targets: list[str] | None = None, **options: Any) -> Any:
    """Adapts a model by AuroRA, with large updates of every tensor; in eval mode."""
    inject(model, method or AuroRA(rank=2), targets or ["re:.*proj.*"], **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.6 * torch.randn(p.shape, generator=generator))
    return model.eval()


class Stack(nn.Module):
    """proj0, tanh, proj1, tanh, … and an output that is not adapted."""

    def __init__(self, depth: int = 2, *, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        for k in range(depth):
            setattr(self, f"proj{k}", nn.Linear(WIDTH, WIDTH, bias=bias))
        self.dropout, self.out, self.depth = nn.Dropout(dropout), nn.Linear(WIDTH, 3), depth

    def forward(self, x: Tensor) -> Tensor:
        for k in range(self.depth):
            x = self.dropout(torch.tanh(getattr(self, f"proj{k}")(x)))
        return self.out(x)


def tokens(rows: int = 300, seed: int = 3) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def adapters(model: nn.Module) -> dict[str, AuroRALayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, AuroRALayer)}
