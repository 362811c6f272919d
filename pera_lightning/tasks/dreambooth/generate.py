"""Images by a module's network as it is now: of validation, test and prediction, and of the class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pera_lightning.tasks.dreambooth.encoders import Encoders
from pera_lightning.tasks.dreambooth.image_folder import to_pil
from pera_lightning.tasks.dreambooth.networks import SDXLNetwork
from pera_lightning.tasks.dreambooth.pipeline_files import FACTOR
from pera_lightning.tasks.dreambooth.sampling import sample

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class ImageGenerator:
    """Generates images with a network.

    Attributes:
        network: the network, with its adapters.
        encoders: the VAE and the frozen text encoders.
        settings: the module's settings, by name.
        prediction_type: what the UNet predicts.
        size: height and width in pixels; None takes the network's own.
        is_sharded: whether all processes must generate each image together (FSDP2).
    """

    network: SDXLNetwork
    encoders: Encoders
    settings: Mapping[str, Any]
    prediction_type: str
    size: tuple[int, int] | None = None
    is_sharded: bool = False

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.network.parameters()).device

    def sampling(self) -> dict[str, Any]:
        """Says how images are sampled, as primitives."""
        side = self.network.unet.config.sample_size * FACTOR  # pixels of what SDXL was trained on: 1024
        height, width = self.size or (side, side)
        how = {"steps": self.settings["sampling_steps"], "guidance_scale": self.settings["guidance_scale"]}
        return {"height": height, "width": width, **how, "prediction_type": self.prediction_type}

    def made_by(self) -> dict[str, Any]:
        """Says what an image of the base depends on besides prompt and seed, as primitives."""
        names = ("model_name", "revision", "variant", "vae", "base_dtype")
        return {**{name: self.settings[name] for name in names}, **self.sampling()}

    def embeddings(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeds prompts by the text encoders as they are now: (B, 77, D), and pooled (B, P)."""
        if not self.settings["adapt_text_encoders"]:
            return self.encoders.prompts(list(prompts), self.device)
        # The network's own text encoders, with adapters.
        one, two = self.encoders.token_ids(prompts)
        return self.network.embeddings(one.to(self.device), two.to(self.device))

    def embed_beforehand(self, prompts: Sequence[str]) -> int:
        """Embeds prompts that will be asked for, so that frozen text encoders leave memory; returns the bytes freed."""
        if self.settings["adapt_text_encoders"]:  # what a prompt becomes changes with each step
            return 0
        if prompts:
            self.encoders.prompts([*dict.fromkeys([*prompts, ""])], self.device)  # "": what guidance leads away from
        return self.encoders.release(vae=False)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Generates an image for each prompt and seed.

        An image depends on its prompt, its seed and the network, not on the batch or the number of processes.
        """
        how = {"device": self.device, "embeddings": self.embeddings, **self.sampling()}
        return to_pil(sample(self.network, self.encoders, prompts=prompts, seeds=seeds, **how))
