"""Merged weights for transformers: what `from_pretrained` gives back, and what a failed export leaves."""

import copy
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from pera_lightning import inject
from pera_lightning.adapters import PERA, AuroRA, FullFineTuning, HiRA, LinearProbe, LoRA
from pera_lightning.errors import CheckpointError, ConfigurationError, NotMergeableError
from pera_lightning.export import merged
from pera_lightning.export.transformers import export_transformers
from pera_lightning.training.precision import keep_heads_float32, release_heads
from tests.tasks.causal_lm import language_helpers as text

IDS = torch.randint(4, text.VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))


def adapted(folder, method, targets=text.QV, trainable=(), dtype=torch.float32, kind=AutoModelForCausalLM):
    model = kind.from_pretrained(folder, dtype=dtype)
    inject(model, method, list(targets), list(trainable), seed=0)
    keep_heads_float32(model)
    text.randomise(model)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()


def tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a file, no dict


def bert(folder, **options):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    shape = {**small, "vocab_size": text.VOCABULARY, "initializer_range": 0.3, "num_labels": 3, **options}
    BertForSequenceClassification(BertConfig(**shape)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "options", "targets", "method"),
    [
        ("llama", {}, text.QV, PERA(rank=3)),
        ("llama", {"tie_word_embeddings": True}, text.QV, HiRA(rank=3)),
        ("gpt2", {"tie_word_embeddings": True}, ["c_attn[q,v]", "c_proj"], LoRA(rank=3)),
        ("mamba", {}, ["in_proj"], LoRA(rank=3)),
    ],
    ids=["llama", "llama-tied", "gpt2", "mamba"],
)
def test_what_is_loaded_is_what_was_adapted(tmp_path, kind, options, targets, method):
    base = text.save_tiny(tmp_path / "base", kind, **options)
    model = adapted(base, method, targets)
    before, plain = logits(model), logits(AutoModelForCausalLM.from_pretrained(base))
    report = export_transformers(model, tmp_path / "out", tokenizer=text.tokenizer())
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert (logits(loaded) - before).abs().max() < 1e-4
    assert (plain - before).abs().max() > 1e-2
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == bool(options)
    assert tensors(tmp_path / "out").keys() == tensors(Path(base)).keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    size = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert report.size == size
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("q1 q2")["input_ids"] == text.tokenizer()("q1 q2")["input_ids"]


def test_no_trace_of_this_package_nor_of_this_machine(tmp_path):
    base = text.save_tiny(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = adapted(base, PERA(rank=3), trainable=["lm_head"])
    export_transformers(model, tmp_path / "out", tokenizer=tokenizer)
    for file in (tmp_path / "out").iterdir():
        assert b"pera" not in file.read_bytes().lower().replace(b"temperature", b""), file.name
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    assert not any(type(module).__module__.startswith("pera_lightning") for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_with_a_trained_head(tmp_path, dtype):
    base = bert(tmp_path / "base")
    kind = AutoModelForSequenceClassification
    model = adapted(base, LoRA(rank=3), ["query", "value"], ["classifier"], dtype, kind)
    assert model.classifier.weight.dtype == torch.float32
    before, head = logits(model), model.classifier.weight.detach().clone()
    mine = copy.deepcopy(model)
    assert release_heads(mine, dtype) == ([] if dtype == torch.float32 else ["classifier"])
    report = export_transformers(mine, tmp_path / "out")
    assert report.merge.layers == 4
    loaded = kind.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded.classifier.weight, head.to(dtype))
    # bfloat16 has 8 bits, and in it the merged weight is rounded once more.
    bound = 1e-4 if dtype == torch.float32 else 0.05 * before.abs().max()
    assert (logits(loaded) - before).abs().max() < bound
    assert model.classifier._forward_pre_hooks or dtype == torch.float32


def test_a_head_that_is_tied_to_the_embeddings(tmp_path):
    base = text.save_tiny(tmp_path / "base", tie_word_embeddings=True)
    model = adapted(base, LoRA(rank=3), trainable=["lm_head"])
    before = logits(model)
    export_transformers(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert (logits(loaded) - before).abs().max() < 1e-4


@pytest.mark.parametrize(("method", "trainable"), [(LinearProbe(), ["lm_head"]), (FullFineTuning(), [])])
def test_methods_without_layers_write_what_they_trained(tmp_path, method, trainable):
    model = adapted(text.save_tiny(tmp_path / "base"), method, [], trainable)
    before = logits(model)
    report = export_transformers(model, tmp_path / "out")
    assert "adapts no layers: the weights are written as they were trained" in str(report)
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - before).abs().max() < 1e-4


def test_the_error_of_a_static_merge_is_told(tmp_path):
    model = adapted(text.save_tiny(tmp_path / "base"), AuroRA(rank=3))
    before = logits(model)
    with pytest.raises(NotMergeableError, match="calibrated"):
        export_transformers(model, tmp_path / "out")
    assert torch.equal(logits(model), before)
    report = export_transformers(model, tmp_path / "out", mode="static", measure_on=[{"input_ids": IDS, "labels": IDS}])
    after = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert report.merge.merge_error.outputs == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)
    assert "layers, static" in str(report)
    assert "loss" in str(report)


def test_what_is_there_is_not_overwritten_and_the_model_not_merged(tmp_path):
    model = adapted(text.save_tiny(tmp_path / "base"), PERA(rank=3))
    (tmp_path / "out").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(ConfigurationError, match="exists"):
        export_transformers(model, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert model.model.layers[0].self_attn.q_proj.merged is None
    export_transformers(model, tmp_path / "out", overwrite=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_no_room_leaves_nothing(tmp_path, monkeypatch):
    model = adapted(text.save_tiny(tmp_path / "base"), PERA(rank=3))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1))
    with pytest.raises(CheckpointError, match="make room"):
        export_transformers(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_tied_weights_need_room_once(tmp_path, monkeypatch):
    base = text.save_tiny(tmp_path / "base", tie_word_embeddings=True, vocab_size=50_000)
    asked = []
    output_folder = merged.output_folder

    def watched(path, *, overwrite, needed):
        asked.append(needed)
        return output_folder(path, overwrite=overwrite, needed=needed)

    monkeypatch.setattr(merged, "output_folder", watched)
    monkeypatch.setattr(merged, "_BESIDES", 0)
    export_transformers(adapted(base, PERA(rank=3)), tmp_path / "out")
    assert asked[0] == pytest.approx((tmp_path / "out" / "model.safetensors").stat().st_size, rel=0.01)


def test_a_disk_that_fills_up_while_it_is_written_leaves_nothing(tmp_path, monkeypatch):
    model = adapted(text.save_tiny(tmp_path / "base"), PERA(rank=3))
    import transformers.modeling_utils as writer

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "safe_save_file", full)
    with pytest.raises(CheckpointError, match="make room"):
        export_transformers(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_generation_settings_that_transformers_does_not_write(tmp_path):
    """As some bases on the hub have them: sampling settings, and no sampling."""
    base = text.save_tiny(tmp_path / "base")
    file = Path(base) / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 0.6}))
    report = export_transformers(adapted(base, PERA(rank=3)), tmp_path / "out")
    assert "generation_config.json is the base's as it was" in str(report)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (written["temperature"], written["eos_token_id"]) == (0.6, 1)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.temperature == 0.6


def test_what_transformers_refuses_is_one_line(tmp_path, monkeypatch):
    model = adapted(text.save_tiny(tmp_path / "base"), PERA(rank=3))

    def refuse(folder):
        raise ValueError("The model is quantized\nand is not serializable")

    monkeypatch.setattr(model, "save_pretrained", refuse)
    expected = "transformers does not write LlamaForCausalLM: The model is quantized and is not serializable"
    with pytest.raises(ConfigurationError, match=expected):
        export_transformers(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
