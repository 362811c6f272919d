"""Images and prompts of training rows as what SDXL's encoders make of them: through the cache, each once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from pera_lightning.errors import megabytes
from pera_lightning.tasks.dreambooth import latent_cache as cache
from pera_lightning.tasks.dreambooth.photographs import Photograph, file_sha256, open_image, seen, to_pixels
from pera_lightning.tasks.dreambooth.training_examples import TrainingRows

VAE_ADVICE = (
    "SDXL's VAE overflows in float16: leave vae out to run it in float32, or take madebyollin/sdxl-vae-fp16-fix; if it "
    "ran so, replace the image"
)
_TEXT_ADVICE = "let the text encoders run in float32"


def encode(
    rows: TrainingRows,
    encoders: Any,
    device: torch.device,
    *,
    folder: Path,
    digests: Mapping[str, str],
    rank: int = 0,
    world: int = 1,
) -> dict[str, cache.Tensors]:
    """What the encoders make of the images and captions of rows, from the cache where it is there.

    Every process must call it, and has all of it afterwards. Equal images, and equal captions, share their tensors.

    Args:
        rows: cut from the middle, not mirrored; all files are there.
        encoders: with `latents`, `prompts` and `settings`.
        device: where they compute.
        folder: of the cache.
        digests: sha256 of files by id, as far as they are known.
        rank: of this process.
        world: processes.

    Returns:
        For each photograph's id: ``latent_mean``, ``latent_std`` (4, H/8, W/8), ``time_ids`` (6,), ``prompt_embeds``
        (77, D) and ``pooled_prompt_embeds`` (P,), float32 on the CPU.

    Raises:
        DataError: for a broken image, latents or embeddings that are not finite, and a cache that cannot be used.
    """
    settings = encoders.settings()
    examples = [*rows.photographs, *rows.class_images]
    image_keys = {
        one.id: cache.image_key(digests.get(one.id) or file_sha256(one.path), rows.size, rows.crop, settings["images"])
        for one in examples
    }
    prompt_keys = {one.caption: cache.prompt_key(one.caption, settings["prompts"]) for one in examples}
    images = {image_keys[one.id]: one for one in reversed(examples)}
    captions = {key: caption for caption, key in prompt_keys.items()}

    def make(key: str) -> cache.Tensors:
        if key in captions:
            return _prompt(encoders, captions[key], device)
        return _image(encoders, images[key], rows.size, device)

    keys = [*dict.fromkeys(image_keys.values()), *captions]
    found, computed = cache.cached(folder, keys, make, rank=rank, world=world)
    held = sum(value.nbytes for tensors in found.values() for value in tensors.values())
    rank_zero_info(
        f"Cached: {len(images)} images and {len(captions)} prompts, {megabytes(held)}; {computed} computed now, the "
        f"rest from {folder} or by other processes"
    )
    return {one.id: {**found[image_keys[one.id]], **found[prompt_keys[one.caption]]} for one in examples}


def _image(encoders: Any, photograph: Photograph, size: tuple[int, int], device: torch.device) -> cache.Tensors:
    image, time_ids = seen(open_image(photograph.path), size)
    # One by one, so that a result does not depend on the images beside it.
    mean, std = encoders.latents(to_pixels(image)[None], device)
    made = {"latent_mean": mean[0], "latent_std": std[0], "time_ids": time_ids}
    return cache.require_finite(made, f"latents of image {photograph.path}", VAE_ADVICE)


def _prompt(encoders: Any, prompt: str, device: torch.device) -> cache.Tensors:
    embeds, pooled = encoders.prompts([prompt], device)
    made = {"prompt_embeds": embeds[0], "pooled_prompt_embeds": pooled[0]}
    return cache.require_finite(made, f"embeddings of prompt {prompt!r}", _TEXT_ADVICE)
