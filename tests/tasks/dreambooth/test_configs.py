"""The configs of DreamBooth: built and injected into SDXL's own network, on the meta device."""

import json
import re

import pytest
import yaml

from pera_lightning.cli.lightning_cli import PeraCLI
from tests.run_helpers import ROOT
from tests.tasks.dreambooth import sdxl

PATHS = sorted((ROOT / "configs").glob("dreambooth_sdxl_*.yaml"))
# What the repository's files say of SDXL 1.0; the rest are the defaults of diffusers and transformers.
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TEXT = {"text_encoder": (768, 768), "text_encoder_2": (1280, 1280)}  # width, projection
BASE = 2_567_463_684  # parameters of SDXL's UNet
ADAPTERS = {"aurora": ("AuroRA", 5_832_960), "lora": ("LoRA", 5_806_080), "pera": ("PERA", 5_811_680)}

by_name = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline's folder with configurations and no weights."""
    folder = sdxl.save_tiny(
        tmp_path_factory.mktemp("networks") / "sdxl", parts=["tokenizer", "tokenizer_2", "scheduler"]
    )
    for part, (width, projection) in TEXT.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps({"hidden_size": width, "projection_dim": projection}))
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(json.dumps(UNET))
    return folder


@by_name
def test_built_and_injected(path, base, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pera"])  # Lightning warns where words are given twice
    words = ["--config", str(path), "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    cli = PeraCLI(args=[*words, "--model.model_name", str(base)], run=False, save_config_callback=None)
    assert type(cli.trainer.callbacks[0]).__name__ == "AdapterInjection"
    (keeps,) = cli.trainer.checkpoint_callbacks  # nothing is measured that would select
    assert (keeps.filename, keeps.monitor, keeps._save_on_train_epoch_end) == ("last", None, True)
    report = cli.model.dry_run(cli.config_init["adapter"].injector())
    method, count = ADAPTERS[path.stem.removeprefix("dreambooth_sdxl_")]
    assert type(cli.config_init["adapter"].method).__name__ == method
    assert report.adapter_parameters == report.trainable_parameters == count
    assert report.total_parameters == BASE + count
    assert len(report.matched) == 70 * 2 * 4  # transformer blocks, attentions of each, layers of each
    assert f"Trainable: {count:,} parameters" in path.read_text()


@by_name
def test_what_the_header_says_of_the_settings(path):
    config = yaml.safe_load(path.read_text())
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert config["adapter"]["method"]["init_args"] == {"rank": 4, "alpha": 4}
    assert (model["lr"], model["lr_schedule"], trainer["max_steps"]) == (1e-4, "constant", 500)
    assert data["resolution"] == 1024
    assert data["batch_size"] * trainer["accumulate_grad_batches"] == 4
    # Five photographs: no accumulation ends early with the epoch, and validation falls on a whole step.
    assert 5 * data["repeats"] % trainer["accumulate_grad_batches"] == 0
    assert trainer["val_check_interval"] % trainer["accumulate_grad_batches"] == 0


def test_the_three_differ_in_their_method_only():
    def rest(path):
        config = yaml.safe_load(path.read_text())
        del config["adapter"]["method"]
        return config

    assert len(PATHS) == 3
    assert rest(PATHS[0]) == rest(PATHS[1]) == rest(PATHS[2])


@by_name
def test_every_command_of_the_header_names_this_config(path):
    named = re.findall(r"python cli.py \w+ --config (\S+)", path.read_text())
    assert len(named) == 3
    assert set(named) == {path.relative_to(ROOT).as_posix()}
