"""What is taken for a sequence classifier, which of its parameters are new, and what is refused in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.sequence_classification.networks import load_network, trained_labels
from pera_lightning.training.transformers_models import check_extremes
from tests.tasks.sequence_classification.classifier_helpers import (
    KINDS,
    LONGEST,
    VOCABULARY,
    built,
    collate,
    module,
    outputs,
    save_tiny,
    sentences,
)


def load(folder, num_labels=2, **options):
    return load_network(str(folder), num_labels=num_labels, **{"dtype": torch.float32, **options})


def one_line(error):
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_encoder_is_adapted(tmp_path, kind):
    """Padding changes nothing, whatever token the tokenizer fills with."""
    folder = save_tiny(tmp_path, kind)
    _, _, targets, head = KINDS[kind]
    network = built(folder, targets=targets, trainable=head, num_labels=3)
    rows = sentences(5)
    expected = outputs(network, rows)
    assert expected.shape == (5, 3)
    assert expected.std(0).min() > 1e-4  # rows differ
    for pad_id in (0, VOCABULARY - 1):
        with torch.no_grad():
            torch.testing.assert_close(network(collate(rows, pad_id)).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_as_saved_and_the_head_new(tmp_path, kind):
    folder = save_tiny(tmp_path, kind)
    saved = load_file(tmp_path / "model.safetensors")
    network, random = load(folder, 3)
    tensors = network.state_dict()
    prefix = f"{network.base_model_prefix}."
    in_base = [name for name in tensors if name.startswith(prefix) and name not in random]
    for name in in_base:
        file_name = name if name in saved else name.removeprefix(prefix)
        assert torch.equal(tensors[name], saved[file_name]), name
    assert len(in_base) > 10
    assert random
    assert all(name.startswith(tuple(KINDS[kind][3])) for name in random), random


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_head_for_another_task_with_as_many_classes_does_not_survive(tmp_path, kind):
    whole = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}[kind] + "ForSequenceClassification"
    folder = save_tiny(tmp_path, kind, saved=whole, num_labels=3, id2label={0: "yes", 1: "no", 2: "maybe"})
    saved = load_file(tmp_path / "model.safetensors")
    network, random = load(folder, 3)
    tensors = network.state_dict()
    heads = {name for name in saved if name.startswith(("classifier", "pre_classifier"))}
    assert random == heads
    for name in heads:
        assert not torch.equal(tensors[name], saved[name]) or "bias" in name, name
        if "bias" in name:
            assert not tensors[name].any()
    assert {n for n in saved if torch.equal(tensors[n], saved[n])} >= set(saved) - heads
    assert set(network.config.id2label.values()) == {"LABEL_0", "LABEL_1", "LABEL_2"}


def test_a_new_head_is_drawn_from_the_seed(tmp_path):
    folder = save_tiny(tmp_path, saved="BertForSequenceClassification")
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(load(folder)[0].classifier.weight.clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(0.3, rel=0.5)  # the configuration's initializer_range


def test_a_pooler_that_no_file_has_must_be_trained(tmp_path):
    folder = save_tiny(tmp_path, saved="BertForMaskedLM")
    with pytest.raises(ConfigurationError, match=r"would stay so.*trainable=\[pooler, classifier\]") as error:
        built(folder)
    one_line(error)
    built(folder, trainable=["pooler", "classifier"])


@pytest.mark.parametrize("kind", ["bert", "distilbert", "debertav2"])
def test_a_head_that_is_not_trained_is_refused(tmp_path, kind):
    folder, (_, _, targets, head) = save_tiny(tmp_path, kind), KINDS[kind]
    for trainable in [(), head[1:]][: len(head)]:
        with pytest.raises(ConfigurationError, match="are new and random and would stay so") as error:
            built(folder, targets=targets, trainable=trainable)
        assert "classifier" in one_line(error)


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind in KINDS for value in (0.0, 0.35)])
def test_head_dropout_is_that_before_the_classifier(tmp_path, kind, value):
    """Four hundred copies of a sentence, with the base in eval mode."""
    folder, (_, _, targets, head) = save_tiny(tmp_path, kind), KINDS[kind]
    if kind == "llama":
        if value:
            with pytest.raises(ConfigurationError, match=r"head_dropout=0\.35 would not act") as error:
                load(folder, head_dropout=value)
            one_line(error)
        return
    network = built(folder, targets=targets, trainable=head, head_dropout=value)
    batch = collate(sentences(1) * 400)
    network.model.train()
    network.model.base_model.eval()
    with torch.no_grad():
        drawn = network(batch)
        network.eval()
        plain = network(batch)
    if value == 0:
        assert torch.equal(drawn, plain)
        return
    assert drawn.std(0).min() > 1e-3
    if kind == "bert":  # the mean is the output without dropout; others have something after it
        torch.testing.assert_close(drawn.mean(0), plain[0], rtol=0, atol=5 * drawn.std(0).max().item() / 20)


def test_the_number_of_outputs_is_read_off_a_trained_head(tmp_path):
    for kind, (_, _, targets, head) in KINDS.items():
        folder = save_tiny(tmp_path / kind, kind)
        network = built(folder, targets=targets, trainable=head, num_labels=5)
        assert trained_labels(folder, None, network.model.state_dict()) == 5
        assert trained_labels(folder, None, {}) is None


def test_building_without_weights_takes_no_memory(tmp_path):
    network = module(save_tiny(tmp_path), num_labels=2)
    from pera_lightning import AdapterInjection
    from pera_lightning.adapters import PERA

    report = network.dry_run(AdapterInjection(PERA(rank=2), ["query", "value"], ["classifier"]).injector())
    assert report.trainable_parameters == 4 * (2 * 32 + 3) + 2 * 17


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "longest"), [("bert", LONGEST), ("roberta", LONGEST), ("distilbert", LONGEST)])
def test_examples_beyond_the_positions_are_refused(tmp_path, kind, longest):
    """RoBERTa's two first positions are of padding; the longest example that passes runs."""
    folder, (_, _, targets, head) = save_tiny(tmp_path, kind), KINDS[kind]
    network = built(folder, targets=targets, trainable=head)
    row = {"input_ids": [5] * longest, "label": 0, "id": "0"}
    check_extremes(network.model, longest, 5)
    outputs(network, [row])
    with pytest.raises(ConfigurationError, match=f"{longest + 1} tokens.*max_length to {longest} or less") as error:
        check_extremes(network.model, longest + 1, 5)
    one_line(error)
    with pytest.raises(ConfigurationError, match=f"token id {VOCABULARY}"):
        check_extremes(network.model, 3, VOCABULARY)


def test_a_decoder_without_padding_token_is_refused(tmp_path):
    folder = save_tiny(tmp_path, "llama", pad_token_id=None)
    with pytest.raises(ConfigurationError, match="has no pad_token_id") as error:
        load(folder)
    one_line(error)


def test_a_base_that_lacks_weights_is_refused(tmp_path):
    folder = save_tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("output.dense.weight"))
    save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="no weights for 1 of its tensors") as error:
        load(folder)
    assert name in one_line(error)
    save_file({**tensors, name: torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="other shapes than its configuration says") as error:
        load(folder)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ConfigurationError, match="a file of its weights is damaged"):
        load(folder)


def test_other_kinds_of_models_are_refused_shortly(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigurationError, match="ViTConfig") as error:
        load(tmp_path)
    one_line(error)
    with pytest.raises(ConfigurationError, match="there is no such folder") as error:
        load(tmp_path / "absent" / "folder")
    one_line(error)
