"""DreamBooth on SDXL: a subject is taught to the UNet, and if wanted to both text encoders, from a few photographs.

Papers: DreamBooth (arXiv 2208.12242), SDXL (arXiv 2307.01952), min-SNR weights (arXiv 2303.09556); AuroRA (arXiv
2505.18738) adapts SDXL's UNet here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from pera_lightning.errors import ConfigurationError, listed, megabytes
from pera_lightning.tasks.dreambooth import encoding
from pera_lightning.tasks.dreambooth import loss as diffusion_loss
from pera_lightning.tasks.dreambooth.data import DreamBoothDataModule
from pera_lightning.tasks.dreambooth.encoders import Encoders
from pera_lightning.tasks.dreambooth.generate import ImageGenerator
from pera_lightning.tasks.dreambooth.image_stages import ImageStagesModule
from pera_lightning.tasks.dreambooth.networks import SDXLNetwork, load_text_encoders, load_unet
from pera_lightning.tasks.dreambooth.noise_schedule import load_scheduler, noise_alphas
from pera_lightning.tasks.dreambooth.pipeline_files import CHANNELS, FACTOR
from pera_lightning.training.fsdp2 import data_parallel_mesh
from pera_lightning.training.optimizers import with_own_rate
from pera_lightning.training.precision import DTYPES
from pera_lightning.validation import check_choice, check_in_range, check_positive, check_positive_int

_STEPS = "trained_steps"  # in checkpoints
_LEVELS = 4  # timesteps of each image that a merge is measured at
TOKENS = 77  # of a prompt, for CLIP
_TEXT = ("prompt_embeds", "pooled_prompt_embeds", "input_ids", "input_ids_2")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


class DreamBoothModule(ImageStagesModule):
    """Trains adapters of SDXL on photographs of a subject.

    Training batches are dicts: ``latent_mean`` and ``latent_std`` (B, 4, H/8, W/8), ``prompt_embeds`` (B, 77, D) and
    ``pooled_prompt_embeds`` (B, P), or what the step encodes, ``pixel_values`` (B, 3, H, W) in [-1, 1] and
    ``prompts``, a list of text; with either, ``time_ids`` (B, 6), ``is_prior`` (B,) bool and ``ids``. The loss is the
    squared error of what the UNet predicts: the mean over the subject's images, plus `prior_weight` times that over the
    class images, each image by its own min-SNR weight. That of an optimizer step is one mean over all ranks and
    accumulated batches. Logged: `train/loss`.

    Validation, test and prediction generate images of the data module's prompts and seeds, see `ImageStagesModule`;
    test measures them (`test/dino`, `test/clip_i`, `test/clip_t`).

    Attributes:
        trained_steps: optimizer steps that the network was trained for, those before this fit included.
        encoders: the VAE and the frozen text encoders.
        schedule: ᾱ (T,) of the noise schedule in float32, and what the UNet predicts; there once the network is built.

    Args:
        model_name: hub id or folder of a pipeline of SDXL.
        vae: another VAE, by hub id or folder, such as ``madebyollin/sdxl-vae-fp16-fix``, which runs in `base_dtype`;
            SDXL's own overflows there, and runs in float32.
        adapt_text_encoders: whether both text encoders are part of the network, so that targets find their layers.
        text_encoder_lr: learning rate of adapters in the text encoders; by default as elsewhere.
        snr_gamma: γ of the min-SNR weights; 5 in their paper. By default all timesteps count alike.
        noise_offset: standard deviation of the noise that all pixels of a channel share.
        prior_weight: weight of the loss of class images.
        prediction_type: what the UNet predicts; by default as its noise schedule says.
        optimizer: "adamw", or "adamw8bit", with moments in 8 bits (needs bitsandbytes).
        activation_checkpointing: whether the activations of each block are computed again in the backward.
        compile: whether the UNet is compiled, after the injection.
        revision: branch, tag or commit of the hub's repository.
        variant: variant of the weights' files, such as "fp16".
        sampling_steps: steps of the sampler for the images that are generated.
        guidance_scale: scale of classifier-free guidance for them; 1 switches it off.
        dino: hub id or folder of the network that `test/dino` compares by; null leaves it out.
        clip: hub id or folder of the network that `test/clip_i` and `test/clip_t` compare by; null leaves them out.
    """

    counted = "step_images"

    def __init__(
        self,
        model_name: str = "stabilityai/stable-diffusion-xl-base-1.0",
        vae: str | None = None,
        lr: float = 1e-4,
        lr_schedule: Literal["linear", "cosine", "constant"] = "constant",
        adapt_text_encoders: bool = False,
        text_encoder_lr: float | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        prior_weight: float = 1.0,
        prediction_type: Literal["epsilon", "v_prediction"] | None = None,
        optimizer: Literal["adamw", "adamw8bit"] = "adamw",
        base_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        activation_checkpointing: bool = False,
        compile: bool = False,
        revision: str | None = None,
        variant: str | None = None,
        sampling_steps: int = 30,
        guidance_scale: float = 5.0,
        dino: str | None = "facebook/dino-vits16",
        clip: str | None = "openai/clip-vit-base-patch32",
        **shared: Any,
    ) -> None:
        super().__init__(lr=lr, lr_schedule=lr_schedule, base_dtype=base_dtype, **shared)
        for name in ("snr_gamma", "text_encoder_lr"):
            if self.hparams[name] is not None:
                check_positive(self.hparams[name], name)
        for name in ("noise_offset", "prior_weight", "guidance_scale"):
            check_in_range(self.hparams[name], name, ge=0)
        if text_encoder_lr is not None and not adapt_text_encoders:
            raise ConfigurationError(f"text_encoder_lr={text_encoder_lr} needs adapt_text_encoders=true")
        if prediction_type is not None:
            check_choice(prediction_type, "prediction_type", diffusion_loss.PREDICTION_TYPES)
        check_choice(optimizer, "optimizer", ("adamw", "adamw8bit"))
        check_positive_int(sampling_steps, "sampling_steps")
        self.trained_steps = 0
        self.encoders = Encoders(model_name, vae=vae, dtype=DTYPES[base_dtype], revision=revision, variant=variant)

    # --- the network ---

    def build_network(self, weights: bool = True) -> SDXLNetwork:
        h = self.hparams
        how = {"dtype": DTYPES[h["base_dtype"]], "revision": h["revision"], "variant": h["variant"], "weights": weights}
        # First what is refused without weights: a prediction without a loss, and more steps than the sampler has.
        with torch.device("cpu"):  # on the meta device, where networks may be built, a schedule would have no values
            self.schedule = noise_alphas(h["model_name"], h["revision"], h["prediction_type"])
            load_scheduler(h["model_name"], h["revision"], steps=h["sampling_steps"])
        unet = load_unet(h["model_name"], **how)
        if not h["adapt_text_encoders"]:
            return SDXLNetwork(unet)
        return SDXLNetwork(unet, *load_text_encoders(h["model_name"], **how))

    def finish_network(self) -> None:
        network = self.model
        # An encoder that is made part of the network and not adapted would only cost memory.
        if self.hparams["adapt_text_encoders"] and self.adapter_injection is not None:
            plain = [n for n in _TEXT_ENCODERS if not any(p.requires_grad for p in getattr(network, n).parameters())]
            if plain:
                found = f"adapt_text_encoders=true, but no target names a layer of {listed(plain)}"
                raise ConfigurationError(f"{found}: add q_proj, k_proj, v_proj and out_proj to adapter.targets")
        if self.hparams["activation_checkpointing"]:
            network.recompute_activations()
        if self.hparams["compile"]:
            network.unet.compile()  # in place: names of parameters stay

    @property
    def generator(self) -> ImageGenerator:
        """Generates images with the network as it is, of the data's size; for a network that is built."""
        size, is_sharded = self._about_data.get("size"), data_parallel_mesh(self) is not None
        return ImageGenerator(self.model, self.encoders, self.hparams, self.schedule[1], size, is_sharded)

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if (rate := self.hparams["text_encoder_lr"]) is not None:
            text = (p for name in _TEXT_ENCODERS for p in getattr(self.model, name).parameters())
            groups = with_own_rate(groups, text, name="text_encoders", lr=rate)
        if self.hparams["optimizer"] == "adamw":
            return super().make_optimizer(groups)
        if data_parallel_mesh(self) is not None:
            raise ConfigurationError("optimizer=adamw8bit does not take FSDP2's shards; take adamw, or DDP")
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ConfigurationError("optimizer=adamw8bit needs bitsandbytes: pip install it, or take adamw") from error
        return AdamW8bit(groups)

    # --- training ---

    def data_requirements(self) -> dict[str, Any]:
        """States what training images are encoded with and, once the network is built, what makes class images."""
        stated = {"encoders": self.encoders, "adapts_text_encoders": self.hparams["adapt_text_encoders"]}
        if self.model is not None:
            stated |= {"generator": self.generator, "is_trained": self.trained_steps > 0}
        return stated

    def on_train_start(self) -> None:
        """Frees the encoders' memory: class images are generated, and what is cached is encoded."""
        # Not in on_fit_start: with max_epochs=-1 Lightning makes the train loader, which encodes, only after that.
        prompts = self._about_data.get("prompts", {})
        asked = [*prompts.get("validation", ())]  # of images during the fit
        if not self._about_data.get("cached", False):
            asked += prompts.get("train", ())
        if freed := self.generator.embed_beforehand(asked) + self.release_vae():
            rank_zero_info(f"Of VAE and text encoders, what is not needed any more left memory: {megabytes(freed)}")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.trained_steps += 1  # steps, not batches: Lightning calls this once an accumulation

    def encoded(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Encodes what a batch brings unencoded: pixels into latents, prompts into embeddings or token ids."""
        batch = dict(batch)
        if "latent_mean" not in batch:
            batch |= encoding.latents(self.encoders, batch.pop("pixel_values"), batch["ids"], self.device)
        if any(name in batch for name in _TEXT):
            return batch
        prompts = batch.pop("prompts")
        if self.hparams["adapt_text_encoders"]:  # the network runs these encoders itself, for their gradients
            one, two = self.encoders.token_ids(prompts)
            return {**batch, "input_ids": one.to(self.device), "input_ids_2": two.to(self.device)}
        batch |= encoding.embeddings(self.encoders, prompts, self.device)
        return batch

    def _shared_step(
        self, batch: Mapping[str, Any], t: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gives the summed loss, what it is summed over, and predictions (B, 4, h, w).

        Args:
            batch: a training batch.
            t: timesteps (B,); drawn by default.
            generator: a generator on the CPU, for noise that is the same each time; by default the device's own.
        """
        alphas, predicts = self.schedule
        batch = self.encoded(batch)
        mean, std = batch["latent_mean"].float(), batch["latent_std"].float()
        how: dict[str, Any] = {"device": mean.device if generator is None else "cpu", "generator": generator}
        # A sample of the VAE's distribution, anew in each step.
        latents = mean + std * torch.randn(mean.shape, **how).to(mean.device)
        # Diffusion: the UNet sees latents with noise of a timestep each, and predicts the noise (or v).
        noise = diffusion_loss.offset_noise(mean.shape, self.hparams["noise_offset"], **how).to(mean.device)
        if t is None:
            t = torch.randint(len(alphas), mean.shape[:1], device=mean.device)  # (B,), uniform
        noisy = diffusion_loss.add_noise(latents, noise, alphas, t)  # (B, 4, h, w)
        text = {name: batch[name] for name in _TEXT if name in batch}  # embeddings, or token ids
        prediction = self.model(noisy, t, batch["time_ids"], **text)  # type: ignore[misc]
        target = diffusion_loss.target(predicts, latents, noise, alphas, t)
        # Each image by its own min-SNR weight; then class images by the prior's.
        gamma, weights = self.hparams["snr_gamma"], None
        if gamma is not None:
            weights = diffusion_loss.min_snr_weights(alphas, t, gamma, predicts)
        prior = self.hparams["prior_weight"]
        return *diffusion_loss.dreambooth_loss(prediction, target, weights, batch["is_prior"], prior), prediction

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        summed, count, _ = self._shared_step(batch)
        return self.normalised_loss(summed, count, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_STEPS] = self.trained_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.trained_steps = int(checkpoint.get(_STEPS, checkpoint.get("global_step", 0)))

    # --- merging and export ---

    def outputs_and_loss(self, network: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Gives predictions (N, 4) for a batch, and their mean loss.

        Each image is seen at several timesteps, spread over the schedule. They and the noise are drawn by a seed made
        of the images' ids: other ones for other images, and the same each time.
        """
        seed = hashlib.sha256(repr(batch["ids"]).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "little"))
        encoded = {name: value for name, value in self.encoded(batch).items() if isinstance(value, Tensor)}
        # (B, …) -> (B * levels, …), the copies of an example next to one another.
        spread = {name: value.repeat_interleave(_LEVELS, 0) for name, value in encoded.items()}
        t = diffusion_loss.spread_timesteps(len(batch["ids"]), _LEVELS, len(self.schedule[0]), generator)
        summed, count, prediction = self._shared_step(spread, t.to(self.device), generator)
        return prediction.movedim(1, -1).flatten(0, -2), summed / count  # (B * levels * h * w, 4)

    def write_network(self, folder: Path, data: Any = None, class_names: Sequence[str] | None = None) -> list[str]:
        from pera_lightning.export.diffusers_pipeline import write_pipeline

        how = {name: self.hparams[name] for name in ("revision", "variant", "prediction_type")}
        notes = write_pipeline(self.model, folder, self.hparams["model_name"], **how)
        if (vae := self.hparams["vae"]) is not None:
            self.encoders.write_vae(folder / "vae")  # in place of the repository's
            notes.append(f"the VAE is {vae}")
        return notes

    def how_to_load(self, folder: Path) -> str:
        return f"diffusers.StableDiffusionXLPipeline.from_pretrained({str(folder)!r})"

    def export_notes(self) -> list[str]:
        predicts = self.hparams["prediction_type"]
        return [f"trained with prediction_type={predicts}: give the pipeline's scheduler the same"] if predicts else []

    # --- memory ---

    def example_batch(self, data: Any) -> tuple[dict[str, Tensor], str]:
        """Latents, those of class images included; the VAE, which is not in the network, does not count."""
        if not isinstance(data, DreamBoothDataModule):
            return super().example_batch(data)
        height, width = data.size
        uses_prior = data.class_folder is not None
        count = data.batch_size * (2 if uses_prior else 1)
        latents = (CHANNELS, height // FACTOR, width // FACTOR)
        # Of each prompt token ids for both encoders, or embeddings: the UNet takes the pooled one beside six sizes.
        config = self.model.unet.config  # type: ignore[union-attr]
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        text = {"prompt_embeds": (TOKENS, config.cross_attention_dim), "pooled_prompt_embeds": (pooled,)}
        if self.hparams["adapt_text_encoders"]:
            text = dict.fromkeys(("input_ids", "input_ids_2"), (TOKENS,))
        shapes = {"latent_mean": latents, "latent_std": latents, "time_ids": (6,), **text}
        batch = {name: torch.empty(count, *shape, device="meta") for name, shape in shapes.items()}
        batch |= {name: value.long() for name, value in batch.items() if name.startswith("input_ids")}
        batch["is_prior"] = torch.arange(count) >= data.batch_size  # its values decide what is computed
        kinds = f", {data.batch_size} of them of the class" if uses_prior else ""
        besides = "" if data.cache else "; the VAE, which stays where latents are not cached, comes on top"
        return batch, f"{count} images of {height}x{width} pixels{kinds}{besides}"
