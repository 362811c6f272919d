"""The PEFT folder, read by peft itself: the same outputs, exactly our layers, and nothing that trained left behind."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from pera_lightning import export_peft, inject, merge, unmerge
from pera_lightning.adapters import (
    PERA,
    AuroRA,
    FullFineTuning,
    HiLoRA,
    HiRA,
    LinearProbe,
    LoRA,
    MoSLoRA,
    registered_methods,
)
from pera_lightning.errors import ConfigurationError, NotMergeableError
from pera_lightning.merging.merge import adapted_layers
from tests.export.peft_models import (
    BASES,
    HEADS,
    adapted,
    apart,
    bert,
    gpt2,
    in_peft,
    inputs,
    llama,
    outputs,
    stir,
    vit,
)

EXACT = [
    LoRA(rank=2, alpha=5.0, dropout=0.1),
    *(LoRA(rank=2, init=init) for init in ("gaussian", "pissa", "milora")),
    *(PERA(rank=2, alpha=3.0, terms=terms) for terms in ("full", "square", "cross", "linear")),
    PERA(rank=3, init="gaussian_b"),
    MoSLoRA(rank=3),
    AuroRA(rank=2, train_mode="static", inference_mode="static"),
]


def config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


# Every method on one base, and every base with a method whose factors grow.
PAIRS = [*(("gpt2", method) for method in EXACT), *((name, EXACT[4]) for name in BASES if name != "gpt2")]


@pytest.mark.parametrize(("name", "method"), PAIRS, ids=[f"{method}-{name}" for name, method in PAIRS])
def test_peft_gives_the_same_outputs(tmp_path, name, method):
    model, x = adapted(name, method), inputs(name)
    report = export_peft(model, tmp_path / "out", base_name="some/base")
    theirs = in_peft(BASES[name](), tmp_path / "out")
    assert apart(outputs(theirs, x), outputs(model, x)) <= 1e-5
    assert apart(outputs(BASES[name](), x), outputs(model, x)) > 1e-2  # the adapters do something
    assert report.errors == {}
    blocks = 1 if name in ("llama", "bert") else 2
    assert max(report.ranks.values()) == blocks * method.export_rank
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("name", BASES)
def test_peft_merges_it(tmp_path, name):
    model, x = adapted(name, PERA(rank=2)), inputs(name)
    export_peft(model, tmp_path / "out", base_name="base")
    theirs = in_peft(BASES[name](), tmp_path / "out").double().merge_and_unload()
    assert apart(outputs(theirs, x), outputs(model, x)) <= 1e-5


def test_the_config_and_the_names_are_those_that_peft_writes(tmp_path):
    """Saved again by peft, the folder is the same, but for what peft leaves open."""
    model = adapted("bert", LoRA(rank=2, alpha=5.0, dropout=0.1))
    export_peft(model, tmp_path / "ours", base_name="some/base")
    in_peft(bert(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    written = config(tmp_path / "ours")
    assert written["task_type"] == "SEQ_CLS"
    assert written["base_model_name_or_path"] == "some/base"
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (2, 5, 0.1)
    assert written["inference_mode"]
    assert written["target_modules"] == ["query"]
    assert written["modules_to_save"] == ["classifier"]


@pytest.mark.parametrize(
    ("name", "task", "fan"), [("llama", "CAUSAL_LM", False), ("gpt2", "CAUSAL_LM", True), ("vit", None, False)]
)
def test_task_and_layout(tmp_path, name, task, fan):
    export_peft(adapted(name, LoRA(rank=2)), tmp_path / "out", base_name="base")
    assert (config(tmp_path / "out")["task_type"], config(tmp_path / "out")["fan_in_fan_out"]) == (task, fan)


def test_a_frozen_head_is_not_asked_for(tmp_path):
    """peft adds a classifier to the heads of every SEQ_CLS model and fails where the folder has none."""
    model, x = adapted("bert", LoRA(rank=2), heads=[]), inputs("bert")
    export_peft(model, tmp_path / "out", base_name="base")
    assert config(tmp_path / "out")["task_type"] is None
    assert apart(outputs(in_peft(bert(), tmp_path / "out"), x), outputs(model, x)) <= 1e-5


def test_a_name_that_peft_takes_for_a_head_too(tmp_path):
    """DistilBERT's pre_classifier ends with "classifier"."""
    shape = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_heads": 4, "n_layers": 2, "num_labels": 3}

    def base():
        torch.manual_seed(0)
        return DistilBertForSequenceClassification(DistilBertConfig(**shape, initializer_range=0.3)).eval()

    model = base()
    inject(model, LoRA(rank=2), ["q_lin"], ["classifier"])
    stir(model)
    report = export_peft(model, tmp_path / "out", base_name="base")
    assert report.heads == ("pre_classifier", "classifier")
    assert any("pre_classifier" in note for note in report.notes)
    assert apart(outputs(in_peft(base(), tmp_path / "out"), inputs("bert")), outputs(model, inputs("bert"))) <= 1e-5


def test_layers_of_a_number_that_begins_another(tmp_path):
    """Of twelve blocks, those of number 1 and 10 only: 11 must stay plain."""
    model = adapted("llama", PERA(rank=2), ["layers.1.self_attn.q_proj", "layers.10.self_attn.q_proj"], blocks=12)
    export_peft(model, tmp_path / "out", base_name="base")
    theirs, x = in_peft(llama(blocks=12), tmp_path / "out"), inputs("llama")
    hit = sorted(n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A"))
    assert hit == [f"model.layers.{k}.self_attn.q_proj" for k in (1, 10)]
    assert apart(outputs(theirs, x), outputs(model, x)) <= 1e-5


def test_ranks_that_differ(tmp_path):
    """q and v rows in one block, q rows in another of twelve: patterns must tell block 1 from block 11."""
    targets = ["h.1.attn.c_attn[q,v]", "h.11.attn.c_attn[q]", "h.3.mlp.c_fc"]
    model, x = adapted("gpt2", PERA(rank=2, alpha=3.0), targets, blocks=12), inputs("gpt2")
    export_peft(model, tmp_path / "out", base_name="base")
    assert config(tmp_path / "out")["rank_pattern"] == {"^transformer\\.h\\.1\\.attn\\.c_attn": 10}
    assert config(tmp_path / "out")["alpha_pattern"] == {"^transformer\\.h\\.1\\.attn\\.c_attn": 15}
    theirs = in_peft(gpt2(blocks=12), tmp_path / "out")
    assert apart(outputs(theirs, x), outputs(model, x)) <= 1e-5


class Nested(nn.Module):
    """`proj` at the top and within `inner`: no end of a path names the first alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 6)})

    def forward(self, x):
        return self.inner["proj"](self.proj(x).tanh())


def test_a_path_that_ends_another(tmp_path):
    model, x = Nested(), torch.randn(4, 6)
    inject(model, LoRA(rank=2), ["re:proj"])
    stir(model)
    export_peft(model, tmp_path / "out", base_name="base")
    theirs = in_peft(Nested(), tmp_path / "out")
    assert not hasattr(theirs.base_model.model.inner.proj, "lora_A")
    assert apart(outputs(theirs, x), outputs(model, x)) <= 1e-5


# --- AuroRA, whose dynamic layers no matrix equals ---


def test_dynamic_aurora_needs_a_method(tmp_path):
    model = adapted("gpt2", AuroRA(rank=2))
    with pytest.raises(NotMergeableError, match=r"'calibrated'.*'static'"):
        export_peft(model, tmp_path / "out", base_name="base")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("mode", ["static", "calibrated"])
def test_linear_maps_of_aurora(tmp_path, name, mode):
    """peft has what `merge` makes by the same mode: with constants where the base has biases, without in Llama."""
    model, x = adapted(name, AuroRA(rank=2)), inputs(name)
    dynamic = outputs(model, x)
    batches = [inputs(name, rows=20)]
    report = export_peft(model, tmp_path / "out", base_name="base", mode=mode, batches=batches)
    theirs = in_peft(BASES[name](), tmp_path / "out")
    assert torch.equal(outputs(model, x), dynamic)  # the model is as it was
    given = outputs(theirs, x)
    merged = merge(model, mode=mode, batches=batches)
    assert apart(given, outputs(model, x)) <= 1e-5
    assert report.merge_error.outputs == pytest.approx(merged.merge_error.outputs, rel=1e-3)
    assert config(tmp_path / "out")["lora_bias"] == (mode == "calibrated" and name != "llama")
    if mode == "calibrated" and name != "llama":
        assert apart(outputs(theirs.merge_and_unload(), x), given) <= 1e-5
    unmerge(model)


def test_constants_beside_a_layer_without_bias(tmp_path):
    """peft predicts with it, and cannot merge it: the report says so."""

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=False)).eval()

    model, x = base(), torch.randn(30, 6)
    inject(model, AuroRA(rank=2), ["0", "2"])
    stir(model)
    report = export_peft(model, tmp_path / "out", base_name="base", mode="calibrated", batches=[x])
    assert any("refuses to merge" in note and "(2)" in note for note in report.notes)
    merge(model, mode="calibrated", batches=[x])
    with pytest.warns(UserWarning, match="has no bias"):
        theirs = in_peft(base(), tmp_path / "out")
    assert apart(outputs(theirs, x), outputs(model, x)) <= 1e-5


def test_the_error_that_was_not_measured_is_said(tmp_path):
    report = export_peft(adapted("llama", AuroRA(rank=2)), tmp_path / "out", base_name="base", mode="static")
    assert report.merge_error is None
    assert "not measured" in str(report)


def test_batches_without_a_method(tmp_path):
    with pytest.raises(ConfigurationError, match="leave them out"):
        export_peft(adapted("llama", LoRA(rank=2)), tmp_path / "o", base_name="b", batches=[inputs("llama")])


# --- cut to a rank ---


@pytest.mark.parametrize("method", [HiRA(rank=3), HiLoRA(hira_rank=2, lora_rank=2), PERA(rank=3)], ids=str)
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_cut_by_svd(tmp_path, name, method):
    """The error that is reported is the true one: of what peft adds to the base, against our own update."""
    model = adapted(name, method)
    report = export_peft(model, tmp_path / "out", base_name="base", rank=4, max_error=1.0)
    theirs = in_peft(BASES[name](), tmp_path / "out")
    for path, layer in adapted_layers(model):
        full = torch.zeros(layer.base_weight().shape)
        for block, adapter in layer.adapters.items():
            rows = layer.slices[block]
            full[rows] = adapter.delta_weight(layer.base_weight()[rows])
        cut = theirs.base_model.model.get_submodule(path).get_delta_weight("default")
        true = float((cut - full).norm() / full.norm())
        assert report.errors[path] == pytest.approx(true, rel=1e-3)
        best = torch.linalg.svdvals(full)
        assert true == pytest.approx(float(best[4:].norm() / best.norm()), rel=1e-3)
    worst = max(report.errors.values())
    assert f"at worst {worst:.3g}" in str(report)


def test_a_large_error_is_refused(tmp_path):
    model = adapted("llama", HiRA(rank=3))
    with pytest.raises(NotMergeableError, match=r"rank 2, 4 of 4 layers.*max_error=0.1.*layers\.\d\.self_attn"):
        export_peft(model, tmp_path / "out", base_name="base", rank=2)
    assert list(tmp_path.iterdir()) == []


def test_no_rank_no_cut(tmp_path):
    with pytest.raises(NotMergeableError, match=r"q_proj: .*give a rank"):
        export_peft(adapted("llama", HiRA(rank=3)), tmp_path / "out", base_name="base")


@pytest.mark.parametrize("rank", [5, 6])
def test_a_rank_that_is_large_enough_changes_nothing(tmp_path, rank):
    model = adapted("llama", PERA(rank=2))
    report = export_peft(model, tmp_path / "out", base_name="base", rank=rank)
    assert set(report.ranks.values()) == {5}
    assert report.errors == {}


def test_hira_of_full_rank_is_whole(tmp_path):
    model, x = adapted("llama", HiRA(rank=3)), inputs("llama")
    report = export_peft(model, tmp_path / "out", base_name="base", rank=16)
    assert max(report.errors.values()) < 1e-6
    assert apart(outputs(in_peft(llama(), tmp_path / "out"), x), outputs(model, x)) <= 1e-5


# --- refusals ---


def test_merged_adapters(tmp_path):
    model = adapted("llama", LoRA(rank=2))
    merge(model)
    with pytest.raises(ConfigurationError, match="call unmerge"):
        export_peft(model, tmp_path / "out", base_name="base")


@pytest.mark.parametrize("method", [LinearProbe(), FullFineTuning()], ids=str)
def test_methods_without_layers(tmp_path, method):
    model = bert()
    inject(model, method, [], HEADS["bert"])
    with pytest.raises(ConfigurationError, match=f"{type(method).__name__} adapts no layers.*merged"):
        export_peft(model, tmp_path / "out", base_name="base")


def test_a_plain_model(tmp_path):
    with pytest.raises(ConfigurationError, match="call inject first"):
        export_peft(llama(), tmp_path / "out", base_name="base")


def test_weights_that_other_code_trained(tmp_path):
    model = adapted("llama", LoRA(rank=2))
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"1 weights were trained that a PEFT .* model\.norm\.weight"):
        export_peft(model, tmp_path / "out", base_name="base")


def test_a_trained_head_that_is_tied_to_the_base(tmp_path):
    model = llama(tie_word_embeddings=True)
    inject(model, LoRA(rank=2), ["q_proj"], ["lm_head"])
    with pytest.raises(ConfigurationError, match="embed_tokens"):
        export_peft(model, tmp_path / "out", base_name="base")


def test_an_adapted_layer_that_peft_takes_for_a_head(tmp_path):
    model = nn.Sequential()
    model.add_module("pre_head", nn.Linear(6, 6))
    model.add_module("head", nn.Linear(6, 2))
    inject(model, LoRA(rank=2), ["pre_head"], ["re:head"])
    with pytest.raises(ConfigurationError, match="pre_head"):
        export_peft(model, tmp_path / "out", base_name="base")


def test_a_layer_in_two_places(tmp_path):
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    inject(model, LoRA(rank=2), ["0"])
    with pytest.raises(ConfigurationError, match="several places"):
        export_peft(model, tmp_path / "out", base_name="base")


def test_an_update_with_nan(tmp_path):
    model = adapted("llama", LoRA(rank=2))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.adapters["all"].A[0, 0] = float("nan")
    for rank in (None, 1):
        with pytest.raises(NotMergeableError, match=r"layers\.1\.self_attn\.v_proj.*NaN"):
            export_peft(model, tmp_path / "out", base_name="base", rank=rank)


def test_running_statistics_stay_behind_and_that_is_said(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    inject(model, LoRA(rank=2), ["0"])
    assert "running statistics" in str(export_peft(model, tmp_path / "out", base_name="base"))


def test_a_low_precision_base_is_told_about_its_head(tmp_path):
    model = vit().bfloat16()
    model.head.float()
    inject(model, LoRA(rank=2), ["qkv"], ["head"])
    assert any("load the base in float32" in note for note in export_peft(model, tmp_path / "o", base_name="b").notes)


def test_an_existing_folder_stays(tmp_path):
    model = adapted("llama", LoRA(rank=2))
    (tmp_path / "out").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "out" / name).write_text("old")
    with pytest.raises(ConfigurationError, match="--overwrite"):
        export_peft(model, tmp_path / "out", base_name="base")
    assert (tmp_path / "out" / "adapter_config.json").read_text() == "old"
    export_peft(model, tmp_path / "out", base_name="base", overwrite=True)
    assert config(tmp_path / "out")["r"] == 2


def test_an_existing_folder_is_told_before_the_work(tmp_path):
    def forward(model, batch):
        raise AssertionError("it was called")

    model, batches = adapted("llama", AuroRA(rank=2)), [inputs("llama")]
    with pytest.raises(ConfigurationError, match="exists"):
        export_peft(model, tmp_path, base_name="b", mode="calibrated", batches=batches, forward=forward)


def test_the_same_export_is_the_same_bytes(tmp_path):
    model = adapted("bert", PERA(rank=2), ["query", "key", "value"])
    for name in ("a", "b"):
        export_peft(model, tmp_path / name, base_name="base")
    assert config(tmp_path / "a")["target_modules"] == ["key", "query", "value"]  # sorted: peft keeps them as a set
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_every_method_has_a_test_here():
    """A new method must be exported in a test above, or be refused in one."""
    tried = {type(method).__name__ for method in EXACT} | {"HiRA", "HiLoRA", "LinearProbe", "FullFineTuning"}
    assert tried == set(registered_methods())
