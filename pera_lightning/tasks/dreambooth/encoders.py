"""What Stable Diffusion XL has beside the trained network: the VAE and frozen text encoders.

Each image and each prompt is computed alone: the result does not depend on what else is in the batch, and the memory
needed, which the VAE in float32 decides, is that of one image.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.dreambooth.networks import (
    load_text_encoders,
    load_tokenizers,
    loaded,
    prompt_embeddings,
    tokenise,
)
from pera_lightning.tasks.dreambooth.pipeline_files import (
    CHANNELS,
    FACTOR,
    INDEX,
    check_sdxl,
    check_size,
    identity,
    read,
)

_TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class Encoders:
    """The VAE and both text encoders of a pipeline, frozen, loaded when they are needed and on the device asked for.

    No `nn.Module`: what is here is neither trained, sharded, saved nor counted.

    Args:
        name: hub id, or folder.
        vae: another VAE, by hub id or folder, such as ``madebyollin/sdxl-vae-fp16-fix``. It runs in `dtype`; SDXL's
            own overflows in float16 and runs in float32.
        dtype: of the text encoders.
        revision: branch, tag or commit of the hub's repository `name`.
        variant: of its weights' files, such as "fp16".
    """

    def __init__(
        self,
        name: str,
        *,
        vae: str | None = None,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        self.name, self.vae, self.dtype, self.revision, self.variant = name, vae, dtype, revision, variant
        self._vae: Any = None
        self._text: tuple[nn.Module, nn.Module] | None = None
        self._tokenizers: Any = None
        self._prompts: dict[str, tuple[Tensor, Tensor]] = {}

    # --- images ---

    def latents(self, pixels: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """The normal distribution of each image's latents, as the UNet takes them.

        Args:
            pixels: (B, 3, H, W) in [-1, 1]; height and width are multiples of 8.
            device: where it is computed.

        Returns:
            Mean and standard deviation, each (B, 4, H/8, W/8) in float32 on the device, times the VAE's scaling factor;
            where the VAE has means and deviations of its latents, these are taken out, as diffusers' pipelines do.

        Raises:
            ConfigurationError: for other sizes, or where the VAE cannot be had.
        """
        check_size(*pixels.shape[-2:])
        with _plain(device):
            vae = self._load_vae(device)
            shift, scale = _scaling(vae, device)
            means, stds = [], []
            for image in pixels.split(1):
                found = vae.encode(image.to(device, vae.dtype)).latent_dist
                means.append((found.mean.float() - shift) * scale)
                stds.append(found.std.float() * scale)
            return torch.cat(means), torch.cat(stds)

    def decode(self, latents: Tensor, device: torch.device | str) -> Tensor:
        """Images of latents.

        Args:
            latents: (B, 4, h, w), as the UNet takes them.
            device: where it is computed.

        Returns:
            (B, 3, 8h, 8w) in [0, 1], float32, on the device.
        """
        with _plain(device):
            vae = self._load_vae(device)
            shift, scale = _scaling(vae, device)
            images = []
            for one in latents.split(1):
                plain = (one.to(device, torch.float32) / scale + shift).to(vae.dtype)
                images.append((vae.decode(plain, return_dict=False)[0].float() * 0.5 + 0.5).clamp(0, 1))
            return torch.cat(images)

    def _load_vae(self, device: torch.device | str) -> Any:
        if self._vae is None:
            self._vae = self._read_vae()
        return self._vae.to(device)

    def _read_vae(self) -> Any:
        name, part, revision, variant = self._vae_source()
        if self.vae is not None and (Path(self.vae) / INDEX).is_file():
            raise ConfigurationError(f"vae={self.vae} is a whole pipeline: give {Path(self.vae) / 'vae'}")
        if self.vae is not None and Path(self.vae).is_file():
            raise ConfigurationError(f"vae={self.vae} is a file: give a folder with config.json and its weights")
        try:
            return self._loaded_vae(name, part, revision, variant)
        except ConfigurationError as error:
            raise error if self.vae is None else ConfigurationError(f"vae={self.vae}: {error}") from error

    def _loaded_vae(self, name: str, part: str, revision: str | None, variant: str | None) -> Any:
        from diffusers import AutoencoderKL

        dtype = torch.float32 if self.vae is None else self.dtype
        config = read(name, f"{part}/config.json".lstrip("/"), revision)
        kind = config.get("_class_name")
        shape = config.get("latent_channels", CHANNELS), 2 ** (len(config.get("block_out_channels", [])) - 1)
        if kind != "AutoencoderKL" or shape != (CHANNELS, FACTOR):
            what = (
                f"is of class {kind}" if kind != "AutoencoderKL" else f"has {shape[0]} channels for {shape[1]} pixels"
            )
            raise ConfigurationError(
                f"the VAE of {name} {what}, and an AutoencoderKL with {CHANNELS} channels for {FACTOR} pixels is "
                "needed: give vae= another, or leave it out"
            )
        if self.vae is None:
            check_sdxl(name, revision)
        vae = loaded(AutoencoderKL, name, part, dtype=dtype, revision=revision, variant=variant)
        return vae.requires_grad_(False)

    def _vae_source(self) -> tuple[str, str, str | None, str | None]:
        """Name, part, revision and variant."""
        own = self.name, "vae", self.revision, self.variant
        return own if self.vae is None else (self.vae, "", None, None)

    # --- text ---

    def prompts(self, prompts: Sequence[str], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Embeddings of prompts, kept in CPU memory for the next time.

        Args:
            prompts: B texts.
            device: where they are computed and given.

        Returns:
            (B, 77, D) and pooled (B, P), in the text encoders' dtype.

        Raises:
            ConfigurationError: where the text encoders cannot be had.
        """
        with _plain(device):
            for prompt in dict.fromkeys(prompts):
                if prompt not in self._prompts:
                    self._prompts[prompt] = self._embed(prompt, device)
            found = [self._prompts[prompt] for prompt in prompts]
            embeds, pooled = (torch.cat(parts).to(device) for parts in zip(*found, strict=True))
            return embeds, pooled

    def token_ids(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, 77) of prompts for either text encoder, on the CPU; see `tokenise`."""
        if self._tokenizers is None:
            self._tokenizers = load_tokenizers(self.name, self.revision)
        return tokenise(self._tokenizers, prompts)

    def _embed(self, prompt: str, device: torch.device | str) -> tuple[Tensor, Tensor]:
        if self._text is None:
            found = load_text_encoders(self.name, dtype=self.dtype, revision=self.revision, variant=self.variant)
            self._text = found[0].requires_grad_(False), found[1].requires_grad_(False)
        encoders = [encoder.to(device) for encoder in self._text]
        embeds, pooled = prompt_embeddings(encoders, self.token_ids([prompt]))
        return embeds.cpu(), pooled.cpu()

    def unconditional(self, device: torch.device | str, embed: Callable[[list[str]], Any] | None = None) -> Any:
        """What guidance leads away from: embeddings of the empty prompt, or zeros where the pipeline says so.

        Args:
            device: where it is given.
            embed: makes embeddings of prompts, by default `prompts`.
        """
        embed = embed or (lambda texts: self.prompts(texts, device))
        embeds, pooled = embed([""])
        if read(self.name, INDEX, self.revision).get("force_zeros_for_empty_prompt", True):
            return torch.zeros_like(embeds), torch.zeros_like(pooled)
        return embeds, pooled

    def write_vae(self, folder: Path) -> None:
        """Writes the VAE, in place of one that is there."""
        from pera_lightning.export.pipeline_files import without_path

        shutil.rmtree(folder, ignore_errors=True)
        self._load_vae("cpu").save_pretrained(folder)
        without_path(folder / "config.json")
        self.release(text=False)

    # --- what is held, and what it is ---

    def release(self, vae: bool = True, text: bool = True) -> int:
        """Frees the networks' memory, and gives its bytes; embeddings of prompts that were seen stay known."""
        before = self.held()
        if vae:
            self._vae = None
        if text:
            self._text = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return before - self.held()

    def held(self) -> int:
        """Bytes of the networks that are loaded."""
        tensors = [
            t for n in (self._vae, *(self._text or ())) if n is not None for t in (*n.parameters(), *n.buffers())
        ]
        return sum(t.numel() * t.element_size() for t in tensors)

    def settings(self) -> dict[str, dict[str, str | None]]:
        """What latents of "images" and embeddings of "prompts" depend on, as primitives: for the keys of caches."""
        name, part, revision, variant = self._vae_source()
        where = f"{part}/config.json".lstrip("/")
        return {
            "images": {
                "vae": name,
                "files": identity(name, where, [part], revision),
                "dtype": _word(torch.float32 if self.vae is None else self.dtype),
                "variant": variant,
            },
            "prompts": {
                "model": self.name,
                "files": identity(self.name, INDEX, _TEXT_PARTS, self.revision),
                "dtype": _word(self.dtype),
                "variant": self.variant,
            },
        }


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _scaling(vae: Any, device: torch.device | str) -> tuple[Any, Any]:
    """Shift and scale, so that what the UNet takes is (z - shift) * scale.

    A `shift_factor` is left alone: SDXL's pipelines do not know it.
    """
    config = vae.config
    factor = config.scaling_factor
    means, stds = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if means is None or stds is None:
        return 0.0, factor
    shift, std = (torch.tensor(x, device=device, dtype=torch.float32).view(1, -1, 1, 1) for x in (means, stds))
    return shift, factor / std


@contextlib.contextmanager
def _plain(device: torch.device | str) -> Iterator[None]:
    """No gradients, no autocast, and tensors that training may use later, as those of inference mode cannot be."""
    off = torch.autocast(torch.device(device).type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), off:
        yield
