"""The command line in process: what works, and what wins."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pera_lightning import __version__
from pera_lightning.adapters import registry
from tests.run_helpers import QUICKSTART, ROOT, quick_words, run_pera


def options(*words, code=0):
    """The config that fit would run with, from ``--print_config``."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run_pera("fit", "--config", QUICKSTART, *words, "--print_config") == code
    return yaml.safe_load(printed.getvalue())


# ---- before anything is imported ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], ["fitt"], ["fit", "--config", "no.yaml"]])
def test_the_quick_answers_import_nothing_heavy(words):
    code = (
        "import sys\nfrom pera_lightning.cli.main import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "print('heavy:', sorted({'torch', 'lightning', 'timm', 'jsonargparse', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.slow
def test_importing_the_commands_imports_no_other_task():
    """timm and diffusers are imported when a network is built, not to parse a command line."""
    code = (
        "import sys\nimport pera_lightning.cli.lightning_cli\n"
        "print(sorted({'timm', 'diffusers', 'peft', 'datasets', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command(pera):
    result = pera("--help")
    assert result.code == 0
    for command in ("fit", "validate", "test", "predict", "params"):
        assert f"  {command} " in result.out


def test_no_command_is_an_error_with_the_help(pera):
    result = pera()
    assert (result.code, result.out) == (2, pera("--help").out)


def test_version(pera):
    assert pera("--version").out.strip() == __version__


def test_help_of_a_command_lists_its_options(pera):
    result = pera("fit", "--help")
    assert result.code == 0
    for option in ("--adapter.targets", "--adapter.method", "--trainer.max_epochs", "--ckpt_path"):
        assert option in result.out
    assert "--optimizer" not in result.out


# ---- configs --------------------------------------------------------------------------------------------------------


def test_a_config_of_the_package_is_found_from_anywhere(pera, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("configs/quickstart.yaml", "quickstart.yaml"):
        assert pera("params", "--config", name).code == 0
        assert pera("params", f"--config={name}").code == 0
    assert pera("params", "-c", "quickstart.yaml").code == 0


def test_an_own_config_comes_before_the_package_s(pera, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    changed = yaml.safe_load(Path(QUICKSTART).read_text())
    changed["adapter"]["method"]["init_args"]["rank"] = 3
    (tmp_path / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(changed))
    monkeypatch.chdir(tmp_path)
    assert "AuroRA(rank=3," in pera("params", "--config", "configs/quickstart.yaml").out


def test_later_configs_win(pera, tmp_path):
    (tmp_path / "more.yaml").write_text("adapter:\n  method: {class_path: PERA, init_args: {rank: 5}}\n")
    assert "PERA(rank=5," in pera("params", "--config", QUICKSTART, "--config", tmp_path / "more.yaml").out


# ---- one flag changes the method ------------------------------------------------------------------------------------


def test_another_method_keeps_what_it_shares():
    method = options("--adapter.method", "PERA", "--adapter.method.rank", "3")["adapter"]["method"]
    assert method["class_path"] == "pera_lightning.adapters.PERA"
    assert method["init_args"]["rank"] == 3
    assert method["init_args"]["alpha"] == 16
    assert "activation" not in method["init_args"]
    method = options("--adapter.method", "LoRA")["adapter"]["method"]
    assert method["init_args"]["rank"] == 8


@pytest.mark.parametrize("name", list(registry.registered_methods()))
def test_params_works_with_every_method(pera, name):
    result = pera("params", "--config", QUICKSTART, "--adapter.method", name)
    assert result.code == 0, result.err
    assert f"Injected {name}(" in result.out


OTHER_PACKAGE = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F
from pera_lightning.adapters import LinearAdapter, LinearMethod


class DiagonalLayer(LinearAdapter):
    def __init__(self, *, in_features, out_features, gain):
        super().__init__(in_features=in_features, out_features=out_features, scale=gain, dropout=0.0)
        self.d = nn.Parameter(torch.zeros(out_features, 1))

    def reset_parameters(self, generator=None):
        nn.init.zeros_(self.d)

    def delta_output(self, x):
        return self.scale * x.sum(-1, keepdim=True) * self.d.T.to(x.dtype)

    def delta_weight(self, weight):
        return self.scale * self.d.expand(-1, self.in_features)


@dataclass(frozen=True, kw_only=True)
class Diagonal(LinearMethod):
    gain: float = 1.0

    def build(self, context):
        return DiagonalLayer(in_features=context.in_features, out_features=context.out_features, gain=self.gain)
"""


def test_a_method_of_another_package(quick, tmp_path, monkeypatch):
    """By its dotted path, without being registered."""
    name = "other_package"
    (tmp_path / f"{name}.py").write_text(OTHER_PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    method = ["--adapter.method", f"{name}.Diagonal", "--adapter.method.gain", "0.5"]
    result = quick(*method)
    assert result.code == 0, result.err
    assert "Injected Diagonal(gain=0.5)" in result.out
    checkpoint = tmp_path / "quickstart" / "checkpoints" / "best.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state["model.blocks.0.attn.qkv.adapters.q.d"].abs().max() > 0
    assert quick(*method, "--ckpt_path", checkpoint, command="test").code == 0
    results = json.loads((tmp_path / "quickstart" / "results.json").read_text())
    assert results["method"] == {"class_path": f"{name}.Diagonal", "init_args": {"gain": 0.5}}


# ---- fit, test, predict, again --------------------------------------------------------------------------------------


def test_what_a_fit_leaves(fitted):
    names = {p.relative_to(fitted.run).as_posix() for p in fitted.run.rglob("*") if p.is_file()}
    events = {name for name in names if name.startswith("events.out")}
    assert names - events == {
        "config.yaml",
        "hparams.yaml",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "adapter/adapter.safetensors",
        "adapter/adapter_config.json",
        "splits/digits.json",
    }
    assert len(events) == 1
    assert fitted.checkpoint.stat().st_size < 500_000  # the base alone has 850 kB


def test_fit_says_what_was_injected_and_where_things_are(quick, tmp_path):
    result = quick()
    run = tmp_path / "quickstart"
    assert "Injected AuroRA(rank=8, alpha=16.0" in result.out
    assert "trainable 11,669 (adapters 11,264, other 405) of 222,629: 5.2415 %" in result.out
    assert f"Adapter of the best checkpoint: {run / 'adapter'}" in result.out
    assert f"Logs and checkpoints: {run}" in result.out


def test_the_same_commands_twice_in_one_folder(quick, tmp_path):
    run = tmp_path / "quickstart"
    kept = []
    for _ in range(2):
        assert quick().code == 0
        assert quick("--ckpt_path", run / "checkpoints" / "best.ckpt", command="test").code == 0
        state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        kept.append((state, json.loads((run / "results.json").read_text())["metrics"]))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    for name, value in kept[0][0].items():
        assert torch.equal(value, kept[1][0][name]), name
    assert kept[0][1] == kept[1][1]


def test_the_seed_changes_the_run(quick, fitted, tmp_path):
    assert quick("--seed_everything", 1).code == 0
    one = torch.load(fitted.checkpoint, weights_only=True)["state_dict"]
    other = torch.load(tmp_path / "quickstart" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    name = "model.blocks.0.attn.qkv.adapters.q.A"
    assert not torch.equal(one[name], other[name])


def test_test_then_predict(quick, fitted, tmp_path):
    """The folder of the run is the command line's, the weights are the checkpoint's."""
    result = quick("--ckpt_path", fitted.checkpoint, command="test")
    assert result.code == 0, result.err
    for metric in ("test/accuracy", "test/loss", "test_static/accuracy", "test_static/loss"):
        assert metric in result.out
    results = json.loads((tmp_path / "quickstart" / "results.json").read_text())
    assert results["n"] == 179
    assert results["seed"] == 0
    assert results["protocol"]["checkpoint"] == str(fitted.checkpoint)
    data = results["protocol"]["data"]
    assert (data["dataset"], data["transform"], data["split_seed"]) == ("digits", "none", 0)
    assert data["preprocessing"]["size"] == [8, 8]
    assert {p.name for p in (tmp_path / "quickstart").glob("*.yaml")} >= {"config_test.yaml"}
    assert not (tmp_path / "quickstart" / "config.yaml").exists()  # that is the fit's
    result = quick("--ckpt_path", fitted.checkpoint, command="predict")
    table = tmp_path / "quickstart" / "predictions" / "predictions.csv"
    assert f"Predictions of 179 examples: {table}" in result.out
    assert len(table.read_text().splitlines()) == 180


def test_validate_with_a_checkpoint(quick, fitted):
    result = quick("--ckpt_path", fitted.checkpoint, command="validate")
    assert result.code == 0
    assert "val/accuracy" in result.out


def test_fit_goes_on_from_a_checkpoint(quick, fitted, tmp_path):
    assert quick("--ckpt_path", fitted.checkpoint, "--trainer.max_epochs", 2).code == 0
    last = torch.load(tmp_path / "quickstart" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4


def test_the_last_checkpoint_is_the_last_also_where_nothing_improves(quick, tmp_path):
    rates = ("--model.lr", 1e-30, "--model.head_lr", 1e-30)
    assert quick(*rates, "--trainer.max_epochs", 3).code == 0
    steps = {
        name: torch.load(tmp_path / "quickstart" / "checkpoints" / f"{name}.ckpt", weights_only=True)["global_step"]
        for name in ("best", "last")
    }
    assert steps == {"best": 2, "last": 6}


def test_print_config_can_be_fed_back(pera, tmp_path):
    words = [*quick_words(tmp_path)[1:], "--adapter.method", "PERA", "--adapter.method.rank", "8"]
    first = pera("fit", *words, "--print_config")
    assert first.code == 0
    (tmp_path / "all.yaml").write_text(first.out)
    assert pera("fit", "--config", tmp_path / "all.yaml", "--print_config").out == first.out
    assert pera("fit", "--config", tmp_path / "all.yaml").code == 0
    # So can what the run has saved.
    saved = tmp_path / "quickstart" / "config.yaml"
    again = pera("fit", "--config", saved, "--print_config")
    config, printed = yaml.safe_load(again.out), yaml.safe_load(first.out)
    for key in ("callbacks", "default_root_dir"):  # a run adds what all runs share
        assert config["trainer"].pop(key)
        assert printed["trainer"].pop(key) is None
    assert config == printed


# ---- what is given on the command line wins -------------------------------------------------------------------------


def test_the_command_line_wins_over_the_checkpoint(quick, fitted, tmp_path):
    """Lightning would put the checkpoint's hyperparameters over what is given here."""
    given = {"adapter.method.inference_mode": "static", "data.eval_batch_size": 7, "model.lr": 0.5}
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    result = quick("--ckpt_path", fitted.checkpoint, *words, command="test")
    assert result.code == 0, result.err
    assert "test_static" not in result.out  # static is what is set
    results = json.loads((tmp_path / "quickstart" / "results.json").read_text())
    assert results["method"]["init_args"]["inference_mode"] == "static"
    saved = yaml.safe_load((tmp_path / "quickstart" / "config_test.yaml").read_text())
    assert saved["data"]["init_args"]["eval_batch_size"] == 7
    assert saved["model"]["init_args"]["lr"] == 0.5


def test_a_learning_rate_given_at_resume_is_in_the_new_checkpoint(quick, fitted, tmp_path):
    words = ["--ckpt_path", fitted.checkpoint, "--trainer.max_epochs", 2, "--model.label_smoothing", 0.3]
    assert quick(*words).code == 0
    last = torch.load(tmp_path / "quickstart" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["hyper_parameters"]["label_smoothing"] == 0.3
    assert last["hyper_parameters"]["num_classes"] == 5


# ---- the trainer's callbacks ----------------------------------------------------------------------------------------


def configured(*words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pera"])  # Lightning warns where both are given
    from pera_lightning.cli.lightning_cli import PeraCLI

    return PeraCLI(args=["--config", QUICKSTART, *words], run=False, save_config_callback=None)


def test_the_adapter_comes_before_the_config_s_callbacks(monkeypatch):
    from pera_lightning import AdapterInjection

    cli = configured(monkeypatch=monkeypatch)
    assert isinstance(cli.trainer.callbacks[0], AdapterInjection)
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert names.count("AdapterInjection") == 1
    assert {"ModelCheckpoint", "LearningRateMonitor"} <= set(names)


@pytest.mark.parametrize("callbacks", ["null", '{"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging"}'])
def test_the_adapter_comes_first_without_a_list_too(callbacks, monkeypatch):
    cli = configured("--trainer.callbacks", callbacks, monkeypatch=monkeypatch)
    assert type(cli.trainer.callbacks[0]).__name__ == "AdapterInjection"
    assert ("EMAWeightAveraging" in [type(c).__name__ for c in cli.trainer.callbacks]) == (callbacks != "null")


def test_a_callback_that_copies_the_model_copies_the_adapters(quick, tmp_path):
    """Weight averaging copies the module at its setup: after the injection, or it would average the base."""
    callback = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}
    result = quick("--trainer.callbacks", json.dumps([callback]))
    assert result.code == 0, result.err


# ---- params ---------------------------------------------------------------------------------------------------------


def test_params_reads_neither_weights_nor_data(pera, monkeypatch):
    import datasets
    import timm

    def refuse(*args, **kwargs):
        raise AssertionError("params asked for data")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    create, asked = timm.create_model, []

    def spy(name, pretrained=False, **keywords):
        asked.append(pretrained)
        return create(name, pretrained=pretrained, **keywords)

    monkeypatch.setattr(timm, "create_model", spy)
    result = pera("params", "--config", str(ROOT / "configs" / "vit_dtd_aurora.yaml"))
    assert result.code == 0, result.err
    assert asked == [False]
    assert "blocks.*.attn.qkv  12 x  2304 x 768  slices q, v" in result.out
    # 47 classes, from the catalogue: a head of 47 * 769.
    assert "trainable 110,351 (adapters 74,208, other 36,143) of 85,909,007" in result.out


def test_params_takes_the_number_of_classes_that_is_given(pera):
    result = pera("params", "--config", QUICKSTART, "--model.num_classes", 3)
    assert "other 243)" in result.out  # 3 * 81


def test_params_leaves_no_file(pera, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pera("params", "--config", QUICKSTART).code == 0
    assert list(tmp_path.iterdir()) == []
