"""A DreamBooth run by the command line: fit, images, measures, export, merge, counting; and wrong input."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from pera_lightning.adapters import PERA, LoRA
from pera_lightning.tasks.dreambooth.image_folder import read_images
from pera_lightning.tasks.dreambooth.module import DreamBoothModule
from tests.cli.trained_runs import refused
from tests.run_helpers import run_pera
from tests.tasks.dreambooth.config_words import SIDE, words
from tests.tasks.dreambooth.fits import base_fixture, injected, photos_fixture
from tests.tasks.dreambooth.sdxl import SHALLOW, save_tiny

MIB = 2**20


base = base_fixture()
photos = photos_fixture()


@pytest.fixture(scope="module")
def runs(base, photos, tmp_path_factory):
    """Runs by method: two optimizer steps of four accumulated batches each."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("pera", "aurora"):
        assert run_pera(*words("fit", base, photos, folder, method)) == 0
    return SimpleNamespace(
        folder=folder,
        run=folder / "pera",
        pera=folder / "pera" / "checkpoints" / "last.ckpt",
        aurora=folder / "aurora" / "checkpoints" / "last.ckpt",
    )


@pytest.fixture(scope="module")
def ours(runs):
    return DreamBoothModule.load_from_checkpoint(runs.pera).eval()


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def noise_of(unet):
    generator = torch.Generator().manual_seed(1)
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    conditions = {
        "text_embeds": torch.randn(2, pooled, generator=generator),
        "time_ids": torch.tensor([[64.0, 64, 0, 8, 64, 64]] * 2),
    }
    texts = torch.randn(2, 77, config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        noisy, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([20, 900])
        return unet.eval()(noisy, t, texts, added_cond_kwargs=conditions).sample


# --- fit, test, predict ---


def test_fit_leaves_a_run_with_images_and_a_checkpoint(runs, ours):
    assert {path.name for path in (runs.run / "validation" / "step_000002").iterdir()} >= {"grid.png"}
    assert runs.pera.is_file()
    assert (runs.run / "config.yaml").is_file()
    assert ours.trained_steps == 2


def test_predict_and_a_grid_of_two_methods(pera, runs, base, photos, tmp_path, ours):
    for method in ("pera", "aurora"):
        given = words("predict", base, photos, runs.folder, method)
        assert pera(*given, "--ckpt_path", getattr(runs, method)).code == 0
        made = read_images(runs.folder / method / "images")
        assert len(made.images) == 4
        assert made.step == 2
        assert (runs.folder / method / "images" / "grid.png").is_file()
    # What was made is of the trained network.
    one = read_images(runs.run / "images").images[3]
    assert one.seed == 1
    generator = replace(ours.generator, size=(SIDE, SIDE))
    expected = np.asarray(generator.generate([one.prompt], [one.seed])[0]).astype(int)
    assert abs(pixels(runs.run / "images" / one.file) - expected).max() <= 1
    file = tmp_path / "grid.png"
    result = pera("grid", "--runs", runs.folder / "pera", runs.folder / "aurora", "--output", file)
    assert result.code == 0, result.err
    assert "4 prompts and seeds x 2 runs (PERA, AuroRA)" in result.out
    assert file.is_file()


def test_validate_and_test(pera, runs, base, photos):
    result = pera(*words("validate", base, photos, runs.folder), "--ckpt_path", runs.pera)
    assert result.code == 0, result.err
    result = pera(*words("test", base, photos, runs.folder), "--ckpt_path", runs.pera)
    assert result.code == 0, result.err
    results = json.loads((runs.run / "results.json").read_text())
    assert results["metrics"] == {}
    assert results["n"] == 4
    assert results["protocol"]["checkpoint"] == str(runs.pera)
    assert results["method"]["class_path"].endswith("PERA")
    assert len(list((runs.run / "test_images").glob("0*.png"))) == 4


# --- export and merge ---


def pipeline(folder):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_diffusers_loads_what_was_trained(pera, runs, ours, base, tmp_path):
    given = ["--ckpt_path", runs.pera, "--format", "diffusers", "--output", tmp_path / "out"]
    result = pera("export", *given)
    assert result.code == 0, result.err
    assert "load_lora_weights(" in result.out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe = pipeline(base)
    plain = noise_of(pipe.unet)
    pipe.load_lora_weights(tmp_path / "out")
    found, expected = noise_of(pipe.unet), noise_of(ours.model.unet)
    assert (expected - plain).abs().max() > 1e-3
    assert (found - expected).abs().max() <= 1e-4
    again = pera("export", *given)
    assert "exists; give another --output, or --overwrite" in refused(again)


def test_a_merged_pipeline_makes_the_same_image(pera, runs, ours, tmp_path):
    result = pera("export", "--ckpt_path", runs.pera, "--format", "merged", "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert "StableDiffusionXLPipeline.from_pretrained(" in result.out
    pipe = pipeline(tmp_path / "out")
    assert (noise_of(pipe.unet) - noise_of(ours.model.unet)).abs().max() <= 1e-4
    how = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "guidance_scale": 5.0}
    image = pipe("a sks dog", generator=torch.Generator().manual_seed(4), **how).images[0]
    expected = replace(ours.generator, size=(SIDE, SIDE)).generate(["a sks dog"], [4])[0]
    assert abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 2


def test_our_own_folder(pera, runs, tmp_path):
    assert pera("export", "--ckpt_path", runs.pera, "--format", "adapter", "--output", tmp_path / "out").code == 0
    assert pera("export", "--ckpt_path", tmp_path / "out", "--format", "merged", "--output", tmp_path / "pipe",
                "--config", runs.run / "config.yaml").code == 0  # fmt: skip


def test_hira_and_a_dynamic_aurora_are_no_lora_file(pera, runs, base, photos, tmp_path):
    given = words("fit", base, photos, runs.folder, trainer__max_steps=1, trainer__val_check_interval=4)
    given += [
        "--trainer.logger.init_args.name",
        "hira",
        "--adapter.method",
        "HiRA",
        "--data.validation_prompts",
        "null",
    ]
    assert pera(*given).code == 0
    hira = next((runs.folder / "hira" / "checkpoints").glob("*.ckpt"))
    out = ["--output", tmp_path / "out"]
    line = refused(pera("export", "--ckpt_path", hira, "--format", "diffusers", *out))
    assert "HiRA" in line
    assert "merged" in line
    assert pera("export", "--ckpt_path", hira, "--format", "merged", *out).code == 0
    line = refused(pera("export", "--ckpt_path", runs.aurora, "--format", "diffusers", "--output", tmp_path / "a"))
    assert "AuroRA in dynamic mode is not a linear map" in line
    done = pera("export", "--ckpt_path", runs.aurora, "--format", "diffusers", "--mode", "static",
                "--output", tmp_path / "a")  # fmt: skip
    assert done.code == 0, done.err


@pytest.mark.parametrize("prompts", ["null", '["a {}"]'])
def test_a_merge_is_measured_on_photographs(pera, runs, prompts):
    """Validation makes images, whose batches have no loss."""
    given = ["--ckpt_path", runs.pera, "--batches", "2", "--data.validation_prompts", prompts]
    result = pera("merge", *given)
    assert result.code == 0, result.err
    assert "loss" in result.out


def test_a_calibrated_aurora_becomes_a_file_of_diffusers(pera, runs, base, tmp_path):
    given = ["--format", "diffusers", "--mode", "calibrated", "--batches", "2", "--output", tmp_path / "out"]
    result = pera("export", "--ckpt_path", runs.aurora, *given)
    assert result.code == 0, result.err
    pipeline(base).load_lora_weights(tmp_path / "out")


# --- counting ---


def numbers(text):
    lines = text.splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("Memory per device"))
    last = next(k for k, line in enumerate(lines) if line.startswith("sum "))
    rows = [re.split(r"  +", line) for line in lines[first + 1 : last + 1]]
    return {label: [float(cell.replace(",", "").replace("-", "0")) for cell in cells] for label, *cells in rows}


def test_params_counts_what_is_trained(pera, base, photos, tmp_path):
    network = injected(base, PERA(rank=4, alpha=4))
    expected = sum(p.numel() for p in network.parameters() if p.requires_grad)
    result = pera(*words("params", base, photos, tmp_path))
    assert result.code == 0, result.err
    assert f"trainable {expected:,} " in result.out
    assert "eval mode" not in result.out  # the fit takes it out of that
    text = ["--model.adapt_text_encoders", "true", "--data.cache", "false"]
    targets = ["--adapter.targets", "[to_q, to_k, to_v, to_out.0, q_proj, k_proj, v_proj, out_proj]"]
    wider = pera(*words("params", base, photos, tmp_path), *text, *targets)
    assert wider.code == 0, wider.err
    assert "text_encoder_2.encoder.layers" in wider.out.replace("text_model.", "")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A pipeline with enough in it to count in tenths of a MiB."""
    return str(
        save_tiny(
            tmp_path_factory.mktemp("wide"), unet={**SHALLOW, "block_out_channels": (64, 96), "norm_num_groups": 8}
        )
    )


@pytest.mark.slow
def test_memory_is_that_of_the_network_and_the_prior_doubles_the_images(pera, wide, photos, tmp_path):
    network = injected(wide, LoRA(rank=4, alpha=4))
    sizes = {True: 0, False: 0}
    for parameter in network.parameters():
        sizes[parameter.requires_grad] += 4 * parameter.numel()
    memory = [*words("params", wide, photos, tmp_path, "lora"), "--memory"]
    prior = ["--data.class_folder", tmp_path / "class", "--data.class_prompt", "a dog", "--data.num_class_images", "4"]
    found = []
    for more in (["--data.batch_size", "3", *prior], ["--data.batch_size", "6", "--data.cache", "false"]):
        result = pera(*memory, *more)
        assert result.code == 0, result.err
        found.append(numbers(result.out))
        table = found[-1]
        assert table["base weights (float32)"][0] == pytest.approx(sizes[False] / MIB, abs=0.06)
        assert table["adapters"][0] == pytest.approx(sizes[True] / MIB, abs=0.06)
        assert table["AdamW's moments"][0] == pytest.approx(2 * sizes[True] / MIB, abs=0.06)
        if more[1] == "3":
            assert "6 images of 64x64 pixels, 3 of them of the class; precision" in result.out
        else:
            ending = "; the VAE, which stays where latents are not cached, comes on top; precision"
            assert f"6 images of 64x64 pixels{ending}" in result.out
    assert found[0]["sum"] == pytest.approx(found[1]["sum"], abs=0.2)
    assert found[0]["kept for the backward"][0] > 0.2


@pytest.mark.slow
def test_memory_with_adapted_text_encoders(pera, base, photos, tmp_path):
    text = ["--model.adapt_text_encoders", "true", "--data.cache", "false"]
    targets = ["--adapter.targets", "[to_q, q_proj, out_proj]"]
    result = pera(
        *words("params", base, photos, tmp_path, "lora"), "--memory", *text, *targets, "--model.optimizer", "adamw8bit"
    )
    assert result.code == 0, result.err
    assert "AdamW in float32, of whose moments adamw8bit has a quarter" in result.out


# --- wrong input: of the network, of the data, and of both together; the rest is tested with what refuses it ---

WRONG = {
    "no such model": (["--model.model_name", "gone/folder/x"], "gone/folder/x"),
    "no images": (["--data.instance_folder", "EMPTY"], "no images"),
    "adapted and cached": (
        ["--model.adapt_text_encoders", "true", "--adapter.targets", "[to_q, q_proj]"],
        "text encoders with adapters change what a prompt becomes: set cache=false",
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    (folder / "EMPTY").mkdir()
    return folder


@pytest.mark.parametrize(("more", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line(pera, base, photos, tmp_path, places, more, expected):
    more = [str(places / word) if word == "EMPTY" else word for word in more]
    line = refused(pera(*words("fit", base, photos, tmp_path), *more))
    assert expected in line


def test_a_refused_fit_leaves_the_config_of_the_run_before(pera, runs, base, photos):
    """Which merge and export read beside the checkpoint."""
    config = runs.run / "config.yaml"
    before = config.read_text()
    refused(pera(*words("fit", base, photos, runs.folder, model__sampling_steps=2000)))
    assert config.read_text() == before


def test_a_measure_that_cannot_be_had_is_one_line(pera, runs, base, photos):
    given = words("test", base, photos, runs.folder, model__dino="gone/model")
    line = refused(pera(*given, "--ckpt_path", runs.pera))
    assert "gone/model" in line
