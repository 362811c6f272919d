"""DreamBooth on SDXL: a subject is taught to the UNet, and where wanted to both text encoders, from a few photographs.

Papers: DreamBooth (arXiv 2208.12242), SDXL (arXiv 2307.01952), min-SNR weights (arXiv 2303.09556); AuroRA (arXiv
2505.18738) adapts SDXL's UNet here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.errors import ConfigurationError, DataError, listed, megabytes
from pera_lightning.tasks.dreambooth import loss as diffusion_loss
from pera_lightning.tasks.dreambooth.encoders import Encoders
from pera_lightning.tasks.dreambooth.encoding import VAE_ADVICE
from pera_lightning.tasks.dreambooth.generate import Pictures
from pera_lightning.tasks.dreambooth.networks import (
    SDXLNetwork,
    load_text_encoders,
    load_unet,
    noise_alphas,
)
from pera_lightning.training.fsdp2 import data_parallel_mesh
from pera_lightning.training.module import DTYPES
from pera_lightning.training.normalised_loss import StepMeanModule
from pera_lightning.training.optimizers import with_own_rate
from pera_lightning.validation import check_choice, check_in_range, check_positive, check_positive_int

_STEPS = "trained_steps"  # in checkpoints
_LEVELS = 4  # timesteps of each image that a merge is measured at
TOKENS = 77  # of a prompt, for CLIP
_TEXT = ("prompt_embeds", "pooled_prompt_embeds", "input_ids", "input_ids_2")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


class DreamBoothModule(StepMeanModule):
    """Trains adapters of SDXL on photographs of a subject.

    Training batches are dicts: ``pixel_values`` (B, 3, H, W) in [-1, 1] and ``prompts``, a list of text, or what the
    encoders made of them, ``latent_mean`` and ``latent_std`` (B, 4, H/8, W/8), ``prompt_embeds`` (B, 77, D) and
    ``pooled_prompt_embeds`` (B, P); with either, ``time_ids`` (B, 6), ``is_prior`` (B,) bool and ``ids``. The loss is
    the squared error of what the UNet predicts: the mean over the subject's images, plus `prior_weight` times that
    over the class images, each image by its own min-SNR weight. That of an optimizer step is one mean over all ranks
    and accumulated batches. Logged: `train/loss`.

    Validation, test and prediction make images of the data module's prompts and seeds, see `Pictures`; test measures
    them (`test/dino`, `test/clip_i`, `test/clip_t`).

    Attributes:
        trained_steps: optimizer steps that the network was trained for, those before this fit included.

    Args:
        model_name: hub id or folder of a pipeline of SDXL.
        vae: another VAE, by hub id or folder, such as ``madebyollin/sdxl-vae-fp16-fix``, which runs in `base_dtype`;
            SDXL's own overflows there, and runs in float32.
        adapt_text_encoders: makes both text encoders part of the network, where targets find their layers.
        text_encoder_lr: learning rate of what is trained there, by default as elsewhere.
        snr_gamma: of the min-SNR weights; 5 in their paper. By default all timesteps count alike.
        noise_offset: standard deviation of what is added to the noise of a whole channel of an image.
        prior_weight: of the loss of class images.
        prediction_type: what the UNet predicts; by default as its noise schedule says.
        optimizer: "adamw", or "adamw8bit", with moments in 8 bits (needs bitsandbytes).
        activation_checkpointing: computes the activations of each block again in the backward instead of keeping them.
        compile: compiles the UNet, after the injection.
        revision: branch, tag or commit of the hub's repository.
        variant: of the files of the weights, such as "fp16".
        sampling_steps: of the images that are made.
        guidance_scale: classifier-free guidance of the same; 1 is none.
        dino: hub id or folder of the network that `test/dino` compares by; null leaves it out.
        clip: of the network that `test/clip_i` and `test/clip_t` compare by; null leaves them out.
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
        for name, value in (("snr_gamma", snr_gamma), ("text_encoder_lr", text_encoder_lr)):
            if value is not None:
                check_positive(value, name)
        if text_encoder_lr is not None and not adapt_text_encoders:
            raise ConfigurationError(
                f"text_encoder_lr={text_encoder_lr}, and the text encoders are frozen: set adapt_text_encoders=true, "
                "or leave it out"
            )
        for name, value in (("noise_offset", noise_offset), ("prior_weight", prior_weight)):
            check_in_range(value, name, ge=0)
        if prediction_type is not None:
            check_choice(prediction_type, "prediction_type", diffusion_loss.PREDICTION_TYPES)
        check_choice(optimizer, "optimizer", ("adamw", "adamw8bit"))
        check_positive_int(sampling_steps, "sampling_steps")
        check_in_range(guidance_scale, "guidance_scale", ge=0)
        self._schedule: tuple[Tensor, str] | None = None
        self.trained_steps = 0
        self.encoders = Encoders(model_name, vae=vae, dtype=DTYPES[base_dtype], revision=revision, variant=variant)
        self._pictures = Pictures(self)

    # --- the network ---

    def build_network(self, weights: bool = True) -> SDXLNetwork:
        h = self.hparams
        how = {"dtype": DTYPES[h["base_dtype"]], "revision": h["revision"], "variant": h["variant"], "weights": weights}
        unet = load_unet(h["model_name"], **how)
        if not h["adapt_text_encoders"]:
            return SDXLNetwork(unet)
        return SDXLNetwork(unet, *load_text_encoders(h["model_name"], **how))

    def configure_model(self) -> None:
        if hasattr(self.data, "check_cacheable") and self.trainer.state.fn == "fit":  # before anything is loaded
            self.data.check_cacheable(self.hparams["adapt_text_encoders"])
        super().configure_model()

    def finish_network(self) -> None:
        network = self.model
        if self.hparams["adapt_text_encoders"] and self.adapter_injection is not None:
            plain = [n for n in _TEXT_ENCODERS if not any(_trains(m) for m in getattr(network, n).modules())]
            if plain:
                raise ConfigurationError(
                    f"adapt_text_encoders=true, but no target names a layer of {listed(plain)}: add q_proj, k_proj, "
                    "v_proj and out_proj to adapter.targets, or leave it out"
                )
        if self.hparams["activation_checkpointing"]:
            network.recompute_activations()
        if self.hparams["compile"]:
            network.unet.compile()

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
            raise ConfigurationError(
                "optimizer=adamw8bit needs bitsandbytes (pip install bitsandbytes); or take adamw"
            ) from error
        return AdamW8bit(groups)

    @property
    def schedule(self) -> tuple[Tensor, str]:
        """The noise schedule: ᾱ (T,) in float32, and what the UNet predicts."""
        if self._schedule is None:
            alphas, predicts = noise_alphas(self.hparams["model_name"], self.hparams["revision"])
            predicts = self.hparams["prediction_type"] or predicts
            diffusion_loss.check_prediction_type(predicts)
            self._schedule = alphas, predicts
        return self._schedule

    def token_ids(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, 77) of prompts for either text encoder, on the module's device."""
        one, two = self.encoders.token_ids(prompts)
        return one.to(self.device), two.to(self.device)

    @property
    def data(self) -> Any:
        """The trainer's data module, or None."""
        return getattr(self._trainer, "datamodule", None)

    def embeddings(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, 77, D) and pooled (B, P) of prompts, by the text encoders as they are now."""
        if self.hparams["adapt_text_encoders"]:
            return self.model.embeddings(*self.token_ids(prompts))  # type: ignore[union-attr,operator]
        return self.encoders.prompts(list(prompts), self.device)

    # --- training ---

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = self.data
        self._pictures.check()
        self.trained_with = data.protocol() if hasattr(data, "protocol") else None
        if hasattr(data, "class_images_missing"):
            self._pictures.make_class_images(data)
        if getattr(data, "cache", False):
            share = {"rank": self.trainer.global_rank, "world": self.trainer.world_size}
            data.encode_with(self.encoders, self.device, **share)
        freed = self.know_prompts("validation", *(() if getattr(data, "cache", False) else ("train",)))
        if freed := freed + self.release_encoders():
            rank_zero_info(f"Of VAE and text encoders, what is not needed any more left memory: {megabytes(freed)}")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.trained_steps += 1

    def know_prompts(self, *kinds: str) -> int:
        """Embeds the prompts that the data module will ask for, so that frozen text encoders leave memory.

        Args:
            kinds: "train", "class", "validation" or "test".

        Returns:
            Bytes that they leave.
        """
        if self.hparams["adapt_text_encoders"] or not hasattr(self.data, "texts_of"):
            return 0
        if texts := [text for kind in kinds for text in self.data.texts_of(kind)]:
            self.encoders.prompts([*dict.fromkeys([*texts, ""])], self.device)  # "": what guidance leads away from
        return self.encoders.release(vae=False)

    def release_encoders(self) -> int:
        """Frees the VAE where the next batches do not need it; gives the bytes that it leaves."""
        vae = getattr(self.data, "cache", False) or self.trainer.state.fn != "fit"
        return self.encoders.release(vae=vae, text=False)

    def _distribution(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, (B, 4, h, w) in float32."""
        if "latent_mean" in batch:
            return batch["latent_mean"].float(), batch["latent_std"].float()
        mean, std = self.encoders.latents(batch["pixel_values"], self.device)
        broken = ~(mean.isfinite() & std.isfinite()).flatten(1).all(1)
        if broken.any():
            names = [name for name, wrong in zip(batch["ids"], broken.tolist(), strict=True) if wrong]
            raise DataError(f"latents of image {listed(names, 3)}: NaN or infinite; {VAE_ADVICE}")
        return mean, std

    def _text(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        given = {name: batch[name] for name in _TEXT if name in batch}
        if given:
            return given
        if self.hparams["adapt_text_encoders"]:
            one, two = self.token_ids(batch["prompts"])
            return {"input_ids": one, "input_ids_2": two}
        embeds, pooled = self.encoders.prompts(batch["prompts"], self.device)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """What a batch says of each prompt: names and shapes."""
        if self.hparams["adapt_text_encoders"]:
            return {"input_ids": (TOKENS,), "input_ids_2": (TOKENS,)}
        config = self.model.unet.config  # type: ignore[union-attr]
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {"prompt_embeds": (TOKENS, config.cross_attention_dim), "pooled_prompt_embeds": (pooled,)}

    def _shared_step(
        self, batch: Mapping[str, Any], t: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Summed loss, what it is summed over, and predictions (B, 4, h, w).

        Args:
            batch: as the class says.
            t: timesteps (B,), by default drawn.
            generator: of the CPU, for noise that is the same each time; by default the device's own.
        """
        alphas, predicts = self.schedule
        mean, std = self._distribution(batch)
        how: dict[str, Any] = {"device": mean.device if generator is None else "cpu", "generator": generator}
        latents = mean + std * torch.randn(mean.shape, **how).to(mean.device)
        noise = diffusion_loss.offset_noise(mean.shape, self.hparams["noise_offset"], **how).to(mean.device)
        if t is None:
            t = torch.randint(len(alphas), mean.shape[:1], device=mean.device)
        noisy = diffusion_loss.add_noise(latents, noise, alphas, t)
        prediction = self.model(noisy, t, batch["time_ids"], **self._text(batch))  # type: ignore[misc]
        target = diffusion_loss.target(predicts, latents, noise, alphas, t)
        gamma, weights = self.hparams["snr_gamma"], None
        if gamma is not None:
            weights = diffusion_loss.min_snr_weights(alphas, t, gamma, predicts)
        prior = self.hparams["prior_weight"]
        return *diffusion_loss.dreambooth_loss(prediction, target, weights, batch["is_prior"], prior), prediction

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        summed, count, _ = self._shared_step(batch)
        return self.step_loss(summed, count, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_STEPS] = self.trained_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.trained_steps = int(checkpoint.get(_STEPS, checkpoint.get("global_step", 0)))

    # --- images ---

    def on_validation_epoch_start(self) -> None:
        self._pictures.start("validate")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._pictures.step(batch)

    def on_validation_epoch_end(self) -> None:
        self._pictures.finish_validation()

    def on_test_start(self) -> None:
        self._pictures.start("test")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._pictures.step(batch)

    def on_test_epoch_end(self) -> None:
        self._pictures.finish_test()

    def on_predict_start(self) -> None:
        self._pictures.start("predict")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Of each image made: ``{"file", "prompt", "seed"}``."""
        return [asdict(made) for made in self._pictures.step(batch)]  # which Lightning walks through

    def on_predict_end(self) -> None:
        self._pictures.finish_predict()

    # --- merging and export ---

    def outputs_and_loss(self, network: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Predictions (N, 4) for a batch, and their mean loss.

        Each image is seen at several timesteps, spread over the schedule, which with the noise are drawn by the images'
        ids: other for other images, and the same each time.
        """
        seed = hashlib.sha256(repr(batch["ids"]).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "little"))
        spread = {name: repeated(value, _LEVELS) for name, value in batch.items()}
        t = diffusion_loss.spread_timesteps(len(batch["ids"]), _LEVELS, len(self.schedule[0]), generator)
        summed, count, prediction = self._shared_step(spread, t.to(self.device), generator)
        return prediction.movedim(1, -1).flatten(0, -2), summed / count

    def write_network(self, folder: Path, data: Any = None, class_names: Sequence[str] | None = None) -> list[str]:
        from pera_lightning.export.diffusers import write_pipeline

        h = self.hparams
        how = {name: h[name] for name in ("revision", "variant", "prediction_type")}
        notes = write_pipeline(self.model, folder, h["model_name"], **how)
        if h["vae"] is not None:
            self.encoders.write_vae(folder / "vae")
            notes.append(f"the VAE is {h['vae']}")
        return notes

    def how_to_load(self, folder: Path) -> str:
        return f"diffusers.StableDiffusionXLPipeline.from_pretrained({str(folder)!r})"


def repeated(value: Any, times: int) -> Any:
    """Every row of a tensor or list several times, next to one another."""
    if isinstance(value, Tensor):
        return value.repeat_interleave(times, 0)
    return [row for row in value for _ in range(times)]


def _trains(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLayer) or any(p.requires_grad for p in module.parameters(recurse=False))
