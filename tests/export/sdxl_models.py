"""What the tests of the export to diffusers share: networks of SDXL with trained-looking adapters, and pipelines."""

import copy
import functools

import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from pera_lightning import inject
from tests.export.peft_models import stir
from tests.tasks.dreambooth import sdxl

ATTENTION = ["unet.**.to_q", "unet.**.to_k", "unet.**.to_v", "unet.**.to_out.0"]
TEXT = ["text_encoder.**.q_proj", "text_encoder.**.out_proj", "text_encoder_2.**.v_proj", "text_encoder_2.**.fc1"]
FILE = "pytorch_lora_weights.safetensors"
PROMPTS = ["a photo of a sks dog", "cat"]


class Network(nn.Module):
    """As the DreamBooth module has it: the UNet, and text encoders where they are adapted."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *given, **named):
        return self.unet(*given, **named).sample


@functools.cache
def loaded(folder, **options):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(folder, **options):
    """A pipeline that may be changed."""
    return copy.deepcopy(loaded(folder, **options))


def network(base, parts=("unet",), **options):
    pipe = pipeline(base, **options)
    return Network(**{part: getattr(pipe, part) for part in parts}).eval()


def adapted(base, method, targets=ATTENTION, parts=("unet",), **options):
    model = network(base, parts)
    inject(model, method, targets, seed=0, **options)
    return stir(model, spread=0.2)


def batch(rows=2, seed=5):
    g = torch.Generator().manual_seed(seed)
    width = sum(sdxl.WIDTHS)
    cond = {"text_embeds": torch.randn(rows, sdxl.PROJECTION, generator=g)}
    cond["time_ids"] = torch.tensor([[64.0, 64, 0, 8, 64, 64]]).repeat(rows, 1)
    return {
        "sample": torch.randn(rows, 4, 8, 8, generator=g),
        "timestep": torch.linspace(20, 900, rows).long(),
        "encoder_hidden_states": torch.randn(rows, 7, width, generator=g),
        "added_cond_kwargs": cond,
    }


@torch.no_grad()
def predicted(unet, **options):
    return unet.eval()(**batch(**options)).sample


def by_pixel(model, given):
    """A `Forward` of the merge: outputs (..., channels)."""
    return model(**given).movedim(1, -1)


def with_lora(base, folder):
    pipe = pipeline(base)
    pipe.load_lora_weights(folder)
    return pipe


def apart(a, b):
    """Relative."""
    return float((a - b).detach().norm() / b.detach().norm())


@torch.no_grad()
def embeddings(pipe, adapted=None):
    """What the pipeline makes of prompts, with the text encoders of an adapted network where one is given."""
    for name in ("text_encoder", "text_encoder_2"):
        if hasattr(adapted, name):
            setattr(pipe, name, getattr(adapted, name))
    given = pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return given[0], given[2]  # of each token, pooled
