"""Images and prompts as what SDXL's encoders make of them: in a training step, or beforehand through the cache.

`latents` and `embeddings` are the one way to either; both the step and the cache go through them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from pera_lightning.errors import DataError, listed, megabytes
from pera_lightning.tasks.dreambooth import latent_cache as cache
from pera_lightning.tasks.dreambooth.encoders import Encoders
from pera_lightning.tasks.dreambooth.photographs import Photograph, file_sha256
from pera_lightning.tasks.dreambooth.preprocessing import crop_to, open_image, to_pixels

_VAE_ADVICE = (
    "SDXL's VAE overflows in float16: leave vae out to run it in float32, or take madebyollin/sdxl-vae-fp16-fix; if it "
    "ran so, replace the image"
)
_TEXT_ADVICE = "let the text encoders run in float32"


def latents(encoders: Encoders, pixels: Tensor, ids: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Encodes images (B, 3, H, W) in [-1, 1] into ``latent_mean`` and ``latent_std``, (B, 4, H/8, W/8) in float32."""
    mean, std = encoders.latents(pixels, device)
    _require_finite("latents of image", ids, (mean, std), _VAE_ADVICE)
    return {"latent_mean": mean, "latent_std": std}


def embeddings(encoders: Encoders, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Embeds prompts by frozen text encoders: ``prompt_embeds`` (B, 77, D) and ``pooled_prompt_embeds`` (B, P)."""
    embeds, pooled = encoders.prompts(list(prompts), device)
    _require_finite("embeddings of prompt", [repr(prompt) for prompt in prompts], (embeds, pooled), _TEXT_ADVICE)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _require_finite(what: str, names: Sequence[str], tensors: Sequence[Tensor], advice: str) -> None:
    finite = torch.stack([value.isfinite().flatten(1).all(1) for value in tensors]).all(0)  # (B,)
    if not finite.all():
        broken = dict.fromkeys(name for name, good in zip(names, finite.tolist(), strict=True) if not good)
        raise DataError(f"{what} {listed(broken, 3)}: NaN or infinite; {advice}")


def encode_photographs(
    photographs: Sequence[Photograph],
    encoders: Encoders,
    device: torch.device,
    *,
    size: tuple[int, int],
    folder: Path,
    digests: Mapping[str, str],
    rank: int = 0,
    world: int = 1,
) -> dict[str, cache.Tensors]:
    """Encodes images, cropped from the middle, and their captions, or reads them from the cache.

    Every process must call it, and has all of it afterwards. Equal images, and equal captions, share their tensors.

    Args:
        photographs: the images.
        encoders: the VAE and the frozen text encoders.
        device: where they compute.
        size: height and width in pixels.
        folder: the folder of the cache.
        digests: sha256 of files by id, as far as they are known.
        rank: rank of this process.
        world: number of processes.

    Returns:
        For each photograph's id: ``latent_mean``, ``latent_std`` (4, H/8, W/8), ``time_ids`` (6,), ``prompt_embeds``
        (77, D) and ``pooled_prompt_embeds`` (P,), float32 on the CPU.
    """
    # Keys hold the content and the encoders' identity: equal content shares one file, another encoder takes others.
    settings = encoders.settings()
    image_keys = {}
    for one in photographs:
        content = {"sha256": digests.get(one.id) or file_sha256(one.path), "size": list(size), "crop": "center"}
        content["transparency"] = "white"  # earlier versions dropped it: their latents are of other pixels
        image_keys[one.id] = cache.cache_key("image", content, settings["images"])
    prompt_keys = {
        one.caption: cache.cache_key("prompt", {"text": one.caption}, settings["prompts"]) for one in photographs
    }
    captions = {key: caption for caption, key in prompt_keys.items()}
    images = {image_keys[one.id]: one for one in reversed(photographs)}  # of equal ones the first

    def encode(key: str) -> cache.Tensors:
        # One by one, so that a result does not depend on the images beside it.
        if key in captions:
            made = embeddings(encoders, [captions[key]], device)
        else:
            image, time_ids = crop_to(open_image(images[key].path), size)
            made = latents(encoders, to_pixels(image)[None], [images[key].id], device)
            made["time_ids"] = time_ids[None]
        # A batch of one: its axis goes.
        return {name: value[0].detach().to("cpu", torch.float32).contiguous() for name, value in made.items()}

    keys = [*dict.fromkeys(image_keys.values()), *captions]
    found, computed = cache.cached(folder, keys, encode, rank=rank, world=world)
    held = sum(value.nbytes for tensors in found.values() for value in tensors.values())
    rank_zero_info(
        f"Cached: {len(images)} images and {len(captions)} prompts, {megabytes(held)}; {computed} computed now, the "
        f"rest from {folder} or by other processes"
    )
    return {one.id: {**found[image_keys[one.id]], **found[prompt_keys[one.caption]]} for one in photographs}
