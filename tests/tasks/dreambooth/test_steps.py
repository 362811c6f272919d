"""The loss of an optimizer step of DreamBooth, over batches and processes that hold unlike much."""

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from pera_lightning.tasks.dreambooth import loss as diffusion_loss
from pera_lightning.tasks.dreambooth.module import DreamBoothModule
from tests.tasks.dreambooth.fits import base_fixture, cached_batch, fit, gradients, part
from tests.tasks.dreambooth.sdxl import SHALLOW

base = base_fixture(unet=SHALLOW)


class Still(DreamBoothModule):
    """Noise by an example's name and one timestep, so that an example's loss does not depend on its batch."""

    def encoded(self, batch):
        self.names = batch["ids"]
        return {**batch, "latent_std": torch.zeros_like(batch["latent_mean"])}

    def _shared_step(self, batch):
        plain = diffusion_loss.offset_noise

        def by_name(shape, *_, **__):
            own = [torch.Generator().manual_seed(int(name.removesuffix(".png"))) for name in self.names]
            return torch.stack([torch.randn(shape[1:], generator=one) for one in own])

        diffusion_loss.offset_noise = by_name
        try:
            return super()._shared_step(batch)
        finally:
            diffusion_loss.offset_noise = plain

    def build_network(self, weights=True):
        network = super().build_network(weights)
        self.schedule = torch.tensor([0.4]), "epsilon"
        return network


class Uneven(LightningDataModule):
    """Three photographs with a class image each, in one batch; or two and one, over batches or processes."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        own = self.batches
        if self.trainer.world_size == 2:
            own = own[self.trainer.global_rank :: 2]
        return DataLoader(own, batch_size=None)


class Gradients(Callback):
    def __init__(self, file):
        self.file = file

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        torch.save(gradients(pl_module), f"{self.file}{trainer.global_rank}.pt")


def test_a_step_is_one_mean_over_batches_and_processes(base, tmp_path):
    whole = cached_batch(rows=6, prior=3, side=8)
    pieces = [part(whole, rows) for rows in ([0, 1, 3, 4], [2, 5])]
    ways = {
        "one": ([whole], {}),
        "accumulated": (pieces, {"accumulate_grad_batches": 2}),
        "ranks": (pieces, {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}),
    }
    for name, (batches, options) in ways.items():
        settings = {"base_dtype": "float32", "snr_gamma": 0.3, "prior_weight": 0.4, "dino": None, "clip": None}
        network = Still(model_name=base, **settings)
        fit(tmp_path, network, Uneven(batches), callbacks=[Gradients(tmp_path / name)], **options)
    one = torch.load(tmp_path / "one0.pt")
    for name in ("accumulated0", "ranks0", "ranks1"):
        other = torch.load(tmp_path / f"{name}.pt")
        assert other.keys() == one.keys()
        for key, value in one.items():
            largest = value.abs().max().item()
            assert largest > 0, key
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-3 * largest, msg=f"{name} {key}")
