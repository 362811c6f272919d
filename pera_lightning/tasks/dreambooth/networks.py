"""The networks of Stable Diffusion XL: UNet, text encoders, tokenizers and noise schedule, and embeddings of prompts.

Paper: SDXL (arXiv 2307.01952). Two text encoders read a prompt; the UNet attends to what their last layers but one
give, side by side, and is told the second one's projection of the whole, and sizes and crop in pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors import SafetensorError
from torch import Tensor, nn

from pera_lightning.adapters.adapted_layer import UNUSED
from pera_lightning.errors import ConfigurationError, listed, shorten
from pera_lightning.tasks.dreambooth.pipeline_files import check_sdxl, failed, find, read
from pera_lightning.training.transformers_models import recompute_activations

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
_LETTERS = 512  # of CLIP's vocabulary: each byte, and each at a word's end


class SDXLNetwork(nn.Module):
    """The UNet and, where they are adapted, both text encoders.

    Args:
        unet: predicts the noise, or what else the schedule asks for.
        text_encoder: the first, with the narrower states.
        text_encoder_2: the second, with the projection.
    """

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
            setattr(last_block(text_encoder), UNUSED, True)

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet's base, whatever that of adapters on it."""
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
        """What the UNet predicts, or, without latents, the embeddings of prompts.

        One forward for both, so that a network that is sharded gathers its weights for either.

        Args:
            noisy: latents with noise, (B, 4, h, w).
            timesteps: (B,), or one for all, ().
            time_ids: original height and width, crop's top and left, target height and width in pixels, (B, 6).
            prompt_embeds: (B, L, D).
            pooled_prompt_embeds: (B, P).
            input_ids: of the first tokenizer, (B, L), in place of embeddings.
            input_ids_2: of the second.

        Returns:
            (B, 4, h, w) in the dtype of the products; without `noisy` the pair of `prompt_embeddings`.
        """
        if input_ids is not None and input_ids_2 is not None:
            encoders = (self.text_encoder, self.text_encoder_2)
            prompt_embeds, pooled_prompt_embeds = prompt_embeddings(encoders, (input_ids, input_ids_2))
        if noisy is None:
            return prompt_embeds, pooled_prompt_embeds
        # The UNet computes in the dtype of what it is given. Sizes stay in float32, where they are exact.
        dtype = self.dtype
        conditions = {"text_embeds": pooled_prompt_embeds.to(dtype), "time_ids": time_ids}  # type: ignore[union-attr]
        embeds = prompt_embeds.to(dtype)  # type: ignore[union-attr]
        return self.unet(noisy.to(dtype), timesteps, embeds, added_cond_kwargs=conditions, return_dict=False)[0]

    def embeddings(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) and pooled (B, P) of token ids by the network's own text encoders."""
        return self(input_ids=input_ids, input_ids_2=input_ids_2)

    def recompute_activations(self) -> None:
        """Has the activations of each block computed again in the backward."""
        self.unet.enable_gradient_checkpointing()
        for encoder in (getattr(self, name, None) for name in ("text_encoder", "text_encoder_2")):
            if encoder is not None:
                recompute_activations(encoder)


def last_block(encoder: CLIPTextModel) -> nn.Module:
    """The last transformer block of a text encoder."""
    return [module for module in encoder.modules() if hasattr(module, "self_attn") and hasattr(module, "mlp")][-1]


def load_unet(
    name: str, *, dtype: torch.dtype, revision: str | None = None, variant: str | None = None, weights: bool = True
) -> UNet2DConditionModel:
    """The UNet of a pipeline of Stable Diffusion XL, in eval mode.

    Args:
        name: hub id, or folder.
        dtype: of the weights.
        revision: branch, tag or commit of the hub's repository.
        variant: of the weights' files, such as "fp16".
        weights: False builds from the configuration alone, with random weights.

    Raises:
        ConfigurationError: where it cannot be had, or is no Stable Diffusion XL.
    """
    from diffusers import UNet2DConditionModel

    check_sdxl(name, revision)
    if not weights:
        network = UNet2DConditionModel.from_config(read(name, "unet/config.json", revision))
        return nn.Module.to(network, dtype).eval()  # diffusers' own `to` warns, without a cause
    return loaded(UNet2DConditionModel, name, "unet", dtype=dtype, revision=revision, variant=variant)


def load_text_encoders(
    name: str, *, dtype: torch.dtype, revision: str | None = None, variant: str | None = None, weights: bool = True
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both text encoders, in eval mode; see `load_unet`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    check_sdxl(name, revision)
    made = []
    for part, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        if weights:
            made.append(loaded(kind, name, part, dtype=dtype, revision=revision, variant=variant))
        else:
            config = CLIPTextConfig.from_dict(read(name, f"{part}/config.json", revision))
            made.append(kind(config).to(dtype).eval())
    return made[0], made[1]


def loaded(kind: Any, name: str, part: str, *, dtype: torch.dtype, revision: str | None, variant: str | None) -> Any:
    """A model with its weights, read straight into `dtype`.

    Args:
        kind: its class, of diffusers or transformers.
        name: hub id, or folder.
        part: folder of it there; "" for the whole.
        dtype: of the weights.
        revision: of the hub's repository.
        variant: of the weights' files.

    Raises:
        ConfigurationError: where it cannot be had, or tensors are missing.
    """
    options = {"dtype" if kind.__module__.startswith("transformers") else "torch_dtype": dtype}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # which diffusers still gives
            network, found = kind.from_pretrained(
                name,
                subfolder=part,
                revision=revision or "main",
                variant=variant,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except SafetensorError as error:
        raise ConfigurationError(f"{part} of model {name}: a file of its weights is damaged; fetch it again") from error
    except (OSError, ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        raise failed(error, name, part, variant) from error
    _check_complete(f"{part} of model {name}" if part else f"model {name}", found)
    return network.eval()


def _check_complete(what: str, found: Mapping[str, Any]) -> None:
    """Refuses a base with tensors that no file gave: they would be random and stay so."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise ConfigurationError(
            f"{what} has no weights for {len(missing)} of its tensors, which would be random: {listed(missing, 2)}; "
            "fetch it again"
        )


def load_tokenizers(name: str, revision: str | None = None) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """The tokenizers of both text encoders.

    Raises:
        ConfigurationError: where they cannot be had.
    """
    from transformers import CLIPTokenizer

    made = []
    for part, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        find(name, f"{part}/tokenizer_config.json", revision)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(name, subfolder=part, revision=revision or "main")
        except Exception as error:  # the library tokenizers raises nothing narrower
            raise ConfigurationError(f"{part} of model {name}: {shorten(str(error))[:200]}; fetch it again") from error
        size = read(name, f"{encoder}/config.json", revision).get("vocab_size")
        if not _LETTERS <= len(tokenizer) <= (size or len(tokenizer)):
            raise ConfigurationError(
                f"{part} of model {name} has {len(tokenizer)} tokens, and {encoder} knows {size}; fetch it again"
            )
        made.append(tokenizer)
    return made[0], made[1]


def load_scheduler(name: str, revision: str | None = None, prediction_type: str | None = None) -> SchedulerMixin:
    """The scheduler that the pipeline samples with.

    Args:
        name: hub id, or folder.
        revision: branch, tag or commit of the hub's repository.
        prediction_type: what the UNet predicts, in place of what the scheduler's configuration says.

    Raises:
        ConfigurationError: where this diffusers does not have it.
    """
    import diffusers

    kind = (read(name, "model_index.json", revision).get("scheduler") or [None, None])[1]
    maker = getattr(diffusers, str(kind), None)
    config = read(name, "scheduler/scheduler_config.json", revision)
    if prediction_type is not None:
        config = {**config, "prediction_type": prediction_type}
    try:
        if maker is None:
            raise ValueError("there is no such class")
        return maker.from_config(config)
    except (ValueError, NotImplementedError, ImportError, TypeError) as error:
        raise ConfigurationError(
            f"scheduler {kind} of model {name} cannot be made by diffusers {diffusers.__version__}: "
            f"{shorten(str(error))[:200]}"
        ) from error


def noise_alphas(name: str, revision: str | None = None) -> tuple[Tensor, str]:
    """The noise schedule that a pipeline's UNet is trained with.

    Args:
        name: hub id, or folder.
        revision: branch, tag or commit of the hub's repository.

    Returns:
        ᾱ (T,) in float32, the share of the signal in the variance, and what is predicted, "epsilon" or another. With
        ``rescale_betas_zero_snr`` the last ᾱ is zero (arXiv 2305.08891, algorithm 1).

    Raises:
        ConfigurationError: where the scheduler is of another kind, such as EDM or flow matching.
    """
    from diffusers import DDPMScheduler

    scheduler = load_scheduler(name, revision)
    config = scheduler.config
    if "beta_schedule" not in config:
        raise ConfigurationError(
            f"model {name} was trained for {type(scheduler).__name__}, which has no schedule of β, and this module "
            "trains with one (DDPM's); give another base"
        )
    options = {key: config[key] for key in _SCHEDULE if key in config}
    ddpm = DDPMScheduler(rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False)), **options)
    return ddpm.alphas_cumprod.float(), config.get("prediction_type") or "epsilon"


def tokenise(tokenizers: Sequence[CLIPTokenizer], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids of prompts for each text encoder, padded and cut to its length.

    Args:
        tokenizers: of both.
        prompts: B texts.

    Returns:
        Two times (B, 77), int64. Of prompts that are cut a warning says which words are lost, once for each.
    """
    prompts = list(prompts)
    made = []
    for number, tokenizer in enumerate(tokenizers):
        longest = tokenizer.model_max_length
        if number == 0:  # the second has the same words
            for prompt in dict.fromkeys(prompts):
                whole = tokenizer(prompt, verbose=False).input_ids
                if len(whole) > longest:
                    _warn_of_cut(prompt, tokenizer.decode(whole[longest - 1 : -1]).strip(), longest)
        made.append(
            tokenizer(prompts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt").input_ids
        )
    return made[0], made[1]


_WARNED: set[tuple[str, int]] = set()


def _warn_of_cut(prompt: str, lost: str, longest: int) -> None:
    if (prompt, longest) not in _WARNED:
        _WARNED.add((prompt, longest))
        rank_zero_warn(
            f"the text encoders read {longest} tokens, start and end included; of the prompt {shorten(prompt)[:60]!r} "
            f"they do not see {shorten(lost)[:200]!r}"
        )


def prompt_embeddings(encoders: Sequence[nn.Module], input_ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings of prompts as the UNet takes them (arXiv 2307.01952, section 2.1).

    Args:
        encoders: both text encoders; gradients flow where they have any.
        input_ids: for each, (B, L).

    Returns:
        The states of both before their last layer, side by side, (B, L, D1 + D2), and the projection that the second
        gives of the whole prompt, (B, P).
    """
    states, pooled = [], None
    for encoder, ids in zip(encoders, input_ids, strict=True):
        out = encoder(ids.to(next(encoder.parameters()).device), output_hidden_states=True)
        states.append(out.hidden_states[-2])
        pooled = out[0]
    return torch.cat(states, dim=-1), pooled
