import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from pera_lightning import __version__, inject, merge
from pera_lightning.adapters import PERA, AuroRA
from pera_lightning.adapters.aurora import static_inference
from pera_lightning.training import results


def test_versions_name_what_is_installed():
    found = results.versions()
    assert found["pera_lightning"] == __version__
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "lightning", "timm", "torchmetrics"} <= set(found)
    assert all(isinstance(value, str) for value in found.values())


def test_peak_memory_is_in_bytes():
    peak = results.peak_memory()
    assert 50e6 < peak["host"] < 100e9
    assert ("cuda" in peak) == torch.cuda.is_available()


def test_what_was_injected_is_collected(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    model = nn.ModuleDict({"inner": nn.ModuleDict({"body": nn.Linear(6, 6), "head": nn.Linear(6, 2)})})
    report = inject(model["inner"], PERA(rank=2), ["body"], ["head"])
    result = results.collect(model, {"test/accuracy": 0.5}, n=10)
    assert result["method"] == PERA(rank=2).spec()
    assert (result["targets"], result["trainable"]) == (["body"], ["head"])
    assert result["trainable_parameters"] == report.trainable_parameters == 2 * 6 * 2 + 3 + 14
    assert result["total_parameters"] == report.total_parameters
    assert (result["n"], result["seed"], result["metrics"]) == (10, 7, {"test/accuracy": 0.5})


def test_without_injection_and_seed(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    result = results.collect(nn.Linear(2, 2), {})
    assert (result["method"], result["seed"]) == (None, None)
    assert "trainable_parameters" not in result


def test_written_whole_or_not_at_all(tmp_path):
    path = results.write(tmp_path / "new", {"n": 1})
    assert json.loads(path.read_text()) == {"n": 1}
    with pytest.raises(TypeError):
        results.write(tmp_path / "new", {"n": torch.ones(1)})
    assert json.loads(path.read_text()) == {"n": 1}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_merged_aurora_is_one_row_by_the_name_of_its_merge():
    """Not the paper's rows: what acts is in the weight."""
    network = torch.nn.Sequential(torch.nn.Linear(6, 6))
    inject(network, AuroRA(rank=2), ["0"])
    network.eval()
    assert list(results.inference_stages(network)) == ["test", "test_static"]
    merge(network, mode="calibrated", batches=[torch.randn(40, 6)])
    assert results.inference_stages(network) == {"test": "merged: calibrated"}
    with static_inference(network) as dynamic:
        assert dynamic == 0


def saved(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def names(folder, *tested, kept=("best", "last"), **known):
    """The names under which a run keeps the results of these checkpoints."""
    keepers = [ModelCheckpoint(folder / "checkpoints", filename=name) for name in kept]
    trainer = {
        "callbacks": [SimpleNamespace(**{"untrained": False, "best_checkpoint": "", **known})],
        "checkpoint_callback": next(iter(keepers), None),
        "checkpoint_callbacks": keepers,
        "default_root_dir": folder,
    }
    return [results.output_name(SimpleNamespace(**trainer, ckpt_path=one), folder, "results.json") for one in tested]


def test_no_result_is_written_over_another_s(tmp_path):
    own, other = tmp_path / "run" / "checkpoints", tmp_path / "run.earlier" / "checkpoints"
    saved(own / "best.ckpt", own / "last.ckpt", own / "epoch=1.5.ckpt", other / "best.ckpt", other / "last.ckpt")
    mine = names(tmp_path / "run", *(own / f"{name}.ckpt" for name in ("best", "last", "epoch=1.5")))
    assert mine == ["results.json", "results-last.json", "results-epoch=1.5.json"]
    theirs = names(tmp_path / "run", other / "best.ckpt", other / "last.ckpt")
    none = names(tmp_path / "run", None, untrained=True)
    assert none == ["results-none.json"]
    assert len({*mine, *theirs, *none}) == 6
    assert all(name.startswith("results-") for name in theirs)
    # Weights in memory; the best one of the process that trained, by whatever name.
    named = own / "epoch=1.5.ckpt"
    assert names(tmp_path / "run", None, named, best_checkpoint=str(named)) == ["results.json"] * 2


def test_the_usual_checkpoint_of_a_run_that_keeps_the_last_only(tmp_path):
    last = tmp_path / "checkpoints" / "last.ckpt"
    saved(last)
    assert names(tmp_path, last, kept=("last",)) == ["results.json"]
    # A folder of evaluations alone.
    assert names(tmp_path / "elsewhere", last, tmp_path / "best.ckpt", kept=()) == ["results-last.json", "results.json"]
