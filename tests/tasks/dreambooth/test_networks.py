"""Stable Diffusion XL's networks: what is loaded, what is refused in one line, and embeddings of prompts."""

import json
import warnings

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from pera_lightning import inject
from pera_lightning.adapters import PERA
from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.dreambooth import tokenization
from pera_lightning.tasks.dreambooth.networks import SDXLNetwork, load_text_encoders, load_unet
from pera_lightning.tasks.dreambooth.noise_schedule import noise_alphas
from pera_lightning.tasks.dreambooth.tokenization import load_tokenizers, prompt_embeddings, tokenise
from tests.tasks.dreambooth.sdxl import LENGTH, PROJECTION, WIDTHS, save_tiny

PROMPTS = ["a photo of sks dog", "a cat", ""]
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("sdxl")))


@pytest.fixture(scope="module")
def pipeline(folder):
    return StableDiffusionXLPipeline.from_pretrained(folder)


def unet_of(folder, dtype=torch.float32, **options):
    return load_unet(str(folder), dtype=dtype, **options)


def refused(match, call, *words, **options):
    """What a refusal says, in one line that is not too long."""
    with pytest.raises(ConfigurationError, match=match) as error:
        call(*words, **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 450
    return str(error.value)


def batch(rows=2, size=(8, 8), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    texts = {"prompt_embeds": draw(rows, LENGTH, sum(WIDTHS)), "pooled_prompt_embeds": draw(rows, PROJECTION)}
    sizes = torch.tensor([[1023.0, 771.0, 5.0, 0.0, 64.0, 64.0]]).expand(rows, -1)
    return (draw(rows, 4, *size), torch.tensor([7, 900])[:rows], sizes), texts


# --- embeddings ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_the_pipelines(folder, dtype):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=dtype)
    encoders = load_text_encoders(folder, dtype=dtype)
    with torch.no_grad():
        expected = pipe.encode_prompt(PROMPTS)
        embeds, pooled = prompt_embeddings(encoders, tokenise(load_tokenizers(folder), PROMPTS))
    assert embeds.shape == (3, LENGTH, sum(WIDTHS))
    assert embeds.dtype == pooled.dtype == dtype
    assert torch.equal(embeds, expected[0])
    assert torch.equal(pooled, expected[2])


def test_each_tokenizer_pads_in_its_own_way(folder, pipeline):
    ids = tokenise(load_tokenizers(folder), PROMPTS)
    assert [tuple(each.shape) for each in ids] == [(3, LENGTH)] * 2
    for found, tokenizer in zip(ids, (pipeline.tokenizer, pipeline.tokenizer_2), strict=True):
        assert found[1, -1] == tokenizer.pad_token_id
    assert not torch.equal(*ids)


def test_words_that_are_cut_are_named_once(folder, pipeline):
    tokenization._warn_of_cut.cache_clear()
    tokenizers, long = load_tokenizers(folder), "dog " * 75 + "cat photo"
    with pytest.warns(UserWarning, match="do not see 'cat photo'") as caught:
        ids = tokenise(tokenizers, [long, "a cat", long])
    assert len(caught) == 1
    expected = pipeline.tokenizer(long, padding="max_length", max_length=LENGTH, truncation=True).input_ids
    assert ids[0][0].tolist() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenise(tokenizers, [long, "dog " * 75])


def test_gradients_flow_to_adapters_of_the_text_encoders(folder):
    network = SDXLNetwork(unet_of(folder), *load_text_encoders(folder, dtype=torch.bfloat16))
    inject(network, PERA(rank=2), targets=[*UNET_TARGETS, *TEXT_TARGETS])
    network.train()
    (noisy, t, sizes), _ = batch(rows=1)
    one, two = tokenise(load_tokenizers(folder), PROMPTS[:1])
    network(noisy, t, sizes, input_ids=one, input_ids_2=two).square().mean().backward()
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        grads = [p.grad for n, p in trained.items() if n.startswith(f"{part}.") and p.grad is not None]
        assert max(g.abs().max() for g in grads) > 0
        assert all(g.isfinite().all() for g in grads)
    # The last layer of the first has no say in its states before the last layer.
    silent = {".".join(n.split(".")[:-5]) for n, p in trained.items() if p.grad is None}
    assert all("text_encoder.text_model.encoder.layers" in n or "text_encoder.encoder.layers" in n for n in silent)


def test_the_network_gives_embeddings_through_its_forward(folder):
    """Only a forward gathers the weights of a network that is sharded."""
    network = SDXLNetwork(unet_of(folder), *load_text_encoders(folder, dtype=torch.float32))
    ids, calls = tokenise(load_tokenizers(folder), PROMPTS), []
    network.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = network.embeddings(*ids)
        expected = prompt_embeddings((network.text_encoder, network.text_encoder_2), ids)
    assert calls == [1]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_network_without_text_encoders_has_no_such_children(folder):
    assert [name for name, _ in SDXLNetwork(unet_of(folder)).named_children()] == ["unet"]


# --- the UNet ---


def test_the_unet_is_the_pipelines(folder, pipeline):
    network = unet_of(folder)
    (noisy, t, sizes), texts = batch()
    conditions = {"text_embeds": texts["pooled_prompt_embeds"], "time_ids": sizes}
    with torch.no_grad():
        expected = pipeline.unet(noisy, t, texts["prompt_embeds"], added_cond_kwargs=conditions).sample
        assert torch.equal(SDXLNetwork(network)(noisy, t, sizes, **texts), expected)
        moved = SDXLNetwork(network)(noisy, t, sizes + 64, **texts)
    assert (moved - expected).abs().max() > 1e-3
    assert not network.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_build_on_the_meta_device_costs_nothing_and_has_the_same_names(folder, dtype):
    network = unet_of(folder, dtype)
    encoders = load_text_encoders(folder, dtype=dtype)
    with torch.device("meta"):
        empty = unet_of(folder, dtype, weights=False)
        empty_encoders = load_text_encoders(folder, dtype=dtype, weights=False)

    def shapes(module):
        return [(n, p.shape, p.dtype, p.requires_grad) for n, p in module.named_parameters()]

    for real, built in zip((network, *encoders), (empty, *empty_encoders), strict=True):
        assert all(p.is_meta for p in (*built.parameters(), *built.buffers()))
        assert shapes(real) == shapes(built)
        assert [(n, b.dtype) for n, b in real.named_buffers()] == [(n, b.dtype) for n, b in built.named_buffers()]
        assert type(real) is type(built)
    assert {p.dtype for p in network.parameters()} == {dtype}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_in_float32_train_over_a_base_in_bfloat16(folder, checkpointing, autocast):
    network = SDXLNetwork(unet_of(folder, torch.bfloat16))
    inject(network, PERA(rank=2), targets=UNET_TARGETS)
    generator = torch.Generator().manual_seed(1)
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    for p in trained.values():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    network.train()
    args, texts = batch()

    def gradients():
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = network(*args, **texts)
        out.float().square().mean().backward()
        return out.detach().float(), {n: p.grad.clone() for n, p in trained.items()}

    plain, grads = gradients()
    assert plain.shape == args[0].shape
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads.values())
    assert network.dtype == torch.bfloat16
    if checkpointing:
        blocks = [m for m in network.unet.down_blocks if getattr(m, "attentions", None)]
        calls = []
        blocks[0].attentions[0].transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        network.recompute_activations()
        again, again_grads = gradients()
        assert len(calls) == 2  # in the forward, and again in the backward
        torch.testing.assert_close(again, plain)
        for name, grad in grads.items():
            torch.testing.assert_close(again_grads[name], grad, msg=name)


def test_sizes_stay_exact_over_a_base_in_bfloat16(folder):
    """1023 is 1024 in bfloat16: the photograph's size would be another."""
    network, seen = SDXLNetwork(unet_of(folder, torch.bfloat16)), []
    network.unet.add_time_proj.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    args, texts = batch()
    with torch.no_grad():
        network(*args, **texts)
    assert seen[0].flatten()[0].item() == 1023.0


def test_latents_of_any_shape(folder):
    network = SDXLNetwork(unet_of(folder))
    args, texts = batch(size=(7, 10))
    with torch.no_grad():
        assert network(*args, **texts).shape == (2, 4, 7, 10)


def test_text_encoders_compute_their_activations_again_too(folder):
    network = SDXLNetwork(unet_of(folder), *load_text_encoders(folder, dtype=torch.float32))
    network.train().recompute_activations()
    assert network.unet.is_gradient_checkpointing
    assert network.text_encoder.is_gradient_checkpointing
    assert network.text_encoder_2.is_gradient_checkpointing


# --- the noise schedule ---


def test_the_noise_schedule_is_that_of_ddpm(folder):
    alphas, predicts = noise_alphas(folder)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert predicts == "epsilon"
    assert alphas.dtype == torch.float32
    torch.testing.assert_close(alphas.double(), (1 - betas).cumprod(0), rtol=1e-4, atol=0)


def test_a_schedule_whose_end_is_pure_noise(tmp_path):
    changes = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    save_tiny(tmp_path, parts=["scheduler"], scheduler=changes)
    alphas, predicts = noise_alphas(str(tmp_path))
    assert predicts == "v_prediction"
    assert alphas[-1] == 0.0
    assert alphas[0] > 0.99


def test_a_key_that_is_not_written_is_that_schedulers_default(tmp_path):
    save_tiny(tmp_path, parts=["scheduler"], index={"scheduler": ["diffusers", "LCMScheduler"]})
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    expected = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    assert torch.equal(noise_alphas(str(tmp_path))[0], expected)


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_schedules_of_other_kinds_are_refused(tmp_path, kind):
    save_tiny(tmp_path, parts=["scheduler"], index={"scheduler": ["diffusers", kind]})
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    refused(f"{kind}, which has no schedule of β", noise_alphas, str(tmp_path))


def test_a_scheduler_that_diffusers_lacks(tmp_path):
    save_tiny(tmp_path, parts=["scheduler"], index={"scheduler": ["diffusers", "FutureScheduler"]})
    refused("scheduler FutureScheduler of model .* there is no such class", noise_alphas, str(tmp_path))


# --- what is refused ---


def test_other_pipelines_are_refused(tmp_path):
    for kind in ("StableDiffusionPipeline", "StableDiffusion3Pipeline", "StableDiffusionXLInpaintPipeline"):
        save_tiny(tmp_path, parts=["scheduler"], index={"_class_name": kind})
        refused(f"is a {kind}, and Stable Diffusion XL", unet_of, tmp_path)


def test_a_refiner_is_refused(tmp_path):
    index = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None], "tokenizer": [None, None]}
    save_tiny(tmp_path, index=index)
    refused("has no text_encoder, as a refiner of SDXL: give the base model", unet_of, tmp_path)
    refused("has no text_encoder", load_text_encoders, str(tmp_path), dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 9}, "in_channels=9 for 4"),
        ({"cross_attention_dim": 32}, "cross_attention_dim=32 for 40"),
        ({"addition_embed_type": None, "projection_class_embeddings_input_dim": None}, "addition_embed_type=None"),
        ({"projection_class_embeddings_input_dim": 5 * 8 + PROJECTION}, "projection_class_embeddings_input_dim=60"),
    ],
)
def test_unets_of_another_make_are_refused(tmp_path, changes, words):
    save_tiny(tmp_path, parts=["unet", "text_encoder", "text_encoder_2"], unet=changes)
    for weights in (True, False):
        refused(f"its UNet is not SDXL's .*{words}", unet_of, tmp_path, weights=weights)


def test_folders_that_are_not_there_or_not_whole(folder, tmp_path):
    refused("there is no such folder", unet_of, tmp_path / "nowhere")
    refused("has no model_index.json; give a complete one", unet_of, f"{folder}/unet")
    refused("cannot be loaded from the cache or https", unet_of, "someone/of-the-hub")
    (tmp_path / "model.safetensors").write_bytes(b"0")
    refused("is a file, and a folder is needed: .*from_single_file", unet_of, tmp_path / "model.safetensors")
    whole = save_tiny(tmp_path / "part", parts=["unet", "text_encoder"])
    refused("has no text_encoder_2/config.json; give a complete one", unet_of, whole)
    refused("has no tokenizer/tokenizer_config.json", load_tokenizers, str(whole))
    refused("has no scheduler/scheduler_config.json", noise_alphas, str(whole))
    (whole / "model_index.json").write_text('{"_class_name": ')
    refused("model_index.json is damaged", unet_of, whole)
    (whole / "model_index.json").write_text("[]")
    refused("model_index.json is damaged", unet_of, whole)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "text_encoder_2"])
def test_damaged_weights_are_named(tmp_path, part):
    save_tiny(tmp_path, parts=["unet", "text_encoder", "text_encoder_2"])
    file = next((tmp_path / part).glob("*.safetensors"))
    whole = file.read_bytes()

    def load():
        return unet_of(tmp_path) if part == "unet" else load_text_encoders(str(tmp_path), dtype=torch.float32)

    file.write_bytes(whole[:-50])
    refused(f"^{part} of model .*: a file of its weights is damaged; fetch it again", load)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(f"^{part} of model .*: a file of its weights is damaged", load)
    file.unlink()
    refused(f"^{part} of model .*: it has no weights in safetensors' format", load)
    file.write_bytes(whole)
    tensors = load_file(file)
    lost = next(n for n in tensors if n.endswith(("to_q.weight", "q_proj.weight")))
    save_file({n: t for n, t in tensors.items() if n != lost}, file, metadata={"format": "pt"})
    assert lost.removeprefix("text_model.") in refused("has no weights for 1 of its tensors", load)


def test_variants(folder, tmp_path):
    save_tiny(tmp_path, variant="fp16", dtype=torch.float16, parts=["unet", "text_encoder", "text_encoder_2"])
    network = unet_of(tmp_path, torch.bfloat16, variant="fp16")
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(network.conv_in.weight, unet_of(folder).conv_in.weight.half().bfloat16())
    assert ".fp16.safetensors" in refused("unet of .* no weights in safetensors' format", unet_of, tmp_path)
    assert "diffusion_pytorch_model.safetensors" in refused(
        "no weights of variant='fp8'", unet_of, folder, variant="fp8"
    )
    options = {"dtype": torch.float32, "variant": "fp8"}
    assert "model.safetensors" in refused("text_encoder of .*variant='fp8'", load_text_encoders, folder, **options)


def test_damaged_tokenizers_are_named(tmp_path):
    save_tiny(tmp_path)
    file = tmp_path / "tokenizer_2" / "vocab.json"
    words = json.loads(file.read_text())
    file.write_text("{")
    refused("tokenizer_2 of model .*EOF.*; fetch it again", load_tokenizers, str(tmp_path))
    file.write_text(json.dumps({**words, "more": len(words)}))
    refused(
        f"tokenizer_2 of model .* has {len(words) + 1} tokens, and text_encoder_2 knows {len(words)}",
        load_tokenizers,
        str(tmp_path),
    )
    file.unlink()  # transformers makes three tokens of their own up then
    refused("tokenizer_2 of model", load_tokenizers, str(tmp_path))


def test_the_index_of_the_helper_is_diffusers_own(pipeline, folder, tmp_path):
    pipeline.save_pretrained(tmp_path)
    own, saved = (json.loads((p / "model_index.json").read_text()) for p in (tmp_path, type(tmp_path)(folder)))
    assert {k: own[k] for k in saved if k != "_diffusers_version"} == {
        k: v for k, v in saved.items() if k != "_diffusers_version"
    }
