"""The module for sentences: losses, metrics, what test and predict leave, checkpoints, the start from another run."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from pera_lightning.adapters import PERA, AuroRA, LinearProbe, LoRA
from pera_lightning.adapters.aurora import static_inference
from pera_lightning.errors import ConfigurationError, DataError, NonFiniteLossError
from pera_lightning.injection.inject import injection_of
from pera_lightning.tasks.sequence_classification.metrics import average_ranks, pearson
from pera_lightning.tasks.sequence_classification.module import SequenceClassificationModule
from tests.tasks.sequence_classification.classifier_helpers import (
    KINDS,
    LONGEST,
    Sentences,
    built,
    collate,
    csv_logger,
    fit,
    make_trainer,
    module,
    outputs,
    randomise,
    save_tiny,
    sentences,
    task_of,
    trained,
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("bert"))


def started(folder, path, data, method=None, **options):
    """A module with random adapters and head, and its trainer, after nothing but building."""
    network, trainer = module(path), make_trainer(folder, method, logger=csv_logger(folder), **options)
    trainer.validate(network, datamodule=data, verbose=False)
    randomise(network)
    return network, trainer


def labels_of(rows):
    return torch.tensor([row["label"] for row in rows])


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_classification_is_measured_over_the_whole_set(bert, tmp_path):
    """Eleven rows in batches of four, the third and the fifth without a label."""
    rows = sentences(11, 2, types=True)
    rows[2]["label"] = rows[4]["label"] = -100
    data = Sentences([rows], metrics=("matthews", "accuracy", "f1"))
    network, trainer = started(tmp_path, bert, data, LoRA(rank=2))
    known = [row for row in rows if row["label"] != -100]
    logits, labels = outputs(network, known), labels_of(known)
    predictions = logits.argmax(-1)
    tp, fp, fn = (int(((predictions == p) & (labels == t)).sum()) for p, t in ((1, 1), (1, 0), (0, 1)))
    expected = {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": (predictions == labels).double().mean().item(),
        "f1": 2 * tp / (2 * tp + fp + fn),
    }
    (validated,) = trainer.validate(network, datamodule=data, verbose=False)
    assert {k: validated[f"val/{k}"] for k in expected} == pytest.approx(expected, rel=1e-5)
    assert validated["val/metric"] == validated["val/matthews"] != 0
    (tested,) = trainer.test(network, datamodule=data, verbose=False)
    assert {k.replace("test/", "val/"): v for k, v in tested.items()} == pytest.approx(validated, rel=1e-6)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["n"] == {"test": 9}
    assert results["metrics"] == pytest.approx(tested, rel=1e-6)


def test_regression_is_measured_over_the_whole_set(bert, tmp_path):
    rows = sentences(11, 1)
    rows[3]["label"] = -100.0
    data = Sentences([rows], classes=1)
    network, trainer = started(tmp_path, bert, data)
    known = [row for row in rows if row["label"] != -100]
    values, labels = outputs(network, known)[:, 0], labels_of(known).double()
    (tested,) = trainer.test(network, datamodule=data, verbose=False)
    assert tested["test/loss"] == pytest.approx((values - labels).square().mean().item(), rel=1e-5)
    assert tested["test/pearson"] == pytest.approx(pearson(values, labels).item(), abs=1e-5)
    ranks = average_ranks(values), average_ranks(labels)
    assert tested["test/spearman"] == pytest.approx(pearson(*ranks).item(), abs=1e-5)
    assert tested["test/metric"] == tested["test/pearson"]


def test_a_second_set_has_its_own_name(bert, tmp_path):
    sets = [sentences(7, 3, seed=1), sentences(9, 3, seed=2)]
    data = Sentences(sets, classes=3, names=("matched", "mismatched"))
    network, trainer = started(tmp_path, bert, data)
    names = {}
    for scores in (trainer.validate, trainer.test):
        names.update({k: v for part in scores(network, datamodule=data, verbose=False) for k, v in part.items()})
    for stage in ("val", "test"):
        for prefix, rows in zip((stage, f"{stage}_mismatched"), sets, strict=True):
            share = (outputs(network, rows).argmax(-1) == labels_of(rows)).double().mean().item()
            assert names[f"{prefix}/accuracy"] == names[f"{prefix}/metric"] == pytest.approx(share)
    assert not [name for name in names if "dataloader" in name]
    assert json.loads((tmp_path / "results.json").read_text())["n"] == {"test": 7, "test_mismatched": 9}


def test_aurora_has_two_rows(bert, tmp_path):
    rows = sentences(9, 2)
    data = Sentences([rows])
    network, trainer = started(tmp_path, bert, data, AuroRA(rank=2))
    (tested,) = trainer.test(network, datamodule=data, verbose=False)
    dynamic = F.cross_entropy(outputs(network, rows), labels_of(rows)).item()
    with static_inference(network):
        static = F.cross_entropy(outputs(network, rows), labels_of(rows)).item()
    assert abs(dynamic - static) > 1e-3
    assert (tested["test/loss"], tested["test_static/loss"]) == pytest.approx((dynamic, static), rel=1e-5)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["inference"] == {
        "test": "dynamic, the paper's AuroRA-D",
        "test_static": "static, the paper's row AuroRA",
    }


def test_validation_within_a_fit_starts_from_nothing(bert, tmp_path):
    rows = sentences(9, 2)
    network = module(bert, lr=1e-12)
    trainer = fit(tmp_path, network, Sentences([rows]), max_epochs=3, num_sanity_val_steps=1)
    expected = F.cross_entropy(outputs(network, rows), labels_of(rows)).item()
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(expected, rel=1e-5)


def test_a_test_set_without_labels_is_refused(bert, tmp_path):
    rows = [{**row, "label": -100} for row in sentences(5)]
    data = Sentences([rows], train=sentences(5))
    with pytest.raises(DataError, match="no example of test has a label to test by; predict them"):
        make_trainer(tmp_path).test(module(bert), datamodule=data)


# ---- training -------------------------------------------------------------------------------------------------------


def test_it_learns_and_the_best_epoch_is_kept_by_one_name(bert, tmp_path):
    rows = sentences(32, 2)
    for row in rows:
        row["input_ids"][0] = 5 + row["label"]
    keeper = ModelCheckpoint(tmp_path, monitor="val/metric", mode="max")
    options = {"callbacks": [keeper], "enable_checkpointing": True, "max_epochs": 12}
    network = module(bert, lr=0.02, head_lr=0.01)
    trainer = fit(tmp_path, network, Sentences([rows], metrics=("matthews",), batch_size=8), **options)
    assert keeper.best_model_score > 0.9
    names = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert set(names) == {"adapter", "head", "head_no_decay"}


def test_head_and_adapters_have_their_own_learning_rate(bert, tmp_path):
    network = module(bert, lr=0.02, head_lr=0.005, lr_schedule="constant")
    trainer = fit(tmp_path, network, Sentences([sentences(4)]))
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == {"adapter": 0.02, "head": 0.005, "head_no_decay": 0.005}


def test_the_frozen_part_stays(bert, tmp_path):
    network = module(bert)
    fit(tmp_path, network, Sentences([sentences(8)]))
    fresh = built(bert, random=False).model.state_dict()
    moved = {n for n, v in network.model.state_dict().items() if not torch.equal(v, fresh[n])}
    assert moved >= {"classifier.weight", "classifier.bias"}
    assert all("adapters" in name or name.startswith("classifier") for name in moved)


def test_a_loss_that_is_no_number_stops_the_fit(bert, tmp_path):
    rows = sentences(4, 1)
    rows[0]["label"] = float("inf")
    with pytest.raises(NonFiniteLossError):
        fit(tmp_path, module(bert), Sentences([rows], classes=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activation_checkpointing_changes_memory_only(tmp_path, dtype):
    """Without dropout in the base, whose masks would differ."""
    path = save_tiny(tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    gradients = []
    for checkpointing in (False, True):
        network = built(path, PERA(rank=2), base_dtype=dtype, activation_checkpointing=checkpointing)
        assert any(getattr(m, "gradient_checkpointing", False) for m in network.modules()) == checkpointing
        network.train()
        network._shared_step(collate(sentences(4)))[0].sum().backward()
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
        assert all(p.dtype == torch.float32 for p in network.parameters() if p.requires_grad)
        assert {p.dtype for p in network.parameters() if not p.requires_grad} == {getattr(torch, dtype)}
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)


def test_compiled_it_computes_the_same(bert, monkeypatch):
    rows = sentences(1)
    expected = outputs(built(bert), rows)
    eager, calls = torch.nn.Module.compile, []

    def compile(module):
        calls.append(module)
        eager(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    network = built(bert, compile=True)
    assert calls == [network.model]
    torch.testing.assert_close(outputs(network, rows), expected)


def test_activation_checkpointing_that_a_model_lacks_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="AlbertForSequenceClassification cannot checkpoint activations"):
        built(save_tiny(tmp_path, "albert"), activation_checkpointing=True)


# ---- token types ----------------------------------------------------------------------------------------------------


def test_token_types_reach_the_models_that_have_them(tmp_path):
    rows = sentences(3, types=True)
    plain = [{k: v for k, v in row.items() if k != "token_type_ids"} for row in rows]
    for kind, differs in (("bert", True), ("roberta", False), ("distilbert", False)):
        _, _, targets, head = KINDS[kind]
        network = built(save_tiny(tmp_path / kind, kind), targets=targets, trainable=head)
        assert torch.equal(outputs(network, rows), outputs(network, plain)) != differs


# ---- predictions ----------------------------------------------------------------------------------------------------


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_predictions_are_in_the_form_of_the_leaderboard(bert, tmp_path):
    sets = [sentences(7, 3, seed=1), sentences(9, 3, seed=2)]
    unlabelled = [[{**row, "label": -100, "id": str(int(row["id"]) + 9796)} for row in rows] for rows in sets]
    names = ["entailment", "neutral", "contradiction"]
    task = task_of("mnli", ("MNLI-m", "MNLI-mm"), lambda prediction: names[int(prediction)])
    data = Sentences(unlabelled, train=sets[0], classes=3, names=("matched", "mismatched"), task=task)
    network, trainer = started(tmp_path, bert, Sentences([sets[0]], classes=3))
    trainer.predict(network, datamodule=data, return_predictions=False)
    for name, rows in zip(task.submission_files, unlabelled, strict=True):
        predicted = read(tmp_path / "predictions" / f"{name}.tsv")
        assert [row["index"] for row in predicted] == [str(9796 + k) for k in range(len(rows))]
        assert [row["prediction"] for row in predicted] == [names[k] for k in outputs(network, rows).argmax(-1)]


def test_values_of_a_regression_are_written_as_the_task_says(bert, tmp_path):
    rows = sentences(5, 1)
    task = task_of("stsb", ("STS-B",), lambda value: f"{min(max(value, 0.0), 5.0):.3f}")
    data = Sentences([rows], classes=1, task=task)
    network, trainer = started(tmp_path, bert, data)
    batches = trainer.predict(network, datamodule=data)
    expected = outputs(network, rows)[:, 0].float()
    torch.testing.assert_close(torch.cat([batch["predictions"] for batch in batches]), expected)
    written = [float(row["prediction"]) for row in read(tmp_path / "predictions" / "STS-B.tsv")]
    assert written == pytest.approx(expected.clamp(0, 5).tolist(), abs=6e-4)


def test_loaders_of_somebody_else_get_a_file_too(bert, tmp_path):
    rows = sentences(5)
    network, trainer = started(tmp_path, bert, Sentences([rows]))
    batches = [collate(rows[:3]), collate(rows[3:])]
    for batch in batches:
        del batch["ids"]
    trainer.predict(network, DataLoader(batches, batch_size=None))
    written = read(tmp_path / "predictions" / "predictions.tsv")
    assert [row["index"] for row in written] == ["0_0", "0_1", "0_2", "1_0", "1_1"]
    assert [row["prediction"] for row in written] == [str(k) for k in outputs(network, rows).argmax(-1).tolist()]


# ---- results --------------------------------------------------------------------------------------------------------


def test_results_say_what_was_measured(bert, tmp_path):
    data = Sentences([sentences(8)], metrics=("accuracy", "f1"))
    network = module(bert)
    trainer = fit(tmp_path, network, data, method=PERA(rank=2), logger=csv_logger(tmp_path))
    trainer.test(network, datamodule=data, verbose=False)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["method"] == PERA(rank=2).spec()
    assert results["trainable_parameters"] == 4 * (2 * 32 + 3) + 2 * 17
    assert results["protocol"] == {
        "task": "sequence_classification",
        "model_name": bert,
        "checkpoint": None,
        "num_labels": 2,
        "selection": "accuracy",
        "mnli_checkpoint": None,
        "data": data.protocol(),
        "training": data.protocol(),
    }
    assert 0 < results["seconds"] < 60
    assert set(results["metrics"]) == {f"test/{name}" for name in ("loss", "accuracy", "f1", "metric")}


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_labels": 0}, "num_labels"),
        ({"head_dropout": 1.0}, "head_dropout"),
        ({"class_weights": [1.0, -1.0]}, "a positive number a class"),
        ({"class_weights": "equal"}, "'balanced', or"),
        ({"class_weights": [1.0, 2.0, 3.0], "num_labels": 2}, "3.0], and there are 2 classes"),
        ({"class_weights": "balanced", "num_labels": 1}, "a regression has no classes"),
    ],
)
def test_values_that_are_not_allowed(bert, options, text):
    with pytest.raises(ConfigurationError, match=text):
        module(bert, **options)


@pytest.mark.parametrize(
    ("options", "data", "text"),
    [
        ({"num_labels": 3}, {"classes": 2}, "num_labels=3, but the data has num_labels=2: leave it out"),
        ({"num_labels": 2}, {"classes": 1}, "num_labels=2, but the data has num_labels=1: leave it out"),
        ({"class_weights": "balanced"}, {"classes": 1}, "a regression has no classes"),
        ({}, {"classes": 2, "metrics": ("pearson",)}, "'pearson' does not fit 2 classes"),
    ],
)
def test_modules_and_data_that_do_not_fit(bert, tmp_path, options, data, text):
    with pytest.raises(ConfigurationError, match=text):
        fit(tmp_path, module(bert, **options), Sentences([sentences(8, data["classes"])], **data))


def test_without_data_the_number_of_labels_is_asked_for(bert, tmp_path):
    with pytest.raises(ConfigurationError, match="num_labels is not given"):
        make_trainer(tmp_path).validate(module(bert), Sentences([sentences(4)]).train_dataloader())


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_examples_that_are_too_long_are_refused_before_they_run(bert, tmp_path, command):
    data = Sentences([sentences(2, longest=3), [{"input_ids": [5] * (LONGEST + 1), "label": 0, "id": "x"}]])
    with pytest.raises(ConfigurationError, match=f"up to {LONGEST + 1} tokens.*max_length to {LONGEST}"):
        getattr(make_trainer(tmp_path), command)(module(bert), datamodule=data)


def test_a_probe_trains_the_head_alone(bert, tmp_path):
    network = module(bert)
    fit(tmp_path, network, Sentences([sentences(8)]), method=LinearProbe(), targets=[])
    assert injection_of(network.model).report.trainable_parameters == 34
    assert set(trained(network)) == {"model.classifier.weight", "model.classifier.bias"}


def test_a_subclass_may_take_fewer_arguments(bert, tmp_path):
    class Mine(SequenceClassificationModule):
        def __init__(self, rate: float = 0.01):
            super().__init__(model_name=bert, lr=rate)
            self.save_hyperparameters()

    network = Mine()
    fit(tmp_path, network, Sentences([sentences(8)]))
    assert network.hparams["num_labels"] == 2
    assert network.hparams["rate"] == 0.01
