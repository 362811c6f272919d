"""GLUE by the command line, on a tiny BERT: fit, test, predict, and what `params`, `merge` and `export` make of it."""

import json
from pathlib import Path

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from pera_lightning.cli.trained_run import Trained, TrainedCLI
from tests.run_helpers import ROOT, run_pera
from tests.tasks.sequence_classification.classifier_helpers import save_tiny
from tests.tasks.sequence_classification.glue_helpers import SPECIAL, pair_tokenizer, pairs, write

CONFIG = str(ROOT / "configs" / "glue_minilm.yaml")
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A BERT with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pair_tokenizer().backend_tokenizer, **SPECIAL)
    tokenizer.save_pretrained(folder)
    return save_tiny(folder, vocab_size=len(tokenizer), max_position_embeddings=64)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """RTE and MNLI, of few rows."""
    folder = tmp_path_factory.mktemp("glue")
    for split, count in (("train", 24), ("validation", 10), ("test", 5)):
        unlabelled = {"label": -1} if split == "test" else {}
        write(folder / "rte" / f"{split}.jsonl", pairs(count, **unlabelled))
    mnli = [{"premise": r["sentence1"], "hypothesis": r["sentence2"], "label": r["idx"] % 3} for r in pairs(12)]
    for split in ("train", "validation_matched", "validation_mismatched"):
        for name in ("mnli", "mnli_own"):
            write(folder / name / f"{split}.jsonl", mnli)
    for name, count in (("matched", 5), ("mismatched", 4)):
        write(folder / "mnli" / f"test_{name}.jsonl", [{**row, "label": -1} for row in mnli[:count]])
        write(folder / "mnli_own" / f"test_{name}.jsonl", mnli[:count])
    return folder


def words(base, rows, runs, task="rte"):
    own = ["--model.model_name", base, "--data.folder", rows / task, "--data.task", task]
    small = ["--data.max_length", 64, "--data.train_limit=null", "--data.cache_dir", runs / "cache"]
    where = ["--trainer.logger.init_args.save_dir", runs, "--trainer.logger.init_args.name", task]
    short = ["--trainer.max_epochs", 2, "--model.lr", 0.05]
    return ["--config", CONFIG, *own, *small, *where, *short, *QUIET]


@pytest.fixture(scope="module")
def runs(base, rows, tmp_path_factory):
    """A folder with a run of RTE and a run of MNLI."""
    folder = tmp_path_factory.mktemp("runs")
    for task in ("rte", "mnli"):
        assert run_pera("fit", *words(base, rows, folder, task)) == 0
    return folder


def test_a_run_and_its_result(pera, base, rows, runs):
    assert pera("test", *words(base, rows, runs), "--ckpt_path", "best").code == 0
    result = json.loads((runs / "rte" / "results.json").read_text())
    assert {"test/accuracy", "test/loss", "test/metric"} <= result["metrics"].keys()
    assert result["n"] == {"test": 5}
    facts = result["protocol"]["training"]
    assert (facts["split_protocol"], facts["selected_on_test"], facts["split_seed"]) == ("red", False, 42)
    assert facts["sizes"]["train"] == 24
    assert facts["padding"]["grouped"] <= facts["padding"]["random"]
    split = json.loads((runs / "rte" / "splits" / "rte.json").read_text())
    chosen = [split["parts"][name]["rows"] for name in ("validation", "test")]
    assert sorted(chosen[0] + chosen[1]) == list(range(10))
    assert sorted(path.name for path in (runs / "rte" / "splits").iterdir()) == ["rte-test.json", "rte.json"]


def test_a_submission(pera, base, rows, runs):
    assert pera("predict", *words(base, rows, runs), "--ckpt_path", "best").code == 0
    lines = (runs / "rte" / "predictions" / "RTE.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == list("01234")
    assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "not_entailment"}


def test_a_submission_of_mnli_is_two_files(pera, base, rows, runs):
    assert pera("predict", *words(base, rows, runs, "mnli"), "--ckpt_path", "best").code == 0
    for name, count in (("MNLI-m", 5), ("MNLI-mm", 4)):
        lines = (runs / "mnli" / "predictions" / f"{name}.tsv").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines] == ["index", *map(str, range(count))]
        assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "neutral", "contradiction"}


def test_a_test_set_of_ones_own_is_scored_on(pera, base, rows, tmp_path):
    own = ["--data.folder", rows / "mnli_own", "--data.split_protocol", "own_test", "--trainer.max_epochs", 1]
    given = [*words(base, rows, tmp_path, "mnli"), *own]
    assert pera("fit", *given).code == 0
    sizes = json.loads((tmp_path / "mnli" / "splits" / "mnli.json").read_text())["sizes"]
    tested = {"test_matched": 5, "test_mismatched": 4}
    assert sizes == {"train": 12, "validation_matched": 12, "validation_mismatched": 12, **tested}
    assert pera("test", *given, "--ckpt_path", "best").code == 0
    result = json.loads((tmp_path / "mnli" / "results.json").read_text())
    assert result["n"] == {"test": 5, "test_mismatched": 4}
    assert json.loads((tmp_path / "mnli" / "splits" / "mnli-test.json").read_text())["sizes"] == tested


def test_params(pera, base, rows, runs):
    plain = pera("params", *words(base, rows, runs))
    assert "attention.self.query" in plain.out
    assert "trained in full: bert.pooler, classifier" in plain.out
    memory = pera("params", *words(base, rows, runs), "--memory", "--devices", 2)
    assert "Assumed: on each device 16 examples of 64 tokens" in memory.out
    again = pera("params", *words(base, rows, runs), "--memory", "--model.activation_checkpointing", "true")
    kept = [
        float(line.split()[-1])
        for out in (memory.out, again.out)
        for line in out.splitlines()
        if line.startswith("kept for the backward")
    ]
    assert kept[1] < kept[0] / 2


def trained(runs, task):
    """The run's network, in eval mode, and its data."""
    return Trained(TrainedCLI(["--ckpt_path", str(runs / task / "checkpoints" / "best.ckpt")]))


def encoded(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(["001???", "7"], ["!!", "!"], padding=True, return_tensors="pt")


@pytest.mark.parametrize("task", ["rte", "mnli"])
@torch.no_grad()
def test_exports(pera, base, runs, tmp_path, task):
    network, ids = trained(runs, task).module.model, encoded(base)
    expected = network(**ids).logits
    given = ["--ckpt_path", runs / task / "adapter"]
    assert pera("export", *given, "--format", "merged", "--output", tmp_path / "merged").code == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(**encoded(tmp_path / "merged")).logits, expected, rtol=1e-4, atol=1e-5)
    names = {"rte": ["entailment", "not_entailment"], "mnli": ["entailment", "neutral", "contradiction"]}[task]
    assert [merged.config.id2label[k] for k in range(len(names))] == names

    assert pera("export", *given, "--format", "peft", "--output", tmp_path / "peft").code == 0
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(names))
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    torch.testing.assert_close(theirs(**ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert peft.PeftConfig.from_pretrained(tmp_path / "peft").task_type == "SEQ_CLS"


@pytest.mark.parametrize("task", ["rte", "mnli"])
def test_merge_measures_on_the_validation_examples(pera, runs, task):
    result = pera("merge", "--ckpt_path", runs / task / "adapter")
    assert result.code == 0
    assert "loss" in result.out


def test_the_config_is_the_small_one():
    config = yaml.safe_load(Path(CONFIG).read_text())
    assert config["model"]["init_args"]["model_name"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert (config["data"]["init_args"]["train_limit"], config["trainer"]["max_epochs"]) == (1000, 3)
    data = config["data"]["init_args"]
    assert data["split_protocol"] == "red"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.split_protocol", "half"], "split_protocol='half' does not exist"),
        (["--data.split_protocol", "own_test"], "has examples without label"),
        (["--data.task", "cola"], "has no column 'sentence'"),
        (["--model.num_labels", "3"], "num_labels=3, but the data has num_labels=2"),
    ],
)
def test_wrong_input_is_one_line(pera, base, rows, tmp_path, options, expected):
    result = pera("fit", *words(base, rows, tmp_path), *options)
    assert result.code == 2
    line = result.err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert expected in line
