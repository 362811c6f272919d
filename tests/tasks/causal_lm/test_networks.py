"""What is taken for a causal language model, and what is refused in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import Embedding
from transformers import BertConfig, BertLMHeadModel, BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

from pera_lightning import AdapterInjection
from pera_lightning.adapters import PERA
from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.causal_lm.commonsense import CommonsenseDataModule
from pera_lightning.tasks.causal_lm.networks import check_causal, check_packing, load_network
from pera_lightning.training.transformers_models import check_extremes
from tests.tasks.causal_lm.language_helpers import (
    CONTEXT,
    examples,
    fit,
    make_trainer,
    module,
    padded,
    randomise,
    save_tiny,
    write_sets,
)

DTYPES = [torch.float32, torch.bfloat16]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 140}


def load(folder, dtype=torch.float32):
    return load_network(str(folder), dtype=dtype, attn_implementation=None, revision=None)


def one_line(error):
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    return str(error.value)


def bert(**options):
    return BertLMHeadModel(BertConfig(**SMALL, num_attention_heads=4, intermediate_size=32, **options)).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mamba"])
def test_causal_models_pass(kind, dtype, tmp_path):
    network = load(save_tiny(tmp_path / kind, kind), dtype)
    network.train()
    network.get_input_embeddings().eval()
    before = [m.training for m in network.modules()]
    check_causal(network)
    assert [m.training for m in network.modules()] == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_encoder_is_refused_and_as_a_decoder_it_passes(dtype):
    with pytest.raises(ConfigurationError, match="BertLMHeadModel is not a causal language model") as error:
        check_causal(bert().to(dtype))
    one_line(error)
    check_causal(bert(is_decoder=True).to(dtype))


def test_an_encoder_is_refused_before_it_is_trained(tmp_path):
    folder = save_tiny(tmp_path / "bert")
    bert().save_pretrained(folder)
    with pytest.raises(ConfigurationError, match="not a causal language model"):
        fit(tmp_path, module(folder), [padded(examples([(6, 3)]))], targets=["query", "value"])


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_encoder_is_refused_before_it_is_measured(command, tmp_path):
    folder = save_tiny(tmp_path / "bert")
    bert().save_pretrained(folder)
    sets = write_sets(tmp_path / "sets", {"boolq": 2})
    data = CommonsenseDataModule(
        str(sets), train="ARC-Easy", test=["boolq"], validation_size=2, cache_dir=str(tmp_path / "cache")
    )
    trainer = make_trainer(tmp_path, targets=["query", "value"])
    with pytest.raises(ConfigurationError, match="not a causal language model"):
        getattr(trainer, command)(module(folder), datamodule=data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_models_whose_packed_examples_see_each_other(dtype, tmp_path):
    opt = OPTForCausalLM(OPTConfig(**SMALL, num_attention_heads=4, ffn_dim=32, max_position_embeddings=64))
    bloom = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=4, vocab_size=140))
    for network in (opt, bloom, load(save_tiny(tmp_path / "mamba", "mamba"))):
        with pytest.raises(ConfigurationError, match="use batching=grouped"):
            check_packing(network.to(dtype))
    for kind in ("llama", "gemma2", "gpt2"):
        check_packing(load(save_tiny(tmp_path / kind, kind), dtype))


def test_a_base_that_lacks_weights_is_refused(llama, tmp_path):
    folder = save_tiny(tmp_path / "part")
    file = tmp_path / "part" / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("down_proj.weight"))
    save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="no weights for 1 of its tensors") as error:
        load(folder)
    assert name in one_line(error)
    load(llama)


def test_tied_weights_do_not_count_as_lacking(tmp_path):
    load(save_tiny(tmp_path / "tied", tie_word_embeddings=True))


def test_damaged_weights_are_named(tmp_path):
    folder = save_tiny(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ConfigurationError, match="a file of its weights is damaged") as error:
        load(folder)
    one_line(error)


def test_other_kinds_of_models_are_refused_shortly(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ConfigurationError, match="T5Config") as error:
        load(tmp_path)
    one_line(error)


def test_a_folder_without_tokenizer(llama, tmp_path):
    folder = save_tiny(tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigurationError, match="has no tokenizer") as error:
        _ = module(folder).tokenizer
    one_line(error)


def test_examples_that_do_not_fit_the_model(tmp_path):
    network = load(save_tiny(tmp_path / "gpt2", "gpt2"))
    vocabulary = network.get_input_embeddings().num_embeddings
    check_extremes(network, CONTEXT, vocabulary - 1)
    with pytest.raises(ConfigurationError, match=f"up to {CONTEXT + 1} tokens, and the model's context is {CONTEXT}"):
        check_extremes(network, CONTEXT + 1, 0)
    with pytest.raises(ConfigurationError, match=f"token id {vocabulary}, and the model has embeddings for ids up to"):
        check_extremes(network, 1, vocabulary)


def test_a_fit_holds_its_examples_to_the_model(tmp_path):
    sets = write_sets(tmp_path / "sets", {"boolq": 2})
    folder = save_tiny(tmp_path / "llama")
    data = CommonsenseDataModule(
        str(sets), train="ARC-Easy", test=["boolq"], validation_size=2, cache_dir=str(tmp_path / "cache")
    )
    network = module(folder)
    build = network.build_network

    def smaller(weights=True):
        model = build(weights)
        model.set_input_embeddings(Embedding(20, 16))
        return model

    network.build_network = smaller
    with pytest.raises(ConfigurationError, match="give the tokenizer of this model"):
        fit(tmp_path, network, data, targets=["v_proj"])


@pytest.mark.parametrize("world", [1, 2])
def test_validation_counts_every_example_once(llama, tmp_path, world):
    """Nine examples on two processes: a sampler that fills up would count one of them twice."""
    sets = write_sets(tmp_path / "sets", {"boolq": 2}, train=13)
    options = {"validation_size": 9, "batch_size": 4, "eval_batch_size": 2, "cache_dir": str(tmp_path / "cache")}

    def data():
        return CommonsenseDataModule(str(sets), train="ARC-Easy", test=["boolq"], **options)

    network = module(llama)
    network.adapter_injection = AdapterInjection(PERA(rank=2), ["q_proj", "v_proj"]).injector()
    network.configure_model()
    randomise(network)
    more = {"devices": 2, "strategy": "ddp_fork"} if world == 2 else {}
    trainer = make_trainer(tmp_path, **more)
    found = trainer.validate(network, datamodule=data(), verbose=False)[0]
    # By hand: every row alone.
    alone = data()
    alone.tokenizer_name = str(llama)
    alone.setup("fit")
    losses, count = 0.0, 0
    for row in alone.dataset("validation"):
        batch = padded([row])
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = network.model(**batch).logits
        wanted = labels[0, 1:] != -100
        losses -= logits[0, :-1].log_softmax(-1).gather(-1, labels[0, 1:, None].clamp(min=0))[wanted].sum().item()
        count += int(wanted.sum())
    assert found["val/loss"] == pytest.approx(losses / count, rel=1e-5)
