"""The networks of Stable Diffusion XL: UNet and text encoders.

Paper: SDXL (arXiv 2307.01952). Two text encoders read a prompt; the UNet attends to what their last layers but one
give, side by side, and is told the second one's projection of the full prompt, and sizes and crop in pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pera_lightning.adapters.adapted_layer import UNUSED
from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.tasks.dreambooth.pipeline_files import check_sdxl, failed, read
from pera_lightning.tasks.dreambooth.tokenization import prompt_embeddings
from pera_lightning.training.transformers_models import recompute_activations

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection


class SDXLNetwork(nn.Module):
    """The UNet and, if they are adapted, both text encoders."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel | None = None,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        if text_encoder is not None and text_encoder_2 is not None:
            self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
            # Of the first encoder only the states before this block are used, of the second the projection too.
            blocks = [m for m in text_encoder.modules() if hasattr(m, "self_attn") and hasattr(m, "mlp")]
            setattr(blocks[-1], UNUSED, True)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the UNet's base, whatever that of adapters on it."""
        frozen = (p.dtype for p in self.unet.parameters() if not p.requires_grad and p.is_floating_point())
        return next(frozen, next(self.unet.parameters()).dtype)

    def forward(
        self,
        noisy: Tensor | None = None,
        timesteps: Tensor | None = None,
        time_ids: Tensor | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        input_ids_2: Tensor | None = None,
    ) -> Any:
        """Predicts with the UNet or, without latents, embeds prompts.

        One forward for both, so that a sharded network gathers its weights for either.

        Args:
            noisy: latents with noise, (B, 4, h, w).
            timesteps: (B,), or one for all, ().
            time_ids: original height and width, crop's top and left, target height and width in pixels, (B, 6).
            prompt_embeds: embeddings of the prompts, (B, L, D).
            pooled_prompt_embeds: their pooled embeddings, (B, P).
            input_ids: token ids of the first tokenizer, (B, L), in place of embeddings.
            input_ids_2: token ids of the second tokenizer, (B, L).

        Returns:
            (B, 4, h, w) in the dtype of the products; without `noisy` the pair of `prompt_embeddings`.
        """
        # Text encoders with adapters run inside the network, so that their gradients flow.
        if input_ids is not None and input_ids_2 is not None:
            encoders = (self.text_encoder, self.text_encoder_2)
            prompt_embeds, pooled_prompt_embeds = prompt_embeddings(encoders, (input_ids, input_ids_2))
        if noisy is None:
            return prompt_embeds, pooled_prompt_embeds  # for images: embedded once, not in each step
        # The UNet computes in the dtype of what it is given. Sizes stay in float32, where they are exact.
        dtype = self.dtype
        conditions = {"text_embeds": pooled_prompt_embeds.to(dtype), "time_ids": time_ids}  # type: ignore[union-attr]
        embeds = prompt_embeds.to(dtype)  # type: ignore[union-attr]
        return self.unet(noisy.to(dtype), timesteps, embeds, added_cond_kwargs=conditions, return_dict=False)[0]

    def embeddings(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds token ids by the network's own text encoders: (B, L, D), and pooled (B, P)."""
        return self(input_ids=input_ids, input_ids_2=input_ids_2)

    def recompute_activations(self) -> None:
        """Computes the activations of each block again in the backward instead of keeping them."""
        self.unet.enable_gradient_checkpointing()  # non-reentrant, as diffusers has it
        for encoder in (getattr(self, name, None) for name in ("text_encoder", "text_encoder_2")):
            if encoder is not None:
                recompute_activations(encoder)


def load_unet(
    name: str, *, dtype: torch.dtype, revision: str | None = None, variant: str | None = None, weights: bool = True
) -> UNet2DConditionModel:
    """Loads the UNet of a pipeline of Stable Diffusion XL, in eval mode; `weights=False` gives random weights."""
    from diffusers import UNet2DConditionModel

    check_sdxl(name, revision)
    if not weights:
        network = UNet2DConditionModel.from_config(read(name, "unet/config.json", revision))
        return nn.Module.to(network, dtype).eval()  # diffusers' own `to` warns, without a cause
    return loaded(UNet2DConditionModel, name, "unet", dtype=dtype, revision=revision, variant=variant)


def load_text_encoders(
    name: str, *, dtype: torch.dtype, revision: str | None = None, variant: str | None = None, weights: bool = True
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Loads both text encoders, in eval mode; see `load_unet`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    check_sdxl(name, revision)
    made = []
    for part, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        if weights:
            made.append(loaded(kind, name, part, dtype=dtype, revision=revision, variant=variant))
        else:
            config = CLIPTextConfig.from_dict(read(name, f"{part}/config.json", revision))
            made.append(kind(config).to(dtype).eval())  # random weights
    return made[0], made[1]


def loaded(kind: Any, name: str, part: str, *, dtype: torch.dtype, revision: str | None, variant: str | None) -> Any:
    """Loads a model with its weights, read straight into `dtype`."""
    options: dict[str, Any] = {"dtype" if kind.__module__.startswith("transformers") else "torch_dtype": dtype}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # which diffusers still gives
            options |= {"use_safetensors": True, "output_loading_info": True, "variant": variant}
            network, found = kind.from_pretrained(name, subfolder=part, revision=revision or "main", **options)
    except Exception as error:  # diffusers and transformers check little of what a folder's files say
        raise failed(error, name, part, variant) from error
    check_complete(f"{part} of model {name}" if part else f"model {name}", found)
    return network.eval()  # as from_pretrained, whatever the library


def check_complete(what: str, found: Mapping[str, Any]) -> None:
    """Refuses a base with tensors that no file gave: they would be random and stay so."""
    if missing := sorted(found["missing_keys"]):
        lost = f"has no weights for {len(missing)} of its tensors, which would be random"
        raise ConfigurationError(f"{what} {lost}: {listed(missing, 2)}; fetch it again, or give another")
