"""PEFT folders that are refused, in one line, with the model as it was."""

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pera_lightning import inject, load_peft, save_adapter
from pera_lightning.adapters import LoRA
from pera_lightning.errors import ConfigurationError, PeraError
from tests.export.peft_folders import lora, refused, retensor, rewrite, trained
from tests.export.peft_models import adapted, bert, gpt2, llama, vit

UNKNOWN = {
    "DoRA": ({"use_dora": True}, "use_dora=True"),
    "constants": ({"lora_bias": True}, "lora_bias=True"),
    "biases": ({"bias": "lora_only"}, "bias='lora_only'"),
    "tokens": ({"trainable_token_indices": [0, 3]}, "trainable_token_indices"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*changes the base"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
}


@pytest.mark.parametrize(("options", "match"), UNKNOWN.values(), ids=UNKNOWN)
def test_kinds_of_lora_that_are_more(tmp_path, options, match):
    trained("gpt2", lora("gpt2", **options), tmp_path)
    refused(gpt2(), tmp_path, match)


def test_parameters_as_targets(tmp_path):
    trained("llama", lora(target_parameters=["mlp.up_proj.weight"]), tmp_path)
    refused(llama(), tmp_path, "target_parameters")


def test_a_setting_of_tomorrow(tmp_path):
    trained("llama", lora(), tmp_path)
    rewrite(tmp_path, use_wonder={"depth": 3})
    refused(llama(), tmp_path, "use_wonder=.*does not take")


def test_other_types(tmp_path):
    trained("llama", peft.LoHaConfig(r=2, target_modules=["q_proj"]), tmp_path)
    refused(llama(), tmp_path, "is a LOHA of peft: LORA and HIRA")


def test_embeddings(tmp_path):
    trained("llama", lora(target_modules=["q_proj", "embed_tokens"]), tmp_path)
    refused(llama(), tmp_path, "unexpected: .*embed_tokens")


def test_a_layer_that_the_base_lacks(tmp_path):
    trained("llama", lora(), tmp_path, blocks=3)
    refused(llama(), tmp_path, r"layers\.2\.self_attn\.q_proj.*does not have")
    refused(bert(), tmp_path, "BertForSequenceClassification does not have")


def test_a_base_of_another_shape(tmp_path):
    trained("llama", lora(), tmp_path)
    refused(llama(hidden_size=32), tmp_path, r"q_proj are \(3, 16\) and \(16, 3\), expected \(3, 32\) and \(32, 3\)")


def test_a_base_of_more_blocks(tmp_path):
    """peft would load it in silence, with fresh adapters in the last block."""
    trained("llama", lora(), tmp_path)
    refused(llama(blocks=3), tmp_path, r"targets model\.layers\.2\.self_attn\.q_proj.*no tensors")


def test_another_number_of_classes(tmp_path):
    trained("vit", lora("vit"), tmp_path)
    model = vit()
    model.reset_classifier(5)
    refused(model, tmp_path, r"head\.weight is \(3, 16\), the model's is \(5, 16\); does the data have another number")


def test_a_base_without_the_head(tmp_path):
    trained("bert", lora("bert"), tmp_path)
    refused(bert().bert, tmp_path, "does not have")
    trained("vit", lora("vit"), tmp_path)
    model = vit()
    model.head = nn.Identity()
    refused(model, tmp_path, r"2 unexpected: head\.bias, head\.weight")


def test_a_head_that_is_tied_in_the_base(tmp_path):
    """peft gives the head a copy of its own; loading it here would change the embeddings too."""
    trained("llama", lora(modules_to_save=["lm_head"]), tmp_path)
    refused(llama(tie_word_embeddings=True), tmp_path, "lm_head.weight.*one tensor.*untie")
    load_peft(llama(), tmp_path)


def test_tensors_that_are_missing_or_left_over(tmp_path):
    trained("vit", lora("vit"), tmp_path / "a")

    def broken(change, match):
        folder = tmp_path / f"broken {len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / file).write_bytes((tmp_path / "a" / file).read_bytes())
        retensor(folder, change)
        refused(vit(), folder, match)

    block = "base_model.model.blocks.1.attn.qkv"
    broken(lambda t: t.pop(f"{block}.lora_B.weight"), r"blocks\.1\.attn\.qkv have one factor")
    broken(lambda t: [t.pop(f"{block}.lora_{x}.weight") for x in "AB"], r"targets blocks\.1\.attn\.qkv")
    broken(lambda t: t.pop("base_model.model.head.bias"), r"1 missing: head\.bias")
    broken(lambda t: t.update({f"{block}.lora_magnitude_vector": torch.ones(3)}), "1 unexpected: .*magnitude")
    broken(lambda t: t.update({"blocks.0.extra": torch.ones(3)}), "do not begin with base_model")
    broken(lambda t: t.clear(), "lora_A.weight of any layer is missing")


def test_files_that_are_missing_or_damaged(tmp_path):
    refused(llama(), tmp_path / "nothing", "does not exist")
    refused(llama(), tmp_path, "has no adapter_config.json$")
    trained("llama", lora(), tmp_path / "adapter")
    refused(llama(), tmp_path / "adaptr", "does not exist; closest: adapter")
    weights, config = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(llama(), tmp_path / "adapter", "adapter_model.safetensors is damaged")
    weights.write_bytes(b"")
    refused(llama(), tmp_path / "adapter", "adapter_model.safetensors is damaged")
    weights.rename(weights.with_suffix(".bin"))
    refused(llama(), tmp_path / "adapter", r"adapter_model\.bin is damaged, or holds more than tensors \(EOFError")
    weights.with_suffix(".bin").unlink()
    refused(llama(), tmp_path / "adapter", "has no adapter_model.safetensors")
    config.write_text("{")
    refused(llama(), tmp_path / "adapter", "adapter_config.json is damaged")
    config.write_text('{"a":' + "[" * 10**5)
    refused(llama(), tmp_path / "adapter", "adapter_config.json is damaged")
    config.write_text("[1]")
    refused(llama(), tmp_path / "adapter", "was not written by peft: it has no peft_type")


NONSENSE = [("r", 0), ("r", "8"), ("r", None), ("lora_alpha", "16"), ("lora_dropout", [0.1]), ("rank_pattern", [3])]
NONSENSE += [("alpha_pattern", {"(": 3}), ("target_modules", 3), ("target_modules", "*q"), ("modules_to_save", "head")]
NONSENSE += [("modules_to_save", [3]), ("alpha_pattern", {"q_proj": "x"}), ("rank_pattern", {"q_proj": [1]})]


@pytest.mark.parametrize(("name", "value"), NONSENSE)
def test_values_that_peft_does_not_write(tmp_path, name, value):
    trained("llama", lora(), tmp_path)
    rewrite(tmp_path, **{name: value})
    refused(llama(), tmp_path, "adapter_config.json is damaged")


def test_our_own_folder(tmp_path):
    save_adapter(adapted("llama", LoRA(rank=2)), tmp_path)
    refused(llama(), tmp_path, "use load_adapter")


def test_a_rank_larger_than_a_layer(tmp_path):
    trained("llama", lora(r=20), tmp_path)
    refused(llama(), tmp_path, "rank=20 is larger than", ConfigurationError)


def test_a_model_that_is_adapted_already(tmp_path):
    trained("llama", lora(), tmp_path)
    model = llama()
    inject(model, LoRA(rank=2), ["q_proj"])
    with pytest.raises(PeraError, match="adapted already"):
        load_peft(model, tmp_path)


def test_a_layer_in_two_places(tmp_path):
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    get_peft_model(nn.Sequential(nn.Linear(6, 6)), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    refused(model, tmp_path, "several places")
