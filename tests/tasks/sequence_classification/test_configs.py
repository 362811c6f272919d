"""The configs of GLUE: built and injected on the meta device, and with the papers' values."""

import json
import re

import pytest
import yaml

from pera_lightning.cli.lightning_cli import PeraCLI
from tests.run_helpers import ROOT

FLAGSHIPS = {"glue_rte_pera": "pera/roberta_base_rte", "glue_cola_aurora": "aurora/roberta_base_cola"}
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
GLUE = [path for path in CONFIGS if path.stem.startswith("roberta_") or path.stem in FLAGSHIPS]

# What config.json says of RoBERTa; the rest are the defaults of transformers.
BASE = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
LARGE = {**BASE, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
# Adapter parameters of each, on query and value.
ADAPTERS = {
    ("PERA", "base"): 295_776,
    ("PERA", "large"): 788_160,
    ("AuroRA", "base"): 74_208,
    ("AuroRA", "large"): 197_568,
}

PERA = {  # arXiv 2604.11841: lr, epochs, dropout
    "base": {
        "sst2": (1e-4, 50, 0),
        "mrpc": (1e-3, 50, 0.25),
        "cola": (1e-3, 40, 0),
        "qnli": (3e-4, 30, 0.25),
        "rte": (5e-4, 75, 0),
        "stsb": (1e-3, 80, 0.25),
    },
    "large": {
        "sst2": (5e-4, 45, 0.25),
        "mrpc": (1e-4, 35, 0),
        "cola": (4e-4, 60, 0.2),
        "qnli": (3e-4, 50, 0),
        "rte": (5e-4, 75, 0.25),
        "stsb": (4e-4, 30, 0.1),
    },
}
AURORA = {  # arXiv 2505.18738: lr, epochs, batch, length
    "base": {
        "stsb": (6e-4, 30, 64, 512),
        "rte": (5e-4, 80, 16, 512),
        "mrpc": (8e-4, 30, 64, 512),
        "cola": (5e-3, 90, 32, 512),
        "sst2": (8e-4, 30, 32, 512),
        "qnli": (5e-3, 80, 32, 512),
    },
    "large": {
        "stsb": (3e-4, 20, 16, 512),
        "rte": (4e-4, 10, 32, 512),
        "mrpc": (1e-3, 30, 16, 512),
        "cola": (5e-4, 50, 16, 256),
        "sst2": (8e-4, 40, 16, 128),
        "qnli": (4e-4, 20, 16, 512),
    },
}

by_name = pytest.mark.parametrize("path", GLUE, ids=[f"{path.parent.name}-{path.stem}" for path in GLUE])


def row_of(path):
    """Method, size and task of the papers' row that a config stands for."""
    paper, _, name = FLAGSHIPS.get(path.stem, f"{path.parent.name}/{path.stem}").partition("/")
    _, size, task = name.split("_")
    return {"pera": "PERA", "aurora": "AuroRA"}[paper], size, task


# One with a label and one with two of each method; the others have the same keys.
BUILT = [path for path in GLUE if path.stem in FLAGSHIPS or path.stem.endswith("_stsb")]


def keys_of(values, above=""):
    """Every key of a config, with those above it, and the classes."""
    if not isinstance(values, dict):
        return {above}
    classes = {f"{above}={values['class_path']}"} if "class_path" in values else set()
    return classes.union(*(keys_of(value, f"{above}.{key}") for key, value in values.items()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Size to a folder with a config.json and nothing else."""
    made = {}
    for size, values in (("base", BASE), ("large", LARGE)):
        made[size] = tmp_path_factory.mktemp("networks") / f"roberta-{size}"
        made[size].mkdir()
        (made[size] / "config.json").write_text(json.dumps(values))
    return made


def test_every_row_is_there():
    rows = {row_of(path) for path in GLUE if path.stem not in FLAGSHIPS}
    assert rows == {(method, size, task) for method, size in ADAPTERS for task in PERA["base"]}
    assert FLAGSHIPS.keys() <= {path.stem for path in GLUE}


@pytest.mark.parametrize("path", BUILT, ids=[f"{path.parent.name}-{path.stem}" for path in BUILT])
def test_built_and_injected(path, folders, monkeypatch):
    method, size, task = row_of(path)
    monkeypatch.setattr("sys.argv", ["pera"])  # Lightning warns where words are given twice
    words = ["--config", str(path), "--trainer.accelerator", "cpu", "--model.model_name", str(folders[size])]
    cli = PeraCLI(args=words, run=False, save_config_callback=None)
    checkpoint = cli.trainer.checkpoint_callback
    assert type(cli.trainer.callbacks[0]).__name__ == "AdapterInjection"
    assert (checkpoint.monitor, checkpoint.mode) == ("val/metric", "max")
    cli.model.hparams["num_labels"] = cli.datamodule.expected_classes()
    report = cli.model.dry_run(cli.config_init["adapter"].injector())
    width, labels = {"base": BASE, "large": LARGE}[size]["hidden_size"], 1 if task == "stsb" else 2
    assert report.adapter_parameters == ADAPTERS[method, size]
    assert report.trainable_parameters == report.adapter_parameters + (width + 1) * width + (width + 1) * labels
    assert len(report.matched) == 2 * {"base": 12, "large": 24}[size]


@by_name
def test_the_values_of_the_papers(path):
    method, size, task = row_of(path)
    config = yaml.safe_load(path.read_text())
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert model["model_name"] == f"FacebookAI/roberta-{size}"
    assert (model["lr_schedule"], model["warmup_ratio"], model["weight_decay"]) == ("linear", 0.06, 0)
    assert (config["adapter"]["targets"], config["adapter"]["trainable"]) == (["query", "value"], ["classifier"])
    arguments = config["adapter"]["method"]["init_args"]
    if method == "PERA":
        lr, epochs, dropout = PERA[size][task]
        batch, length, protocol = 32, 512, "red"
        assert arguments == {"rank": 8, "alpha": 8, "dropout": dropout}
    else:
        lr, epochs, batch, length = AURORA[size][task]
        protocol = "full_validation"
        assert arguments == {"rank": 2, "alpha": 4}
    assert model["lr"] == model["head_lr"] == lr
    assert trainer["max_epochs"] == epochs
    assert (data["task"], data["split_protocol"]) == (task, protocol)
    assert (data["batch_size"], data["max_length"]) == (batch, length)
    assert f"{ADAPTERS[method, size]:,} adapter parameters" in re.sub(r"\s*\n#\s*", " ", path.read_text())
    built = next(other for other in BUILT if row_of(other)[0] == method)
    assert keys_of(config) == keys_of(yaml.safe_load(built.read_text()))


def test_flagships_are_rows_of_the_papers():
    for flagship, row in FLAGSHIPS.items():
        paths = ROOT / "configs" / f"{flagship}.yaml", ROOT / "configs" / "paper" / f"{row}.yaml"
        one, other = (yaml.safe_load(path.read_text()) for path in paths)
        assert one == other


@by_name
def test_the_header_names_the_seeds(path):
    seeds = {"PERA": "42,43,44,45,46", "AuroRA": "0,11111,22222,33333,44444"}[row_of(path)[0]]
    assert f"python cli.py sweep --config {path.relative_to(ROOT)} --seeds {seeds}" in path.read_text()
