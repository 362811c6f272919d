"""The causal-LM module's network: logits where there is a label, packing, precision, ties, metrics, checkpoints."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from transformers import LlamaForCausalLM

from pera_lightning import AdapterInjection
from pera_lightning.adapters import PERA, AuroRA, LoRA
from pera_lightning.data.batching import collate_packed
from pera_lightning.errors import CheckpointError, ConfigurationError
from pera_lightning.injection.inject import injection_of
from pera_lightning.tasks.causal_lm.module import CausalLMModule
from pera_lightning.tasks.causal_lm.networks import check_packing
from tests.tasks.causal_lm.language_helpers import (
    QV,
    examples,
    fit,
    gradients,
    loader,
    module,
    padded,
    randomise,
    save_tiny,
    trained,
)

ROWS = examples([(9, 6), (40, 9), (12, 11), (15, 5), (8, 2)])


def built(folder, method=None, targets=QV, trainable=(), **options):
    """A module with random adapters in training mode."""
    network = module(folder, **options)
    network.adapter_injection = AdapterInjection(method or PERA(rank=2), list(targets), list(trainable)).injector()
    network.configure_model()
    randomise(network)
    return network.train()


@torch.no_grad()
def plain(network, rows):
    """Summed loss, labels, and labels that are the likeliest token; an example at a time, all logits."""
    total, count, right = 0.0, 0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logs = network.model(input_ids=ids).logits[0].double().log_softmax(-1)
        for k in range(max(row["start"], 1), ids.shape[1]):
            total -= logs[k - 1, ids[0, k]].item()
            right += int(logs[k - 1].argmax() == ids[0, k])
            count += 1
    return total, count, right


# ---- logits where there is a label ----------------------------------------------------------------------------------


class Without(LlamaForCausalLM):
    """A Llama whose forward does not know logits_to_keep."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        return super().forward(input_ids, attention_mask, position_ids=position_ids, use_cache=use_cache)


@pytest.mark.parametrize("kind", ["llama", "tied", "gemma2", "gpt2", "without", "mamba"])
def test_the_loss_is_that_of_all_logits(tmp_path, kind):
    """Padded on the left, with masked prompts; Gemma 2 caps its logits, which a head called from outside would not."""
    source = {"tied": "llama", "without": "llama"}.get(kind, kind)
    folder = save_tiny(tmp_path, source, tie_word_embeddings=kind == "tied")
    targets = {"gpt2": ["c_attn[q,v]"], "mamba": ["in_proj"]}.get(kind, QV)
    network = built(folder, targets=targets)
    if kind == "without":
        network.model.__class__ = Without
    summed, logits, labels = network._shared_step(padded(ROWS))
    total, count, right = plain(network, ROWS)
    assert summed.item() == pytest.approx(total, rel=1e-5)
    labelled = labels != -100
    assert int(labelled.sum()) == count
    assert int((logits.argmax(-1) == labels)[labelled].sum()) == right
    summed.backward()
    assert all(g.isfinite().all() for g in gradients(network).values())
    if kind == "gemma2":
        assert logits.abs().max() <= 0.5


def test_the_head_sees_positions_with_labels_only(llama):
    network = built(llama)
    rows = []
    network.model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape))
    network._shared_step(padded(ROWS[1:2]))
    network._shared_step(padded(ROWS[:3]))
    assert rows == [(1, 31, 16), (3, 31, 16)]  # of 40 positions; the labels of the others lie within those of the long


def test_without_positions_all_logits_come(llama):
    network, batch = built(llama), padded(ROWS)
    positions = torch.tensor([3, 38, 20])
    torch.testing.assert_close(network(batch, positions), network(batch)[:, positions])


# ---- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_have_the_loss_and_gradient_of_single_ones(llama, attention):
    network = built(llama, attn_implementation=attention)
    packed, *_ = network._shared_step(collate_packed(ROWS))
    packed.backward()
    together = gradients(network)
    network.zero_grad()
    single = sum(network._shared_step(padded([row]))[0] for row in ROWS)
    single.backward()
    assert packed.item() == pytest.approx(single.item(), rel=1e-5)
    for name, gradient in gradients(network).items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=1e-5)
    check_packing(network.model)


class Blind(LlamaForCausalLM):
    """A Llama that does not hand on the positions."""

    def forward(self, position_ids=None, **inputs):
        return super().forward(**inputs)


def test_models_that_cannot_keep_examples_apart_are_refused(llama, tmp_path):
    network = built(llama)
    network.model.__class__ = Blind
    with pytest.raises(ConfigurationError, match="Blind with attention 'sdpa' lets packed examples see each other"):
        check_packing(network.model)
    assert network.model.training
    mamba = built(save_tiny(tmp_path, "mamba"), targets=["in_proj"])
    with pytest.raises(ConfigurationError, match=r"MambaForCausalLM .*use batching=grouped"):
        check_packing(mamba.model)


# ---- activation checkpointing and compilation -----------------------------------------------------------------------


def step_gradients(network, calls=None):
    """Gradients of one backward, and how often the first block's projection ran forward."""
    ran = []
    network.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    network._shared_step(padded(ROWS))[0].backward()
    return gradients(network), len(ran)


def test_activations_are_computed_again(llama):
    plain_gradients, once = step_gradients(built(llama))
    checkpointed, twice = step_gradients(built(llama, activation_checkpointing=True))
    assert (once, twice) == (1, 2)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-7)


def test_activation_checkpointing_works_in_a_fit(llama, tmp_path):
    """from_pretrained leaves networks in eval mode, where transformers does not checkpoint."""
    runs = []

    class Count(Callback):
        def on_train_start(self, trainer, pl_module):
            mlp = pl_module.model.model.layers[0].mlp
            mlp.register_forward_pre_hook(lambda module, _: runs.append(module.training))

    one, other = module(llama), module(llama, activation_checkpointing=True)
    fit(tmp_path, one, [padded(ROWS)])
    fit(tmp_path, other, [padded(ROWS)], callbacks=[Count()], val=[padded(ROWS)])
    assert runs == [True, True, False]
    assert not any("eval mode" in note for note in injection_of(other.model).report.notes)
    for name, value in trained(one).items():
        torch.testing.assert_close(trained(other)[name], value, rtol=1e-5, atol=1e-6)


def test_a_network_that_cannot_checkpoint_says_so(llama, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigurationError, match="LlamaForCausalLM cannot checkpoint activations; leave it out"):
        built(llama, activation_checkpointing=True)


def test_compiled_gradients_are_the_same(llama, monkeypatch):
    compiled = []
    original = torch.nn.Module.compile

    def with_quick_backend(self, *args, **options):
        compiled.append(type(self).__name__)
        original(self, *args, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", with_quick_backend)
    plain_gradients, _ = step_gradients(built(llama))
    network = built(llama, compile=True)
    network._shared_step(padded(ROWS))[0].backward()
    assert compiled == ["LlamaForCausalLM"]
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients(network)[name], gradient, rtol=1e-4, atol=1e-6)


# ---- precision and ties ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_base_in_bfloat16(llama, tmp_path, precision):
    network = module(llama, base_dtype="bfloat16")
    fit(tmp_path, network, [padded(ROWS)] * 2, val=[padded(ROWS)], precision=precision)
    frozen = {p.dtype for p in network.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert {p.dtype for p in trained(network).values()} == {torch.float32}
    rotary = network.model.model.rotary_emb.inv_freq
    exact = built(llama).model.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    assert torch.equal(rotary, exact)


def test_a_tied_head_over_bfloat16_is_refused(tmp_path):
    folder = save_tiny(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ConfigurationError, match=r"the head shares its weight with the embeddings.*base_dtype=float32"):
        built(folder, trainable=["lm_head"], base_dtype="bfloat16")
    built(folder, base_dtype="bfloat16")  # not trained, it may be


def test_an_untied_head_over_bfloat16_is_trained_in_float32(llama, tmp_path):
    network = module(llama, base_dtype="bfloat16")
    fit(tmp_path, network, [padded(ROWS)] * 2, trainable=["lm_head"])
    assert network.model.lm_head.weight.dtype == torch.float32
    assert network.model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_a_tied_head_is_trained_tied_and_resumes(tmp_path):
    folder = save_tiny(tmp_path / "base", tie_word_embeddings=True)
    options = {"trainable": ["lm_head"], "max_epochs": 2, "enable_checkpointing": True}
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    batches, whole = [padded(ROWS[:3]), padded(ROWS[3:])], module(folder)
    fit(tmp_path, whole, batches, callbacks=[keep], **options)
    resumed = module(folder)
    fit(tmp_path, resumed, batches, ckpt=str(tmp_path / "epoch=0.ckpt"), seed=9, **options)
    reloaded = CausalLMModule.load_from_checkpoint(tmp_path / "epoch=1.ckpt")
    before = LlamaForCausalLM.from_pretrained(folder).lm_head.weight
    for network in (whole, resumed, reloaded):
        head = network.model.lm_head.weight
        assert head is network.model.model.embed_tokens.weight
        assert torch.equal(head, whole.model.lm_head.weight)
        assert (head - before).abs().max() > 1e-3


# ---- validation -----------------------------------------------------------------------------------------------------


def test_validation_metrics_are_of_the_whole_set(llama, tmp_path):
    """Batches of 3 + 31, 1 and 10 + 6 labels: means over batches or examples would be wrong."""
    network = module(llama)
    batches = [padded(ROWS[:2]), padded(ROWS[2:3]), padded(ROWS[3:])]
    trainer = fit(tmp_path, network, [padded(ROWS)], val=batches, num_sanity_val_steps=2)
    for _ in range(2):  # nothing is left of the first time, nor of the sanity check
        network.eval()
        total, count, right = plain(network, ROWS)
        expected = {"val/loss": total / count, "val/token_accuracy": right / count}
        expected["val/perplexity"] = torch.tensor(total / count).exp().item()
        logged = {name: trainer.callback_metrics[name].item() for name in expected}
        assert logged == pytest.approx(expected, rel=1e-5)
        randomise(network, seed=8)
        trainer.validate(network, loader(batches), verbose=False)


def test_a_fast_dev_run(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(tmp_path, module(llama), [padded(ROWS)] * 3, val=[padded(ROWS)], fast_dev_run=True)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[PERA(rank=2), AuroRA(rank=2)], ids=str)
def checkpoint(request, llama, tmp_path_factory):
    folder, network = tmp_path_factory.mktemp("checkpoint"), module(llama)
    keep = ModelCheckpoint(folder, filename="end", enable_version_counter=False)
    options = {"method": request.param, "callbacks": [keep], "enable_checkpointing": True}
    fit(folder, network, [padded(ROWS)] * 2, **options)
    return network, folder / "end.ckpt"


def test_a_checkpoint_holds_no_base_and_rebuilds(checkpoint):
    network, path = checkpoint
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(".adapters." in name for name in state)
    again = CausalLMModule.load_from_checkpoint(path).eval()
    batch = padded(ROWS)
    with torch.no_grad():
        torch.testing.assert_close(again(batch), network.eval()(batch), rtol=0, atol=0)
    assert again.hparams == network.hparams


def test_a_checkpoint_of_another_base_is_refused(checkpoint, tmp_path):
    _, path = checkpoint
    other = save_tiny(tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="base"):
        CausalLMModule.load_from_checkpoint(path, model_name=other)


def test_another_method_is_refused(checkpoint, llama, tmp_path):
    _, path = checkpoint
    with pytest.raises(CheckpointError, match="LoRA"):
        fit(tmp_path, module(llama), [padded(ROWS)], method=LoRA(rank=2), ckpt=str(path))


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr": 0.0}, "lr=0.0: a number above 0 is needed"),
        ({"base_dtype": "int8"}, "base_dtype='int8' does not exist; one of float32, bfloat16, float16"),
        ({"warmup_steps": 2, "warmup_ratio": 0.1}, "give one of them"),
    ],
)
def test_wrong_values_are_refused_at_once(options, expected):
    with pytest.raises(ValueError, match=expected):
        module("anything", **options)


def test_dry_run_needs_no_weights(llama):
    network = module(llama)
    report = network.dry_run(AdapterInjection(PERA(rank=2), QV).injector())
    assert report.adapter_parameters == 2 * (2 * (16 + 16) + 3 + 2 * (16 + 8) + 3)
