"""PEFT folders, written by peft itself, as our LoRA and HiRA: the same outputs, and nothing dropped in silence."""

import json
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from pera_lightning import export_peft, inject, load_adapter, load_peft, merge, save_adapter
from pera_lightning.adapters import PERA, HiRA, LoRA
from pera_lightning.errors import CheckpointError, ConfigurationError, PeraError
from pera_lightning.injection.inject import injection_of
from tests.export.peft_models import BASES, adapted, apart, bert, gpt2, in_peft, inputs, llama, outputs, vit

LAYERS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query"], "vit": ["qkv"]}
HEADS = {"llama": None, "gpt2": None, "bert": ["classifier"], "vit": ["head"]}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "vit": None}


@torch.no_grad()
def trained(name, config, folder, **base):
    """Saves what peft makes of a base, with values as after a training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(BASES[name](**base), config)
        torch.manual_seed(2)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
        model.save_pretrained(str(folder))


def read_by_peft(name, folder, **base):
    """The outputs of what peft reads, which is the truth: the order of patterns is another one in the file."""
    return outputs(in_peft(BASES[name](**base), folder), inputs(name))


def heads(name):
    return HEADS[name] and [*HEADS[name]]  # peft extends the list


def lora(name="llama", **options):
    usual = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": LAYERS[name],
        "task_type": TASKS[name],
        "modules_to_save": heads(name),
    }
    return LoraConfig(**{**usual, **options})


def hira(name="llama", **options):
    usual = {"r": 3, "target_modules": LAYERS[name], "task_type": TASKS[name], "modules_to_save": heads(name)}
    return peft.HiraConfig(**{**usual, **options})


def rewrite(folder, **values):
    """Changes a folder's config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def retensor(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


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


# --- what is refused, in one line, with the model as it was ---


def refused(model, folder, match, error=CheckpointError):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=match) as caught:
        load_peft(model, folder)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert injection_of(model) is None
    assert all(p.requires_grad for p in model.parameters())


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
