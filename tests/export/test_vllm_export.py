"""What vLLM takes: one rank and alpha, no head, no constants, rank at most 512; and the rank to start it with."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pera_lightning import export_peft
from pera_lightning.adapters import PERA, AuroRA, HiRA, LoRA
from pera_lightning.adapters.base import LowRankUpdate
from pera_lightning.errors import ConfigurationError
from pera_lightning.export.vllm import served_updates
from pera_lightning.injection.inject import injection_of
from tests.export.peft_models import adapted, apart, gpt2, in_peft, inputs, outputs


def config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(("method", "rank"), [(LoRA(rank=1), 1), (LoRA(rank=8), 8), (PERA(rank=3), 16)], ids=str)
def test_the_rank_to_start_it_with(tmp_path, method, rank):
    report = export_peft(adapted("llama", method), tmp_path / "out", base_name="base", target="vllm")
    assert report.max_lora_rank == rank
    assert f"--max-lora-rank {rank}" in str(report)


def test_one_rank_for_all(tmp_path):
    """Ranks that differ are filled up: no patterns, the same model."""
    model, x = adapted("gpt2", PERA(rank=2), ["h.0.attn.c_attn[q,v]", "h.1.mlp.c_fc"]), inputs("gpt2")
    report = export_peft(model, tmp_path / "out", base_name="base", target="vllm")
    assert set(report.ranks.values()) == {10}
    assert any("filled up" in note for note in report.notes)
    written = config(tmp_path / "out")
    assert (written["r"], written["rank_pattern"], written["alpha_pattern"]) == (10, {}, {})
    assert {len(t) for n, t in load_file(tmp_path / "out/adapter_model.safetensors").items() if "lora_A" in n} == {10}
    assert apart(outputs(in_peft(gpt2(), tmp_path / "out"), x), outputs(model, x)) <= 1e-5


def test_what_it_reads_of_the_config(tmp_path):
    """The keys that its loader checks: no head, bias "none", neither DoRA nor rank-stabilised."""
    export_peft(adapted("llama", LoRA(rank=2)), tmp_path / "out", base_name="base", target="vllm")
    written = config(tmp_path / "out")
    assert not written["modules_to_save"]
    assert not written["use_dora"]
    assert not written["use_rslora"]
    assert not written["lora_bias"]
    assert written["bias"] == "none"


def wide(rank):
    return {"q_proj": LowRankUpdate(torch.zeros(rank, 3), torch.zeros(4, rank))}


def test_the_largest_rank():
    assert served_updates(wide(512), injection_of(adapted("llama", LoRA(rank=2))))[1] == 512


def test_a_rank_that_is_too_large(tmp_path):
    """PERA at 32 expands to 560."""
    model = adapted("llama", PERA(rank=32), hidden_size=32, intermediate_size=32, num_key_value_heads=4)
    with pytest.raises(ConfigurationError, match=r"PERA\(rank=32.*rank 560.*at most 512.*rank=512.*merged"):
        export_peft(model, tmp_path / "out", base_name="base", target="vllm")
    assert list(tmp_path.iterdir()) == []
    report = export_peft(model, tmp_path / "out", base_name="base", target="vllm", rank=512)
    assert report.max_lora_rank == 32  # the width of the layers: no update has a larger rank
    assert max(report.errors.values()) < 1e-6


def test_a_head(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no trained head.*classifier.*merged"):
        export_peft(adapted("bert", LoRA(rank=2)), tmp_path / "out", base_name="base", target="vllm")


def test_constants(tmp_path):
    model, batches = adapted("gpt2", AuroRA(rank=2)), [inputs("gpt2", rows=20)]
    with pytest.raises(ConfigurationError, match=r"no constants.*merged"):
        export_peft(model, tmp_path / "o", base_name="b", target="vllm", mode="calibrated", batches=batches)
    export_peft(model, tmp_path / "o", base_name="b", target="vllm", mode="static")


def test_another_library(tmp_path):
    with pytest.raises(ConfigurationError, match="serves models of transformers"):
        export_peft(adapted("vit", LoRA(rank=2), heads=[]), tmp_path / "out", base_name="base", target="vllm")


def test_an_unknown_target(tmp_path):
    with pytest.raises(ValueError, match="target='vlm' does not exist; one of peft, vllm"):
        export_peft(adapted("llama", LoRA(rank=2)), tmp_path / "out", base_name="base", target="vlm")


def test_hira_by_svd(tmp_path):
    model = adapted("llama", HiRA(rank=2))
    report = export_peft(model, tmp_path / "out", base_name="base", target="vllm", rank=7, max_error=1.0)
    assert report.max_lora_rank == 8
