"""The VAE of Stable Diffusion XL: loaded and checked, and the scaling of its latents."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.dreambooth.networks import loaded
from pera_lightning.tasks.dreambooth.pipeline_files import CHANNELS, FACTOR, check_sdxl, identity, read


class VAESource(NamedTuple):
    """Where a VAE lies and how it runs."""

    name: str  # hub id, or folder
    subfolder: str  # "" for `name` itself
    revision: str | None
    variant: str | None
    dtype: torch.dtype
    replaces: bool  # given in place of the pipeline's own

    @property
    def config_file(self) -> str:
        return f"{self.subfolder}/config.json".lstrip("/")

    def settings(self) -> dict[str, str | None]:
        """Gives what latents depend on, as primitives: for the keys of caches."""
        return {
            "vae": self.name,
            "files": identity(self.name, self.config_file, [self.subfolder], self.revision),
            "dtype": str(self.dtype).removeprefix("torch."),
            "variant": self.variant,
        }


def load_vae(source: VAESource) -> Any:
    """Loads a frozen VAE."""
    from diffusers import AutoencoderKL

    # From its configuration, before any weights are fetched.
    try:
        config = read(source.name, source.config_file, source.revision)
    except ConfigurationError as error:
        raise ConfigurationError(f"vae of {source.name}: {error}") from error
    factor = 2 ** (len(config.get("block_out_channels", [])) - 1)  # every block but one halves height and width
    found = config.get("_class_name"), config.get("latent_channels", CHANNELS), factor
    if found != ("AutoencoderKL", CHANNELS, FACTOR):
        raise ConfigurationError(
            f"the VAE of {source.name} is a {found[0]} with {found[1]} channels for {factor} pixels; an AutoencoderKL "
            f"with {CHANNELS} channels for {FACTOR} pixels is needed: give vae= another, or leave it out"
        )
    if not source.replaces:
        check_sdxl(source.name, source.revision)
    how = {"dtype": source.dtype, "revision": source.revision, "variant": source.variant}
    return loaded(AutoencoderKL, source.name, source.subfolder, **how).requires_grad_(False)


def shift_and_scale(vae: Any, device: torch.device | str) -> tuple[Any, Any]:
    """Gives shift and scale, so that the UNet takes (z - shift) · scale of the VAE's latents z.

    SDXL's scaling factor 0.13025 brings latents to a standard deviation of about 1; a VAE that knows means and
    deviations of its latents has these taken out, as diffusers' pipelines do. A `shift_factor` is left alone: SDXL's
    pipelines do not know it.
    """
    config = vae.config
    means, stds = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if means is None or stds is None:
        return 0.0, config.scaling_factor
    shift, std = (torch.tensor(x, device=device, dtype=torch.float32).view(1, -1, 1, 1) for x in (means, stds))
    return shift, config.scaling_factor / std
