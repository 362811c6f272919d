"""A frozen layer that no file gave is named: it is random, and another one in the next process."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from pera_lightning import inject
from pera_lightning.adapters import LoRA
from pera_lightning.injection.new_layers import modules_of, new_and_frozen


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


@pytest.mark.parametrize("name", ["head", "classifier", "score", "fc"])
def test_a_last_linear_called_like_a_head(name: str) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), name: nn.Linear(4, 2)})
    with pytest.warns(UserWarning, match=rf"{name} of ModuleDict is frozen, .*; trainable=\[{name}\] trains it"):
        inject(model, LoRA(rank=1), ["body"])


@pytest.mark.parametrize("options", [{"targets": ["body"], "trainable": ["head"]}, {"targets": ["body", "head"]}])
def test_none_where_it_is_trained_or_adapted(options: dict) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(model, LoRA(rank=1), **options)


def test_a_layer_in_the_middle_is_no_head() -> None:
    assert new_and_frozen(frozen(nn.ModuleDict({"fc": nn.Linear(4, 4), "out": nn.Linear(4, 2)}))) == []


def test_transformers_says_what_it_has_loaded(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base = BertModel(BertConfig(vocab_size=30, **sizes), add_pooling_layer=False)
    base.save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base").to(torch.bfloat16)
    assert new_and_frozen(frozen(model)) == ["bert.pooler", "classifier"]
    assert new_and_frozen(nn.ModuleDict({"encoder": model})) == ["encoder.bert.pooler", "encoder.classifier"]
    model.save_pretrained(tmp_path / "whole")  # a classifier that was trained is not named
    assert new_and_frozen(frozen(BertForSequenceClassification.from_pretrained(tmp_path / "whole"))) == []


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
        ("levit_128s", ["head.linear", "head_dist.linear"]),
        ("convnext_atto", ["head.fc"]),
    ],
)
def test_timm_says_for_how_many_classes_its_heads_are(name: str, heads: list[str]) -> None:
    with torch.device("meta"):
        assert new_and_frozen(frozen(timm.create_model(name, num_classes=7))) == heads
        assert new_and_frozen(frozen(timm.create_model(name))) == []


def test_the_outermost_modules_are_named() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.Linear(2, 2)}), "b": nn.LayerNorm(2)})
    names = [name for name, _ in model.named_parameters()]
    assert modules_of(model, names) == ["a", "b"]
    assert modules_of(model, [n for n in names if n.startswith("a.x") or n == "b.weight"]) == ["a.x", "b"]
