"""What leaves a real language model is that model: a PEFT folder, and merged weights."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pera_lightning import export_peft, export_transformers, inject
from pera_lightning.adapters import PERA
from pera_lightning.merging.merge import adapted_layers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
PROMPTS = ["The capital of France is", "Three animals that swim:", "Water boils at"]


@torch.no_grad()
def adapted(folder: Path) -> PreTrainedModel:
    """With updates that change what is said, products of the factors included."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inject(model, PERA(rank=8, alpha=8), TARGETS, seed=0)
    draw = torch.Generator().manual_seed(0)
    for _, layer in adapted_layers(model):
        adapter = layer.adapters["all"]
        adapter.B.copy_(0.05 * torch.randn(adapter.B.shape, generator=draw))
        adapter.h.copy_(50 * torch.randn(adapter.h.shape, generator=draw))
    return model.eval()


@torch.no_grad()
def said(model: PreTrainedModel, folder: Path) -> list[tuple[Tensor, list[int]]]:
    """Logits, and the greedy continuation, of each prompt."""
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        text = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        found.append((model(input_ids=ids).logits, text[0].tolist()))
    return found


def change(one: list, other: list) -> float:
    return max(float((a - b).abs().max()) for (a, _), (b, _) in zip(one, other, strict=True))


def test_exports_say_the_same(model_folder: Path, tmp_path: Path) -> None:
    folder = model_folder
    model = adapted(folder)
    ours = said(model, folder)
    linear = [layer.adapters["all"].h for _, layer in adapted_layers(model)]
    kept = [h.clone() for h in linear]
    for h in linear:
        h.data.zero_()
    assert change(ours, said(model, folder)) > 0.1  # the products matter
    for h, value in zip(linear, kept, strict=True):
        h.data.copy_(value)

    report = export_peft(model, tmp_path / "peft", base_name=str(folder))
    assert set(report.ranks.values()) == {44}
    assert not report.errors
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert change(ours, said(base, folder)) > 1
    theirs = said(peft.PeftModel.from_pretrained(base, tmp_path / "peft"), folder)
    assert change(ours, theirs) < 1e-4
    assert [text for _, text in ours] == [text for _, text in theirs]

    export_transformers(model, tmp_path / "merged", tokenizer=AutoTokenizer.from_pretrained(folder))
    merged = said(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tmp_path / "merged")
    assert change(ours, merged) < 1e-3  # float32 over 30 layers, see docs/merging.md
    assert [text for _, text in ours] == [text for _, text in merged]
