"""Every config: parsed and built by the command line, injected on the meta device, and with the paper's values."""

import itertools
import re

import datasets
import pytest
import timm
import torch
import yaml
from run_helpers import ROOT

from pera_lightning.commands.lightning_cli import PeraCLI
from pera_lightning.data.image_datasets import CATALOGUE

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PAPER = [path for path in CONFIGS if "paper" in path.parts]

# AuroRA (arXiv 2505.18738): learning rate of the adapters and of the head, weight decay.
BASE = {
    "oxford_pets": (5e-3, 5e-3, 8e-4),
    "stanford_cars": (1e-2, 1e-2, 4e-5),
    "cifar10": (1e-2, 3e-2, 9e-5),
    "dtd": (1e-2, 8e-3, 7e-5),
    "eurosat": (5e-3, 8e-3, 3e-4),
    "fgvc": (1e-2, 1e-2, 7e-5),
    "resisc45": (8e-3, 1e-2, 3e-4),
    "cifar100": (8e-3, 5e-3, 1e-4),
}
LARGE = {
    "oxford_pets": (5e-3, 4e-3, 8e-4),
    "stanford_cars": (9e-3, 8e-3, 4e-5),
    "cifar10": (8e-3, 4e-2, 9e-5),
    "dtd": (8e-3, 9e-3, 7e-5),
    "eurosat": (4e-3, 8e-3, 3e-4),
    "fgvc": (1.5e-2, 1e-2, 7e-5),
    "resisc45": (7.5e-3, 1.5e-2, 3e-4),
    "cifar100": (1.5e-2, 5e-3, 1e-4),
}
TABLE = {
    f"vit_{size}_{name}": values for size, rows in (("base", BASE), ("large", LARGE)) for name, values in rows.items()
}
TABLE["vit_dtd_aurora"] = BASE["dtd"]
CLASSES = {
    "oxford_pets": 37,
    "stanford_cars": 196,
    "cifar10": 10,
    "dtd": 47,
    "eurosat": 10,
    "fgvc": 100,
    "resisc45": 45,
    "cifar100": 100,
}
ADAPTERS = {"base": (74_208, 768), "large": (197_568, 1024)}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Nothing may be downloaded: no data set, no weights."""

    def refuse(*args, **options):
        raise AssertionError(f"a download was asked for: {args}")

    create = timm.create_model

    def without_weights(name, pretrained=False, **options):
        assert not pretrained, name
        return create(name, **options)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(timm, "create_model", without_weights)


def configured(path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pera"])  # Lightning warns where words are given twice
    words = ["--config", str(path), "--trainer.accelerator", "cpu"]
    return PeraCLI(args=words, run=False, save_config_callback=None)


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=[path.stem for path in paths])


def test_every_config_is_here():
    assert len(CONFIGS) == 18
    assert len(PAPER) == 16
    assert {path.stem for path in PAPER} | {"vit_dtd_aurora"} == set(TABLE)
    assert set(CLASSES) == set(CATALOGUE)


@named(CONFIGS)
def test_parsed_built_and_injected(path, monkeypatch):
    cli = configured(path, monkeypatch)
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert names[0] == "AdapterInjection"
    assert {"ModelCheckpoint", "LearningRateMonitor"} <= set(names)
    assert cli.trainer.checkpoint_callback.monitor == "val/accuracy"
    assert cli.trainer.checkpoint_callback.mode == "max"
    classes = cli.datamodule.expected_classes()
    cli.model.settings["num_classes"] = classes
    report = cli.model.dry_run(cli.config_init["adapter"].injector())
    if path.stem == "quickstart":
        assert (report.adapter_parameters, report.trainable_parameters) == (11_264, 11_264 + 5 * 81)
        return
    adapters, width = ADAPTERS["large" if "large" in path.stem else "base"]
    assert classes == CLASSES[cli.datamodule.dataset]
    assert report.adapter_parameters == adapters
    assert report.trainable_parameters == adapters + classes * (width + 1)
    assert len(report.matched) == {"base": 12, "large": 24}["large" if "large" in path.stem else "base"]
    assert set(report.matched.values()) == {("q", "v")}


@named([path for path in CONFIGS if path.stem != "quickstart"])
def test_the_values_of_the_paper(path):
    config = yaml.safe_load(path.read_text())
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    size = "large" if "large" in path.stem else "base"
    dataset = "dtd" if path.stem == "vit_dtd_aurora" else path.stem.removeprefix(f"vit_{size}_")
    assert config["adapter"] == {
        "method": {"class_path": "AuroRA", "init_args": {"rank": 2, "alpha": 4}},
        "targets": ["attn.qkv[q,v]"],
        "trainable": ["head"],
    }
    assert (model["lr"], model["head_lr"], model["weight_decay"]) == TABLE[path.stem]
    assert (model["lr_schedule"], model["warmup_steps"]) == ("linear", 0)
    assert (model["model_name"], model["pretrained"]) == (f"vit_{size}_patch16_224.orig_in21k", True)
    assert (data["dataset"], data["transform"], data["batch_size"]) == (dataset, "fourierft", 50)
    assert (trainer["max_epochs"], trainer["accumulate_grad_batches"]) == (10, 4)
    assert config["seed_everything"] in (0, 7, 77, 777, 7777, 77777)


@named(CONFIGS)
def test_the_header_says_how_to_run_it(path):
    text = path.read_text()
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    header = " ".join(line.removeprefix("#") for line in lines)
    header = re.sub(r"\s+(\\\s+)?", " ", header)
    own = path.relative_to(ROOT).as_posix()
    assert f"python cli.py fit --config {own}" in header
    for named_config in re.findall(r"configs/[\w/.]+\.yaml", header):
        assert named_config == own
    trainer = yaml.safe_load(text)["trainer"]
    logger = trainer["logger"]["init_args"]
    folder = f"{logger['save_dir']}/{logger['name']}"
    assert f"python cli.py test --config {own} --ckpt_path {folder}/checkpoints/best.ckpt" in header
    assert trainer["default_root_dir"] == folder
    assert trainer["callbacks"][0]["init_args"]["filename"] == "best"
    for part in ("Stands for:", "Hardware"):
        assert part in header
    assert ("The paper reports:" in header) == (path.stem != "quickstart")
    assert "@" not in header  # a placeholder left over


@named(PAPER)
def test_paper_configs_differ_where_they_must_only(path):
    """What is not the table's is the same in all of them."""

    def rest(path):
        config = yaml.safe_load(path.read_text())
        for key in ("lr", "head_lr", "weight_decay", "model_name"):
            del config["model"]["init_args"][key]
        del config["data"]["init_args"]["dataset"]
        del config["trainer"]["default_root_dir"]
        del config["trainer"]["logger"]["init_args"]["name"]
        return config

    assert rest(path) == rest(PAPER[0])


def test_the_log_folders_are_all_different():
    folders = [yaml.safe_load(path.read_text())["trainer"]["default_root_dir"] for path in CONFIGS]
    assert len(set(folders)) == len(CONFIGS)


def test_dry_runs_take_no_memory(monkeypatch):
    """ViT-Large has 300 million parameters, none of which is made."""
    cli = configured(ROOT / "configs" / "paper" / "aurora" / "vit_large_dtd.yaml", monkeypatch)
    cli.model.settings["num_classes"] = 47
    network = []

    def keep(model):
        network.append(model)
        return cli.config_init["adapter"].injector()(model)

    cli.model.dry_run(keep)
    assert {p.device for p in network[0].parameters()} == {torch.device("meta")}
