"""The VAE and text encoders beside the network: what diffusers' own pipeline makes of images and prompts."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from torch import nn

from pera_lightning import inject
from pera_lightning.adapters import PERA
from pera_lightning.tasks.dreambooth.networks import SDXLNetwork, load_unet
from pera_lightning.tasks.dreambooth.sampling import sample
from tests.tasks.dreambooth.fits import UNET, encoders, pipeline, refused
from tests.tasks.dreambooth.sdxl import LENGTH, PROJECTION, WIDTHS, save_tiny

PROMPTS = ["a photo of sks dog", "a cat", "a photo of sks dog"]
HOW = {"height": 32, "width": 24, "steps": 2, "guidance_scale": 5.0, "device": "cpu"}
MOMENTS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.8, 1.2, 2.0, 0.5], "scaling_factor": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def unet(folder):
    return load_unet(str(folder), dtype=torch.float32)


def pixels(rows=2, height=64, width=48):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, 3, height, width, generator=generator, dtype=torch.float32) * 2 - 1


# --- the VAE ---


@pytest.mark.parametrize("changes", [{}, MOMENTS, {"shift_factor": 0.7}, {"latents_mean": MOMENTS["latents_mean"]}])
def test_latents_are_the_posterior_as_the_pipelines_scale_it(tmp_path, changes):
    save_tiny(tmp_path, vae=changes)
    pipe = pipeline(tmp_path, StableDiffusionXLImg2ImgPipeline)
    mean, std = encoders(tmp_path).latents(pixels(), "cpu")
    assert mean.shape == std.shape == (2, 4, 8, 6)
    assert mean.dtype == std.dtype == torch.float32
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels()).latent_dist
    # What the pipeline makes of an image with a seed is the mean and so much of that noise.
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    t, generator = torch.tensor([999]), torch.Generator().manual_seed(1)
    with torch.no_grad():
        own = pipe.prepare_latents(pixels(), t, 2, 1, torch.float32, torch.device("cpu"), generator, add_noise=False)
    torch.testing.assert_close(mean + std * noise, own, rtol=1e-5, atol=1e-5)
    if not MOMENTS.keys() & changes.keys():
        torch.testing.assert_close(mean, posterior.mean * 0.13025, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(std, posterior.std * 0.13025, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, MOMENTS])
def test_images_of_latents_are_the_pipelines(tmp_path, changes):
    save_tiny(tmp_path, vae=changes)
    latents = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    images = encoders(tmp_path).decode(latents, "cpu")
    assert images.shape == (2, 3, 64, 48)
    assert images.dtype == torch.float32
    vae = pipeline(tmp_path).vae
    shift, std = (
        torch.tensor(changes.get(k, d)).view(-1, 1, 1) for k, d in (("latents_mean", [0.0]), ("latents_std", [1.0]))
    )
    with torch.no_grad():
        plain = vae.decode(latents * std / vae.config.scaling_factor + shift).sample
    torch.testing.assert_close(images, (plain / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-5)


def test_each_image_is_the_same_alone_and_in_a_batch(folder):
    own, images = encoders(folder), pixels(3)
    mean, std = own.latents(images, "cpu")
    alone = [own.latents(images[k : k + 1], "cpu") for k in range(3)]
    assert torch.equal(mean, torch.cat([m for m, _ in alone]))
    assert torch.equal(std, torch.cat([s for _, s in alone]))
    assert torch.equal(own.decode(mean, "cpu")[1:2], own.decode(mean[1:2], "cpu"))


def test_the_vae_stays_in_float32_and_another_one_runs_in_the_base_dtype(folder, tmp_path):
    exact = encoders(folder).latents(pixels(), "cpu")[0]
    own = encoders(folder, dtype=torch.bfloat16)
    assert torch.equal(own.latents(pixels(), "cpu")[0], exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own.latents(pixels(), "cpu")[0], exact)
        assert torch.equal(own.decode(exact, "cpu"), encoders(folder).decode(exact, "cpu"))
    save_tiny(tmp_path, seed=1, parts=["vae"])
    other = encoders(folder, dtype=torch.bfloat16, vae=str(tmp_path / "vae"))
    mean = other.latents(pixels(), "cpu")[0]
    whole = encoders(folder, vae=str(tmp_path / "vae")).latents(pixels(), "cpu")[0]
    assert mean.dtype == torch.float32
    assert (mean - exact).abs().max() > 0.01  # another VAE's
    assert 0 < (mean - whole).abs().max() < 0.02  # in bfloat16


def test_sizes_that_have_no_latents_are_refused(folder):
    refused("60 × 48 pixels: both must be multiples of 8", encoders(folder).latents, pixels(height=60), "cpu")


def test_vaes_that_do_not_fit_are_refused(folder, tmp_path):
    save_tiny(tmp_path / "wide", parts=["vae"], vae={"latent_channels": 16})
    shallow = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    save_tiny(tmp_path / "low", parts=["vae"], vae={"block_out_channels": (8, 8, 8), **shallow})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    for name, words in (("wide/vae", "with 16 channels for 8 pixels"), ("low/vae", "with 4 channels for 4 pixels")):
        refused(words, encoders(folder, vae=str(tmp_path / name)).latents, pixels(), "cpu")
    refused("is a AutoencoderTiny", encoders(folder, vae=str(tmp_path / "other")).latents, pixels(), "cpu")
    refused("there is no such folder", encoders(folder, vae=str(tmp_path / "none")).latents, pixels(), "cpu")
    refused("is a pipeline: give .*vae", encoders(folder, vae=str(folder)).latents, pixels(), "cpu")


def test_a_damaged_vae_is_named(tmp_path):
    save_tiny(tmp_path)
    file = next((tmp_path / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-50])
    refused("^vae of model .* is damaged", encoders(tmp_path).latents, pixels(), "cpu")
    refused("vae of model .* no weights of variant='fp8'", encoders(tmp_path, variant="fp8").latents, pixels(), "cpu")


# --- prompts ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_are_the_pipelines(folder, dtype):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=dtype)
    own = encoders(folder, dtype=dtype)
    embeds, pooled = own.prompts(PROMPTS, "cpu")
    assert embeds.shape == (3, LENGTH, sum(WIDTHS))
    assert pooled.shape == (3, PROJECTION)
    assert embeds.dtype == pooled.dtype == dtype
    with torch.no_grad():
        for k, prompt in enumerate(PROMPTS):
            expected = pipe.encode_prompt(prompt)
            assert torch.equal(embeds[k], expected[0][0])
            assert torch.equal(pooled[k], expected[2][0])


def test_prompts_are_computed_once_and_outlive_the_text_encoders(folder):
    own = encoders(folder)
    first = own.prompts(PROMPTS, "cpu")
    own.release()
    again = own.prompts([PROMPTS[1], PROMPTS[0]], "cpu")
    assert own.held() == 0
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one[[1, 0]], other)
        assert torch.equal(one[0], one[2])


def test_what_inference_mode_gave_can_be_trained_on(folder):
    """Lightning validates in inference mode, and training uses what is known from there."""
    own = encoders(folder)
    with torch.inference_mode():
        embeds, pooled = own.prompts(["a cat"], "cpu")
        mean, _ = own.latents(pixels(1), "cpu")
    network = SDXLNetwork(load_unet(str(folder), dtype=torch.float32))
    inject(network, PERA(rank=2), targets=UNET)
    t, sizes = torch.tensor([5]), torch.full((1, 6), 64.0)
    for source in (own.prompts(["a cat"], "cpu"), (embeds, pooled)):
        texts = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), source, strict=True))
        network(mean, t, sizes, **texts).square().sum().backward()
    network(own.latents(pixels(1), "cpu")[0], t, sizes, **texts).square().sum().backward()


def test_under_another_default_dtype_all_is_as_before(folder, unet):
    """Lightning's precision bf16-true makes bfloat16 torch's default."""

    def all_of(own):
        found = [*own.latents(pixels(), "cpu"), *own.prompts(PROMPTS, "cpu")]
        return [*found, sample(unet, own, prompts=PROMPTS[:1], seeds=[0], **HOW)]

    expected = all_of(encoders(folder))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = all_of(encoders(folder))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# --- memory, and what caches are told ---


def test_releasing_frees_and_the_next_call_loads_again(folder):
    own = encoders(folder)
    assert own.held() == 0
    first = own.latents(pixels(), "cpu")[0]
    vae = own.held()
    own.prompts(["a cat"], "cpu")
    both = own.held()
    pipe = pipeline(folder)
    sizes = {
        n: sum(4 * p.numel() for p in getattr(pipe, n).parameters()) for n in ("vae", "text_encoder", "text_encoder_2")
    }
    assert vae == sizes["vae"]
    assert sum(sizes.values()) <= both <= sum(sizes.values()) + 2 * 8 * LENGTH  # and the numbers of the positions
    own.release(text=False)
    assert own.held() == both - vae
    assert torch.equal(own.latents(pixels(), "cpu")[0], first)
    own.release()
    assert own.held() == 0
    assert torch.equal(own.latents(pixels(), "cpu")[0], first)
    assert torch.equal(own.prompts(["a dog"], "cpu")[0], encoders(folder).prompts(["a dog"], "cpu")[0])


def test_nothing_of_it_is_part_of_a_module(folder):
    parent = nn.Module()
    parent.encoders = encoders(folder)
    parent.encoders.latents(pixels(1), "cpu")
    parent.encoders.prompts(["a cat"], "cpu")
    assert not list(parent.parameters())
    assert not parent.state_dict()
    held = [parent.encoders._vae, *parent.encoders._text]
    assert not any(p.requires_grad for n in held for p in n.parameters())
    assert not any(n.training for n in held)


def test_settings_tell_what_changes_the_result(folder, tmp_path):
    """Of images and of prompts apart: another VAE leaves what is known of prompts as it is."""

    def changed(before, after):
        return [(kind, k) for kind in before for k in before[kind] if after[kind][k] != before[kind][k]]

    known = encoders(folder).settings()
    assert json.loads(json.dumps(known)) == known
    assert set(known) == {"images", "prompts"}
    assert encoders(folder).settings() == known
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    moved = encoders(copy).settings()
    assert changed(known, moved) == [("images", "vae"), ("prompts", "model")]  # by name, the files are the same
    assert changed(known, encoders(folder, dtype=torch.bfloat16).settings()) == [("prompts", "dtype")]
    save_tiny(copy, seed=1, parts=["unet", "scheduler"])  # has no part in it
    assert encoders(copy).settings() == moved
    for part, kind in (("vae", "images"), ("text_encoder_2", "prompts"), ("tokenizer", "prompts")):
        before = encoders(copy).settings()
        if part == "tokenizer":
            (copy / part / "merges.txt").write_text("#version: 0.2\na b</w>\n")
        else:
            save_tiny(copy, seed=1, parts=[part])  # files of the same sizes
        assert changed(before, encoders(copy).settings()) == [(kind, "files")], part
    other = encoders(folder, vae=str(copy / "vae"), dtype=torch.bfloat16).settings()
    assert {k for kind, k in changed(known, other) if kind == "images"} >= {"vae", "files", "dtype"}
    assert encoders(folder, vae=str(copy / "vae")).settings()["prompts"] == known["prompts"]
