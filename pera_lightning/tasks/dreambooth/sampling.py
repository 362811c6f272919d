"""Images by Stable Diffusion XL with the network as it is, each the same whatever batch it is in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pera_lightning.tasks.dreambooth.networks import SDXLNetwork
from pera_lightning.tasks.dreambooth.noise_schedule import load_scheduler
from pera_lightning.tasks.dreambooth.pipeline_files import check_size

if TYPE_CHECKING:
    from pera_lightning.tasks.dreambooth.encoders import Encoders


class _Denoiser(nn.Module):
    """The network as the pipeline calls a UNet. It goes through the network's own forward, which gathers its shards."""

    def __init__(self, network: SDXLNetwork, device: torch.device) -> None:
        super().__init__()
        # In a tuple, which hides it from `nn.Module`: the pipeline cannot move or change it.
        self._network, self.device, self.dtype = (network,), device, network.dtype

    @property
    def config(self) -> Any:
        return self._network[0].unet.config

    @property
    def add_embedding(self) -> nn.Module:
        return self._network[0].unet.add_embedding

    def forward(
        self, latents: Tensor, t: Tensor, *, encoder_hidden_states: Tensor, added_cond_kwargs: dict, **_: Any
    ) -> tuple[Tensor]:
        texts = {"prompt_embeds": encoder_hidden_states, "pooled_prompt_embeds": added_cond_kwargs["text_embeds"]}
        return (self._network[0](latents, t, added_cond_kwargs["time_ids"], **texts),)


@torch.no_grad()
def sample(
    unet: nn.Module,
    encoders: Encoders,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    height: int,
    width: int,
    steps: int,
    guidance_scale: float,
    device: torch.device | str,
    prediction_type: str | None = None,
    embeddings: Callable[[list[str]], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Samples images by diffusers' StableDiffusionXLPipeline, with the repository's scheduler.

    An image depends on its prompt, its seed (noise is drawn on the CPU) and the network, on nothing else. The network's
    modes and the state of random numbers are left as they were; the network acts in eval mode.

    Args:
        unet: the network, or its UNet.
        encoders: the VAE, and frozen text encoders.
        prompts: B texts.
        seeds: B seeds.
        height: pixels, a multiple of 8.
        width: pixels, a multiple of 8.
        steps: steps of the sampler.
        guidance_scale: scale of classifier-free guidance; up to 1 it is off.
        device: the network's device.
        prediction_type: what the UNet predicts; by default as the repository's scheduler says.
        embeddings: embeds prompts, (B, 77, D) and pooled (B, P); by default the encoders do.

    Returns:
        (B, 3, height, width) in [0, 1], float32, on the device.
    """
    from diffusers import StableDiffusionXLPipeline

    check_size(height, width)
    scheduler = load_scheduler(encoders.name, encoders.revision, prediction_type, steps)
    device = torch.device(device)
    network = unet if isinstance(unet, SDXLNetwork) else SDXLNetwork(unet)
    embed = embeddings or (lambda texts: encoders.prompts(texts, device))
    with _evaluating(network):
        parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        denoiser = _Denoiser(network, device)
        pipeline = StableDiffusionXLPipeline(**parts, unet=denoiser, scheduler=scheduler, add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)  # Lightning shows the stage's
        how = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": guidance_scale}
        # Guidance leads away from the empty prompt: two predictions a step.
        if guidance_scale > 1:
            embeds, pooled = encoders.unconditional(embed)
            how |= {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled}
        known: dict[str, tuple[Tensor, Tensor]] = {}
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):  # one by one, so that the batch decides nothing
            if prompt not in known:
                known[prompt] = embed([prompt])  # once for all seeds
            embeds, pooled = known[prompt]
            with _seeded(int(seed), device) as generator:
                texts = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
                latents = pipeline(**texts, generator=generator, output_type="latent", **how).images  # (1, 4, h, w)
            images.append(encoders.decode(latents, device))
        return torch.cat(images)  # (B, 3, height, width)


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Puts a network in eval mode, and each module's own mode back afterwards."""
    modes = [(module, module.training) for module in network.modules()]  # one may be in eval mode by choice
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """Gives a generator on the CPU; torch's own are seeded too, for samplers that draw from these, and restored."""
    # Noise from the CPU is the same whatever device computes the image.
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.random.default_generator.manual_seed(seed)  # for samplers that add noise in each step
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)  # the device's own
        yield torch.Generator().manual_seed(seed)  # for the first noise
