"""Settings of the DreamBooth module that images and merged pipelines follow: what is predicted, and another VAE."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.tasks.dreambooth.fits import base_fixture, injected, pipeline
from tests.tasks.dreambooth.sdxl import SHALLOW, save_tiny

PROMPT, SEED = "a photo of sks dog", 3


base = base_fixture(unet=SHALLOW)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Another VAE, in a folder of its own."""
    return str(save_tiny(tmp_path_factory.mktemp("other"), seed=1, parts=["vae"]) / "vae")


def pixels(network):
    return np.asarray(replace(network.generator, size=(32, 32)).generate([PROMPT], [SEED])[0]).astype(int)


def theirs(folder):
    """The same image by diffusers alone."""
    how = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 2.0}
    return np.asarray(pipeline(folder)(PROMPT, generator=torch.Generator().manual_seed(SEED), **how).images[0])


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """The image without any setting, and the merged folder."""
    network, folder = injected(base), tmp_path_factory.mktemp("plain") / "merged"
    image = pixels(network)
    network.export_merged(folder)
    return image, folder


def test_what_the_unet_predicts_is_what_images_are_sampled_by(base, plain, tmp_path):
    """As of a repository that says so, with the same weights."""
    chosen = pixels(injected(base, prediction_type="v_prediction"))
    own = save_tiny(tmp_path, unet=SHALLOW, scheduler={"prediction_type": "v_prediction"})
    assert (chosen == pixels(injected(own))).all()
    assert abs(chosen - plain[0]).max() > 20
    assert (pixels(injected(own, prediction_type="epsilon")) == plain[0]).all()


def test_a_merged_pipeline_predicts_as_it_was_trained(base, plain, tmp_path):
    network = injected(base, prediction_type="v_prediction")
    image = pixels(network)
    report = network.export_merged(tmp_path / "merged")
    assert [note for note in report.notes if "prediction_type=v_prediction" in note]
    made, without = (files(folder) for folder in (tmp_path / "merged", plain[1]))
    assert {name for name in made if made[name] != without.get(name)} == {"scheduler/scheduler_config.json"}
    before, after = (json.loads(each["scheduler/scheduler_config.json"]) for each in (without, made))
    assert after == {**before, "prediction_type": "v_prediction"}
    assert abs(theirs(tmp_path / "merged") - image).max() <= 2
    assert abs(theirs(plain[1]) - image).max() > 20


def test_a_merged_pipeline_has_the_vae_that_was_given(base, vae, plain, tmp_path):
    network = injected(base, vae=vae)
    image = pixels(network)
    report = network.export_merged(tmp_path / "merged")
    assert [note for note in report.notes if f"the VAE is {vae}" in note]
    name = "vae/diffusion_pytorch_model.safetensors"
    found, given, own = (load_file(f"{folder}/{name}") for folder in (tmp_path / "merged", f"{vae}/..", base))
    assert found.keys() == given.keys()
    assert all(torch.equal(value, given[key]) for key, value in found.items())
    assert any(not torch.equal(value, own[key]) for key, value in found.items())
    assert abs(theirs(tmp_path / "merged") - image).max() <= 2
    assert abs(theirs(plain[1]) - image).max() > 20
    made, without = (files(folder) for folder in (tmp_path / "merged", plain[1]))
    assert {file for file in made if made[file] != without.get(file)} <= {name, "vae/config.json"}
    assert str(vae).encode() not in made["vae/config.json"]
