"""PEFT folders, written by peft itself, as our LoRA and HiRA: the same outputs, and nothing dropped in silence."""

import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from pera_lightning import export_peft, load_adapter, load_peft, merge, save_adapter
from pera_lightning.adapters import PERA, HiRA, LoRA
from pera_lightning.injection.inject import injection_of
from tests.export.peft_folders import HEADS, LAYERS, hira, lora, read_by_peft, refused, retensor, trained
from tests.export.peft_models import BASES, adapted, apart, bert, gpt2, in_peft, inputs, llama, outputs

# --- what loads ---


@pytest.mark.parametrize("name", BASES)
def test_lora_of_peft(tmp_path, name):
    trained(name, lora(name, lora_dropout=0.25), tmp_path)
    theirs = read_by_peft(name, tmp_path)
    model = load_peft(BASES[name](), tmp_path)
    assert apart(outputs(model, inputs(name)), theirs) <= 1e-5
    assert injection_of(model).method == LoRA(rank=3, alpha=5, dropout=0.25)
    assert list(injection_of(model).trained_modules) == (HEADS[name] or [])
    whole = [n for n, p in model.named_parameters() if p.requires_grad and ".adapters." not in n]
    assert whole == [f"{head}.{part}" for head in HEADS[name] or [] for part in ("weight", "bias")]


@pytest.mark.parametrize("name", BASES)
def test_hira_of_peft(tmp_path, name):
    trained(name, hira(name, hira_dropout=0.25), tmp_path)
    theirs = read_by_peft(name, tmp_path)
    model = load_peft(BASES[name](), tmp_path)
    assert apart(outputs(model, inputs(name)), theirs) <= 1e-5
    assert injection_of(model).method == HiRA(rank=3, dropout=0.25)
    merge(model)
    assert apart(outputs(model, inputs(name)), theirs) <= 1e-5


OTHERS = {
    "rank-stabilised": {"use_rslora": True},
    "ranks": {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5, "v_proj": 2}},
    "alphas": {"alpha_pattern": {"v_proj": 11, r"^model\.layers\.11\..*": 2}},
    "all of it": {"use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 1}},
    "an expression": {"target_modules": r".*\.1\.self_attn\.(q|o)_proj"},
    "layer numbers": {"layers_to_transform": [1, 11]},
    "excluded": {"exclude_modules": ["layers.3.self_attn.q_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "another start": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_settings_of_lora(tmp_path, options):
    trained("llama", lora(**options), tmp_path, blocks=12)
    theirs = read_by_peft("llama", tmp_path, blocks=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = load_peft(llama(blocks=12), tmp_path)
    # Outputs of twelve blocks of large random weights are large themselves.
    assert apart(outputs(model, inputs("llama")), theirs) <= 1e-5 * max(1.0, float(theirs.abs().max()))
    kept = {key for key in load_file(tmp_path / "adapter_model.safetensors") if key.endswith("lora_A.weight")}
    assert len(injection_of(model).layers) == len(kept)


def test_ranks_of_hira(tmp_path):
    """peft does not heed the pattern here; other writers may, so a layer's rank is that of its tensors."""
    trained("llama", hira(rank_pattern={"v_proj": 5}), tmp_path)
    theirs = read_by_peft("llama", tmp_path)
    assert apart(outputs(load_peft(llama(), tmp_path), inputs("llama")), theirs) <= 1e-5

    def widen(tensors):
        for name in [name for name in tensors if "v_proj" in name]:
            more = (0, 0, 0, 2) if name.endswith("hira_A") else (0, 2)
            tensors[name] = torch.nn.functional.pad(tensors[name], more)

    retensor(tmp_path, widen)
    with pytest.warns(UserWarning, match="filled up with zeros"):
        model = load_peft(llama(), tmp_path)
    assert injection_of(model).method == HiRA(rank=5)
    assert apart(outputs(model, inputs("llama")), theirs) <= 1e-5


def test_even_folders_warn_of_nothing(tmp_path):
    trained("llama", lora(use_rslora=True), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_peft(llama(), tmp_path)
    assert injection_of(model).method.scale == pytest.approx(5 / 3**0.5)


def test_filled_rows_stay_zero_in_training(tmp_path):
    trained("llama", lora(rank_pattern={"v_proj": 2}), tmp_path)
    with pytest.warns(UserWarning, match="filled up"):
        model = load_peft(llama(), tmp_path)
    adapter = model.model.layers[0].self_attn.v_proj.adapters["all"]
    loss = model(inputs("llama"), labels=inputs("llama")).loss
    loss.backward()
    assert not adapter.A.grad[2].any()
    assert not adapter.B.grad[:, 2].any()
    assert adapter.A.grad[:2].any()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("kind", [LoRA(rank=3, alpha=7.0, dropout=0.1), PERA(rank=2)], ids=str)
def test_there_and_back(tmp_path, name, kind):
    """Our export loads into a plain base, and its export again has the same tensors."""
    model = adapted(name, kind, LAYERS[name])
    export_peft(model, tmp_path / "a", base_name="base")
    again = load_peft(BASES[name](), tmp_path / "a")
    assert apart(outputs(again, inputs(name)), outputs(model, inputs(name))) <= 1e-5
    export_peft(again, tmp_path / "b", base_name="base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    if isinstance(kind, LoRA):
        assert injection_of(again).method == kind


def test_peft_and_back(tmp_path):
    trained("bert", lora("bert"), tmp_path / "a")
    theirs = read_by_peft("bert", tmp_path / "a")
    export_peft(load_peft(bert(), tmp_path / "a"), tmp_path / "b", base_name="base")
    assert apart(outputs(in_peft(bert(), tmp_path / "b"), inputs("bert")), theirs) <= 1e-5
    first, second = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_it_is_an_adapter_like_any_other(tmp_path):
    """Saved in our own folder it loads again: the targets that were made up name the same layers."""
    trained("gpt2", lora("gpt2", target_modules=["h.1.attn.c_attn"]), tmp_path / "a", blocks=12)
    theirs = read_by_peft("gpt2", tmp_path / "a", blocks=12)
    model = load_peft(gpt2(blocks=12), tmp_path / "a")
    save_adapter(model, tmp_path / "b")
    assert apart(outputs(load_adapter(gpt2(blocks=12), tmp_path / "b"), inputs("gpt2")), theirs) <= 1e-5


def test_peft_is_not_needed(tmp_path):
    get_peft_model(nn.Sequential(nn.Linear(6, 6)), LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['peft'] = sys.modules['transformers'] = None\nimport torch, pera_lightning\n"
        f"pera_lightning.load_peft(torch.nn.Sequential(torch.nn.Linear(6, 6)), {str(tmp_path)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_half_precision_folder(tmp_path):
    """A and B are float32 here whatever they were saved in."""
    trained("llama", lora(), tmp_path)
    retensor(tmp_path, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    model = load_peft(llama(), tmp_path)
    adapter = model.model.layers[0].self_attn.q_proj.adapters["all"]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(adapter.A, saved["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].float())


# --- what peft saves of the base ---


def test_a_head_among_the_targets(tmp_path):
    """peft saves the frozen lm_head beside the adapter; a bfloat16 copy of it is the same one."""
    trained("llama", lora(target_modules=["q_proj", "lm_head"]), tmp_path)
    assert any(name.endswith("lm_head.base_layer.weight") for name in load_file(tmp_path / "adapter_model.safetensors"))
    theirs = read_by_peft("llama", tmp_path)
    assert apart(outputs(load_peft(llama(), tmp_path), inputs("llama")), theirs) <= 1e-5
    load_peft(llama().bfloat16(), tmp_path)
    retensor(tmp_path, lambda t: t["base_model.model.lm_head.base_layer.weight"][3].add_(1))
    refused(
        llama(), tmp_path, r"also holds the frozen lm_head\.weight of its base, which is not this model's \(other val"
    )


def test_embeddings_that_are_saved_with_it(tmp_path):
    """As where the vocabulary was resized."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(llama(), lora())
        model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "adapter_model.safetensors")
    load_peft(llama(), tmp_path)
    refused(llama(vocab_size=70), tmp_path, r"frozen .*weight of its base.*\(\d+, 16\) there, \(70, 16\) here")
