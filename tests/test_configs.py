"""Every config: parsed and built by the command line, injected on the meta device, and with the paper's values."""

import itertools
import json
import re
from pathlib import Path

import datasets
import pytest
import timm
import torch
import yaml

from pera_lightning.cli.lightning_cli import PeraCLI
from pera_lightning.cli.run_defaults import default_folder
from pera_lightning.tasks.image_classification.datasets import CATALOGUE
from tests.run_helpers import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
LANGUAGE = [path for path in CONFIGS if path.stem.startswith(("commonsense_", "gsm8k_", "convai2_"))]
GLUE = [path for path in CONFIGS if path.stem.startswith(("roberta_", "glue_"))]
DREAMBOOTH = [path for path in CONFIGS if path.stem.startswith("dreambooth_")]
IMAGES = [path for path in CONFIGS if path not in LANGUAGE + GLUE + DREAMBOOTH]
PAPER = [path for path in CONFIGS if "paper" in path.parts]
PAPER_IMAGES = [path for path in PAPER if path in IMAGES]

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

# What config.json says of the language models; the rest are the defaults of transformers.
LLAMA3 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LLAMA2 = {**LLAMA3, "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
SMOLLM2 = {
    **LLAMA3,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
NETWORKS = {
    "meta-llama/Meta-Llama-3-8B": (LLAMA3, 8_030_261_248),
    "meta-llama/Llama-2-7b-hf": (LLAMA2, 6_738_415_616),
    "Qwen/Qwen2.5-7B": (QWEN, 7_615_616_512),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (SMOLLM2, 134_515_008),
}
# Method, adapter parameters, and their percentage of all parameters as the papers print it, where it is known.
COUNTED = {
    "commonsense_smollm2": ("PERA", 3_338_160, None),
    "commonsense_llama3_pera": ("PERA", 56_707_584, 0.7012),
    "commonsense_llama3_hira": ("HiRA", 56_623_104, 0.7002),
    "commonsense_llama3_aurora": ("AuroRA", 3_542_144, None),
    "commonsense_llama3_lora": ("LoRA", 56_623_104, 0.7002),
    "commonsense_llama3_hilora": ("HiLoRA", 56_623_104, 0.7002),
    "pera/commonsense_llama3_8b_r16": ("PERA", 28_333_312, 0.3516),
    "pera/commonsense_llama3_8b_r32": ("PERA", 56_707_584, 0.7012),
    "pera/commonsense_llama2_7b_r16": ("PERA", 28_071_168, 0.4149),
    "pera/commonsense_llama2_7b_r32": ("PERA", 56_183_296, 0.8269),
    "pera/commonsense_qwen25_7b_r16": ("PERA", 27_085_408, None),
    "pera/commonsense_qwen25_7b_r32": ("PERA", 54_206_656, None),
    "hira/commonsense_llama3_8b_r32": ("HiRA", 56_623_104, 0.7002),
    "hira/commonsense_llama2_7b_r32": ("HiRA", 56_098_816, 0.8256),
    "hira/gsm8k_llama3_8b_r32": ("HiRA", 56_623_104, 0.7002),
    "hira/convai2_llama3_8b_r32": ("HiRA", 56_623_104, 0.7002),
    "aurora/commonsense_llama3_8b_r2": ("AuroRA", 3_542_144, None),
}
# Learning rate, examples in a batch, epochs, protocol.
SETTINGS = {
    "PERA": (1e-4, 16, 3, "hira"),
    "LoRA": (1e-4, 16, 3, "hira"),
    "HiRA": (1e-3, 32, 3, "hira"),
    "HiLoRA": (1e-3, 32, 3, "hira"),
    "AuroRA": (3e-4, 16, 3, "llm_adapters"),
}
OTHER_TASKS = {"gsm8k": (2, "last_number"), "convai2": (1, "self_persona")}


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


def configured(path, monkeypatch, *more):
    monkeypatch.setattr("sys.argv", ["pera"])  # Lightning warns where words are given twice
    words = ["--config", str(path), "--trainer.accelerator", "cpu", *map(str, more)]
    return PeraCLI(args=words, run=False, save_config_callback=None)


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=[path.stem for path in paths])


def name_of(path):
    """The stem, of a paper's config with the paper."""
    return f"{path.parent.name}/{path.stem}" if path in PAPER else path.stem


def test_every_config_is_here():
    assert len(IMAGES) == 18
    assert len(PAPER_IMAGES) == 16
    assert {path.stem for path in PAPER_IMAGES} | {"vit_dtd_aurora"} == set(TABLE)
    assert set(CLASSES) == set(CATALOGUE)
    assert {name_of(path) for path in LANGUAGE} == set(COUNTED)


# Each data set in one of the two sizes; what else these configs hold is the same, see below.
LARGE_ONES = ("fgvc", "oxford_pets", "resisc45", "stanford_cars")
BUILT = [p for p in IMAGES if p not in PAPER_IMAGES or p.stem.endswith(LARGE_ONES) == ("large" in p.stem)]


@named(BUILT)
def test_parsed_built_and_injected(path, monkeypatch):
    cli = configured(path, monkeypatch)
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert names[0] == "AdapterInjection"
    assert {"ModelCheckpoint", "LearningRateMonitor"} <= set(names)
    assert cli.trainer.checkpoint_callback.monitor == "val/accuracy"
    assert cli.trainer.checkpoint_callback.mode == "max"
    classes = cli.datamodule.expected_classes()
    cli.model.hparams["num_classes"] = classes
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


@named([path for path in IMAGES if path.stem != "quickstart"])
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
    kept = "last" if path in DREAMBOOTH else "best"  # nothing is measured that would select
    assert f"python cli.py test --config {own} --ckpt_path {kept}" in header
    assert not {"logger", "callbacks", "default_root_dir"} & yaml.safe_load(text)["trainer"].keys()  # the defaults'
    for part in ("Stands for:", "Hardware"):
        assert part in header
    assert ("The paper reports:" in header) == (path in IMAGES and path.stem != "quickstart")
    assert "@" not in header  # a placeholder left over


@named(PAPER_IMAGES)
def test_paper_configs_differ_where_they_must_only(path):
    """What is not the table's is the same in all of them."""

    def rest(path):
        config = yaml.safe_load(path.read_text())
        for key in ("lr", "head_lr", "weight_decay", "model_name"):
            del config["model"]["init_args"][key]
        del config["data"]["init_args"]["dataset"]
        return config

    assert rest(path) == rest(PAPER_IMAGES[0])


def test_the_log_folders_are_all_different():
    folders = {default_folder(["--config", str(path)]) for path in CONFIGS}
    assert len(folders) == len(CONFIGS)
    assert {Path("runs/quickstart"), Path("runs/paper/pera/roberta_base_rte")} <= folders


def test_dry_runs_take_no_memory(monkeypatch):
    """ViT-Large has 300 million parameters, none of which is made."""
    cli = configured(ROOT / "configs" / "paper" / "aurora" / "vit_large_dtd.yaml", monkeypatch)
    cli.model.hparams["num_classes"] = 47
    network = []

    def keep(model):
        network.append(model)
        return cli.config_init["adapter"].injector()(model)

    cli.model.dry_run(keep)
    assert {p.device for p in network[0].parameters()} == {torch.device("meta")}


# ---- language models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Hub id to a folder with a config.json and nothing else."""
    made = {}
    for name, (values, _) in NETWORKS.items():
        made[name] = tmp_path_factory.mktemp("networks") / name.partition("/")[2]
        made[name].mkdir()
        (made[name] / "config.json").write_text(json.dumps(values))
    return made


def language_named(paths):
    return pytest.mark.parametrize("path", paths, ids=[name_of(path) for path in paths])


# A flagship that a row of a paper repeats is that row, see below.
REPEATED = [f"commonsense_llama3_{name}" for name in ("pera", "hira", "aurora")]


@language_named([path for path in LANGUAGE if path.stem not in REPEATED])
def test_a_language_model_is_built_and_injected(path, folders, monkeypatch):
    network = yaml.safe_load(path.read_text())["model"]["init_args"]["model_name"]
    cli = configured(path, monkeypatch, "--model.model_name", folders[network])
    checkpoint = cli.trainer.checkpoint_callback
    assert type(cli.trainer.callbacks[0]).__name__ == "AdapterInjection"
    assert (checkpoint.monitor, checkpoint.mode) == ("val/loss", "min")
    report = cli.model.dry_run(cli.config_init["adapter"].injector())
    values, base = NETWORKS[network]
    method, adapters, percent = COUNTED[name_of(path)]
    assert type(cli.config_init["adapter"].method).__name__ == method
    assert report.adapter_parameters == report.trainable_parameters == adapters
    assert report.total_parameters == base + adapters
    assert len(report.matched) == 5 * values["num_hidden_layers"]
    if percent is not None:
        assert round(report.percent, 4) == percent


@pytest.mark.parametrize(
    ("name", "method", "percent"),
    [
        ("llama3_8b", ["PERA", "--adapter.method.rank", 2], 0.0441),
        ("llama2_7b", ["LoRA", "--adapter.method.rank", 32], 0.8256),
    ],
    ids=lambda value: "-".join(str(word) for word in value[::2]) if isinstance(value, list) else str(value),
)
def test_another_method_has_the_percentage_of_the_papers(name, method, percent, folders, monkeypatch):
    path = ROOT / "configs" / "paper" / "pera" / f"commonsense_{name}_r16.yaml"
    network = "meta-llama/Meta-Llama-3-8B" if name == "llama3_8b" else "meta-llama/Llama-2-7b-hf"
    cli = configured(path, monkeypatch, "--model.model_name", folders[network], "--adapter.method", *method)
    assert round(cli.model.dry_run(cli.config_init["adapter"].injector()).percent, 4) == percent


@language_named([path for path in LANGUAGE if path.stem != "commonsense_smollm2"])
def test_the_values_of_the_language_papers(path):
    config = yaml.safe_load(path.read_text())
    adapter, trainer = config["adapter"], config["trainer"]
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    method, arguments = adapter["method"]["class_path"], adapter["method"]["init_args"]
    _, adapters, _ = COUNTED[name_of(path)]
    total = adapters + NETWORKS[model["model_name"]][1]
    assert f"Trainable: {adapters:,} parameters, {100 * adapters / total:.4f} %" in path.read_text()
    lr, batch, epochs, protocol = SETTINGS[method]
    epochs, protocol = OTHER_TASKS.get(path.stem.partition("_")[0], (epochs, protocol))
    assert adapter["targets"] == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert (model["lr"], model["weight_decay"], model["lr_schedule"], model["warmup_steps"]) == (lr, 0, "linear", 100)
    assert (model["base_dtype"], trainer["precision"]) == ("bfloat16", "bf16-mixed")
    assert (data["batch_size"], data["validation_size"], data["protocol"]) == (batch, 120, protocol)
    assert (trainer["max_epochs"], trainer["devices"]) == (epochs, 1)
    # Batches are counted, over the ends of epochs; without accumulation they are optimizer steps.
    assert (trainer["val_check_interval"], trainer["check_val_every_n_epoch"]) == (80, None)
    assert "accumulate_grad_batches" not in trainer
    if method in ("PERA", "LoRA"):
        assert arguments == {"rank": arguments["rank"], "alpha": arguments["rank"], "dropout": 0.05}
    if method == "AuroRA":
        assert (arguments["rank"], arguments["alpha"]) == (2, 4)
    if method == "HiLoRA":
        assert (arguments["hira_rank"], arguments["lora_rank"]) == (20, 12)
    if "_r" in path.stem:
        assert path.stem.endswith(f"_r{arguments['rank']}")


def test_flagships_are_rows_of_the_papers():
    """The flagships that a paper's folder repeats are the same."""
    folder = ROOT / "configs"
    for flagship, row in (
        ("pera", "pera/commonsense_llama3_8b_r32"),
        ("hira", "hira/commonsense_llama3_8b_r32"),
        ("aurora", "aurora/commonsense_llama3_8b_r2"),
    ):
        paths = folder / f"commonsense_llama3_{flagship}.yaml", folder / "paper" / f"{row}.yaml"
        one, other = (yaml.safe_load(path.read_text()) for path in paths)
        assert one == other


def test_the_control_differs_in_the_method_alone():
    configs = [
        yaml.safe_load((ROOT / "configs" / f"commonsense_llama3_{name}.yaml").read_text()) for name in ("pera", "lora")
    ]
    for config in configs:
        assert config["adapter"]["method"].pop("class_path") in ("PERA", "LoRA")
    assert configs[0] == configs[1]


def test_the_small_one_fits_into_an_hour():
    config = yaml.safe_load((ROOT / "configs" / "commonsense_smollm2.yaml").read_text())
    data, trainer = config["data"]["init_args"], config["trainer"]
    assert (trainer["max_steps"], data["batch_size"], data["protocol"]) == (300, 4, "score")
    assert (data["folder"], data["test_limit"]) == (None, 500)
    assert data["train"] == data["test"] == ["ARC-Easy", "ARC-Challenge", "openbookqa"]
