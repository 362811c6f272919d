"""Images sampled with the network as it is: those of diffusers' own pipeline, whatever batch they are in."""

import pytest
import torch

from pera_lightning import inject
from pera_lightning.adapters import PERA
from pera_lightning.tasks.dreambooth.networks import SDXLNetwork, load_text_encoders, load_unet
from pera_lightning.tasks.dreambooth.sampling import sample
from tests.tasks.dreambooth.fits import UNET, encoders, pipeline, refused
from tests.tasks.dreambooth.sdxl import LENGTH, PROJECTION, WIDTHS, save_tiny

PROMPTS, SEEDS = ["a photo of sks dog", "a cat", "a photo of sks dog"], [3, 4, 5]
HOW = {"height": 32, "width": 24, "steps": 2, "guidance_scale": 5.0, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def theirs(folder):
    return pipeline(folder)


@pytest.fixture(scope="module")
def unet(folder):
    return load_unet(str(folder), dtype=torch.float32)


def drawn(pipe, prompts=PROMPTS, seeds=SEEDS, *, height=32, width=24, steps=2, guidance_scale=5.0):
    """Images of the pipeline itself, one by one."""
    how = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": guidance_scale}
    made = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        made.append(pipe(prompt, generator=generator, output_type="pt", **how).images)
    return torch.cat(made)


def state_of(network):
    return [
        *((n, m.training, type(m)) for n, m in network.named_modules()),
        *(
            (n, p.dtype, p.requires_grad, p.grad is None, p.data_ptr(), p._version)
            for n, p in network.named_parameters()
        ),
    ]


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0, 0.0])
@pytest.mark.parametrize("size", [(32, 24), (40, 72)])
def test_images_are_the_pipelines(folder, unet, theirs, guidance_scale, size):
    how = {**HOW, "height": size[0], "width": size[1], "guidance_scale": guidance_scale}
    images = sample(unet, encoders(folder), prompts=PROMPTS, seeds=SEEDS, **how)
    assert images.shape == (3, 3, *size)
    assert images.dtype == torch.float32
    own = drawn(theirs, height=size[0], width=size[1], guidance_scale=guidance_scale)
    torch.testing.assert_close(images, own, rtol=0, atol=1e-6)
    assert (images[0] - images[2]).abs().max() > 0.05  # another seed
    assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize(
    "kind", ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"]
)
def test_the_repositorys_scheduler_samples_also_one_that_draws_noise(tmp_path, kind):
    save_tiny(tmp_path, index={"scheduler": ["diffusers", kind]})
    network = load_unet(str(tmp_path), dtype=torch.float32)
    images = sample(network, encoders(tmp_path), prompts=PROMPTS, seeds=SEEDS, **HOW)
    again = sample(network, encoders(tmp_path), prompts=PROMPTS, seeds=SEEDS, **HOW)
    assert torch.equal(images, again)
    torch.testing.assert_close(images, drawn(pipeline(tmp_path)), rtol=0, atol=1e-6)


def test_a_pipeline_that_guides_away_from_the_empty_prompt(tmp_path):
    save_tiny(tmp_path, index={"force_zeros_for_empty_prompt": False})
    network = load_unet(str(tmp_path), dtype=torch.float32)
    images = sample(network, encoders(tmp_path), prompts=PROMPTS, seeds=SEEDS, **HOW)
    torch.testing.assert_close(images, drawn(pipeline(tmp_path)), rtol=0, atol=1e-6)


def test_an_image_is_the_same_alone_and_in_a_batch(folder, unet):
    images = sample(unet, encoders(folder), prompts=PROMPTS, seeds=SEEDS, **HOW)
    for k in (2, 0, 1):
        alone = sample(unet, encoders(folder), prompts=PROMPTS[k : k + 1], seeds=SEEDS[k : k + 1], **HOW)
        assert torch.equal(alone[0], images[k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_leaves_the_network_and_random_numbers_alone(folder, dtype):
    network = SDXLNetwork(load_unet(str(folder), dtype=dtype))
    inject(network, PERA(rank=2, dropout=0.5), targets=UNET)
    for p in network.parameters():
        if p.requires_grad:
            p.data += 0.1
    network.train()
    network.unet.conv_in.eval()
    own = encoders(folder, dtype=dtype)
    before, random = state_of(network), torch.get_rng_state()
    images = sample(network, own, prompts=PROMPTS, seeds=SEEDS, **HOW)
    assert torch.equal(torch.get_rng_state(), random)
    assert state_of(network) == before
    assert not images.requires_grad
    torch.manual_seed(1)
    assert torch.equal(sample(network, own, prompts=PROMPTS, seeds=SEEDS, **HOW), images)  # no dropout
    assert torch.equal(sample(network.unet, own, prompts=PROMPTS, seeds=SEEDS, **HOW), images)
    plain = sample(load_unet(str(folder), dtype=dtype), own, prompts=PROMPTS, seeds=SEEDS, **HOW)
    assert (plain - images).abs().max() > 0.01  # the adapters act


def test_after_a_failure_the_network_trains_on(folder):
    network = SDXLNetwork(load_unet(str(folder), dtype=torch.float32)).train()
    before, random = state_of(network), torch.get_rng_state()

    def broken(prompts):
        if prompts != [""]:
            raise RuntimeError("out of memory")
        return torch.zeros(1, LENGTH, sum(WIDTHS)), torch.zeros(1, PROJECTION)

    with pytest.raises(RuntimeError, match="out of memory"):
        sample(network, encoders(folder), prompts=PROMPTS, seeds=SEEDS, embeddings=broken, **HOW)
    assert state_of(network) == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_base_in_bfloat16_starts_from_the_same_noise(folder, unet, autocast):
    """Else a seed would be another image."""
    low = load_unet(str(folder), dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        images = sample(low, encoders(folder, dtype=torch.bfloat16), prompts=PROMPTS, seeds=SEEDS, **HOW)
    exact = sample(unet, encoders(folder), prompts=PROMPTS, seeds=SEEDS, **HOW)
    other = sample(unet, encoders(folder), prompts=PROMPTS, seeds=[13, 14, 15], **HOW)
    assert images.dtype == torch.float32
    assert (images - exact).abs().mean() < 0.15 * (other - exact).abs().mean()


def test_adapted_text_encoders_are_asked_with_dropout_off(folder, unet):
    network = SDXLNetwork(unet, *load_text_encoders(str(folder), dtype=torch.float32)).train()
    own, modes = encoders(folder), set()

    def embed(prompts):
        modes.add(network.text_encoder.training)
        embeds, pooled = own.prompts(prompts, "cpu")
        return embeds + 1, pooled

    images = sample(network, own, prompts=PROMPTS, seeds=SEEDS, embeddings=embed, **HOW)
    assert modes == {False}
    assert network.text_encoder.training
    assert (images - sample(unet, own, prompts=PROMPTS, seeds=SEEDS, **HOW)).abs().max() > 0.01
    unet.eval()


def test_each_call_goes_through_the_networks_forward(folder, unet):
    """A sharded network gathers its weights there."""
    network, calls = SDXLNetwork(unet), []
    network.register_forward_hook(lambda *_: calls.append(1))
    sample(network, encoders(folder), prompts=PROMPTS, seeds=SEEDS, **HOW)
    assert len(calls) == HOW["steps"] * len(PROMPTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 44}, "32 × 44 pixels"),
        ({"steps": 0}, "0 sampling steps, and there are 1 to 1000"),
        ({"steps": 1001}, "1001 sampling steps, and there are 1 to 1000"),
    ],
)
def test_sizes_and_steps_that_cannot_be_sampled_are_refused(folder, unet, changes, words):
    refused(words, sample, unet, encoders(folder), prompts=PROMPTS, seeds=SEEDS, **{**HOW, **changes})
