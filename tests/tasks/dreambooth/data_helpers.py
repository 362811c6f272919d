"""What the DreamBooth data tests share: photographs, a small data module, and a stand-in for SDXL's encoders."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from pera_lightning.tasks.dreambooth.data import DreamBoothDataModule

PROMPT = "a photo of sks dog"
CPU = torch.device("cpu")


def photograph(height, width, seed=0):
    """A gradient with noise, unlike its mirror image and its other half."""
    ramp = np.linspace(0, 200, height)[:, None, None] + np.linspace(0, 40, width)[None, :, None]
    noise = np.random.default_rng(seed).integers(0, 15, (height, width, 3))
    return Image.fromarray((ramp + noise).astype(np.uint8))


def fill(folder, count=3, size=(32, 48), first=0):
    """Writes ``00.png`` and so on, each unlike the others; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        photograph(*size, seed=number).save(folder / f"{number:02d}.png")
    return folder


class StandIn:
    """Encoders whose latents are means of 8 by 8 pixels, and whose embeddings are made of a prompt's length."""

    def __init__(self, nan=(), vae="one", text="one"):
        self.nan, self.own = nan, {"images": {"vae": vae}, "prompts": {"model": text}}
        self.images, self.texts = 0, []

    def settings(self):
        return dict(self.own)

    def latents(self, pixels, device):
        self.images += len(pixels)
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        mean = torch.cat([mean, mean.mean(1, keepdim=True)], 1)
        return (mean * torch.nan if "image" in self.nan else mean), mean.abs() / 10

    def prompts(self, prompts, device):
        self.texts += prompts
        values = torch.tensor([[float(len(prompt))] for prompt in prompts])
        if "prompt" in self.nan:
            values = values / 0
        return values[:, :, None].expand(-1, 77, 6).bfloat16(), values.expand(-1, 5).bfloat16()


class Generator:
    """Stands in for an `ImageGenerator`: photographs by seed, of a model called "tiny"."""

    is_sharded = False

    def __init__(self, model="tiny"):
        self.model, self.seeds = model, []

    def made_by(self):
        return {"model_name": self.model}

    def embed_beforehand(self, prompts):
        pass

    def generate(self, prompts, seeds):
        self.seeds += seeds
        return [photograph(16, 16, seed) for seed in seeds]


def attach(data, encoders=None, generator=None, *, adapts_text_encoders=False, is_trained=False, **trainer):
    """Gives a data module a trainer whose module has these encoders and this generator."""
    required = {"encoders": encoders or StandIn(), "generator": generator or Generator()}
    required |= {"adapts_text_encoders": adapts_text_encoders, "is_trained": is_trained}
    module = SimpleNamespace(data_requirements=lambda: required)
    data.trainer = SimpleNamespace(lightning_module=module, **trainer)
    return data


def data_module(folder, stage="fit", encoders=None, generator=None, **arguments):
    """A data module over `fill`'s folder, set up, at 16 pixels and uncached where not said otherwise."""
    usual = {"instance_prompt": PROMPT, "resolution": 16, "cache": False}
    data = attach(DreamBoothDataModule(str(folder), **{**usual, **arguments}), encoders, generator)
    data.setup(stage)
    return data


def drawn(data, seed=0):
    """The training batches of an epoch."""
    torch.manual_seed(seed)
    return list(data.train_dataloader())
