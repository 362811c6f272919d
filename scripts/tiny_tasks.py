"""Makes very small models of random weights, with data, for short runs of the text and DreamBooth tasks offline.

`causal_lm`, `glue` and `dreambooth` each write a model's folder and data into a folder, once, and give the words after
``pera fit``: a config of the repository and what is changed in it. `images` needs nothing: the quickstart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def images(folder: Path) -> list[str]:
    """The quickstart, with dropout in its adapters."""
    return ["--config", str(CONFIGS / "quickstart.yaml"), *_options({"adapter.method.dropout": 0.1, **_BEST})]


def causal_lm(folder: Path) -> list[str]:
    """A Llama of two blocks on 160 questions, by optimizer steps; validation in the middle of an epoch."""
    model, data = folder / "llama", folder / "questions"
    if not model.exists():
        rows = [_question(k) for k in range(160)]
        words = sorted({word for row in rows for word in f"{row['instruction']} {row['output']}".split()})
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        words = [*special.values(), *words]
        backend = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        for name, part in (("train", rows), ("test", rows[:20])):
            _write(data / "dataset" / "ARC-Easy" / f"{name}.json", json.dumps(part))
        torch.manual_seed(0)
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=len(words), max_position_embeddings=256, initializer_range=0.3, **size, **ids)
        LlamaForCausalLM(config).save_pretrained(model)
        PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(model)
    changed = {
        "model.model_name": model,
        "model.warmup_steps": 5,
        "data.folder": data,
        "data.train": "ARC-Easy",
        "data.test": "[ARC-Easy]",
        "data.validation_size": 16,
        "data.cache_dir": folder / "cache",
        "trainer.max_steps": 120,
        "trainer.max_epochs": 50,
        "trainer.val_check_interval": 25,
        "trainer.accumulate_grad_batches": 2,
    }
    return ["--config", str(CONFIGS / "commonsense_smollm2.yaml"), *_options({**_COMMON, **_BEST, **changed})]


def glue(folder: Path) -> list[str]:
    """A BERT of two blocks on pairs of sentences."""
    model, data = folder / "bert", folder / "rte"
    if not model.exists():
        special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        words = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
        backend = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        for split, count in (("train", 128), ("validation", 40), ("test", 8)):
            rows = (
                {
                    "sentence1": f"{k:03d}{'?' * (7 * k % 23)}",
                    "sentence2": "!" * (1 + 5 * k % 7),
                    "label": -1 if split == "test" else k * k // 3 % 2,
                    "idx": k,
                }
                for k in range(count)
            )
            _write(data / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = BertConfig(vocab_size=len(words), max_position_embeddings=64, initializer_range=0.3, **size)
        BertModel(config).save_pretrained(model)
        names = ["input_ids", "token_type_ids", "attention_mask"]
        PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **special).save_pretrained(model)
    changed = {
        "model.model_name": model,
        "data.folder": data,
        "data.batch_size": 8,
        "data.max_length": 64,
        "data.train_limit": "null",
        "data.cache_dir": folder / "cache",
        "trainer.max_epochs": 15,
    }
    return ["--config", str(CONFIGS / "glue_minilm.yaml"), *_options({**_COMMON, **_BEST, **changed})]


def dreambooth(folder: Path) -> list[str]:
    """An SDXL pipeline of a hundred thousand parameters on five photographs, by optimizer steps, cached."""
    model, data = folder / "sdxl", folder / "photographs"
    if not model.exists():
        data.mkdir(parents=True, exist_ok=True)
        for k in range(5):
            noise = np.random.default_rng(k).integers(0, 255, (72, 80, 3)).astype(np.uint8)
            Image.fromarray(noise).save(data / f"{k}.png")
        _sdxl(model)
    changed = {
        "model.model_name": model,
        "model.base_dtype": "float32",
        "model.lr": 0.01,
        "model.sampling_steps": 2,
        "model.dino": "null",
        "model.clip": "null",
        "data.instance_folder": data,
        "data.resolution": 64,
        "data.cache_dir": folder / "cache",
        "data.validation_seeds": "[0]",
        "trainer.precision": "32-true",
        "trainer.max_steps": 60,
        "trainer.val_check_interval": 80,
    }
    return ["--config", str(CONFIGS / "dreambooth_sdxl_pera.yaml"), *_options({**_COMMON, **changed})]


TASKS = {"images": images, "causal_lm": causal_lm, "glue": glue, "dreambooth": dreambooth}
_BEST = {
    "trainer.callbacks+": "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {filename: best, "
    "monitor: val/loss, enable_version_counter: false}}"
}
_COMMON = {"adapter.method.dropout": 0.1, "trainer.accelerator": "cpu"}


def _options(changed: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in changed.items()]


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _question(number: int) -> dict[str, str]:
    """An example as LLM-Adapters' files have it."""
    answer = f"answer{number * number // 3 % 4 + 1}"
    question = f"q{number % 40} q{number * 7 % 40} {'why ' * (number % 5)}"
    return {
        "instruction": f"{question}\n\nAnswer format: answer1/answer2/answer3/answer4",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def _sdxl(folder: Path) -> None:
    """Saves the pipeline: SDXL's parts, each of a few channels, and CLIP tokenizers of single bytes."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = "<|endoftext|>"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", end]
    widths, projection, length = (16, 24), 20, 77
    clip = {"vocab_size": len(words), "num_hidden_layers": 2, "max_position_embeddings": length}
    clip |= {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "projection_dim": projection}
    one, two = ({**clip, "hidden_size": w, "intermediate_size": 2 * w, "num_attention_heads": 2} for w in widths)
    CLIPTextModel(CLIPTextConfig(**one, pad_token_id=len(words) - 1)).save_pretrained(folder / "text_encoder")
    second = CLIPTextConfig(**two, pad_token_id=0, hidden_act="gelu")
    CLIPTextModelWithProjection(second).save_pretrained(folder / "text_encoder_2")
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=sum(widths),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + projection,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025,
        force_upcast=True,
    ).save_pretrained(folder / "vae")
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    ).save_pretrained(folder / "scheduler")
    for name, pad in (("tokenizer", end), ("tokenizer_2", "!")):
        special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": pad}
        own = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
        _write(folder / name / "vocab.json", json.dumps({word: k for k, word in enumerate(words)}))
        _write(folder / name / "merges.txt", "#version: 0.2\n")
        _write(folder / name / "special_tokens_map.json", json.dumps(special))
        _write(folder / name / "tokenizer_config.json", json.dumps(own))
    parts = {
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index = {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.32.0", **parts}
    _write(folder / "model_index.json", json.dumps({**index, "force_zeros_for_empty_prompt": True}, indent=2))
