"""Folders with very small Stable Diffusion XL pipelines of random weights, and words that their tokenizers know."""

import json
from pathlib import Path

import torch

# Two widths and a third for the projection: with equal ones a mix-up of the text encoders would not show.
WIDTHS, PROJECTION = (16, 24), 20
LENGTH = 77
MERGES = ["d o", "do g</w>", "c a", "ca t</w>", "s k", "sk s</w>", "a</w> b", "p h", "ph o", "t o</w>", "pho to</w>"]

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 2),  # heads: diffusers misnames it
    "use_linear_projection": True,
    "cross_attention_dim": sum(WIDTHS),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + PROJECTION,
}
SHALLOW = {  # changes of the UNet, for tests of what does not depend on its depth: half the time
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (1, 2),
}
VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 64,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
SCHEDULER = {  # as SDXL 1.0 has it
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}


def vocabulary():
    """Every byte alone and at a word's end, the merges, and the two special tokens: as CLIP's own, but short."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(c) for c in seen] + [chr(256 + k) for k in range(256 - len(seen))]
    words = [merge.replace(" ", "") for merge in MERGES]
    return [*letters, *(c + "</w>" for c in letters), *words, "<|startoftext|>", "<|endoftext|>"]


def save_tokenizer(folder, pad):
    """Writes CLIP's files with few words, padded with `pad`."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {word: number for number, word in enumerate(vocabulary())}
    end = "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": pad}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "add_prefix_space": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "do_lower_case": True}), encoding="utf-8")


def save_tiny(folder, *, seed=0, variant=None, dtype=torch.float32, parts=None, index=None, **changes):
    """Saves a pipeline of about 100 thousand parameters; 64 pixels are 8 latents.

    Args:
        folder: where to; made.
        seed: of the weights.
        variant: of the weights' file names, "fp16".
        dtype: of the weights.
        parts: names of the parts to save, by default all.
        index: changes of model_index.json; None takes an entry out.
        **changes: of the configurations, by part: ``unet={"sample_size": 16}``; "unet", "vae", "text_encoder",
            "text_encoder_2" or "scheduler".
    """
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    folder = Path(folder)
    size = len(vocabulary())
    # Large weights: a freshly initialised encoder is nearly indifferent, and mistakes would not show.
    clip = {"vocab_size": size, "num_hidden_layers": 3, "max_position_embeddings": LENGTH, "initializer_factor": 3.0}
    clip |= {"bos_token_id": size - 2, "eos_token_id": size - 1, "projection_dim": PROJECTION}
    own = [{"hidden_size": w, "intermediate_size": 2 * w, "num_attention_heads": 2} for w in WIDTHS]
    acts = [{"hidden_act": "quick_gelu", "pad_token_id": size - 1}, {"hidden_act": "gelu", "pad_token_id": 0}]
    saved = {"variant": variant} if variant else {}

    def config(part, settings):
        return {**settings, **changes.get(part, {})}

    makers = {
        "unet": lambda: UNet2DConditionModel(**config("unet", UNET)),
        "vae": lambda: AutoencoderKL(**config("vae", VAE)),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**config("text_encoder", {**clip, **own[0], **acts[0]}))),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(
            CLIPTextConfig(**config("text_encoder_2", {**clip, **own[1], **acts[1]}))
        ),
    }
    parts = parts or ["tokenizer", "tokenizer_2", "scheduler", *makers]
    for part, maker in makers.items():
        if part in parts:
            made = maker()
            (made if dtype == torch.float32 else made.to(dtype)).save_pretrained(folder / part, **saved)
    if "scheduler" in parts:
        EulerDiscreteScheduler(**config("scheduler", SCHEDULER)).save_pretrained(folder / "scheduler")
    for part, pad in {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}.items():
        if part in parts:
            save_tokenizer(folder / part, pad)
    classes = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.32.0",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    classes = {k: v for k, v in {**classes, **(index or {})}.items() if v is not None}
    (folder / "model_index.json").write_text(json.dumps(classes, indent=2), encoding="utf-8")
    return folder
