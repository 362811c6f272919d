"""The VAE of Stable Diffusion XL: loaded and checked, and the scaling of its latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.dreambooth.networks import loaded
from pera_lightning.tasks.dreambooth.pipeline_files import CHANNELS, FACTOR, INDEX, read


def load_vae(name: str, part: str, *, dtype: torch.dtype, revision: str | None, variant: str | None) -> Any:
    """Loads the frozen VAE in a folder or hub repository `name`, in its folder `part` ("" for `name` itself)."""
    from diffusers import AutoencoderKL

    if not part and (Path(name) / INDEX).is_file():
        raise ConfigurationError(f"vae={name} is a pipeline: give {Path(name) / 'vae'}")
    # From its configuration, before any weights are fetched.
    try:
        config = read(name, f"{part}/config.json".lstrip("/"), revision)
    except ConfigurationError as error:
        raise ConfigurationError(f"vae of {name}: {error}") from error
    factor = 2 ** (len(config.get("block_out_channels", [])) - 1)  # every block but one halves height and width
    found = config.get("_class_name"), config.get("latent_channels", CHANNELS), factor
    if found != ("AutoencoderKL", CHANNELS, FACTOR):
        needed = f"an AutoencoderKL with {CHANNELS} for {FACTOR}"
        has = f"is a {found[0]} with {found[1]} channels for {factor} pixels"
        raise ConfigurationError(f"the VAE of {name} {has}, and {needed} is needed: give vae= another, or leave it out")
    network = loaded(AutoencoderKL, name, part, dtype=dtype, revision=revision, variant=variant)
    return network.requires_grad_(False)


def shift_and_scale(vae: Any, device: torch.device | str) -> tuple[Any, Any]:
    """Gives shift and scale, so that the UNet takes (z - shift) · scale of the VAE's latents z.

    SDXL's scaling factor 0.13025 brings latents to a standard deviation of about 1; a VAE that knows means and
    deviations of its latents has these taken out, as diffusers' pipelines do. A `shift_factor` is left alone: SDXL's
    pipelines do not know it.
    """
    config = vae.config
    means, stds = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if means is None or stds is None:
        return 0.0, config.scaling_factor  # broadcast over (B, 4, h, w), as the other
    shift, std = (torch.tensor(x, device=device, dtype=torch.float32).view(1, -1, 1, 1) for x in (means, stds))
    return shift, config.scaling_factor / std
