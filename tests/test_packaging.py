"""The wheel, installed outside the checkout; the shipped asset; one version."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
import torch

import pera_lightning
from tests.run_helpers import QUICK, ROOT

ASSET = ROOT / "pera_lightning" / "assets" / "vit_digits"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version():
    assert PROJECT["version"] == pera_lightning.__version__
    assert pera_lightning.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_console_script_exists():
    module, _, function = PROJECT["scripts"]["pera"].partition(":")
    from pera_lightning.cli import main

    assert (module, function) == (main.__name__, main.main.__name__)


def test_the_asset_is_small():
    assert sum(file.stat().st_size for file in ASSET.rglob("*")) < 2_000_000


def make_vit_digits():
    spec = importlib.util.spec_from_file_location("make_vit_digits", ROOT / "scripts" / "make_vit_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_asset_is_what_the_script_makes():
    """Its shape, preprocessing and labels; and it tells apart the digits that it was trained on."""
    import timm

    script = make_vit_digits()
    network = timm.create_model(f"local-dir:{ASSET}", pretrained=True)
    built = script.build(num_classes=5)
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in built.state_dict().items()}
    config = timm.data.resolve_model_data_config(network)
    assert tuple(config["input_size"]) == (3, script.IMAGE_SIZE, script.IMAGE_SIZE)
    assert (tuple(config["mean"]), tuple(config["std"]), config["crop_pct"]) == (script.MEAN, script.STD, 1.0)
    assert json.loads((ASSET / "config.json").read_text())["label_names"] == ["0", "1", "2", "3", "4"]
    torch.manual_seed(0)
    assert script.accuracy(network, *script.digits_as_images(script.PRETRAINING_DIGITS)) > 0.99


# ---- the wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    if importlib.util.find_spec("hatchling"):
        command.insert(-1, "--no-isolation")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_what_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"pera_lightning/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "configs").rglob("*.yaml")}
    code = {p.relative_to(ROOT).as_posix() for p in (ROOT / "pera_lightning").rglob("*.py")}
    assert configs | code <= names
    assert {
        "pera_lightning/assets/vit_digits/config.json",
        "pera_lightning/assets/vit_digits/model.safetensors",
    } <= names
    outside = {name for name in names if not name.startswith("pera_lightning/")}
    assert all(re.match(r"pera_lightning-[\d.]+\.dist-info/", name) for name in outside)
    assert any(name.endswith("licenses/LICENSE") for name in outside)
    assert not [name for name in names if "__pycache__" in name or "runs/" in name]


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(wheel, tmp_path):
    target, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def pera(*words):
        start = [sys.executable, str(target / "bin" / "pera")]
        done = subprocess.run([*start, *words], cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    where = subprocess.run(
        [sys.executable, "-c", "import pera_lightning; print(pera_lightning.__file__)"],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(target))
    options = [word for key, value in QUICK.items() for word in (f"--{key}", str(value))]
    printed = pera("fit", "--config", "configs/quickstart.yaml", *options)
    assert "Injected AuroRA" in printed
    assert "trainable 11,669" in printed
    assert (work / "runs" / "quickstart" / "checkpoints" / "best.ckpt").is_file()
    assert sorted(p.name for p in work.iterdir()) == ["runs"]
