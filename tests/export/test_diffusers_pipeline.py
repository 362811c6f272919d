"""Merged pipelines of SDXL: the same images as those of the adapted network, and the base's files."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pera_lightning import export_pipeline, inject
from pera_lightning.adapters import PERA, AuroRA, HiRA, LoRA
from pera_lightning.errors import ConfigurationError, NotMergeableError
from pera_lightning.export.pipeline_files import pipeline_files
from pera_lightning.merging.merge import adapted_layers
from tests.export.peft_models import stir
from tests.export.sdxl_models import (
    ATTENTION,
    PROMPTS,
    TEXT,
    Network,
    adapted,
    apart,
    batch,
    by_pixel,
    network,
    pipeline,
    predicted,
)
from tests.tasks.dreambooth import sdxl


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return sdxl.save_tiny(tmp_path_factory.mktemp("base") / "pipeline")


def image(pipe):
    g = torch.Generator().manual_seed(3)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt", "generator": g}
    return pipe(PROMPTS[0], **settings).images


def with_parts(base, model):
    pipe = pipeline(base)
    pipe.register_modules(**dict(model.named_children()))
    return pipe


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=2, alpha=2.0),
        PERA(rank=2, alpha=2.0),
        HiRA(rank=2),
        AuroRA(rank=2, train_mode="static", inference_mode="static"),
    ],
    ids=str,
)
def test_the_merged_pipeline_makes_the_same_image(base, tmp_path, method):
    model = adapted(base, method, [*ATTENTION, *TEXT], ("unet", "text_encoder", "text_encoder_2"))
    ours = image(with_parts(base, model))
    report = export_pipeline(model, tmp_path / "out", base)
    assert report.merge.layers > 20
    assert not report.notes
    theirs = image(pipeline(tmp_path / "out"))
    assert torch.allclose(theirs, ours, atol=1e-3)
    assert not torch.allclose(image(pipeline(base)), ours, atol=1e-2)
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            assert b"pera_lightning" not in file.read_bytes(), file
            assert str(tmp_path.parent).encode() not in file.read_bytes(), file  # nor where the base lay


def test_what_was_predicted_in_the_training_is_in_the_scheduler(base, tmp_path):
    report = export_pipeline(adapted(base, LoRA(rank=2)), tmp_path / "out", base, prediction_type="v_prediction")
    assert report.notes == ["the scheduler has prediction_type=v_prediction, as the training"]
    assert pipeline(tmp_path / "out").scheduler.config.prediction_type == "v_prediction"


def test_what_is_not_adapted_is_the_base_s_to_the_byte(base, tmp_path):
    export_pipeline(adapted(base, LoRA(rank=2)), tmp_path / "out", base)
    files = {p.relative_to(base) for p in base.rglob("*") if p.is_file()}
    assert {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()} == files
    for file in files:
        if file.parts[0] != "unet" and not file.name.endswith("config.json"):
            assert (tmp_path / "out" / file).read_bytes() == (base / file).read_bytes(), file
    changed, before = (load_file(p / "unet/diffusion_pytorch_model.safetensors") for p in (tmp_path / "out", base))
    assert {n for n in before if not torch.equal(before[n], changed[n])} == {
        f"{path.removeprefix('unet.')}.weight" for path, _ in adapted_layers(adapted(base, LoRA(rank=2)))
    }


def test_the_vae_is_not_read_into_memory(base, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    model = adapted(base, LoRA(rank=2))
    monkeypatch.setattr(AutoencoderKL, "__init__", lambda *_, **__: pytest.fail("a VAE was made"))
    export_pipeline(model, tmp_path / "out", base)


def test_other_files_of_the_base_stay_behind(base, tmp_path):
    """Hubs hold the same weights many times: other formats, other variants, parts that the pipeline does not name."""
    full = tmp_path / "full"
    shutil.copytree(base, full)
    (full / "vae_1_0").mkdir()
    for name in ("vae/diffusion_pytorch_model.fp16.safetensors", "vae/model.onnx", "vae_1_0/config.json", "x.png"):
        (full / name).write_bytes(b"x")
    export_pipeline(adapted(full, LoRA(rank=2)), tmp_path / "out", full)
    assert {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*")} == {
        p.relative_to(base) for p in base.rglob("*")
    }


def test_a_variant_gets_plain_names(tmp_path):
    half = sdxl.save_tiny(tmp_path / "half", variant="fp16", dtype=torch.float16)
    sdxl.save_tiny(tmp_path / "half", parts=["vae"])  # both variants of one part
    model = Network(unet=pipeline(half, variant="fp16", torch_dtype=torch.float16).unet)
    inject(model, PERA(rank=2), ATTENTION, seed=0)
    stir(model, spread=0.2)
    export_pipeline(model, tmp_path / "out", half, variant="fp16")
    for part, name in {
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "model",
    }.items():
        assert [p.name for p in (tmp_path / "out" / part).glob("*.safetensors")] == [f"{name}.safetensors"]
        weights = load_file(tmp_path / "out" / part / f"{name}.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float16}
    theirs = pipeline(tmp_path / "out", torch_dtype=torch.float16)
    assert all(torch.equal(p, q) for p, q in zip(theirs.unet.parameters(), model.unet.parameters(), strict=True))
    with pytest.raises(ConfigurationError, match=r"text_encoder of .* has no model\.safetensors .* give the variant"):
        pipeline_files(half, ["unet"])


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files(base, tmp_path, variant):
    shards = tmp_path / "shards"
    shutil.copytree(base, shards)
    pipe = pipeline(base)
    (shards / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    pipe.vae.save_pretrained(shards / "vae", max_shard_size="20KB", variant=variant)
    assert len(list((shards / "vae").glob("*.safetensors"))) > 1
    model = adapted(base, LoRA(rank=2))
    export_pipeline(model, tmp_path / "out", shards, variant=variant)
    theirs = pipeline(tmp_path / "out").vae.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in pipe.vae.state_dict().items())


def test_a_base_from_the_hub_s_cache(base, tmp_path, monkeypatch):
    commit, cache = "0" * 40, tmp_path / "cache"
    kept = cache / "models--some--xl"
    shutil.copytree(base, kept / "blobs" / "all")
    snapshot = kept / "snapshots" / commit
    for file in (kept / "blobs" / "all").rglob("*"):
        if file.is_file():
            link = snapshot / file.relative_to(kept / "blobs" / "all")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    (kept / "refs").mkdir()
    (kept / "refs" / "v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    model = adapted(base, LoRA(rank=2))
    ours = image(with_parts(base, model))
    export_pipeline(copy.deepcopy(model), tmp_path / "out", "some/xl", revision="v1")
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    assert torch.allclose(image(pipeline(tmp_path / "out")), ours, atol=1e-3)
    with pytest.raises(ConfigurationError, match=r"some/xl cannot be loaded from the cache.*give a local folder"):
        export_pipeline(copy.deepcopy(model), tmp_path / "two", "some/xl")  # main is another revision
    (snapshot / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"vae of some/xl has no .*safetensors, it has config\.json"):
        export_pipeline(model, tmp_path / "two", "some/xl", revision="v1")
    assert not (tmp_path / "two").exists()


def test_bases_that_are_not_whole(base, tmp_path):
    def refused(folder, words, without=("unet",)):
        with pytest.raises(ConfigurationError, match=words):
            pipeline_files(folder, without)

    refused(tmp_path, "not a pipeline of diffusers: it has no model_index.json")
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    refused(broken, "has no text_encoder_3, it has scheduler", ["text_encoder_3"])
    shutil.rmtree(broken / "tokenizer_2")
    refused(broken, "tokenizer_2 of .* is missing")
    (broken / "model_index.json").write_text("{")
    refused(broken, r"model_index\.json is damaged")


def test_a_low_base_with_modules_that_were_trained_whole(base, tmp_path):
    model = network(base, torch_dtype=torch.bfloat16)
    inject(model, LoRA(rank=2), ATTENTION, ["unet.conv_norm_out"])
    model.unet.conv_norm_out.float()
    report = export_pipeline(model, tmp_path / "out", base)
    assert "all weights of the unet are bfloat16" in str(report)
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert "_name_or_path" not in json.loads((tmp_path / "out" / "unet" / "config.json").read_text())


def test_a_dynamic_aurora_as_a_merged_pipeline(base, tmp_path):
    model = adapted(base, AuroRA(rank=2))
    with pytest.raises(NotMergeableError, match=r"'calibrated'.*'static'"):
        export_pipeline(copy.deepcopy(model), tmp_path / "out", base)
    options = {"mode": "calibrated", "batches": [batch(rows=6, seed=1)], "forward": by_pixel}
    report = export_pipeline(model, tmp_path / "out", base, **options)
    assert report.merge.merge_error is not None
    assert apart(predicted(pipeline(tmp_path / "out").unet), predicted(model.unet)) <= 1e-6
