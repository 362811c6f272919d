"""Checkpoints, adapter folders and configs of an earlier version load, test and export with the same numbers."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

SAVED = Path(__file__).parent / "saved_runs"
RUNS = [path.name for path in sorted((SAVED / "trained").iterdir())]
# float32's eps is 1.2e-7; sums of a few dozen products a layer, through a few layers, may differ by some hundred eps.
ROUNDING = 1e-5


@pytest.fixture(params=RUNS)
def run(request, tmp_path, monkeypatch):
    """The folder of a saved run, in a copy that commands may write into; the working folder is that of the run."""
    base = shutil.copytree(SAVED, tmp_path / "saved")
    (base / "trained").rename(base / "runs")
    monkeypatch.chdir(base)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return Path("runs", request.param)


def test_a_checkpoint_tests_as_before(run, pera):
    before, scores = json.loads((run / "results.json").read_text()), option_scores(run)
    shutil.rmtree(run / "predictions", ignore_errors=True)
    (run / "results.json").unlink()
    done = pera("test", "--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "best.ckpt")
    assert done.code == 0, done.err
    now = json.loads((run / "results.json").read_text())
    assert now["metrics"] == pytest.approx(before["metrics"], rel=ROUNDING)
    assert option_scores(run) == {key: pytest.approx(value, rel=ROUNDING) for key, value in scores.items()}
    for key in ("method", "targets", "trainable_parameters", "total_parameters"):
        assert now[key] == before[key]


def option_scores(run):
    """What each answer of the language run scored; empty for other runs."""
    files = sorted(run.glob("predictions/score/*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {line["id"]: line["scores"] for line in lines}


def test_an_adapter_folder_exports_as_before(run, pera):
    mode = ["--method", "static"] if run.name == "quickstart_AuroRA" else []
    done = pera("export", "--ckpt_path", run / "adapter", "--format", "merged", *mode, "--output", "merged")
    assert done.code == 0, done.err
    now = {
        name: tensor.double().square().sum().item() for name, tensor in load_file("merged/model.safetensors").items()
    }
    assert now == pytest.approx(json.loads((run / "merged.json").read_text()), rel=ROUNDING)
