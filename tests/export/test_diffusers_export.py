"""LoRA files of SDXL, read by diffusers itself: the same outputs as ours."""

import copy
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from pera_lightning import export_diffusers, inject, merge
from pera_lightning.adapters import PERA, AuroRA, FullFineTuning, HiLoRA, HiRA, LinearProbe, LoRA, MoSLoRA
from pera_lightning.errors import CheckpointError, ConfigurationError, NotMergeableError
from pera_lightning.merging.merge import adapted_layers
from tests.export.sdxl_models import (
    ATTENTION,
    FILE,
    TEXT,
    Network,
    adapted,
    apart,
    batch,
    by_pixel,
    embeddings,
    network,
    pipeline,
    predicted,
    with_lora,
)
from tests.tasks.dreambooth import sdxl

EXACT = [
    LoRA(rank=2, alpha=5.0, dropout=0.1),
    LoRA(rank=2, init="pissa"),
    *(PERA(rank=2, alpha=3.0, terms=terms) for terms in ("full", "cross")),
    PERA(rank=4),  # of rank 14, more than small layers have features
    MoSLoRA(rank=3),
    AuroRA(rank=2, train_mode="static", inference_mode="static"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return sdxl.save_tiny(tmp_path_factory.mktemp("base") / "pipeline")


# --- the UNet ---


@pytest.mark.parametrize("method", EXACT, ids=str)
def test_diffusers_predicts_the_same_noise(base, tmp_path, method):
    model = adapted(base, method)
    report = export_diffusers(model, tmp_path / "out")
    assert apart(predicted(with_lora(base, tmp_path / "out").unet), predicted(model.unet)) <= 1e-5
    assert apart(predicted(pipeline(base).unet), predicted(model.unet)) > 1e-2  # the adapters do something
    assert [p.name for p in (tmp_path / "out").iterdir()] == [FILE]
    assert set(report.ranks.values()) == {method.export_rank}
    assert "exact" in str(report)


def test_other_layers_than_attention(base, tmp_path):
    """Every linear layer that diffusers' own training leaves alone too, and some blocks only."""
    targets = [
        "unet.**.proj_in",
        "unet.**.ff.net.2",
        "unet.mid_block.**.to_q",
        "unet.time_embedding.*",
        "unet.**.time_emb_proj",
    ]
    model = adapted(base, PERA(rank=2), targets)
    export_diffusers(model, tmp_path / "out")
    unet = with_lora(base, tmp_path / "out").unet
    assert apart(predicted(unet), predicted(model.unet)) <= 1e-5
    hit = {f"unet.{path}" for path, module in unet.named_modules() if hasattr(module, "lora_A")}
    assert hit == {path for path, _ in adapted_layers(model)}


@pytest.mark.parametrize("weight", [0.5, 1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_the_user_s_weight_scales_the_update(base, tmp_path, weight, fused):
    model = adapted(base, LoRA(rank=2, alpha=5.0), [*ATTENTION, *TEXT], ("unet", "text_encoder", "text_encoder_2"))
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for _, layer in adapted_layers(expected):
            adapter = layer.adapters["all"]
            layer.weight += weight * adapter.delta_weight(layer.weight)
            adapter.B.zero_()
    export_diffusers(model, tmp_path / "out")
    pipe = with_lora(base, tmp_path / "out")
    if fused:
        pipe.fuse_lora(lora_scale=weight)
    else:
        pipe.set_adapters("default_0", weight)
    assert apart(predicted(pipe.unet), predicted(expected.unet)) <= 1e-5
    assert all(apart(a, b) <= 1e-5 for a, b in zip(embeddings(pipe), embeddings(pipe, expected), strict=True))


def test_the_file_needs_no_alpha(base, tmp_path):
    """B A of one rank is the update itself: right for every reader that has no alpha and takes the rank for it."""
    parts = ("unet", "text_encoder", "text_encoder_2")
    model = adapted(base, LoRA(rank=4, alpha=2.0), ["unet.**.to_out.0", *TEXT], parts)
    export_diffusers(model, tmp_path / "out")
    with safe_open(tmp_path / "out" / FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(tmp_path / "out" / FILE)
    assert {t.shape[0] for name, t in tensors.items() if ".lora_A." in name or ".down." in name} == {4}
    for path, layer in adapted_layers(model):
        part, _, inside = path.partition(".")
        down, up = ("lora_A", "lora_B") if part == "unet" else ("lora_linear_layer.down", "lora_linear_layer.up")
        name = path if part == "unet" else f"{part}.text_model.{inside.removeprefix('text_model.')}"
        product = tensors.pop(f"{name}.{up}.weight") @ tensors.pop(f"{name}.{down}.weight")
        assert apart(product, layer.adapters["all"].delta_weight(layer.weight)) <= 1e-6, name
    assert not tensors


def test_the_same_export_is_the_same_bytes(base, tmp_path):
    model = adapted(base, PERA(rank=2))
    before = predicted(model.unet)
    for name in ("a", "b"):
        export_diffusers(model, tmp_path / name)
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    assert torch.equal(predicted(model.unet), before)


# --- text encoders ---


@pytest.mark.parametrize(
    ("targets", "parts", "method"),
    [
        ([*ATTENTION, *TEXT], ("unet", "text_encoder", "text_encoder_2"), PERA(rank=3)),
        (["text_encoder.**.fc1", "text_encoder.**.fc2"], ("unet", "text_encoder"), LoRA(rank=2, alpha=5.0)),
        (["text_encoder_2.**.k_proj"], ("unet", "text_encoder_2"), LoRA(rank=2, alpha=5.0)),
    ],
    ids=["all", "the MLP of one", "the other"],
)
def test_text_encoders(base, tmp_path, targets, parts, method):
    model = adapted(base, method, targets, parts)
    report = export_diffusers(model, tmp_path / "out")
    assert set(report.ranks) == {path for path, _ in adapted_layers(model)}
    pipe = with_lora(base, tmp_path / "out")
    theirs, ours = embeddings(pipe), embeddings(pipeline(base), model)
    assert all(apart(a, b) <= 1e-5 for a, b in zip(theirs, ours, strict=True))
    assert apart(embeddings(pipeline(base))[0], ours[0]) > 1e-2
    assert apart(predicted(pipe.unet), predicted(model.unet)) <= 1e-5


def test_what_a_file_cannot_hold_of_a_text_encoder(base, tmp_path):
    model = adapted(base, LoRA(rank=2), ["text_encoder_2.text_projection"], ("unet", "text_encoder_2"))
    with pytest.raises(ConfigurationError, match=r"text_encoder_2\.text_projection is adapted.*export merged weights"):
        export_diffusers(model, tmp_path / "out")


# --- AuroRA, whose dynamic layers no matrix equals ---


@pytest.mark.parametrize(
    ("targets", "mode"),
    [
        (["unet.**.to_q"], "calibrated"),
        (["unet.**.to_out.0"], "calibrated"),
        (ATTENTION, "calibrated"),
        (ATTENTION, "static"),
    ],
    ids=["no", "all", "some", "some-static"],
)
def test_linear_maps_of_aurora(base, tmp_path, targets, mode):
    """diffusers has what `merge` makes by the same mode: with constants where layers have biases."""
    model = adapted(base, AuroRA(rank=2), targets)
    dynamic = predicted(model.unet)
    with pytest.raises(NotMergeableError, match=r"'calibrated'.*'static'"):
        export_diffusers(model, tmp_path / "out")
    options = {"mode": mode, "batches": [batch(rows=6, seed=1)], "forward": by_pixel}
    report = export_diffusers(model, tmp_path / "out", **options)
    assert torch.equal(predicted(model.unet), dynamic)
    with_constants = mode == "calibrated" and targets != ["unet.**.to_q"]
    assert any("fuse_lora refuses" in note for note in report.notes) == (with_constants and len(targets) > 1)
    assert any("lora_B.bias" in note for note in report.notes) == with_constants
    theirs = predicted(with_lora(base, tmp_path / "out").unet)
    merged = merge(model, **options)
    assert apart(theirs, predicted(model.unet)) <= 1e-5
    assert apart(theirs, dynamic) > 1e-3
    assert report.merge_error.outputs == pytest.approx(merged.merge_error.outputs, rel=1e-3)


def test_constants_of_a_text_encoder(base, tmp_path):
    model = adapted(base, AuroRA(rank=2), ["text_encoder.**.fc1", "text_encoder.**.q_proj"], ("unet", "text_encoder"))
    ids = torch.randint(0, 300, (8, 20), generator=torch.Generator().manual_seed(0))

    def forward(model, ids):
        return model.text_encoder(ids).last_hidden_state

    options = {"mode": "calibrated", "batches": [ids], "forward": forward}
    export_diffusers(model, tmp_path / "out", **options)
    theirs = embeddings(with_lora(base, tmp_path / "out"))
    merge(model, **options)
    assert all(apart(a, b) <= 1e-5 for a, b in zip(theirs, embeddings(pipeline(base), model), strict=True))


def test_the_error_that_was_not_measured_is_said(base, tmp_path):
    report = export_diffusers(adapted(base, AuroRA(rank=2)), tmp_path / "out", mode="static")
    assert "not measured" in str(report)
    with pytest.raises(ConfigurationError, match="leave them out"):
        export_diffusers(adapted(base, LoRA(rank=2)), tmp_path / "o", batches=[batch()])


# --- cut to a rank ---


@pytest.mark.parametrize("method", [HiRA(rank=2), HiLoRA(hira_rank=2, lora_rank=2)], ids=str)
def test_full_rank_needs_a_cut(base, tmp_path, method):
    """Ranks differ where a layer has fewer features than the rank; the file has one."""
    targets = ["unet.**.attn1.to_q", "unet.down_blocks.0.**.time_emb_proj"]  # 16 and 8 rows
    model = adapted(base, method, targets)
    with pytest.raises(NotMergeableError, match=r"unet\.\S+: .*give a rank"):
        export_diffusers(model, tmp_path / "out")
    with pytest.raises(NotMergeableError, match=r"cut to rank 1, .* lose more than max_error=0\.1"):
        export_diffusers(model, tmp_path / "out", rank=1)
    assert not list(tmp_path.iterdir())
    report = export_diffusers(model, tmp_path / "out", rank=12, max_error=0.9)
    assert set(report.ranks.values()) == {12}
    assert any("filled up with zeros" in note for note in report.notes)
    unet = with_lora(base, tmp_path / "out").unet
    for path, layer in adapted_layers(model):
        full = layer.adapters["all"].delta_weight(layer.weight)
        cut = unet.get_submodule(path.removeprefix("unet.")).get_delta_weight("default_0")
        assert report.errors[path] == pytest.approx(apart(cut, full), rel=1e-3, abs=1e-5)
    export_diffusers(model, tmp_path / "whole", rank=16)
    assert apart(predicted(with_lora(base, tmp_path / "whole").unet), predicted(model.unet)) <= 1e-5


# --- refusals ---


def test_what_trained_besides_the_adapters(base, tmp_path):
    model = adapted(base, LoRA(rank=2), trainable=["unet.conv_norm_out"])
    with pytest.raises(ConfigurationError, match=r"2 weights were trained .* unet\.conv_norm_out\.bias"):
        export_diffusers(model, tmp_path / "out")
    model = adapted(base, LoRA(rank=2))
    model.unet.conv_out.weight.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"1 weights were trained .* unet\.conv_out\.weight; export merged"):
        export_diffusers(model, tmp_path / "out")


@pytest.mark.parametrize("method", [LinearProbe(), FullFineTuning()], ids=str)
def test_methods_without_layers(base, tmp_path, method):
    model = network(base)
    inject(model, method, [], ["unet.conv_out"])
    with pytest.raises(ConfigurationError, match=f"{type(method).__name__} adapts no layers.*export merged weights"):
        export_diffusers(model, tmp_path / "out")


def test_networks_that_are_not_sdxl_s(base, tmp_path):
    with pytest.raises(ConfigurationError, match="Network has no adapters: call inject first"):
        export_diffusers(network(base), tmp_path / "out")
    alone = network(base).unet
    inject(alone, LoRA(rank=2), ["to_q"])
    with pytest.raises(ConfigurationError, match=r"has the components .* SDXL network has unet, text"):
        export_diffusers(alone, tmp_path / "out")
    more = network(base, ("unet", "vae"))
    inject(more, LoRA(rank=2), ["unet.**.to_q"])
    with pytest.raises(ConfigurationError, match="has the components unet, vae, and an SDXL network has"):
        export_diffusers(more, tmp_path / "out")
    changes = {"addition_embed_type": None, "projection_class_embeddings_input_dim": None}
    other = Network(unet=UNet2DConditionModel(**{**sdxl.UNET, **changes}))
    inject(other, LoRA(rank=2), ["to_q"])
    with pytest.raises(ConfigurationError, match="addition_embed_type=None, and SDXL's has 'text_time'"):
        export_diffusers(other, tmp_path / "out")


def test_states_that_cannot_be_exported(base, tmp_path):
    model = adapted(base, LoRA(rank=2))
    with torch.no_grad():
        next(layer for _, layer in adapted_layers(model)).adapters["all"].A[0, 0] = float("nan")
    with pytest.raises(NotMergeableError, match="NaN"):
        export_diffusers(model, tmp_path / "out")
    model = adapted(base, LoRA(rank=2))
    merge(model)
    with pytest.raises(ConfigurationError, match="call unmerge"):
        export_diffusers(model, tmp_path / "out")
    with torch.device("meta"):
        empty = Network(unet=UNet2DConditionModel(**sdxl.UNET))
        inject(empty, LoRA(rank=2), ["to_q"])
    with pytest.raises(ConfigurationError, match="meta device"):
        export_diffusers(empty, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_stays(base, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigurationError, match="exists; give another"):
        export_diffusers(adapted(base, LoRA(rank=2)), tmp_path / "out")


def test_a_disk_without_room(base, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(CheckpointError, match="make room"):
        export_diffusers(adapted(base, LoRA(rank=2)), tmp_path / "out")
