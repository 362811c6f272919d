"""LightningModules as other people write them: they know nothing of adapters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Plain(LightningModule):
    """Builds in `__init__`, saves its hyperparameters, uses all parameters that need a gradient."""

    def __init__(self, width: int = 16, dropout: float = 0.3) -> None:
        super().__init__()
        self.save_hyperparameters()
        generator = torch.Generator().manual_seed(1)  # the "pretrained" base is the same in every run
        self.body = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.ReLU()
        )
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 3)
        for p in self.parameters():
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


class BuildsLate(Plain):
    """Builds in `configure_model` and offers no hook."""

    def __init__(self) -> None:
        super(Plain, self).__init__()
        self.inner: Plain | None = None

    def configure_model(self) -> None:
        if self.inner is None:
            self.inner = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class WithHook(BuildsLate):
    """The same with the two lines that the error message asks for."""

    adapter_injection = None

    def configure_model(self) -> None:
        if self.inner is None:
            super().configure_model()
            if self.adapter_injection is not None:
                self.adapter_injection(self)


class Noisy(torch.utils.data.Dataset):
    """Augments with torch's generator, as torchvision's transforms do."""

    def __init__(self, rows: int = 40) -> None:
        generator = torch.Generator().manual_seed(2)
        self.x = torch.randn(rows, 8, generator=generator)
        self.y = torch.randint(0, 3, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + 0.1 * torch.randn(8), self.y[index]


def train_loader(workers: int = 0) -> DataLoader:
    return DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers)


def val_loader() -> DataLoader:
    data = Noisy(12)
    return DataLoader(TensorDataset(data.x, data.y), batch_size=4)
