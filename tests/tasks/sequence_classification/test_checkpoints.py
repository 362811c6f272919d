"""Checkpoints of the module for sentences, the start from a run on MNLI, merging and export."""

import json

import pytest
import torch
import torch.nn.functional as F

from pera_lightning import load_adapted, save_adapter
from pera_lightning.adapters import PERA, AuroRA, LoRA
from pera_lightning.errors import CheckpointError, ConfigurationError
from pera_lightning.tasks.sequence_classification.module import SequenceClassificationModule
from pera_lightning.training.results import scored
from tests.tasks.sequence_classification.classifier_helpers import (
    Sentences,
    built,
    collate,
    csv_logger,
    fit,
    fitted,
    make_trainer,
    module,
    outputs,
    save_tiny,
    sentences,
    trained,
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("bert"))


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_rebuilds_the_module_without_data(bert, tmp_path):
    data = Sentences([sentences(8, 3)], classes=3)
    network, path = fitted(tmp_path, bert, data, PERA(rank=2), class_weights="balanced", mnli_checkpoint=None)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"]["num_labels"] == 3
    assert all("adapters" in n or n.startswith("model.classifier") for n in checkpoint["state_dict"])
    rows = sentences(4, 3, seed=5)
    expected = outputs(network, rows)
    for again in (
        SequenceClassificationModule.load_from_checkpoint(path, map_location="cpu"),
        load_adapted(SequenceClassificationModule, path),
    ):
        assert torch.equal(outputs(again, rows), expected)


def test_a_checkpoint_is_tested_as_the_run_that_wrote_it(bert, tmp_path):
    data = Sentences([sentences(8)])
    network, path = fitted(tmp_path, bert, data, LoRA(rank=2))
    (expected,) = make_trainer(tmp_path, LoRA(rank=2)).test(network, datamodule=data, verbose=False)
    trainer = make_trainer(tmp_path, LoRA(rank=2), logger=csv_logger(tmp_path))
    (tested,) = trainer.test(module(bert), datamodule=data, ckpt_path=path, verbose=False)
    assert tested == expected
    protocol = json.loads((tmp_path / "results-end.json").read_text())["protocol"]  # beside that of the fitted network
    assert protocol["training"] == data.protocol()
    assert protocol["checkpoint"] == str(path)


def test_another_number_of_classes_in_a_checkpoint_is_told(bert, tmp_path):
    _, path = fitted(tmp_path, bert, Sentences([sentences(8, 3)], classes=3))
    with pytest.raises(CheckpointError, match="other classes: the data lack 'class c'"):
        make_trainer(tmp_path).test(module(bert), datamodule=Sentences([sentences(8)]), ckpt_path=path)


# ---- the start from a run on MNLI -----------------------------------------------------------------------------------


def adapters_of(network):
    return {n: v for n, v in trained(network).items() if "adapters" in n}


@pytest.mark.parametrize("source", ["checkpoint", "folder"])
@pytest.mark.parametrize("method", [PERA(rank=2), AuroRA(rank=2), LoRA(rank=2, init="pissa")], ids=str)
def test_training_starts_from_the_adapters_of_another_run(bert, tmp_path, source, method):
    first, path = fitted(tmp_path / "mnli", bert, Sentences([sentences(8, 3)], classes=3), method)
    if source == "folder":
        path = save_adapter(first.model, tmp_path / "mnli" / "adapter")
    network, data = module(bert, lr=1e-12, mnli_checkpoint=str(path)), Sentences([sentences(8)])
    trainer = fit(tmp_path, network, data, method=method, logger=csv_logger(tmp_path), seed=1)
    for name, value in adapters_of(first).items():
        torch.testing.assert_close(network.get_parameter(name).data, value, msg=name)
    assert network.model.classifier.weight.shape == (2, 16)
    trainer.test(network, datamodule=data, verbose=False)
    assert json.loads((tmp_path / "results.json").read_text())["protocol"]["mnli_checkpoint"]["path"] == str(path)


def test_the_head_is_new_though_the_classes_are_as_many(bert, tmp_path):
    first, path = fitted(tmp_path, bert, Sentences([sentences(8)]), LoRA(rank=2))
    network = module(bert, lr=1e-12, mnli_checkpoint=str(path))
    fit(tmp_path, network, Sentences([sentences(8)]), method=LoRA(rank=2), seed=1)
    torch.testing.assert_close(adapters_of(network), adapters_of(first))
    assert not torch.allclose(network.model.classifier.weight, first.model.classifier.weight, atol=1e-3)


def test_a_checkpoint_of_its_own_comes_instead_of_that_start(bert, tmp_path):
    """Tested on another machine, where the run on MNLI is not; the results still say it."""
    _, first = fitted(tmp_path / "mnli", bert, Sentences([sentences(8, 3)], classes=3), LoRA(rank=2))
    data = Sentences([sentences(8)])
    network, path = fitted(tmp_path / "rte", bert, data, LoRA(rank=2), mnli_checkpoint=str(first))
    first.unlink()
    trainer = make_trainer(tmp_path, LoRA(rank=2), logger=csv_logger(tmp_path))
    again = module(bert, mnli_checkpoint=str(first))
    trainer.test(again, datamodule=data, ckpt_path=path, verbose=False)
    torch.testing.assert_close(trained(again), trained(network))
    assert json.loads((tmp_path / "results-end.json").read_text())["protocol"]["mnli_checkpoint"]["path"] == str(first)


def test_a_run_that_goes_on_does_not_start_again(bert, tmp_path):
    """From a checkpoint of a plain run too: what was trained since is not replaced."""
    _, path = fitted(tmp_path / "plain", bert, Sentences([sentences(8)]), LoRA(rank=2))
    network = module(bert, mnli_checkpoint=str(tmp_path / "gone.ckpt"))
    fit(tmp_path, network, Sentences([sentences(8)]), method=LoRA(rank=2), ckpt=path, max_epochs=2)
    assert network.started_from is None


def test_the_task_that_a_start_was_trained_on_is_said(bert, tmp_path):
    class Named(Sentences):
        def protocol(self):
            return {"task": "rte"}

    data = Named([sentences(8)])
    _, path = fitted(tmp_path / "first", bert, data, LoRA(rank=2))
    network = module(bert, mnli_checkpoint=str(path))
    with pytest.warns(UserWarning, match="was trained on rte, and not on mnli"):
        fit(tmp_path, network, data, method=LoRA(rank=2))
    assert network.started_from == {"path": str(path), "task": "rte"}


def test_a_test_says_where_its_examples_selected_the_checkpoint():
    """Two halves of the same rows, cut by another seed in training."""
    trained_with = {"split_protocol": "red", "split_seed": 1, "selected_on_test": False, "sha256": {"validation": "a"}}
    assert scored(trained_with, trained_with) is trained_with
    other = {**trained_with, "split_seed": 2}
    with pytest.warns(UserWarning, match="selected with split_protocol=red, split_seed=1, and is scored with"):
        assert scored(other, trained_with) == {**other, "selected_on_test": True}
    elsewhere = {**other, "sha256": {"validation": "b"}}
    assert scored(elsewhere, trained_with) is elsewhere
    assert scored(other, None) is other


def test_a_start_that_does_not_fit_is_refused(bert, tmp_path):
    _, path = fitted(tmp_path / "mnli", bert, Sentences([sentences(8, 3)], classes=3), LoRA(rank=2))
    data, other = Sentences([sentences(8)]), save_tiny(tmp_path / "other", seed=1)
    cases = [
        (bert, PERA(rank=2), {}, path, "is of LoRA.*the model has PERA"),
        (bert, LoRA(rank=3), {}, path, r"is of LoRA\(rank=2\), the model has LoRA\(rank=3\)"),
        (bert, LoRA(rank=2), {"targets": ["query"]}, path, "adapts 4 layers"),
        (other, LoRA(rank=2), {}, path, "was trained on another base"),
        (bert, LoRA(rank=2), {}, tmp_path / "absent.ckpt", "absent.ckpt does not exist"),
        (bert, LoRA(rank=2), {}, tmp_path, "is not an adapter folder"),
    ]
    for folder, method, options, given, text in cases:
        with pytest.raises(CheckpointError, match=text) as error:
            fit(tmp_path, module(folder, mnli_checkpoint=str(given)), data, method=method, **options)
        assert "\n" not in str(error.value)


# ---- merging and export ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "num_labels"), [("float32", 3), ("bfloat16", 3), ("float32", 1)])
def test_merged_it_is_a_folder_for_from_pretrained(bert, tmp_path, dtype, num_labels):
    from transformers import AutoModelForSequenceClassification

    network = built(bert, PERA(rank=2), num_labels=num_labels, base_dtype=dtype)
    rows = sentences(6, num_labels)
    expected = outputs(network, rows)
    names = ["entailment", "neutral", "contradiction"] if num_labels == 3 else None
    network.export_merged(tmp_path / "out", class_names=names)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert [plain.config.id2label[k] for k in range(num_labels)] == (names or ["LABEL_0"])
    with torch.no_grad():
        made = torch.cat([plain(input_ids=torch.tensor([row["input_ids"]])).logits.double() for row in rows])
    tolerance = 1e-4 if dtype == "float32" else 0.15
    torch.testing.assert_close(made, expected, rtol=tolerance, atol=tolerance)
    assert repr(str(tmp_path / "out")) in network.how_to_load(tmp_path / "out")


def test_a_merge_is_measured_on_the_labelled_examples(bert):
    network = built(bert)
    rows = sentences(5)
    rows[1]["label"] = -100
    seen, loss = network.outputs_and_loss(network.model, collate(rows))
    known = [row for row in rows if row["label"] != -100]
    labels = torch.tensor([row["label"] for row in known])
    torch.testing.assert_close(seen.detach().double(), outputs(network, known), rtol=1e-4, atol=1e-5)
    assert loss.item() == pytest.approx(F.cross_entropy(outputs(network, known), labels).item(), rel=1e-5)


def test_the_number_of_labels_is_settled_by_the_trained_head(bert):
    network = module(bert)
    network.settle(built(bert, num_labels=4).model.state_dict())
    assert network.hparams["num_labels"] == 4
    with pytest.raises(ConfigurationError, match="no trained head"):
        module(bert).settle({})
